"""Plans of sites: kept within bytes, made ahead of their use, and the same however many are kept."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from calibatt.kernels.geometry import Geometry
from calibatt.kernels.mask import BlockMask
from calibatt.kernels.plan import Plan
from calibatt.methods.ahead import SitePlans, sent
from calibatt.methods.site import Site

GEOMETRY = Geometry(grid=(2, 4, 4), heads=2, head_dim=8)
SITE = Site(geometry=GEOMETRY, step=0, steps=2, sigma=0.5, branch="cond", layer=0, layers=3)
CPU = torch.device("cpu")
# two heads, four rows of a word
BYTES = 2 * 4 * 4


class Maker:
    """Makes masks that differ by site, and notes where."""

    def __init__(self) -> None:
        self.made: list[tuple[int, int]] = []

    def __call__(self, step: int, layer: int, geometry: Geometry, device: torch.device) -> Plan:
        self.made.append((step, layer))
        return plan_of(step, layer, geometry)


def plan_of(step: int, layer: int, geometry: Geometry) -> Plan:
    keep = torch.rand(2, 4, 4, generator=torch.Generator().manual_seed(3 * step + layer)) < 0.5
    mask = BlockMask.from_keep(keep, tokens=geometry.tokens, block_q=8, block_k=8)
    return Plan.masked(mask, 2)


def video(plans: SitePlans) -> list[Plan]:
    """The plans of all calls of a video with two branches."""
    return [
        plans.at(replace(SITE, step=step, layer=layer, branch=branch), CPU)
        for step in range(2)
        for branch in ("cond", "uncond")
        for layer in range(3)
    ]


@pytest.mark.parametrize("held", [1, 2, 4, 6])
def test_plans_are_the_same_and_within_their_bytes_however_many_are_kept(held: int) -> None:
    plans = SitePlans(Maker(), limit_bytes=held * BYTES)
    for call in range(12):
        step, _, layer = call // 6, call // 3, call % 3
        plan = plans.at(replace(SITE, step=step, layer=layer), CPU)
        assert isinstance(plan.mask, BlockMask)
        expected = plan_of(step, layer, GEOMETRY).mask
        assert isinstance(expected, BlockMask)
        assert torch.equal(plan.mask.bits, expected.bits)
        assert plans.nbytes() <= held * BYTES


def test_the_next_plan_is_made_before_it_is_asked_for() -> None:
    make = Maker()
    plans = SitePlans(make)
    plans.at(SITE, CPU)
    assert make.made == [(0, 0), (0, 1)]
    plans.at(replace(SITE, layer=2), CPU)
    assert make.made[2:] == [(0, 2), (1, 0)]
    # there is none behind the last
    plans.at(replace(SITE, step=1, layer=2), CPU)
    assert make.made[4:] == [(1, 2)]


def test_where_a_step_fits_the_other_branch_and_the_next_video_make_nothing_twice() -> None:
    make = Maker()
    # a step, and the first plan of the next
    plans = SitePlans(make, limit_bytes=4 * BYTES)
    made = video(plans)
    assert len(make.made) == 6
    assert made[0] is made[3]
    make = Maker()
    plans = SitePlans(make)
    video(plans), video(plans)
    assert len(make.made) == 6


def test_what_was_used_least_recently_goes() -> None:
    make = Maker()
    plans = SitePlans(make, limit_bytes=3 * BYTES)
    for layer in (0, 2, 0):
        plans.at(replace(SITE, layer=layer), CPU)
    make.made.clear()
    # layer 0 was used again, so of step 0 it is layers 0 and 1 that are kept
    plans.at(SITE, CPU)
    assert make.made == []
    plans.at(replace(SITE, layer=2), CPU)
    assert make.made[0] == (0, 2)


def test_bytes_that_plans_share_count_once() -> None:
    shared = plan_of(0, 0, GEOMETRY)
    plans = SitePlans(lambda step, layer, geometry, device: replace(shared), limit_bytes=BYTES)
    video(plans)
    assert plans.nbytes() == BYTES


def test_another_geometry_has_plans_of_its_own() -> None:
    plans = SitePlans(Maker())
    other = replace(GEOMETRY, grid=(2, 2, 8))
    assert plans.at(SITE, CPU) is not plans.at(replace(SITE, geometry=other), CPU)


def test_on_a_cpu_nothing_is_copied() -> None:
    part = torch.ones(3)
    assert sent(part, CPU).data_ptr() == part.data_ptr()


@pytest.mark.gpu
def test_on_a_gpu_plans_are_those_of_the_cpu() -> None:
    device = torch.device("cuda")

    def make(step: int, layer: int, geometry: Geometry, device: torch.device) -> Plan:
        plan = plan_of(step, layer, geometry)
        assert isinstance(plan.mask, BlockMask)
        return Plan.masked(replace(plan.mask, bits=sent(plan.mask.bits, device)), 2)

    plans = SitePlans(make, limit_bytes=2 * BYTES)
    for step in range(2):
        for layer in range(3):
            mask = plans.at(replace(SITE, step=step, layer=layer), device).mask
            expected = plan_of(step, layer, GEOMETRY).mask
            assert isinstance(mask, BlockMask)
            assert isinstance(expected, BlockMask)
            assert mask.bits.device.type == "cuda"
            assert torch.equal(mask.bits.cpu(), expected.bits)
            assert plans.nbytes() <= 2 * BYTES


def test_what_is_sent_is_contiguous_and_the_same() -> None:
    # pinned memory has the strides of what is pinned, and an expanded tensor's cannot be written to
    few = torch.arange(3).expand(4, 3)
    found = sent(few, torch.device("cpu"))
    assert found.is_contiguous()
    assert torch.equal(found, few)


@pytest.mark.gpu
def test_an_expanded_tensor_reaches_the_gpu() -> None:
    few = torch.arange(3).expand(4, 3)
    assert torch.equal(sent(few, torch.device("cuda")).cpu(), few)
