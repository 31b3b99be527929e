"""Spatial repetition: whether a head attends from every row of a frame as it does from a few anchor rows."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from calibatt.kernels import estimates
from calibatt.kernels.geometry import Geometry
from calibatt.kernels.mask import block_count
from calibatt.kernels.plan import RowReuse
from calibatt.methods.blocks import strided_columns, video_queries
from calibatt.methods.energy import CHUNK, block_mass, exponentials, mean_mass


def energy_and_similarity(
    q: Float[Tensor, "heads tokens head_dim"],
    k: Float[Tensor, "heads tokens head_dim"],
    geometry: Geometry,
    anchors: Sequence[int],
    *,
    block: tuple[int, int],
    query_stride: int = 1,
) -> tuple[Float[Tensor, "heads q_blocks k_blocks"], Float[Tensor, "heads"]]:
    """Block energy of the video's queries, and how alike a head attends from all rows of a frame.

    Half precision on a GPU computes each score once for both, by a kernel of its own (`takes`, `takes_mass`); else
    plain torch computes one after the other, in fp32.

    Args:
        q, k: what attention sees.
        geometry: layout of the tokens.
        anchors: ascending row indices within a frame.
        block: tokens of a query and of a key block.
        query_stride: look at the queries of one in so many columns (`strided_columns`).

    Returns:
        As `block_energy`, of these queries; and as `row_similarity`.
    """
    places = video_queries(geometry, query_stride, q.device)
    if estimates.takes(q) and estimates.takes_mass(q, block[1]):
        mass, cosine = estimates.block_mass_and_cosines(
            _looked_at(q, geometry, query_stride).flatten(1, 3), k, grid=_grid(geometry, query_stride),
            nearest_anchor=_nearest_anchor(geometry, tuple(anchors)), block=block, places=places,
        )  # fmt: skip
        similarity = _median_row(cosine, geometry, anchors, query_stride)
    else:
        mass, _ = block_mass(q[:, places], k, block=block, places=places)
        similarity = row_similarity(q, k, geometry, anchors, query_stride=query_stride)
    return mean_mass(mass, geometry.tokens, block[0], places), similarity


def row_similarity(
    q: Float[Tensor, "heads tokens head_dim"],
    k: Float[Tensor, "heads tokens head_dim"],
    geometry: Geometry,
    anchors: Sequence[int],
    *,
    query_stride: int = 1,
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
        query_stride: the mean is over one in so many columns.
    """
    cosine = _by_columns(_looked_at(q, geometry, query_stride), k, geometry, anchors)
    return _median_row(cosine, geometry, anchors, query_stride)


def copied_tokens(geometry: Geometry, anchors: Sequence[int]) -> Int[Tensor, "video_tokens"]:
    """Of each token of the video the one that it would be a copy of, both counted from the video's first.

    Args:
        geometry: layout of the tokens.
        anchors: ascending row indices within a frame.
    """
    reuse = RowReuse.of_anchor_rows(geometry, anchors)
    first = geometry.video_start
    return reuse.computed[reuse.source][first : first + geometry.video_tokens] - first


def _grid(geometry: Geometry, query_stride: int) -> tuple[int, int, int]:
    """Frames, rows and columns of the queries that are looked at."""
    frames, rows, columns = geometry.grid
    return frames, rows, block_count(columns, query_stride)


def _looked_at(
    q: Float[Tensor, "heads tokens head_dim"], geometry: Geometry, query_stride: int
) -> Float[Tensor, "heads frames rows columns head_dim"]:
    video: Tensor = q[:, geometry.video_start : geometry.video_start + geometry.video_tokens]
    video = video.unflatten(1, geometry.grid)
    # without a copy where all are
    return video if query_stride == 1 else video[:, :, :, strided_columns(geometry, query_stride, q.device)]


@functools.lru_cache(maxsize=16)
def _nearest_anchor(geometry: Geometry, anchors: tuple[int, ...]) -> list[int]:
    """Of each row of a frame, read off the first column of the first frame; kept, since that is of all tokens."""
    columns = geometry.grid[2]
    rows: list[int] = (copied_tokens(geometry, anchors)[: geometry.frame_tokens : columns] // columns).tolist()
    return rows


def _median_row(
    cosine: Float[Tensor, "heads ..."], geometry: Geometry, anchors: Sequence[int], query_stride: int
) -> Float[Tensor, "heads"]:
    rows = cosine.view(-1, *_grid(geometry, query_stride)).mean(-1)
    others: Tensor = rows[:, :, _others(geometry.grid[1], tuple(anchors), cosine.device)]
    return others.flatten(1).quantile(0.5, dim=-1)


@functools.lru_cache(maxsize=16)
def _others(rows: int, anchors: tuple[int, ...], device: torch.device) -> Int[Tensor, "others"]:
    """The rows that are no anchors; kept, since to send them is to wait for the device."""
    return torch.tensor([row for row in range(rows) if row not in anchors], device=device)


def _by_columns(
    video: Float[Tensor, "heads frames rows columns head_dim"],
    k: Float[Tensor, "heads tokens head_dim"],
    geometry: Geometry,
    anchors: Sequence[int],
) -> Float[Tensor, "heads frames rows columns"]:
    """Cosine of each video token's weights with those of the token that it would be a copy of."""
    heads, frames, rows, columns, _ = video.shape
    anchor = torch.tensor(anchors, device=k.device)
    nearest = torch.searchsorted(anchor, torch.tensor(_nearest_anchor(geometry, tuple(anchors)), device=k.device))
    at_once = max(1, CHUNK // (rows * geometry.tokens))
    cosine = video.new_empty(heads, frames, rows, columns, dtype=torch.float32)
    for head in range(heads):
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
