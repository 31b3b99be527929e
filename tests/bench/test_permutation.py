"""Orders of tokens, worked out by hand."""

from __future__ import annotations

import torch

from calibatt.bench import permutation
from calibatt.kernels.geometry import Geometry


def test_every_head_has_a_random_order_of_its_own_and_the_same_at_every_call() -> None:
    geometry = Geometry(grid=(2, 5, 5), heads=3, head_dim=64)
    order = permutation.random_order(geometry)
    assert order.sort(-1).values.tolist() == [list(range(50))] * 3
    assert not torch.equal(order[0], order[1])
    assert torch.equal(order, permutation.random_order(geometry))
