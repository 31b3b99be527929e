"""Curves through grids small enough to walk by hand."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from calibatt.kernels.geometry import Geometry
from calibatt.methods.curves import Curve, curve_order, hilbert_index


def walk(grid: tuple[int, int, int], curve: Curve) -> Tensor:
    """The coordinates of each cell, in the order of the curve."""
    order = curve_order(Geometry(grid=grid, heads=1, head_dim=4), curve)[0].long()
    assert order.sort().values.tolist() == list(range(len(order)))
    return torch.cartesian_prod(*(torch.arange(extent) for extent in grid))[order]


def strides(grid: tuple[int, int, int], curve: Curve) -> Tensor:
    """How many cells each step of the curve goes, along the axes."""
    return walk(grid, curve).diff(dim=0).abs().sum(-1)


@pytest.mark.parametrize(
    ("rows", "order"),
    [
        # right, down, left
        (2, [0, 1, 3, 2]),
        # a quarter at a time, the first and the last turned so that they begin and end beside the others
        (4, [0, 4, 5, 1, 2, 3, 7, 6, 10, 11, 15, 14, 13, 9, 8, 12]),
    ],
)
def test_the_curve_through_a_square(rows: int, order: list[int]) -> None:
    assert curve_order(Geometry(grid=(1, rows, rows), heads=1, head_dim=4), "frame").tolist() == [order]


@pytest.mark.parametrize("grid", [(1, 2, 2), (1, 4, 4), (1, 16, 16), (3, 4, 4), (5, 8, 8)])
def test_through_frames_of_a_power_of_two_every_step_is_to_the_next_cell(grid: tuple[int, int, int]) -> None:
    assert (strides(grid, "frame") == 1).all()


@pytest.mark.parametrize("extent", [2, 4, 8])
def test_through_a_cube_every_step_is_to_the_next_cell(extent: int) -> None:
    assert (strides((extent,) * 3, "video") == 1).all()


@pytest.mark.parametrize("curve", ["video", "morton"])
def test_the_curve_fills_each_part_before_the_next(curve: Curve) -> None:
    # of a cube of 8: every 8 cells are a cube of 2, every 64 a cube of 4
    cells = walk((8, 8, 8), curve)
    for side in (2, 4):
        parts = cells.view(-1, side**3, 3)
        assert (parts.amax(1) - parts.amin(1) == side - 1).all()
        assert (parts.amin(1) % side == 0).all()


@pytest.mark.parametrize("grid", [(1, 1, 1), (1, 5, 3), (1, 1, 9), (4, 7, 1), (3, 5, 6), (8, 5, 25)])
@pytest.mark.parametrize("curve", get_args(Curve))
def test_any_grid_has_each_cell_once(grid: tuple[int, int, int], curve: Curve) -> None:
    assert len(walk(grid, curve)) == grid[0] * grid[1] * grid[2]


def test_a_grid_of_other_extents_has_the_curve_of_the_next_power_of_two_without_what_lies_outside() -> None:
    square = walk((1, 8, 8), "frame")
    assert torch.equal(walk((1, 5, 3), "frame"), square[(square[:, 1] < 5) & (square[:, 2] < 3)])
    cube = walk((8, 8, 8), "video")
    inside = (cube[:, 0] < 3) & (cube[:, 1] < 5) & (cube[:, 2] < 6)
    assert torch.equal(walk((3, 5, 6), "video"), cube[inside])


def test_every_other_frame_is_walked_backwards() -> None:
    order = curve_order(Geometry(grid=(3, 2, 2), heads=1, head_dim=4), "frame")
    assert order.tolist() == [[0, 1, 3, 2, 6, 7, 5, 4, 8, 9, 11, 10]]


@pytest.mark.parametrize(("side", "order"), [("first", [0, 1, 2, 3, 4, 6, 5]), ("last", [0, 1, 3, 2, 4, 5, 6])])
def test_text_stays_where_it_is(side: Any, order: list[int]) -> None:
    geometry = Geometry(grid=(1, 2, 2), heads=1, head_dim=4, text_tokens=3, text_side=side)
    for curve in get_args(Curve):
        assert curve_order(geometry, curve).dtype == torch.int32
    assert curve_order(geometry, "frame").tolist() == [order]


def test_the_index_counts_all_cells() -> None:
    cells = torch.cartesian_prod(*[torch.arange(8)] * 2).T
    assert hilbert_index(cells, 3).sort().values.tolist() == list(range(64))


def test_mortons_curve_takes_the_digits_of_the_coordinates_in_turn() -> None:
    # a Z of four, then the one beside it; frames have the highest digit
    assert curve_order(Geometry(grid=(1, 2, 4), heads=1, head_dim=4), "morton").tolist() == [[0, 1, 4, 5, 2, 3, 6, 7]]
    assert curve_order(Geometry(grid=(2, 1, 2), heads=1, head_dim=4), "morton").tolist() == [[0, 1, 2, 3]]
