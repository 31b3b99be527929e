"""Blocks on another grid of tokens: worked out by hand, and against sums over all tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from calibatt.kernels.geometry import Geometry
from calibatt.methods.blocks import video_blocks
from calibatt.methods.transfer import Blocks, transferred, transferred_table


def blocks(*grid: int, block: tuple[int, int] = (2, 2), **text: Any) -> Blocks:
    frames, rows, columns = grid
    return Blocks(geometry=Geometry(grid=(frames, rows, columns), heads=1, head_dim=8, **text), block=block)


def masks(*rows: str) -> Tensor:
    return torch.tensor([[[letter == "x" for letter in row] for row in rows]]).to(torch.uint8)


def test_a_block_is_kept_where_at_least_half_of_its_place_was() -> None:
    fine = masks("xx.x", "...x", "x...", "x..x")
    # of four blocks each, two, two, two and one
    assert torch.equal(transferred(fine, blocks(1, 1, 8), blocks(1, 1, 4), always=1), masks("xx", "x."))
    # the same along the other axes
    for source, to in (((1, 8, 1), (1, 4, 1)), ((8, 1, 1), (4, 1, 1))):
        assert torch.equal(transferred(fine, blocks(*source), blocks(*to), always=1), masks("xx", "x."))


def test_a_finer_grid_has_each_block_several_times() -> None:
    coarse = masks("x.", "xx")
    assert torch.equal(
        transferred(coarse, blocks(1, 1, 4), blocks(1, 1, 8), always=1), masks("xx..", "xx..", "xxxx", "xxxx")
    )
    # twice the frames, of one block each: its place is that of the frame that it lies in
    frames = transferred(coarse, blocks(2, 1, 2), blocks(4, 1, 2), always=1)
    assert torch.equal(frames, masks("xx..", "xx..", "xxxx", "xxxx"))


def test_tokens_that_do_not_fit_into_each_other_count_by_what_they_overlap() -> None:
    three, two = blocks(1, 1, 3, block=(1, 1)), blocks(1, 1, 2, block=(1, 1))
    # the first of two is two thirds of it the first of three, one third the second: 4/9 + 1/9, and 2/9 + 2/9
    assert torch.equal(transferred(masks("x..", ".x.", "..x"), three, two, always=1), masks("x.", ".x"))
    assert torch.equal(transferred(masks("xx.", ".x.", "..x"), three, two, always=1), masks("x.", ".x"))
    assert torch.equal(transferred(masks("xx.", "xx.", "..x"), three, two, always=1), masks("x.", ".x"))
    assert torch.equal(transferred(masks("xxx", "xx.", ".xx"), three, two, always=1), masks("xx", "xx"))


def test_a_row_that_would_lose_all_keeps_where_most_of_it_was() -> None:
    lonely = masks("x...", ".x..", ".x..", ".x..")
    # all rows in one: three quarters of the second block were kept, and a quarter of the first
    source, to = blocks(1, 1, 8), blocks(1, 1, 8, block=(8, 1))
    assert torch.equal(transferred(lonely, source, to, always=1), masks("..xx...."))
    coarse = blocks(1, 1, 8, block=(8, 4))
    # three of eight, and one
    sparse = masks("x...", "..x.", "..x.", "...x")
    assert torch.equal(transferred(sparse, source, coarse, always=1), masks(".x"))
    assert torch.equal(transferred(sparse, source, coarse, always=1, one_a_row=False), masks(".."))


def test_the_same_blocks_are_the_same() -> None:
    generator = torch.Generator().manual_seed(0)
    for text in ({}, {"text_tokens": 3}, {"text_tokens": 3, "text_side": "first"}):
        own = blocks(3, 5, 7, block=(4, 3), **text)
        table = torch.randint(0, 256, (2, 27, 35), generator=generator, dtype=torch.uint8)
        table[:, :, 0] = 255
        here = (
            slice(None),
            *(slice(part.stop - part.start) for part in (video_blocks(own.geometry, size) for size in own.block)),
        )
        assert torch.equal(transferred_table(table, own, own, always=255)[here], table[here])


@pytest.mark.parametrize("text_side", ["first", "last"])
@pytest.mark.parametrize("texts", [(0, 0), (3, 3), (5, 2)])
@pytest.mark.parametrize(
    ("grid", "to_grid", "to_block"),
    [((2, 3, 5), (3, 4, 2), (4, 3)), ((3, 4, 5), (2, 3, 3), (2, 5)), ((1, 7, 3), (5, 2, 4), (3, 3))],
)
def test_blocks_of_odd_grids_are_what_all_their_tokens_come_to(
    grid: tuple[int, int, int], to_grid: tuple[int, int, int], to_block: tuple[int, int], texts: tuple[int, int],
    text_side: str,
) -> None:  # fmt: skip
    source = blocks(*grid, block=(4, 3), text_tokens=texts[0], text_side=text_side)
    to = blocks(*to_grid, block=to_block, text_tokens=texts[1], text_side=text_side)
    of_rows, of_columns = (volumes(source, to, axis) for axis in (0, 1))
    generator = torch.Generator().manual_seed(1)
    keep = torch.rand(1, of_rows.shape[1] - 1, of_columns.shape[1] - 1, generator=generator) < 0.5
    keep[..., 0] = True
    # what is behind the last is text, which was always kept
    known = torch.nn.functional.pad(keep.double(), (0, 1, 0, 1), value=1.0)
    shares = of_rows @ known @ of_columns.T / (of_rows.sum(1)[:, None] * of_columns.sum(1))
    found = transferred(keep.to(torch.uint8), source, to, always=1)
    expected = shares >= 0.5 - 1e-9
    lacking = ~expected.any(-1, keepdim=True)
    expected |= lacking & (shares >= shares.amax(-1, keepdim=True) - 1e-9)
    assert torch.equal(found.bool(), expected)
    assert 0 < found.float().mean() < 1


def volumes(source: Blocks, to: Blocks, axis: int) -> Tensor:
    """How much of each block lies in each of the source's, those with text together as the last."""
    shared = torch.ones(1, 1, dtype=torch.float64)
    for extent, to_extent in zip(source.geometry.grid, to.geometry.grid, strict=True):
        low, to_low = torch.arange(extent).double() / extent, torch.arange(to_extent).double() / to_extent
        ends = torch.minimum(low + 1 / extent, (to_low + 1 / to_extent)[:, None])
        shared = torch.kron(shared, (ends - torch.maximum(low, to_low[:, None])).clamp(min=0))
    (own, count), (other, to_count) = numbered(source, axis), numbered(to, axis)
    table = torch.zeros(to_count + 1, count + 1, dtype=torch.float64)
    for number, row in zip(other, shared, strict=True):
        table[number].index_add_(0, torch.tensor(own), row)
    return table[:to_count]


def numbered(cut: Blocks, axis: int) -> tuple[list[int], int]:
    """The block of each token of the video; those with text are the last."""
    geometry, size = cut.geometry, cut.block[axis]
    first = geometry.video_start
    video = range(first, first + geometry.video_tokens)
    pure = [
        number
        for number in range(-(-geometry.tokens // size))
        if all(token in video for token in range(number * size, min(geometry.tokens, (number + 1) * size)))
    ]
    return [pure.index(token // size) if token // size in pure else len(pure) for token in video], len(pure)


def test_levels_are_transferred_as_the_masks_of_each_of_them() -> None:
    source, to = blocks(3, 4, 5, block=(4, 4)), blocks(4, 3, 3, block=(4, 4))
    levels = torch.randint(0, 256, (1, 15, 15), generator=torch.Generator().manual_seed(2), dtype=torch.uint8)
    # enough that is always kept for no row to lack it
    levels[:, :, :10] = 255
    found = transferred(levels, source, to, always=255)
    assert len(found.unique()) > 10
    for level in range(1, 256):
        of_masks = transferred((levels >= level).to(torch.uint8), source, to, always=1)
        assert torch.equal(found >= level, of_masks.bool())
