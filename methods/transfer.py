"""What was learnt of blocks on one grid of tokens, for another grid: each block takes what half of its places have.

A token is a box of the video, from edge to edge of it along each axis, whatever the grid. So a block stands for boxes,
and where it lies on the grid that was learnt on follows from how they overlap. A pair of a query and a key block takes
the largest value that pairs of blocks with at least half of its volume have: for masks, a block is kept where at least
half of it was. Text has no place in the video: what was learnt of blocks with text is that they are always kept.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from jaxtyping import Int, UInt8
from torch import Tensor
from torch.nn.functional import pad

from calibatt.kernels.geometry import Geometry
from calibatt.methods.blocks import video_blocks, video_part, video_table

# A block is kept where one part in so many of its volume was. By halves density stays within 4 % of what it was (on the
# embedded model, 16 to 8 and to 21 frames); any part at all adds a fifth or more, and no more to PSNR than so much
# density does anyway (docs/methods/calibatt.md).
_HALF = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Blocks:
    """A sequence in blocks.

    Args:
        geometry: layout of the tokens.
        block: tokens of a query and of a key block.
    """

    geometry: Geometry
    block: tuple[int, int]


def transferred_table(
    table: UInt8[Tensor, "heads q_blocks k_blocks"], source: Blocks, to: Blocks, *, always: int, one_a_row: bool = True
) -> UInt8[Tensor, "heads other_q_blocks other_k_blocks"]:
    """A table as `video_table` makes it, for other blocks.

    Args:
        table: of the source.
        source, to: what is known, and what is wanted.
        always: as for `transferred`; also what stands where nothing is known.
        one_a_row: as for `transferred`.
    """
    part = transferred(video_part(table, source.geometry, source.block), source, to, always=always, one_a_row=one_a_row)
    return video_table(part, to.geometry, to.block, left_over=always)


def transferred(
    values: UInt8[Tensor, "heads rows columns"], source: Blocks, to: Blocks, *, always: int, one_a_row: bool = True
) -> UInt8[Tensor, "heads other_rows other_columns"]:
    """For each block without text, the largest value that at least half of it has.

    Args:
        values: of the source's blocks without text.
        source, to: what is known, and what is wanted.
        always: the value of blocks that are always kept, the largest that there is.
        one_a_row: whether a row without any such block is given it where most of it was, as every row had one: a query
            without keys would give zeros.
    """
    (rows, of_rows), (columns, of_columns) = (_overlaps(source, to, axis) for axis in (0, 1))
    # behind the last block stand those with text
    known = pad(values, (0, 1, 0, 1), value=always)
    pairs = [
        (of_rows[:, row, None] * of_columns[:, column], rows[:, row], columns[:, column])
        for row in range(rows.shape[1])
        for column in range(columns.shape[1])
    ]

    def reaching(least: Tensor | int) -> Int[Tensor, "heads other_rows other_columns"]:
        """The part of each block that has at least so much."""
        none = torch.zeros((), dtype=torch.int64)
        return sum((volume * (known[:, row][..., column] >= least) for volume, row, column in pairs), start=none)

    whole = of_rows.sum(1)[:, None] * of_columns.sum(1)
    found = known.new_zeros(len(known), *whole.shape)
    for digit in reversed(range(always.bit_length())):
        more = found | 1 << digit
        found = torch.where(_HALF * reaching(more) >= whole, more, found)
    lacking = (found < always).all(-1, keepdim=True)
    if one_a_row and bool(lacking.any()):
        volumes = reaching(always)
        found[lacking & (volumes == volumes.amax(-1, keepdim=True))] = always
    return found


@functools.lru_cache(maxsize=4)
def _overlaps(source: Blocks, to: Blocks, axis: int) -> tuple[Int[Tensor, "blocks most"], Int[Tensor, "blocks most"]]:
    """For each block without text, the source's blocks that it overlaps, and by how much; 0 where there are no more.

    Args:
        source, to: as for `transferred`.
        axis: 0 for query blocks, 1 for key blocks.
    """
    own = other = torch.zeros((), dtype=torch.int64)
    volumes = torch.ones((), dtype=torch.int64)
    for extent, to_extent in zip(source.geometry.grid, to.geometry.grid, strict=True):
        # edges of both grids, where a whole is as long as both extents multiplied
        edges = torch.cat((torch.arange(extent + 1) * to_extent, torch.arange(to_extent + 1) * extent)).unique()
        own = own[..., None] * extent + edges[:-1] // to_extent
        other = other[..., None] * to_extent + edges[:-1] // extent
        volumes = volumes[..., None] * edges.diff()
    (own, count), (other, to_count) = _numbers(source, axis, own), _numbers(to, axis, other)
    table = torch.zeros(to_count + 1, count + 1, dtype=torch.int64)
    table.index_put_((other.flatten(), own.flatten()), volumes.flatten(), accumulate=True)
    ordered, which = table[:to_count].sort(dim=1, descending=True)
    most = int((ordered > 0).sum(1).amax()) if to_count else 0
    return which[:, :most], ordered[:, :most]


def _numbers(blocks: Blocks, axis: int, tokens: Int[Tensor, "*boxes"]) -> tuple[Int[Tensor, "*boxes"], int]:
    """The block of each token of the video, counted from the first without text, all with text the last; and how many.

    Args:
        blocks: of the sequence.
        axis: as for `_overlaps`.
        tokens: counted from the first of the video.
    """
    size, part = blocks.block[axis], video_blocks(blocks.geometry, blocks.block[axis])
    count = part.stop - part.start
    number = (tokens + blocks.geometry.video_start) // size - part.start
    return torch.where((number >= 0) & (number < count), number, count), count
