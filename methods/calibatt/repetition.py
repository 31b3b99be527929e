"""Spatial repetition: whether a head attends from every row of a frame as it does from a few anchor rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from calibatt.kernels.geometry import Geometry
from calibatt.kernels.plan import RowReuse
from calibatt.methods.energy import CHUNK, exponentials


def row_similarity(
    q: Float[Tensor, "heads tokens head_dim"],
    k: Float[Tensor, "heads tokens head_dim"],
    geometry: Geometry,
    anchors: Sequence[int],
) -> Float[Tensor, "heads"]:
    """How alike a head attends from all rows of a frame: 1 is the same, the median row decides.

    Repetition gives a token the output of the token in the nearest anchor row, at the same frame and column. So these
    two are compared: the cosine similarity of their attention distributions over all keys. (The mean attention of a
    whole row would also be alike where only the order within the rows differs, and copying would be wrong there.) A
    row's similarity is the mean over its columns; the result is the median over the rows of all frames, without the
    anchor rows. Which row is nearest is `RowReuse.of_anchor_rows`'s to say; text tokens are keys only.

    Computed in fp32, some columns of one frame and head at a time.

    Args:
        q, k: what attention sees.
        geometry: layout of the tokens.
        anchors: ascending row indices within a frame.
    """
    frames, rows, columns = geometry.grid
    reuse = RowReuse.of_anchor_rows(geometry, anchors)
    first = geometry.video_start
    # the source of each row, read off the first column of the first frame
    sources = (reuse.computed[reuse.source][first : first + geometry.frame_tokens : columns] - first) // columns
    anchor = torch.tensor(anchors, device=q.device)
    nearest = torch.searchsorted(anchor, sources.to(q.device))
    others = torch.tensor([row for row in range(rows) if row not in anchors], device=q.device)

    video = q[:, first : first + geometry.video_tokens].view(geometry.heads, frames, rows, columns, -1)
    at_once = max(1, CHUNK // (rows * geometry.tokens))
    similarity = q.new_zeros(geometry.heads, frames, rows, dtype=torch.float32)
    for head in range(geometry.heads):
        for frame in range(frames):
            for column in range(0, columns, at_once):
                queries = video[head, frame, :, column : column + at_once].transpose(0, 1)
                weights = exponentials(queries.flatten(0, 1), k[head]).view(-1, rows, geometry.tokens)
                similarity[head, frame] += _cosine(weights, anchor, nearest).sum(0)
    return (similarity[:, :, others] / columns).flatten(1).quantile(0.5, dim=-1)


def _cosine(weights: Tensor, anchor: Tensor, nearest: Tensor) -> Float[Tensor, "columns rows"]:
    """Cosine of each row's weights [columns, rows, tokens] with those of its anchor row, column by column."""
    dots = weights @ weights[:, anchor].transpose(1, 2)
    dots = dots.take_along_dim(nearest[None, :, None], dim=2).squeeze(2)
    norms = torch.linalg.vector_norm(weights, dim=-1)
    cosine: Tensor = dots / (norms * norms[:, anchor[nearest]])
    return cosine
