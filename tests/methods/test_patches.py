"""Patch orders worked out by hand, and means of blocks."""

from __future__ import annotations

import pytest
import torch

from calibatt.kernels.geometry import Geometry
from calibatt.methods.patches import patch_of_tokens, patch_order


def geometry(*grid: int, text: int = 0, side: str = "last") -> Geometry:
    return Geometry(grid=grid, heads=1, head_dim=4, text_tokens=text, text_side=side)  # type: ignore[arg-type]


# a frame of 4 × 4 tokens in four patches of 2 × 2
FRAME = [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15]
# 3 × 5 tokens: the patches of the last column are 2 × 1, those of the last row 1 × 2, and the corner is one token
RAGGED = [0, 1, 5, 6, 2, 3, 7, 8, 4, 9, 10, 11, 12, 13, 14]


def test_a_frame_is_ordered_patch_by_patch_row_by_row() -> None:
    order = patch_order(geometry(1, 4, 4), 2, 2)
    assert order.tolist() == [FRAME]
    assert order.dtype == torch.int32


def test_frames_follow_each_other() -> None:
    assert patch_order(geometry(2, 4, 4), 2, 2).tolist() == [FRAME + [16 + token for token in FRAME]]


def test_a_frame_that_patches_do_not_divide_has_smaller_ones_at_its_right_and_lower_ends() -> None:
    assert patch_order(geometry(1, 3, 5), 2, 2).tolist() == [RAGGED]
    assert patch_order(geometry(2, 3, 5), 2, 2).tolist() == [RAGGED + [15 + token for token in RAGGED]]


def test_rows_and_columns_of_a_patch_are_not_confused() -> None:
    assert patch_order(geometry(1, 2, 4), 1, 2).tolist() == [[0, 1, 2, 3, 4, 5, 6, 7]]
    assert patch_order(geometry(1, 2, 4), 2, 1).tolist() == [[0, 4, 1, 5, 2, 6, 3, 7]]


def test_a_patch_as_large_as_the_frame_or_larger_changes_nothing() -> None:
    assert patch_order(geometry(2, 3, 5), 8, 16).tolist() == [list(range(30))]


@pytest.mark.parametrize(
    ("side", "expected"),
    [("first", [0, 1, 2, 3, 4, 7, 8, 5, 6, 9, 10]), ("last", [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 10])],
)
def test_text_stays_where_it_is(side: str, expected: list[int]) -> None:
    assert patch_order(geometry(1, 2, 4, text=3, side=side), 2, 2).tolist() == [expected]


@pytest.mark.parametrize("side", ["first", "last"])
@pytest.mark.parametrize("grid", [(1, 7, 9), (8, 5, 25), (6, 6, 27)])
def test_every_token_has_one_place(grid: tuple[int, int, int], side: str) -> None:
    where = geometry(*grid, text=28, side=side)
    assert patch_order(where, 8, 16).sort(-1).values.tolist() == [list(range(where.tokens))]


def test_patches_are_counted_frame_by_frame_and_row_by_row() -> None:
    assert patch_of_tokens(geometry(1, 3, 5), 2, 2).view(3, 5).tolist() == [
        [0, 0, 1, 1, 2],
        [0, 0, 1, 1, 2],
        [3, 3, 4, 4, 5],
    ]
    assert patch_of_tokens(geometry(2, 3, 5), 2, 2)[15:].unique().tolist() == [6, 7, 8, 9, 10, 11]
