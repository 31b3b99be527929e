"""Sparse VideoGen 2: what it keeps from call to call, and its mask on queries and keys in plain clusters."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from calibatt.kernels.geometry import Geometry
from calibatt.kernels.mask import VariableBlockMask
from calibatt.kernels.plan import Plan
from calibatt.methods import clusters
from calibatt.methods.catalogue import build
from calibatt.methods.clusters import Grouped
from calibatt.methods.site import Site
from calibatt.methods.svg2 import Svg2

# 1280 tokens: 20 clusters of 64
GEOMETRY = Geometry(grid=(5, 16, 16), heads=2, head_dim=8)
SMALL: dict[str, Any] = {"clusters": (8, 16), "block": (32, 16)}


def site(geometry: Geometry = GEOMETRY, **where: Any) -> Site:
    given: dict[str, Any] = {"step": 20, "steps": 50, "layer": 5, "layers": 40, "sigma": 0.5, "branch": "cond"}
    return Site(geometry=geometry, **{**given, **where})


def noise(geometry: Geometry = GEOMETRY, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q, k = torch.randn(2, geometry.heads, geometry.tokens, geometry.head_dim, generator=generator)
    return 2 * q, k


def qkv(geometry: Geometry = GEOMETRY, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """The same with values, which play no part."""
    q, k = noise(geometry, seed)
    return q, k, k


def made(preset: str = "no-warmup", **settings: Any) -> Svg2:
    return Svg2(replace(Svg2.presets[preset], **{**SMALL, **settings}))


def keep(plan: Plan) -> Tensor:
    assert plan.mask is not None
    return plan.mask.keep()


@pytest.fixture
def turns(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The centroids that each turn of k-means starts from."""
    seen: list[Tensor] = []
    original = clusters.assign

    def noted(x: Tensor, centroids: Tensor, *rest: Tensor) -> Grouped:
        seen.append(centroids)
        return original(x, centroids, *rest)

    monkeypatch.setattr(clusters, "assign", noted)
    return seen


def test_the_first_call_takes_more_turns_than_later_ones(turns: list[Tensor]) -> None:
    method = made(first_iterations=6, iterations=2, tolerance=0.0)
    for expected, step in ((6, 20), (2, 21), (2, 22)):
        turns.clear()
        method.plan(*qkv(), site(step=step))
        # of queries, then of keys
        assert [len(start[0]) for start in turns] == [8] * expected + [16] * expected


def test_a_later_call_starts_from_the_last_calls_centroids(turns: list[Tensor]) -> None:
    method = made(first_iterations=200)
    q, k = noise()
    first = method.plan(q, k, k, site(step=20)).order
    turns.clear()
    # k-means had come to an end on these tokens: it starts there, and the first turn shows that it may end
    later = method.plan(q, k, k, site(step=21)).order
    assert first is not None
    assert later is not None
    assert torch.equal(later.queries, first.queries)
    assert len(turns) == 2


@pytest.mark.parametrize("elsewhere", [{"branch": "uncond"}, {"sample": 1}, {"layer": 6}])
def test_each_branch_sample_and_layer_begins_anew(elsewhere: dict[str, Any], turns: list[Tensor]) -> None:
    method = made(first_iterations=4, tolerance=0.0)
    method.plan(*qkv(), site())
    turns.clear()
    method.plan(*qkv(), site(**elsewhere))
    assert len(turns) == 2 * 4
    turns.clear()
    # and what was there before goes on
    method.plan(*qkv(), site(step=21))
    assert len(turns) == 2 * 2


def test_a_reset_an_earlier_step_and_other_tokens_begin_anew(turns: list[Tensor]) -> None:
    method = made(first_iterations=4, tolerance=0.0)
    other = replace(GEOMETRY, grid=(16, 5, 16))
    method.plan(*qkv(), site())
    for again in (site(step=19), site(other)):
        turns.clear()
        method.plan(*qkv(), again)
        assert len(turns) == 2 * 4
    method.reset()
    turns.clear()
    method.plan(*qkv(), site(other, step=21))
    assert len(turns) == 2 * 4


