"""Output errors: how far a head's outputs move where it reuses rows, and where it has its mask."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from calibatt.kernels.geometry import Geometry
from calibatt.kernels.mask import BlockMask
from calibatt.methods.calibatt.repetition import copied_tokens
from calibatt.methods.energy import CHUNK, products


def output_errors(
    q: Float[Tensor, "heads tokens head_dim"],
    k: Float[Tensor, "heads tokens head_dim"],
    v: Float[Tensor, "heads tokens head_dim"],
    geometry: Geometry,
    anchors: Sequence[int],
    mask: BlockMask,
) -> tuple[Float[Tensor, "heads"], Float[Tensor, "heads"]]:
    """How far outputs move from dense attention's, in the currency of Budget's importance.

    Squared, mean over the queries of the video, and relative to the mean squared output of all heads there. Anchor rows
    count, with no error of reuse; text queries do not, since all of their keys are always computed. In fp32, some
    queries of one head at a time.

    Args:
        q, k, v: what attention sees.
        geometry: layout of the tokens.
        anchors: ascending row indices within a frame.
        mask: of every head; no query of the video is without keys.

    Returns:
        Of each head, the error of reusing rows as `RowReuse.of_anchor_rows` does, and that of its mask.
    """
    heads, tokens, channels = q.shape
    first = geometry.video_start
    copied = copied_tokens(geometry, anchors).to(q.device)
    queries = torch.arange(first, first + geometry.video_tokens, device=q.device)
    out = q.new_empty(geometry.video_tokens, channels, dtype=torch.float32)
    reused, masked, squares = out.new_zeros(3, heads)
    for head in range(heads):
        values = v[head].float()
        for some in queries.split(max(1, CHUNK // tokens)):
            scores = products(q[head, some], k[head]).mul_(channels**-0.5)
            own = scores.softmax(-1) @ values
            # weighed anew, not by weights that are left: those of a query that has lost its largest could all be zero
            left = scores.masked_fill_(~mask.seen(head, some), -torch.inf).softmax(-1) @ values
            masked[head] += (left - own).square().sum()
            out[some - first] = own
        reused[head] = (out[copied] - out).square().sum()
        squares[head] = out.square().sum()
    mean = squares.mean().clamp(min=torch.finfo(torch.float32).tiny)
    return reused / mean, masked / mean
