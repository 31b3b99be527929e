"""Spatial repetition: whether a head attends from every row of a frame as it does from a few anchor rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from calibatt.kernels import estimates
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

    Computed in fp32: half precision on a GPU by a kernel of its own, else some columns of one frame and head at a time.

    Args:
        q, k: what attention sees.
        geometry: layout of the tokens.
        anchors: ascending row indices within a frame.
    """
    frames, rows, columns = geometry.grid
    video = q[:, geometry.video_start : geometry.video_start + geometry.video_tokens]
    copied = copied_tokens(geometry, anchors).to(q.device)
    if estimates.takes(q):
        cosine = estimates.cosines(video, video[:, copied], k).view(-1, frames, rows, columns)
    else:
        cosine = _by_columns(video, k, geometry, anchors, copied)
    others = torch.tensor([row for row in range(rows) if row not in anchors], device=q.device)
    return cosine.mean(-1)[:, :, others].flatten(1).quantile(0.5, dim=-1)


def copied_tokens(geometry: Geometry, anchors: Sequence[int]) -> Int[Tensor, "video_tokens"]:
    """Of each token of the video the one that it would be a copy of, both counted from the video's first.

    Args:
        geometry: layout of the tokens.
        anchors: ascending row indices within a frame.
    """
    reuse = RowReuse.of_anchor_rows(geometry, anchors)
    first = geometry.video_start
    return reuse.computed[reuse.source][first : first + geometry.video_tokens] - first


def _by_columns(
    q: Float[Tensor, "heads video_tokens head_dim"],
    k: Float[Tensor, "heads tokens head_dim"],
    geometry: Geometry,
    anchors: Sequence[int],
    copied: Int[Tensor, "video_tokens"],
) -> Float[Tensor, "heads frames rows columns"]:
    """Cosine of each video token's weights with those of the token that it would be a copy of."""
    frames, rows, columns = geometry.grid
    anchor = torch.tensor(anchors, device=q.device)
    # of each row, read off the first column of the first frame
    nearest = torch.searchsorted(anchor, copied[: geometry.frame_tokens : columns] // columns)
    video = q.view(geometry.heads, frames, rows, columns, -1)
    at_once = max(1, CHUNK // (rows * geometry.tokens))
    cosine = q.new_empty(geometry.heads, frames, rows, columns, dtype=torch.float32)
    for head in range(geometry.heads):
        for frame in range(frames):
            for column in range(0, columns, at_once):
                some = slice(column, column + at_once)
                queries = video[head, frame, :, some].transpose(0, 1)
                weights = exponentials(queries.flatten(0, 1), k[head]).view(-1, rows, geometry.tokens)
                cosine[head, frame, :, some] = _cosine(weights, anchor, nearest).T
    return cosine


def _cosine(weights: Tensor, anchor: Tensor, nearest: Tensor) -> Float[Tensor, "columns rows"]:
    """Cosine of each row's weights [columns, rows, tokens] with those of its anchor row, column by column."""
    dots = weights @ weights[:, anchor].transpose(1, 2)
    dots = dots.take_along_dim(nearest[None, :, None], dim=2).squeeze(2)
    norms = torch.linalg.vector_norm(weights, dim=-1)
    cosine: Tensor = dots / (norms * norms[:, anchor[nearest]])
    return cosine
