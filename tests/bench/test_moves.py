"""Orders of tokens, worked out by hand."""

from __future__ import annotations

import pytest
import torch

from calibatt.bench import moves
from calibatt.kernels.geometry import Geometry


def test_the_frames_of_a_place_follow_each_other() -> None:
    geometry = Geometry(grid=(3, 1, 2), heads=1, head_dim=64)
    assert moves.token_major_order(geometry).tolist() == [[0, 2, 4, 1, 3, 5]]


@pytest.mark.parametrize(("side", "expected"), [("first", [0, 1, 2, 4, 3, 5]), ("last", [0, 2, 1, 3, 4, 5])])
def test_text_stays_where_it_is(side: str, expected: list[int]) -> None:
    geometry = Geometry(grid=(2, 1, 2), heads=1, head_dim=64, text_tokens=2, text_side=side)  # type: ignore[arg-type]
    assert moves.token_major_order(geometry).tolist() == [expected]


def test_every_head_has_a_random_order_of_its_own_and_the_same_at_every_call() -> None:
    geometry = Geometry(grid=(2, 5, 5), heads=3, head_dim=64)
    order = moves.random_order(geometry)
    assert order.sort(-1).values.tolist() == [list(range(50))] * 3
    assert not torch.equal(order[0], order[1])
    assert torch.equal(order, moves.random_order(geometry))
