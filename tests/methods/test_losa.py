"""LoSA's choice against all sets of blocks in fp64, the step it is made at, and how long it holds."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from calibatt.kernels.geometry import Geometry
from calibatt.kernels.plan import Plan
from calibatt.methods.catalogue import build
from calibatt.methods.losa import Losa, LosaConfig
from calibatt.methods.site import Site

BLOCK = (10, 5)
TOKENS = 4
Inputs = tuple[Tensor, Tensor, Tensor]


def method(**settings: Any) -> Losa:
    chosen: dict[str, Any] = {"mass": 0.8, "dense_steps": 3 / 50, "block": BLOCK}
    return Losa(LosaConfig(**(chosen | settings)))


def geometry_of(inputs: Inputs, **text: Any) -> Geometry:
    heads, tokens, head_dim = inputs[0].shape
    return Geometry(grid=(1, 1, tokens - text.get("text_tokens", 0)), heads=heads, head_dim=head_dim, **text)


def site(geometry: Geometry, step: int, **where: Any) -> Site:
    chosen: dict[str, Any] = {"steps": 50, "sigma": 0.5, "branch": "cond", "layer": 0, "layers": 2}
    return Site(geometry=geometry, step=step, **(chosen | where))


def noise(seed: int, *, heads: int = 3, tokens: int = 48, head_dim: int = 8) -> Inputs:
    """Queries that see some keys much more than others."""
    q, k, v = torch.randn(3, heads, tokens, head_dim, generator=torch.Generator().manual_seed(seed))
    return 2 * q, k, v


def by_weight(weights: Sequence[Any]) -> Inputs:
    """Blocks of four tokens: a query of block r of a head gives block c the weight that stands there."""
    table = torch.tensor(weights, dtype=torch.float32)
    channels = table.shape[-1]
    # queries of block r point along channel r, where the keys have the logarithms
    q = (math.sqrt(channels) * torch.eye(channels).expand(len(table), -1, -1)).repeat_interleave(TOKENS, 1)
    k = table.log().mT.repeat_interleave(TOKENS, 1)
    return q, k, k


def keep_of(plan: Plan) -> Tensor:
    assert set(plan.kinds) == {"masked"}
    assert plan.mask is not None
    return plan.mask.keep()


def kept(inputs: Inputs, **settings: Any) -> Tensor:
    """What is kept of a step after one that is looked at."""
    planner = method(**settings)
    for step in (3, 4):
        plan = planner.plan(*inputs, site(geometry_of(inputs), step))
    return keep_of(plan)


def best_sets(inputs: Inputs, share: float, block: tuple[int, int]) -> Tensor:
    """Of all sets of key blocks that hold the share of a row, in fp64, the one with fewest blocks and most mass."""
    q, k, _ = inputs
    weights = (q.double() @ k.double().mT / math.sqrt(q.shape[-1])).softmax(-1)
    found = []
    for rows in weights.split(block[0], 1):
        mass = torch.stack([part.sum((1, 2)) for part in rows.split(block[1], 2)], -1)
        sets = torch.tensor(list(itertools.product((False, True), repeat=mass.shape[-1])))
        for own in mass:
            held = (sets * own).sum(-1)
            # a block more costs more than any mass is worth
            cost = sets.sum(-1) * 2 * own.sum() - held
            found.append(sets[torch.where(held >= share * own.sum(), cost, math.inf).argmin()])
    return torch.stack(found).unflatten(0, (-1, len(q))).transpose(0, 1)


# --- which blocks ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.3, 0.8, 0.95, 0.99, 0.999])
# of 48 tokens the last blocks are shorter, in the second of one key; and all queries in one block
@pytest.mark.parametrize("block", [(10, 5), (7, 47), (64, 8)])
def test_it_keeps_the_smallest_set_that_holds_the_mass(share: float, block: tuple[int, int]) -> None:
    inputs = noise(0)
    assert torch.equal(kept(inputs, mass=share, block=block), best_sets(inputs, share, block))


def test_each_head_and_query_block_keeps_as_many_as_it_needs() -> None:
    even, sharp = [0.25] * 4, [0.85, 0.05, 0.05, 0.05]
    middling = [0.1, 0.45, 0.05, 0.4]
    inputs = by_weight([[even, sharp, middling, even], [sharp] * 4])
    assert kept(inputs, mass=0.82, block=(TOKENS, TOKENS)).int().tolist() == [
        [[1, 1, 1, 1], [1, 0, 0, 0], [0, 1, 0, 1], [1, 1, 1, 1]],
        [[1, 0, 0, 0]] * 4,
    ]


def test_without_any_mass_a_row_keeps_its_heaviest_block_and_for_all_of_it_everything() -> None:
    inputs = noise(0)
    assert torch.equal(kept(inputs, mass=0.0), best_sets(inputs, 1e-9, BLOCK))
    assert kept(inputs, mass=1.0).all()


@pytest.mark.parametrize("side", ["first", "last"])
def test_text_is_kept_or_lost_by_its_mass_as_everything_is(side: Any) -> None:
    inputs = noise(0)
    planner, geometry = method(), geometry_of(inputs, text_tokens=7, text_side=side)
    for step in (3, 4):
        plan = planner.plan(*inputs, site(geometry, step))
    assert torch.equal(keep_of(plan), kept(inputs))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_half_precision_is_weighed_in_single(dtype: torch.dtype, device: str) -> None:
    # 64 channels, and 8 keys a block, are what the fused sums take on a GPU
    q, k, v = (x.to(device, dtype) for x in noise(0, head_dim=64))
    found = kept((q, k, v), mass=0.95, block=(16, 8))
    assert found.device == q.device
    assert torch.equal(found, best_sets((q.cpu(), k.cpu(), v.cpu()), 0.95, (16, 8)).to(device))


def test_own_blocks_are_those_of_the_paper_and_others_take_their_place() -> None:
    inputs = noise(0, tokens=300)
    for block, size in ((None, (128, 32)), ((64, 64), (64, 64))):
        planner = build("losa", block=block)
        for step in (3, 4):
            plan = planner.plan(*inputs, site(geometry_of(inputs), step))
        assert plan.mask is not None
        assert plan.mask.block == size


@pytest.mark.parametrize(("preset", "share"), [("fast", 0.95), ("default", 0.99), ("careful", 0.999)])
def test_presets_hold_the_published_masses(preset: str, share: float) -> None:
    inputs = noise(0)
    planner = build("losa", preset=preset, block=BLOCK)
    for step in (3, 4):
        plan = planner.plan(*inputs, site(geometry_of(inputs), step))
    assert torch.equal(keep_of(plan), best_sets(inputs, share, BLOCK))


# --- when ------------------------------------------------------------------------------------------------------------


# of 50 steps the first four are dense, as in the paper, and of shorter schedules as large a share, rounded, and the one
# that is looked at: a schedule of one step has no other
@pytest.mark.parametrize(("steps", "dense"), [(50, 4), (30, 3), (10, 2), (8, 1), (4, 1), (1, 1)])
def test_the_step_that_is_looked_at_and_those_before_are_dense(steps: int, dense: int) -> None:
    inputs = noise(0)
    planner = build("losa", block=BLOCK)
    kinds = [set(planner.plan(*inputs, site(geometry_of(inputs), step, steps=steps)).kinds) for step in range(steps)]
    assert kinds == [{"dense"}] * dense + [{"masked"}] * (steps - dense)


def test_a_video_that_ends_before_the_look_is_dense() -> None:
    inputs = noise(0)
    planner = method(dense_steps=1.0)
    assert all(set(planner.plan(*inputs, site(geometry_of(inputs), step)).kinds) == {"dense"} for step in range(50))


def test_the_mask_is_that_of_the_look_whatever_came_before_and_comes_after() -> None:
    planner, geometry = method(), geometry_of(noise(0))
    plans = [planner.plan(*noise(step), site(geometry, step)) for step in range(50)]
    expected = best_sets(noise(3), 0.8, BLOCK)
    assert all(torch.equal(keep_of(plan), expected) for plan in plans[4:])
    # kernels keep what they make of a plan with the plan
    assert len({id(plan) for plan in plans[4:]}) == 1
    assert not any(torch.equal(best_sets(noise(step), 0.8, BLOCK), expected) for step in (0, 2, 4))


def test_what_is_kept_takes_a_bit_a_block() -> None:
    inputs = noise(0, tokens=320)
    planner = method(block=(32, 10))
    for step in (3, 4):
        plan = planner.plan(*inputs, site(geometry_of(inputs), step))
    # three heads of 10 query blocks, each with a word of 32 bits
    assert plan.nbytes() == 3 * 10 * 4


def test_without_warm_up_the_first_step_alone_is_dense_and_looked_at() -> None:
    planner, geometry = build("losa", preset="no-warmup", block=BLOCK), geometry_of(noise(0))
    assert set(planner.plan(*noise(0), site(geometry, 0)).kinds) == {"dense"}
    assert torch.equal(keep_of(planner.plan(*noise(1), site(geometry, 1))), best_sets(noise(0), 0.99, BLOCK))


def test_without_a_dense_look_the_mask_serves_from_its_own_step_on() -> None:
    planner, geometry = method(dense_look=False), geometry_of(noise(0))
    plans = [planner.plan(*noise(step), site(geometry, step)) for step in range(6)]
    assert [set(plan.kinds) for plan in plans[:3]] == [{"dense"}] * 3
    assert all(torch.equal(keep_of(plan), best_sets(noise(3), 0.8, BLOCK)) for plan in plans[3:])


def test_a_schedule_entered_midway_is_looked_at_there() -> None:
    planner, geometry = method(), geometry_of(noise(0))
    assert set(planner.plan(*noise(20), site(geometry, 20)).kinds) == {"dense"}
    assert torch.equal(keep_of(planner.plan(*noise(21), site(geometry, 21))), best_sets(noise(20), 0.8, BLOCK))


# benchmarks of single calls ask twice at one step: what is done once in a video is not every call's
def test_a_second_call_at_the_step_that_is_looked_at_has_the_mask_of_the_first() -> None:
    planner, geometry = method(), geometry_of(noise(0))
    assert set(planner.plan(*noise(3), site(geometry, 3)).kinds) == {"dense"}
    for seed in (3, 4):
        plan = planner.plan(*noise(seed), site(geometry, 3))
        assert torch.equal(keep_of(plan), best_sets(noise(3), 0.8, BLOCK))


# --- of what ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "apart", [{"branch": "uncond"}, {"layer": 1}, {"sample": 1}], ids=["branch", "layer", "sample"]
)
def test_branches_layers_and_samples_have_masks_of_their_own(apart: dict[str, Any]) -> None:
    planner, geometry = method(), geometry_of(noise(0))
    for seed, where in ((0, {}), (1, apart)):
        assert set(planner.plan(*noise(seed), site(geometry, 3, **where)).kinds) == {"dense"}
    for seed, where in ((0, {}), (1, apart)):
        plan = planner.plan(*noise(2), site(geometry, 4, **where))
        assert torch.equal(keep_of(plan), best_sets(noise(seed), 0.8, BLOCK))


@pytest.mark.parametrize("told", [True, False], ids=["reset", "a-step-back"])
def test_another_video_is_looked_at_anew(told: bool) -> None:
    planner, geometry = method(), geometry_of(noise(0))
    for step in (3, 4, 49):
        planner.plan(*noise(0), site(geometry, step))
    if told:
        planner.reset()
    assert set(planner.plan(*noise(1), site(geometry, 3)).kinds) == {"dense"}
    assert torch.equal(keep_of(planner.plan(*noise(2), site(geometry, 4))), best_sets(noise(1), 0.8, BLOCK))


def test_a_reset_forgets_a_mask_that_a_later_step_would_be_given() -> None:
    planner, geometry = method(), geometry_of(noise(0))
    planner.plan(*noise(0), site(geometry, 3))
    planner.reset()
    assert set(planner.plan(*noise(1), site(geometry, 4)).kinds) == {"dense"}


def test_another_geometry_is_looked_at_anew() -> None:
    planner = method()
    planner.plan(*noise(0), site(geometry_of(noise(0)), 3))
    # as many tokens: a mask kept by length would pass unseen
    other = Geometry(grid=(2, 4, 6), heads=3, head_dim=8)
    assert set(planner.plan(*noise(1), site(other, 4)).kinds) == {"dense"}
    assert torch.equal(keep_of(planner.plan(*noise(2), site(other, 5))), best_sets(noise(1), 0.8, BLOCK))


def test_it_applies_to_every_geometry() -> None:
    assert method().refusal(Geometry(grid=(1, 1, 1), heads=1, head_dim=1)) is None


@pytest.mark.parametrize("wrong", [{"mass": -0.1}, {"mass": 1.1}, {"mass": math.nan}, {"dense_steps": 3.0}])
def test_settings_that_are_no_shares_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="losa's mass and dense steps are shares"):
        method(**wrong)
