"""What is kept of attention calls."""

from __future__ import annotations

import gc

import numpy as np
import pytest
import torch

from calibatt.bench.observers import PlanSummary, ProbeTaker
from calibatt.kernels.geometry import Geometry
from calibatt.kernels.mask import BlockMask, VariableBlockMask
from calibatt.kernels.plan import Plan, Skip, TokenOrder
from calibatt.methods.call import Call
from calibatt.methods.site import BRANCHES, Branch, Site

GEOMETRY = Geometry(grid=(1, 10, 25), heads=2, head_dim=8)


def call(
    plan: Plan, step: int = 0, layer: int = 0, branch: Branch = "cond", *, steps: int = 1, layers: int = 1
) -> Call:
    x = torch.zeros(1, 2, 250, 8)
    site = Site(geometry=GEOMETRY, step=step, steps=steps, sigma=1.0, branch=branch, layer=layer, layers=layers)
    return Call(site=site, q=x, k=x, v=x, plan=plan, out=x)


def mask(share: float) -> BlockMask:
    keep = torch.arange(10).expand(2, 10, 10) < round(share * 10)
    return BlockMask.from_keep(keep, tokens=250, block_q=25, block_k=25)


def test_a_cell_of_a_picture_is_a_block() -> None:
    keep = torch.rand((2, 4, 8), generator=torch.Generator().manual_seed(0)) < 0.5
    summary = PlanSummary()
    own = BlockMask.from_keep(keep, tokens=250, block_q=80, block_k=32)
    summary.saw(call(Plan.masked(own, 2), 3, 1, steps=5, layers=2))
    masks = summary.masks()
    # one call stands for all parts of its video, with other heads
    assert [site for site, _ in masks] == [(3, 1, 0), (3, 1, 0), (3, 1, 1), (3, 1, 1)]
    assert all(np.array_equal(picture, keep[site[2]].numpy()) for site, picture in masks)


def test_blocks_that_differ_in_size_are_drawn_to_scale() -> None:
    # cells of 64 tokens, whose middles are tokens 32, 96, 160 and 221
    q_sizes, k_sizes = torch.tensor([[33, 0, 217]]), torch.tensor([[96, 1, 153]])
    keep = torch.tensor([[[1, 0, 0], [1, 1, 1], [0, 1, 1]]], dtype=torch.bool)
    own = VariableBlockMask.from_keep(keep, q_sizes=q_sizes, k_sizes=k_sizes, tokens=250)
    summary = PlanSummary()
    summary.saw(call(Plan.masked(own, 2)))
    expected = [[1, 0, 0, 0], [0, 1, 1, 1], [0, 1, 1, 1], [0, 1, 1, 1]]
    assert summary.masks()[0][1].astype(int).tolist() == expected


def test_density_is_the_mean_over_all_calls_and_the_map_that_of_the_conditional_branch() -> None:
    summary = PlanSummary()
    summary.saw(call(Plan.masked(mask(0.2), 2), 0, steps=2))
    summary.saw(call(Plan.dense(GEOMETRY), 0, branch="uncond", steps=2))
    summary.saw(call(Plan.masked(mask(0.6), 2), 1, steps=2))
    summary.saw(call(Plan.dense(GEOMETRY), 1, branch="uncond", steps=2))
    assert summary.density() == pytest.approx(0.7)
    assert summary.by_site().tolist() == [[pytest.approx([0.2, 0.2])], [pytest.approx([0.6, 0.6])]]
    assert summary.nbytes == Plan.masked(mask(0.6), 2).nbytes()


@pytest.mark.parametrize("leave", [True, False])
def test_density_is_the_plans_own_whatever_it_is_made_of(leave: bool) -> None:
    own = mask(0.8)
    skip = Skip.of(own, 2, threshold=-1.0, leave=leave)
    # the kernel noted the first half as low
    skip.low.bits.copy_(mask(0.4).bits)
    for plan in (
        Plan.masked(own, 2, skip=skip),
        Plan(tokens=250, kinds=("masked", "dense"), mask=own),
        Plan.masked(own, 2, TokenOrder.of_all(torch.arange(250)[None])),
    ):
        summary = PlanSummary()
        summary.saw(call(plan))
        assert summary.by_site()[0, 0].tolist() == pytest.approx(plan.density().tolist())
        assert summary.ordered == (plan.order is not None)


def test_masks_are_taken_from_the_middle_of_each_part_of_the_video() -> None:
    summary = PlanSummary()
    for step in range(8):
        summary.saw(call(Plan.masked(mask(0.1 * (step + 1)), 2), step, steps=8))
    assert [site[0] for site, _ in summary.masks()] == [1, 3, 5, 7]
    # where the method is dense at first, the first mask after it stands for that part
    late = PlanSummary()
    for step in range(8):
        late.saw(call(Plan.dense(GEOMETRY) if step < 4 else Plan.masked(mask(0.5), 2), step, steps=8))
    assert [site[0] for site, _ in late.masks()] == [4, 4, 5, 7]


def test_what_is_kept_does_not_grow_with_the_video() -> None:
    def kept(steps: int) -> int:
        summary = PlanSummary()
        for step in range(steps):
            summary.saw(call(Plan.masked(mask(0.5), 2), step, steps=steps))
        gc.collect()
        # a number for every head and site is what the picture shows
        return sum(one[2].bits.nbytes for one in summary._masks.values())

    assert kept(4) == kept(64)


def test_nothing_seen_is_no_density() -> None:
    with pytest.raises(ValueError, match="no attention call was seen"):
        PlanSummary().density()
    with pytest.raises(ValueError, match="conditional"):
        PlanSummary().by_site()


def test_probes_are_the_inputs_of_the_sites_that_were_asked_for() -> None:
    taker = ProbeTaker([(1, 0)])
    for step in range(2):
        for branch in BRANCHES:
            taker.saw(call(Plan.dense(GEOMETRY), step, branch=branch, steps=2))
    (probe,) = taker.probes
    assert (probe.site.step, probe.site.layer, probe.site.branch) == (1, 0, "cond")
