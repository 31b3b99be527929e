"""One dense schedule for every method."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from calibatt.kernels.geometry import Geometry
from calibatt.kernels.plan import Plan
from calibatt.methods.catalogue import METHODS, build, learns_from
from calibatt.methods.dense import Dense, DenseConfig
from calibatt.methods.learning import Learnt
from calibatt.methods.scheduled import Scheduled
from calibatt.methods.site import Site

GEOMETRY = Geometry(grid=(2, 16, 16), heads=2, head_dim=16)


def site(step: int, layer: int) -> Site:
    return Site(geometry=GEOMETRY, step=step, steps=10, sigma=0.5, branch="cond", layer=layer, layers=4)


def test_the_first_steps_and_layers_are_dense_and_the_method_is_asked_afterwards() -> None:
    q, k = torch.randn(2, 2, 512, 16, generator=torch.Generator().manual_seed(0))
    method = Scheduled(build("sparge", block=(64, 64)), steps=0.2, layers=0.25)
    sparse = {
        (step, layer)
        for step in range(10)
        for layer in range(4)
        if "masked" in method.plan(q, k, k, site(step, layer)).kinds
    }
    assert sparse == {(step, layer) for step in range(2, 10) for layer in range(1, 4)}


# of those that learn first, the contract tests run presets without dense steps
@pytest.mark.parametrize(
    "name", [name for name in METHODS if METHODS[name].without_dense and learns_from(name) is None]
)
def test_without_its_own_schedule_a_method_is_sparse_from_the_first_call_on(name: str) -> None:
    q, k = torch.randn(2, 2, 512, 16, generator=torch.Generator().manual_seed(0))
    method_class = METHODS[name]
    # a preset that has dense steps or layers of its own
    preset = {"xattention": "vbench"}.get(name, "default")
    own = build(name, preset=preset, block=(64, 64))
    bare = build(name, preset=preset, block=(64, 64), **method_class.without_dense)
    noisiest = Site(geometry=GEOMETRY, step=0, steps=10, sigma=1.0, branch="cond", layer=0, layers=4)
    assert set(own.plan(q, k, k, noisiest).kinds) == {"dense"}
    assert "masked" in bare.plan(q, k, k, noisiest).kinds


def test_the_method_sees_what_attention_sees_and_what_it_learnt_is_shown(tabled: Callable[..., Learnt]) -> None:
    seen: list[tuple[Tensor, ...]] = []

    class Spy(Dense):
        def plan(self, q: Tensor, k: Tensor, v: Tensor, site: Site) -> Plan:
            seen.append((q, k, v))
            return super().plan(q, k, v, site)

    learnt = tabled("spy", site(0, 0), {})
    method = Scheduled(Spy(DenseConfig(), learnt), steps=0.0, layers=0.0)
    q, k, v = torch.randn(3, 2, 512, 16)
    method.plan(q, k, v, site(3, 2))
    assert [[id(x) for x in call] for call in seen] == [[id(q), id(k), id(v)]]
    assert method.learnt is learnt
