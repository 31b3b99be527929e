"""A method with means in place of what it drops."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from calibatt.kernels import oracle
from calibatt.kernels.geometry import Geometry
from calibatt.kernels.plan import Plan
from calibatt.methods.catalogue import build
from calibatt.methods.dense import Dense, DenseConfig
from calibatt.methods.learning import Learnt
from calibatt.methods.remainder import WithRemainder
from calibatt.methods.scheduled import Scheduled
from calibatt.methods.site import Site

GEOMETRY = Geometry(grid=(2, 16, 16), heads=2, head_dim=16)


def site(step: int = 8) -> Site:
    return Site(geometry=GEOMETRY, step=step, steps=10, sigma=0.5, branch="cond", layer=2, layers=4)


@pytest.mark.parametrize(("name", "preset"), [("sparge", "default"), ("svg2", "clusters")])
def test_the_masks_stay_the_methods_own_and_their_output_comes_nearer_to_dense(name: str, preset: str) -> None:
    # alike within tiles of a frame, as neighbours in a video are
    smooth = torch.randn((3, 2, 16, 2, 4, 4), generator=torch.Generator().manual_seed(0))
    q, k, v = torch.nn.functional.interpolate(smooth.flatten(0, 1), (2, 16, 16), mode="trilinear").unflatten(
        0, (3, 2)
    ).flatten(3).mT  # fmt: skip
    own, approximating = build(name, preset=preset), WithRemainder(build(name, preset=preset), "zeroth")
    for step in (6, 8):
        plan, dropping = (method.plan(q, k, v, site(step)) for method in (approximating, own))
    assert (plan.remainder, dropping.remainder) == ("zeroth", "none")
    assert all(map(torch.equal, plan.tensors(), dropping.tensors()))
    dense, near, far = (oracle.attend(q[None], k[None], v[None], one) for one in (Plan.dense(GEOMETRY), plan, dropping))
    assert (near - dense).norm() < 0.8 * (far - dense).norm()


def test_a_plan_without_a_mask_stays_as_it_is() -> None:
    q, k, v = torch.randn((3, 2, 512, 16), generator=torch.Generator().manual_seed(0))
    method = WithRemainder(Scheduled(build("sparge"), steps=0.5, layers=0.0), "zeroth")
    assert [method.plan(q, k, v, site(step)).remainder for step in (4, 5)] == ["none", "zeroth"]


@pytest.mark.parametrize("remainder", [None, "zeroth"])
def test_a_plan_that_is_the_same_at_every_call_stays_one_plan(remainder: Any) -> None:
    # what kernels and ranks keep, they keep by plan
    geometry = Geometry(grid=(4, 4, 8), heads=2, head_dim=16)
    radial: Any = build("radial", block=(16, 16), dense_steps=0.5, dense_layers=0)
    method = radial if remainder is None else WithRemainder(radial, remainder)
    q = torch.zeros(2, geometry.tokens, 16)
    for step in (0, 9):
        first, second = (method.plan(q, q, q, replace(site(step), geometry=geometry)) for _ in range(2))
        assert first is second
    assert (first.remainder, first.mask is None) == (remainder or "none", False)


def test_a_method_with_a_remainder_of_its_own_takes_no_other_and_none_is_taken_from_it() -> None:
    with pytest.raises(
        ValueError, match=r"^the method itself has the remainder 'zeroth': one more says nothing new, .*"
    ):
        WithRemainder(build("sol"), "zeroth")
    with pytest.raises(ValueError, match=r"^the method itself has the remainder 'zeroth', which 'none' cannot replace"):
        WithRemainder(Scheduled(build("sol"), steps=0.5, layers=0.0), "none")
    with pytest.raises(ValueError, match="one more says nothing new"):
        WithRemainder(WithRemainder(build("sparge"), "zeroth"), "zeroth")
    scheduled = Scheduled(build("sol"), steps=0.5, layers=0.0)
    assert (scheduled.remainder, build("sparge").remainder) == ("zeroth", "none")


def test_what_the_method_learnt_and_refuses_is_shown_and_a_video_begins_for_it_too(
    tabled: Callable[..., Learnt],
) -> None:
    class Spy(Dense):
        resets = 0

        def reset(self) -> None:
            self.resets += 1

    learnt = tabled("spy", site(), {})
    spy = Spy(DenseConfig(), learnt)
    method = WithRemainder(spy, "zeroth")
    method.reset()
    assert (method.learnt, spy.resets, method.refusal(GEOMETRY)) == (learnt, 1, None)
    flat = Geometry(grid=(1, 4, 4), heads=2, head_dim=16)
    for name in ("radial", "sta", "jenga"):
        assert WithRemainder(build(name), "zeroth").refusal(flat) == build(name).refusal(flat)
