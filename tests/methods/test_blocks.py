"""What methods share: pooling, sums over blocks, and where the text stands."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from calibatt.kernels.geometry import Geometry
from calibatt.methods.blocks import (
    block_ends,
    block_sums,
    check_query_stride,
    pooled,
    text_blocks,
    video_blocks,
    video_queries,
    with_text,
)


def test_a_block_is_pooled_to_its_mean_and_a_shorter_last_one_over_its_own_tokens() -> None:
    x = torch.arange(8.0).view(1, 8, 1).expand(2, 8, 3)
    assert pooled(x, 3)[0, :, 0].tolist() == [1.0, 4.0, 6.5]
    assert pooled(x, 4)[1, :, 2].tolist() == [1.5, 5.5]
    assert pooled(x, 16)[0, :, 0].tolist() == [3.5]


def test_half_precision_is_pooled_in_single() -> None:
    # the sum of a block is past the range of fp16, and bf16 has no 1 beside 256
    assert pooled(torch.full((1, 64, 1), 2000.0, dtype=torch.float16), 64).tolist() == [[[2000.0]]]
    x = torch.tensor([256.0, 1.0, 1.0, 1.0, 1.0], dtype=torch.bfloat16).view(1, 5, 1)
    means = pooled(x, 4)
    assert means.dtype == torch.float32
    assert means.flatten().tolist() == [64.75, 1.0]


def test_sums_are_of_blocks_and_of_what_is_left() -> None:
    x = torch.arange(5.0)[None]
    assert block_sums(x, 2).tolist() == [[1.0, 5.0, 4.0]]
    assert block_sums(x, 5).tolist() == [[10.0]]
    assert block_sums(x, 8).tolist() == [[10.0]]


@pytest.mark.parametrize(
    ("video", "text", "side", "block", "expected"),
    [
        (64, 0, "last", 16, slice(0, 4)),
        (50, 0, "last", 16, slice(0, 4)),
        (64, 1, "last", 16, slice(0, 4)),
        (50, 20, "last", 16, slice(0, 3)),
        (10, 20, "last", 16, slice(0, 0)),
        (64, 16, "first", 16, slice(1, 5)),
        (50, 20, "first", 16, slice(2, 5)),
        (2, 18, "first", 16, slice(2, 2)),
    ],
)
def test_blocks_of_video_hold_no_text(video: int, text: int, side: Any, block: int, expected: slice) -> None:
    geometry = Geometry(grid=(1, 1, video), heads=1, head_dim=4, text_tokens=text, text_side=side)
    assert video_blocks(geometry, block) == expected


@pytest.mark.parametrize(
    ("side", "expected"),
    [("first", [[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 0, 0]]), ("last", [[0, 0, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1]])],
)
def test_blocks_of_text_hold_some_among_their_queries_or_keys(side: Any, expected: list[list[int]]) -> None:
    # 20 tokens in query blocks of 8 and key blocks of 5; the text is the first or the last 6
    geometry = Geometry(grid=(1, 1, 14), heads=1, head_dim=4, text_tokens=6, text_side=side)
    assert text_blocks(geometry, (8, 5)).int().tolist() == expected


def test_blocks_end_with_their_last_token_and_the_last_with_the_sequence() -> None:
    first, last = block_ends(10, 4)
    assert (first.tolist(), last.tolist()) == ([0, 4, 8], [3, 7, 9])


@pytest.mark.parametrize(("side", "expected"), [("first", [0, 1, 4, 3, 2]), ("last", [2, 1, 0, 3, 4])])
def test_an_order_of_the_video_leaves_text_where_it_is(side: Any, expected: list[int]) -> None:
    geometry = Geometry(grid=(1, 1, 3), heads=1, head_dim=4, text_tokens=2, text_side=side)
    assert with_text(geometry, torch.tensor([2, 1, 0])).tolist() == [expected]


@pytest.mark.parametrize(
    ("columns", "stride", "expected"),
    [(7, 1, [0, 1, 2, 3, 4, 5, 6]), (8, 4, [2, 6]), (52, 8, [3, 11, 18, 26, 33, 40, 48]), (3, 8, [1])],
)
def test_one_in_so_many_columns_is_the_middle_of_an_equal_part_in_every_row(
    columns: int, stride: int, expected: list[int]
) -> None:
    geometry = Geometry(grid=(2, 3, columns), heads=1, head_dim=8, text_tokens=5, text_side="first")
    rows = [row * columns + column for row in range(6) for column in expected]
    assert (video_queries(geometry, stride) - 5).tolist() == rows


@pytest.mark.parametrize("columns", [3, 5, 52, 80])
def test_a_block_twice_as_long_as_a_stride_has_a_query_wherever_it_lies(columns: int) -> None:
    geometry = Geometry(grid=(3, 4, columns), heads=1, head_dim=8)
    for stride in range(1, 33):
        places = video_queries(geometry, stride)
        ends = torch.cat((torch.tensor([-1]), places, torch.tensor([geometry.tokens])))
        # so many tokens without one
        assert ends.diff().max() - 1 < max(2 * stride, 2)


@pytest.mark.parametrize(("stride", "block"), [(0, 64), (-1, 64), (33, 64), (64, 64), (2, 3)])
def test_a_stride_by_which_a_block_may_have_no_query_is_refused(stride: int, block: int) -> None:
    with pytest.raises(ValueError, match=f"half a block's {block}: got query_stride={stride}"):
        check_query_stride(stride, block)
    check_query_stride(1, 1)
    check_query_stride(32, 64)