def test_layers_and_seeds_draw_other_tokens(turns: list[Tensor]) -> None:
    starts = []
    for seed, layer in ((0, 5), (0, 5), (0, 6), (1, 5)):
        turns.clear()
        made(seed=seed).plan(*qkv(), site(layer=layer))
        starts.append(turns[0])
    assert torch.equal(starts[0], starts[1])
    assert not any(torch.equal(starts[0], other) for other in starts[2:])


@pytest.mark.parametrize(("preset", "dense"), [("default", 10), ("paper", 15), ("no-warmup", 0)])
def test_the_first_steps_and_layers_are_dense(preset: str, dense: int) -> None:
    method = made(preset)
    kinds = {step: method.plan(*qkv(), site(step=step)).kinds[0] for step in (0, dense - 1, dense) if step >= 0}
    assert kinds.pop(dense) == "masked"
    assert set(kinds.values()) <= {"dense"}
    # 0.03 of 40 layers is one, of 30 none
    first = [method.plan(*qkv(), site(step=30, layer=0, layers=layers)).kinds[0] for layers in (40, 30)]
    assert first == (["masked", "masked"] if preset == "no-warmup" else ["dense", "masked"])


def test_queries_see_the_clusters_that_point_their_way_wherever_their_tokens_lie() -> None:
    # tokens of four kinds in random order, each along its own axis: with clusters by kind, a query sees its own alone
    kinds = torch.arange(4).repeat_interleave(320)[torch.randperm(1280, generator=torch.Generator().manual_seed(0))]
    x = 8 * torch.eye(8)[kinds].expand(2, -1, -1)
    plan = made(clusters=(20, 20), mass=0.9, least_share=0.0).plan(x, x, x, site())
    assert plan.order is not None
    for head in range(2):
        queries, keys = (kinds[order[head].long()] for order in (plan.order.queries, plan.order.keys))
        mask = keep(plan)[head].repeat_interleave(32, 0).repeat_interleave(16, 1)
        # 320 of a kind are whole blocks, if no cluster mixes kinds
        assert torch.equal(mask, queries[:, None] == keys)


def test_the_least_share_is_kept_whatever_the_mass() -> None:
    q, k = noise()
    for share, count in ((0.0, 1), (0.1, 1), (0.25, 4), (1.0, 16)):
        kept = keep(made(mass=0.0, least_share=share, block=None).plan(q, k, k, site()))
        assert kept.sum(-1).unique().tolist() == [count]


def test_more_mass_keeps_all_that_less_keeps() -> None:
    last = torch.zeros(1, dtype=torch.bool)
    for mass in (0.0, 0.3, 0.6, 0.9, 1.0):
        kept = keep(made(mass=mass, least_share=0.0).plan(*qkv(), site()))
        assert not (last & ~kept).any()
        last = kept
    assert last.all()


def test_without_a_block_the_plan_is_of_the_clusters_that_blocks_cover() -> None:
    q, k = noise()
    covering = made(mass=0.3).plan(q, k, k, site())
    # a block that the caller wishes for is not one of clusters
    own = build("svg2", preset="clusters-no-warmup", block=(32, 16), clusters=(8, 16), mass=0.3).plan(q, k, k, site())
    assert isinstance(own.mask, VariableBlockMask)
    assert torch.equal(keep(covering), own.mask.cover((32, 16)).keep())
    assert keep(own).shape == (2, 8, 16)
    assert (own.density() < covering.density()).all()


@pytest.mark.parametrize("wrong", [{"mass": 1.1}, {"least_share": -0.1}, {"dense_steps": 2.0}, {"iterations": 0}])
def test_settings_that_make_no_sense_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"0 to 1: got Svg2Config|at least one cluster"):
        made(**wrong)
