"""DFSAttn's choice on attention that is known part by part, and what it keeps between searches."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from calibatt.kernels.geometry import Geometry
from calibatt.kernels.plan import Plan
from calibatt.methods.blocks import pooled
from calibatt.methods.curves import curve_order
from calibatt.methods.dfs import Dfs
from calibatt.methods.site import Site

# eight octants of 64 tokens, one after the other along the curve
GEOMETRY = Geometry(grid=(8, 8, 8), heads=1, head_dim=4)
SMALL: dict[str, Any] = {"block": (64, 64)}
Inputs = tuple[Tensor, Tensor, Tensor]


def site(step: int = 20, *, geometry: Geometry = GEOMETRY, steps: int = 50, layer: int = 5, **where: Any) -> Site:
    return Site(
        geometry=geometry, step=step, steps=steps, sigma=0.5, layer=layer, layers=40, **({"branch": "cond"} | where)
    )  # fmt: skip


def made(preset: str = "no-warmup", **settings: Any) -> Dfs:
    return Dfs(replace(Dfs.presets[preset], **(SMALL | settings)))


def noise(geometry: Geometry = GEOMETRY, seed: int = 0) -> Inputs:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = torch.randn(3, geometry.heads, geometry.tokens, geometry.head_dim, generator=generator)
    return 4 * q, k, v


def keep_of(plan: Plan) -> Tensor:
    assert plan.mask is not None
    return plan.mask.keep()


def one_search(density: float, **settings: Any) -> Dfs:
    return made(search_steps=(0.0,), densities=(density,), **settings)


def by_part(weights: list[float]) -> Inputs:
    """Queries all alike, and keys so that attention to the parts of 16 tokens, along the curve, is in these weights."""
    q, k = torch.zeros(2, 1, 512, 4)
    q[..., 0] = 4**0.5
    k[:, curve_order(GEOMETRY, "video")[0].long(), 0] = torch.tensor(weights).log().repeat_interleave(16)
    return q, k, k


def test_a_block_counts_by_its_parts_and_not_by_their_mean() -> None:
    # of block 2, one part has much and three have next to nothing: the mean key of block 5 fits better
    weights = [1.0] * 32
    weights[8:12] = [30.0, 0.01, 0.01, 0.01]
    weights[20:24] = [3.0] * 4
    q, k, v = by_part(weights)
    order = curve_order(GEOMETRY, "video")[0].long()
    scores = pooled(q[:, order], 64) @ pooled(k[:, order], 64).mT
    assert scores[0, 0].argmax() == 5
    kept = keep_of(one_search(1 / 8).plan(q, k, v, site()))[0]
    assert torch.equal(kept, (torch.arange(8) == 2).expand(8, -1))
    assert torch.equal(keep_of(one_search(2 / 8).plan(q, k, v, site()))[0, 0].nonzero().flatten(), torch.tensor([2, 5]))


def test_a_row_keeps_the_blocks_with_the_most_attention_between_parts() -> None:
    geometry = replace(GEOMETRY, heads=2)
    q, k, v = noise(geometry)
    order = curve_order(geometry, "video")[0].long()
    parts_q, parts_k = (x[:, order].double().unflatten(1, (32, 16)).mean(2) for x in (q, k))
    weights = (parts_q @ parts_k.mT / 2).softmax(-1)
    # query blocks of four parts, key blocks of two
    mass = weights.unflatten(2, (16, 2)).sum(-1).unflatten(1, (8, 4)).sum(2)
    expected = torch.zeros_like(mass, dtype=torch.bool).scatter(-1, mass.topk(5).indices, True)
    plan = one_search(5 / 16, block=(64, 32)).plan(q, k, v, site(geometry=geometry))
    assert torch.equal(keep_of(plan), expected)
    assert plan.order is not None
    assert plan.order.shared
    assert torch.equal(plan.order.queries[0].long(), order)
    assert plan.remainder == "none"


# eight blocks times the density: 0.8, 1.6, 2.4, 4
@pytest.mark.parametrize(("density", "count"), [(0.0, 1), (0.1, 1), (0.2, 1), (0.3, 2), (0.5, 4), (1.0, 8)])
def test_the_number_of_blocks_is_rounded_down_and_one_at_least(density: float, count: int) -> None:
    kept = keep_of(one_search(density).plan(*noise(), site()))
    assert (kept.sum(-1) == count).all()


def test_of_fifty_steps_twelve_are_dense_and_each_twelve_more_are_sparser() -> None:
    method = made("default", block=(16, 16))
    counts = []
    for step in range(50):
        plan = method.plan(*noise(seed=step), site(step))
        counts.append(0 if plan.mask is None else int(keep_of(plan)[0, 0].sum()))
    # of 32 blocks
    assert counts == [0] * 12 + [9] * 12 + [6] * 12 + [3] * 14


@pytest.mark.parametrize(
    ("steps", "counts"),
    [(8, [0, 0, 9, 9, 6, 6, 3, 3]), (4, [0, 9, 6, 3]), (2, [9, 3]), (1, [6])],
)
def test_fewer_steps_have_the_same_shares(steps: int, counts: list[int]) -> None:
    method = made("default", block=(16, 16))
    plans = [method.plan(*noise(), site(step, steps=steps)) for step in range(steps)]
    assert [0 if plan.mask is None else int(keep_of(plan)[0, 0].sum()) for plan in plans] == counts


def test_a_mask_is_kept_until_the_next_search_and_is_each_branchs_own() -> None:
    method = made("default")
    first = method.plan(*noise(seed=1), site(12))
    assert all(method.plan(*noise(seed=step), site(step)) is first for step in range(13, 24))
    other = method.plan(*noise(seed=2), site(12, branch="uncond"))
    assert not torch.equal(keep_of(other), keep_of(first))
    again = method.plan(*noise(seed=3), site(24))
    assert torch.equal(keep_of(again), keep_of(made("default").plan(*noise(seed=3), site(24))))
    method.reset()
    assert torch.equal(keep_of(method.plan(*noise(seed=4), site(30))), keep_of(made().plan(*noise(seed=4), site(30))))


def test_the_first_layer_is_dense() -> None:
    assert [made("default").plan(*noise(), site(20, layer=layer)).kinds[0] for layer in (0, 1)] == ["dense", "masked"]
    assert made("no-warmup").plan(*noise(), site(0, layer=0)).kinds[0] == "masked"


def test_a_larger_scale_keeps_all_that_a_smaller_keeps_and_the_knob_reaches_everything(
    all_ragged: tuple[Geometry, ...],
) -> None:
    assert Dfs.knob is not None
    for geometry in all_ragged:
        last = torch.zeros(1, dtype=torch.bool)
        for scale in (Dfs.knob.low, 0.5, 1.0, 2.0, 5.0, Dfs.knob.high):
            # the sparsest part of the schedule
            kept = keep_of(made(scale=scale, block=(32, 16)).plan(*noise(geometry), site(49, geometry=geometry)))
            assert kept.any(-1).all()
            assert not (last & ~kept).any()
            last = kept
        assert last.all()


@pytest.mark.parametrize("side", ["first", "last"])
def test_blocks_with_text_are_always_on(side: Any) -> None:
    # 80 tokens of text are a block of 64 and a part of the next
    geometry = Geometry(grid=(8, 8, 8), heads=1, head_dim=4, text_tokens=80, text_side=side)
    kept = keep_of(one_search(0.0).plan(*noise(geometry), site(geometry=geometry)))[0]
    text = torch.arange(10) < 2 if side == "first" else torch.arange(10) >= 8
    assert kept[text].all()
    assert kept[:, text].all()
    assert (kept[~text][:, ~text].sum(-1) == 1).all()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"search_steps": (0.5, 0.2, 0.8)}, "search steps are ascending shares"),
        ({"densities": (0.3, 0.2)}, "one density from 0 to 1 for each of"),
        ({"densities": (0.3, 0.2, 1.1)}, "one density from 0 to 1 for each of"),
        ({"scale": float("nan")}, "not negative"),
        ({"block": (64, 40)}, r"whole parts of 16 tokens: got \(64, 40\), set `part`"),
    ],
)
def test_settings_that_make_no_sense_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        made(**wrong)
