"""Permutations by themselves: tokens into the order of a method, against a copy of the same tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from jaxtyping import Int32
from torch import Tensor

from calibatt.bench.cells import Order, PermutationArm
from calibatt.bench.failure import Failure
from calibatt.bench.record import Record
from calibatt.bench.sampling import Goal, Sample, take_samples
from calibatt.bench.timer import PhaseTimer
from calibatt.kernels.geometry import Geometry
from calibatt.kernels.permute import permute, unpermute
from calibatt.methods.sta import SlidingTile
from calibatt.methods.svg import token_major_order
from calibatt.methods.tiles import tile_order


def random_order(geometry: Geometry) -> Int32[Tensor, "heads tokens"]:
    """Random, every head in its own way: the worst that clusters of tokens can ask for."""
    generator = torch.Generator().manual_seed(0)
    orders = [torch.randperm(geometry.tokens, generator=generator) for _ in range(geometry.heads)]
    return torch.stack(orders).to(torch.int32)


_ORDERS: Mapping[Order, Callable[[Geometry], Tensor]] = MappingProxyType(
    {
        "tile": partial(tile_order, tile=SlidingTile.presets["default"].tile),
        "token-major": token_major_order,
        "random": random_order,
    }
)


def measure(
    arms: Sequence[PermutationArm],
    tensors: Sequence[Tensor],
    geometry: Geometry,
    facts: Callable[[PermutationArm], dict[str, Any]],
    goal: Goal,
) -> dict[PermutationArm, Record]:
    """Time permutations in turns with a copy of the tensors: a speedup of 1 is the bandwidth of a copy.

    Args:
        arms: the orders.
        tensors: what is moved, [1, heads, tokens, head_dim] each.
        geometry: of the tensors.
        facts: the fields of a record that say what was run.
        goal: when an arm has samples enough.
    """
    orders = {arm: _ORDERS[arm.order](geometry).to(tensors[0].device) for arm in arms}
    works: dict[PermutationArm | None, Callable[[], Any]] = {None: lambda: [x.clone() for x in tensors]}
    works.update({arm: partial(permute, tensors, order) for arm, order in orders.items()})
    timer = PhaseTimer(tensors[0].device)

    def turn(arm: PermutationArm | None) -> Sample:
        # what an arm that failed left in the timer
        timer.collect_s()
        timer.lead()
        with timer.phase("move"):
            works[arm]()
        return Sample(seconds=timer.collect_s()["move"])

    taken = take_samples(list(works), turn, goal, tensors[0].device, partner=None)
    records: dict[PermutationArm, Record] = {}
    for arm, order in orders.items():
        course = taken[arm]
        if isinstance(course, Failure):
            records[arm] = Record(**facts(arm), outcome=course.outcome, reason=course.reason)
            continue
        moved = permute(tensors[:1], order)[0]
        index = order.long().expand(geometry.heads, -1)[None, :, :, None].expand(1, -1, -1, geometry.head_dim)
        if torch.equal(moved, tensors[0].gather(2, index)) and torch.equal(unpermute(moved, order), tensors[0]):
            records[arm] = Record(**facts(arm), outcome="ok", **course.facts())
        else:
            records[arm] = Record(**facts(arm), outcome="wrong", reason="tokens are not where the order says")
    return records
