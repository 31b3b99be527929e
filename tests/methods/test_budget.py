"""Budget's importances against fp64 and by hand, and how a budget is spent."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from calibatt.kernels.geometry import Geometry
from calibatt.kernels.mask import block_count, block_sizes
from calibatt.methods.base import Foreseen
from calibatt.methods.blocks import text_blocks
from calibatt.methods.budget import importance as importances
from calibatt.methods.budget.importance import (
    ALWAYS,
    LEVELS,
    Sample,
    importance,
    level_values,
    looked_at,
    to_importance,
    to_levels,
)
from calibatt.methods.budget.learner import BudgetLearner
from calibatt.methods.budget.method import Budget, BudgetConfig
from calibatt.methods.budget.sensitivity import sensitivity, step_groups
from calibatt.methods.budget.spending import Cut, alike_rows, scores
from calibatt.methods.facts import read_settings
from calibatt.methods.learning import CalibrationMismatch, Learnt
from calibatt.methods.site import Site

# 32 × 63 blocks of 32 × 16 tokens, the last of each axis shorter
GEOMETRY = Geometry(grid=(8, 5, 25), heads=3, head_dim=8)
TEXT = Geometry(grid=(6, 6, 27), heads=3, head_dim=8, text_tokens=28)
BLOCK = (32, 16)
STEPS, LAYERS = 3, 2
# a rounding of a quarter of a factor of two
ROUNDED = 2 ** (1 / 8)
SCOPES = ("all", "site", "row")

Learn = Callable[..., Learnt]
Tabled = Callable[..., Learnt]
Inputs = tuple[Tensor, Tensor, Tensor]


def site(geometry: Geometry = GEOMETRY, **where: Any) -> Site:
    given: dict[str, Any] = {"step": 0, "layer": 0, "sigma": 0.5, "branch": "cond", **where}
    return Site(geometry=geometry, steps=STEPS, layers=LAYERS, **given)


def config(preset: str = "default", **settings: Any) -> BudgetConfig:
    return replace(Budget.presets[preset], **{"block": BLOCK, **settings})


def qkv(seed: int, geometry: Geometry = GEOMETRY, sharpness: float = 2.0) -> Inputs:
    """Neighbouring tokens are alike, as in videos."""
    generator = torch.Generator().manual_seed(seed)
    shape = (3 * geometry.heads, geometry.head_dim, geometry.tokens // 24 + 2)
    smooth = torch.nn.functional.interpolate(
        torch.randn(shape, generator=generator), geometry.tokens, mode="linear"
    ).mT.unflatten(0, (3, -1))
    q, k, v = smooth + 0.3 * torch.randn(smooth.shape, generator=generator)
    return sharpness * q, k, v


def learnt_from(
    learn: Learn, settings: BudgetConfig, geometry: Geometry = GEOMETRY, seeds: Sequence[int] = (0,)
) -> Learnt:
    """Sites whose heads are sharper and sharper."""
    videos = {
        site(geometry, step=step, layer=layer, sigma=1 - step / STEPS): [
            qkv(100 * seed + 10 * step + layer, geometry, sharpness=1 + step + layer) for seed in seeds
        ]
        for step in range(STEPS)
        for layer in range(LAYERS)
    }
    return learn("budget", settings.learner(), videos)


def planned(method: Budget, geometry: Geometry = GEOMETRY, **where: Any) -> Tensor:
    mask = method.plan(*qkv(99, geometry), site(geometry, **where)).mask
    assert mask is not None
    return mask.keep()


def of_levels(tabled: Tabled, levels: Tensor, sensitivity: Tensor | None = None) -> Learnt:
    """A calibration with these levels at each step and layer; the first block of each row is always computed."""
    levels = levels.to(torch.uint8).contiguous()
    levels[..., 0] = ALWAYS
    sensitivity = torch.ones(STEPS, LAYERS) if sensitivity is None else sensitivity
    return tabled("budget", site(), {"levels": levels, "sensitivity": sensitivity}, config().learner())


# --- importance ------------------------------------------------------------------------------------------------------


def left_out(q: Tensor, k: Tensor, v: Tensor, block_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """In fp64: how far each output moves without each block, squared; attention to it; squared outputs."""
    q, k, v = q.double(), k.double(), v.double()
    weights = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1)
    out = weights @ v
    moved, mass = [], []
    for first in range(0, k.shape[1], block_k):
        rest = weights.clone()
        rest[..., first : first + block_k] = 0
        left = rest.sum(-1, keepdim=True)
        moved.append((rest / left @ v - out).square().sum(-1))
        mass.append(1 - left[..., 0])
    return torch.stack(moved, -1), torch.stack(mass, -1), out.square().sum(-1)


def test_importance_is_what_leaving_a_block_out_does_to_the_output_to_first_order(ragged: Geometry) -> None:
    q, k, v = qkv(0, ragged)
    moved, mass, squares = left_out(q, k, v, 40)
    # each query is a row: what is left is weighed up by 1 / (1 - p), which is 1 to first order
    found = importance([Sample(q, k, v)], block=(1, 40), queries=1, together=False)
    exact = moved * (1 - mass).square() / squares.mean()
    torch.testing.assert_close(found.double(), exact, rtol=1e-3, atol=1e-9)
    small = mass < 0.05
    assert small.any()
    torch.testing.assert_close(found.double()[small], (moved / squares.mean())[small], rtol=2.2 * 0.05, atol=1e-9)


def test_a_row_has_the_mean_of_its_queries_and_a_shorter_one_of_its_own(ragged: Geometry) -> None:
    q, k, v = qkv(1, ragged)
    rows = importance([Sample(q, k, v)], block=(1, 12), queries=1, together=False).split(17, dim=1)
    expected = torch.stack([one.mean(1) for one in rows], 1)
    torch.testing.assert_close(importance([Sample(q, k, v)], block=(17, 12), queries=17, together=False), expected)
    # more than there are
    torch.testing.assert_close(importance([Sample(q, k, v)], block=(17, 12), queries=40, together=False), expected)


def greedy(samples: Sequence[Inputs], block: tuple[int, int]) -> Tensor:
    """In fp64 and from the definition: try every block that is left, leave out the best, of each row by itself."""
    doubled = [[x.double() for x in qkv] for qkv in samples]
    weights = torch.cat([(q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1) for q, k, _ in doubled], 1)
    values = [v for *_, v in doubled]
    heads, tokens, _ = values[0].shape
    # all samples' queries of a block, one sample after the other
    rows = [
        torch.cat([torch.arange(first, min(tokens, first + block[0])) + n * tokens for n in range(len(samples))])
        for first in range(0, tokens, block[0])
    ]

    def outputs(some: Tensor, head: int) -> Tensor:
        return torch.cat([part @ v[head] for part, v in zip(some.chunk(len(values)), values, strict=True)])

    starts = range(0, tokens, block[1])
    found = torch.zeros(heads, len(rows), len(starts), dtype=torch.float64)
    for head in range(heads):
        for row, places in enumerate(rows):
            some = weights[head, places]
            mine = outputs(some, head)
            kept, error, most = list(range(len(starts))), 0.0, 0.0
            while len(kept) > 1:
                tried = {}
                for block_k in kept:
                    rest = torch.zeros_like(some)
                    for other in kept:
                        if other != block_k:
                            own = slice(starts[other], starts[other] + block[1])
                            rest[:, own] = some[:, own]
                    # all queries of the row are weighed up by what is left of their mean
                    moved = (outputs(rest, head) - rest.sum(-1, keepdim=True) * mine) / rest.sum(-1).mean()
                    tried[block_k] = moved.square().sum(-1).mean().item()
                best = min(tried, key=lambda one: tried[one])
                most = max(most, tried[best] - error)
                error = tried[best]
                found[head, row, best] = most
                kept.remove(best)
            found[head, row, kept[0]] = max(most, mine.square().sum(-1).mean().item() - error)
    each = [outputs(weights[head], head) for head in range(heads)]
    return found / torch.stack(each).square().sum(-1).mean()


@pytest.mark.parametrize("count", [1, 2])
def test_blocks_are_left_out_together_as_the_definition_has_it(ragged: Geometry, count: int) -> None:
    samples = [qkv(seed, ragged) for seed in range(count)]
    found = importance([Sample(*one) for one in samples], block=(64, 40), queries=64)
    torch.testing.assert_close(found.double(), greedy(samples, (64, 40)), rtol=1e-2, atol=1e-6)


def test_alone_the_importance_of_several_samples_is_their_mean() -> None:
    samples = [Sample(*qkv(seed)) for seed in range(3)]
    # in shares of the same
    whole = [((s.q @ s.k.mT / math.sqrt(8)).softmax(-1) @ s.v)[:, :1000].square().sum(-1).mean() for s in samples]
    every = {"block": (16, 16), "queries": 16, "together": False}
    each = torch.stack([importance([one], **every) * part for one, part in zip(samples, whole, strict=True)])
    expected = each.mean(0) / torch.stack(whole).mean()
    torch.testing.assert_close(importance(samples, **every), expected, rtol=1e-4, atol=1e-9)


def test_of_one_order_for_all_prompts_less_is_lost_than_of_each_ones_own() -> None:
    samples = [Sample(*qkv(seed)) for seed in range(4)]
    orders = {
        "beside": importance(samples, block=BLOCK, queries=BLOCK[0]),
        "apart": torch.stack([importance([one], block=BLOCK, queries=BLOCK[0]) for one in samples]).mean(0),
    }
    errors = {}
    for name, found in orders.items():
        keep = found >= found.flatten().quantile(0.65)
        keep |= found == found.amax(-1, keepdim=True)
        seen = keep.repeat_interleave(BLOCK[0], 1).repeat_interleave(BLOCK[1], 2)[:, :1000, :1000]
        lost = []
        for sample in samples:
            weights = (sample.q @ sample.k.mT / math.sqrt(8)).softmax(-1)
            rest = weights * seen
            lost.append((rest / rest.sum(-1, keepdim=True) @ sample.v - weights @ sample.v).square().mean())
        errors[name] = torch.stack(lost).mean()
    assert errors["beside"] < errors["apart"]


def test_together_errors_are_smaller_than_by_blocks_alone() -> None:
    q, k, v = qkv(8)
    weights = (q.double() @ k.double().mT / math.sqrt(q.shape[-1])).softmax(-1)
    errors = {}
    for together in (True, False):
        found = importance([Sample(q, k, v)], block=BLOCK, queries=BLOCK[0], together=together)
        keep = found >= found.flatten().quantile(0.75)
        keep |= found == found.amax(-1, keepdim=True)
        seen = keep.repeat_interleave(BLOCK[0], 1).repeat_interleave(BLOCK[1], 2)[:, : q.shape[1], : k.shape[1]]
        rest = weights * seen
        errors[together] = (rest / rest.sum(-1, keepdim=True) @ v.double() - weights @ v.double()).square().mean()
    assert errors[True] < 0.7 * errors[False]


def test_columns_that_are_always_computed_are_not_candidates() -> None:
    q, k, v = qkv(9)
    some = importance([Sample(q, k, v, columns=slice(2, 9))], block=(64, 100), queries=8)
    whole = importance([Sample(q, k, v)], block=(64, 100), queries=8)
    assert some.shape == whole[..., 2:9].shape
    # what never goes leaves more attention, so that the rest costs less
    assert some.median() < whole[..., 2:9].median()


def test_importance_has_no_unit() -> None:
    q, k, v = qkv(2)
    torch.testing.assert_close(
        importance([Sample(q, k, 64 * v)], block=BLOCK, queries=8),
        importance([Sample(q, k, v)], block=BLOCK, queries=8),
    )


def test_a_block_of_values_like_the_output_can_be_left_out_however_much_attention_it_has() -> None:
    q, k, v = qkv(3)
    v = torch.ones_like(v)
    found = importance([Sample(q, k, v)], block=BLOCK, queries=8)
    # one has to stay
    assert (found.sort(-1).values[..., :-1] < 1e-9).all()
    assert (importance([Sample(q, k, v)], block=BLOCK, queries=8, together=False) < 1e-12).all()
    # and where there is no output, nothing is important
    assert not importance([Sample(q, k, 0 * v)], block=BLOCK, queries=8).any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_single(dtype: torch.dtype) -> None:
    halves = [x.to(dtype) for x in qkv(4)]
    found = importance([Sample(*halves)], block=BLOCK, queries=8)
    assert found.dtype == torch.float32
    assert torch.equal(found, importance([Sample(*(x.float() for x in halves))], block=BLOCK, queries=8))


def test_how_much_is_held_at_a_time_plays_no_part(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = importance([Sample(*qkv(5))], block=BLOCK, queries=8)
    monkeypatch.setattr(importances, "CHUNK", 1)
    torch.testing.assert_close(importance([Sample(*qkv(5))], block=BLOCK, queries=8), whole)


def test_queries_are_the_middles_of_equal_parts_and_a_short_block_has_its_own() -> None:
    place, real = looked_at(tokens=35, block=16, queries=4)
    assert place.tolist() == [[2, 6, 10, 14], [18, 22, 26, 30], [32, 33, 34, 34]]
    assert real.tolist() == [[True] * 4, [True] * 4, [True, True, True, False]]
    place, real = looked_at(tokens=5, block=8, queries=100)
    assert place[real].tolist() == [0, 1, 2, 3, 4]


def test_eight_queries_of_a_block_tell_nearly_what_all_of_them_tell() -> None:
    q, k, v = qkv(6, replace(GEOMETRY, grid=(8, 16, 16)))
    some, every = (importance([Sample(q, k, v)], block=(64, 64), queries=queries).double() for queries in (8, 64))
    off = (some / every).log2().abs()
    # what a byte may be off is below what is off by sampling, and both are far below how blocks differ
    assert math.log2(ROUNDED) < off.median() < every.log2().std() / 4
    # at a density of 0.35, the blocks that are chosen hold nearly as much
    budget = round(0.35 * every.numel())
    held = [every.flatten()[by.flatten().topk(budget).indices].sum() for by in (some, every)]
    assert held[0] > 0.97 * held[1]


# --- bytes -----------------------------------------------------------------------------------------------------------


def test_a_byte_is_off_by_an_eighth_of_a_factor_of_two() -> None:
    values = torch.logspace(-47.9, 15.2, 5000, base=2, dtype=torch.float64).view(1, 50, 100)
    off = to_importance(to_levels(values)) / values
    assert 1 / ROUNDED * (1 - 1e-12) <= off.min() < 0.92
    assert 1.08 < off.max() <= ROUNDED * (1 + 1e-12)


def test_levels_are_kept_as_they_are() -> None:
    levels = torch.arange(LEVELS, dtype=torch.uint8).view(1, 16, 16)
    assert torch.equal(to_levels(to_importance(levels)), levels)
    assert torch.equal(to_levels(to_importance(levels).float()), levels)


def test_what_lies_beyond_the_scale_is_nothing_or_the_most_and_never_always() -> None:
    ends = torch.tensor([[[0.0, 2.0**-60, 2.0**40, math.inf]]])
    assert to_levels(ends).tolist() == [[[0, 0, ALWAYS - 1, ALWAYS]]]


# --- learning --------------------------------------------------------------------------------------------------------


def test_a_note_is_importance_for_what_a_block_costs() -> None:
    q, k, v = qkv(7)
    note = config().learner().note(q, k, v, site(), 0)
    expected = importance([Sample(q, k, v)], block=BLOCK, queries=8) / (block_sizes(GEOMETRY.tokens, 16) / 16)
    assert torch.equal(note["levels"], to_levels(expected))
    # the last block of keys has a half
    assert not torch.equal(
        note["levels"][..., -1], to_levels(importance([Sample(q, k, v)], block=BLOCK, queries=8))[..., -1]
    )


def test_the_block_that_a_row_always_has_is_none_that_text_leaves_over() -> None:
    levels = torch.tensor([[[3, 9, 5, ALWAYS], [7, 2, 2, ALWAYS]]], dtype=torch.uint8)
    merged = config().learner().merge([{"levels": levels}])["levels"]
    assert merged.tolist() == [[[3, ALWAYS, 5, ALWAYS], [ALWAYS, 2, 2, ALWAYS]]]


@pytest.mark.parametrize("over_prompts", ["mean", "max"])
def test_prompts_come_to_their_mean_or_their_largest(over_prompts: Literal["mean", "max"]) -> None:
    learner = replace(config().learner(), over_prompts=over_prompts)
    notes = [learner.note(*qkv(seed), site(), seed) for seed in range(3)]
    each = torch.stack([to_importance(note["levels"]) for note in notes])
    common = each.mean(0) if over_prompts == "mean" else each.amax(0)
    levels = learner.merge(notes)["levels"]
    best = torch.zeros_like(levels, dtype=torch.bool).scatter_(-1, common.argmax(-1, keepdim=True), True)
    assert torch.equal(levels == ALWAYS, best)
    off = (to_importance(levels) / common)[~best]
    assert (off.log2().abs() <= 1 / 8 + 1e-12).all()
    # the largest is one of the levels there are
    assert bool((off == 1).all()) == (over_prompts == "max")


def test_the_order_of_the_prompts_plays_no_part() -> None:
    learner = config().learner()
    notes = [learner.note(*qkv(seed), site(), seed) for seed in range(3)]
    assert torch.equal(learner.merge(notes)["levels"], learner.merge(notes[::-1])["levels"])


@pytest.mark.parametrize("side", ["first", "last"])
def test_prompts_of_several_lengths_share_a_table_and_text_is_always_computed(side: Any, learn: Learn) -> None:
    long, short = (replace(TEXT, text_tokens=text, text_side=side) for text in (28, 9))
    learner = config().learner()
    notes = [learner.note(*qkv(0, one), site(one), 0) for one in (long, short)]
    shape = (3, *(block_count(TEXT.video_tokens, size) for size in BLOCK))
    assert learner.merge(notes)["levels"].shape == shape
    method = Budget(config(density=0.0), learnt_from(learn, config(), long))
    for geometry in (long, short):
        keep = planned(method, geometry)
        text = text_blocks(geometry, BLOCK)
        assert keep[:, text].all()
        # in some rows the blocks without text are all but one left out
        assert (~keep).any()


@pytest.mark.parametrize("side", ["first", "last"])
def test_prompts_of_several_lengths_are_noted_as_one_in_the_blocks_that_all_have(side: Any) -> None:
    texts = (28, 9, 0)
    calls = []
    for seed, text in enumerate(texts):
        geometry = replace(TEXT, text_tokens=text, text_side=side)
        calls.append((*qkv(seed, geometry), site(geometry)))
    learner = config().learner()
    levels = learner.note_together(calls)["levels"]
    assert levels.shape == (3, *(block_count(TEXT.video_tokens, size) for size in BLOCK))
    # of 972 tokens of video, whole blocks where text follows; the last may be shorter where it ends the sequence
    rows, columns = {"last": (30, 60), "first": (30, 61)}[side]
    assert (levels[:, :rows, :columns] != ALWAYS).all()
    assert (levels[:, rows:] == ALWAYS).all()
    assert (levels[..., columns:] == ALWAYS).all()
    # whatever their order
    assert torch.equal(levels, learner.note_together(calls[::-1])["levels"])


# --- spending --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("geometry", [GEOMETRY, TEXT, replace(TEXT, text_side="first")], ids=str)
@pytest.mark.parametrize("preset", Budget.presets)
def test_the_density_is_met_within_a_fiftieth_and_known_beforehand(
    preset: str, geometry: Geometry, learn: Learn
) -> None:
    learnt = learnt_from(learn, config(preset), geometry, seeds=(0, 1))
    for density in (0.15, 0.25, 0.35, 0.5, 0.7, 0.9):
        method = Budget(config(preset, density=density), learnt)
        assert isinstance(method, Foreseen)
        sites = [site(geometry, step=step, layer=layer) for step in range(STEPS) for layer in range(LAYERS)]
        plans = [method.plan(*qkv(99, geometry), where) for where in sites]
        found = torch.stack([plan.density() for plan in plans])
        assert method.mean_density() == pytest.approx(found.mean().item())
        assert found.mean().item() == pytest.approx(density, rel=0.02)
        assert all(plan.mask is not None and bool(plan.mask.keep().any(-1).all()) for plan in plans)
        if geometry.text_tokens:
            # a prompt of less text
            short = replace(geometry, text_tokens=geometry.text_tokens - 3)
            plans = [method.plan(*qkv(99, short), replace(where, geometry=short)) for where in sites]
            own = torch.stack([plan.density() for plan in plans]).mean().item()
            assert method.mean_density(short.text_tokens) == pytest.approx(own)
        if preset in ("site", "rows"):
            # at every site by itself
            assert found.mean(1).tolist() == pytest.approx([density] * len(sites), rel=0.02)


@pytest.mark.parametrize("scope", SCOPES)
def test_equally_important_blocks_are_shared_out_evenly(scope: Any, tabled: Tabled) -> None:
    learnt = of_levels(tabled, torch.full((STEPS, LAYERS, 3, 32, 63), 100))
    method = Budget(config(scope=scope, density=0.35), learnt)
    assert method.mean_density() == pytest.approx(0.35, rel=0.002)
    keep = torch.stack([planned(method, step=s, layer=y) for s in range(STEPS) for y in range(LAYERS)]).float()
    # over sites, heads, rows, and blocks of a row but the first
    assert keep.mean((1, 2, 3)).tolist() == pytest.approx([0.35] * 6, rel=0.01)
    assert keep.mean((0, 2, 3)).tolist() == pytest.approx([0.35] * 3, rel=0.01)
    assert (keep.mean((0, 1, 3)) - 0.35).abs().max() < 0.02


@pytest.mark.parametrize("preset", Budget.presets)
def test_without_any_budget_the_most_important_block_of_each_row_stays(preset: str, learn: Learn) -> None:
    learnt = learnt_from(learn, config(preset), seeds=(0, 1))
    assert torch.equal(planned(Budget(config(preset, density=0.0), learnt)), learnt.at("levels", site()) == ALWAYS)
    assert planned(Budget(config(preset, density=1.0), learnt)).all()
    # one of each
    assert (learnt.at("levels", site()) == ALWAYS).sum(-1).eq(1).all()


@pytest.mark.parametrize("preset", Budget.presets)
def test_masks_only_grow_with_the_density(preset: str, learn: Learn) -> None:
    learnt = learnt_from(learn, config(preset))
    for step, layer in ((0, 0), (STEPS - 1, 1)):
        # a step of a thousandth moves within one level
        masks = [
            planned(Budget(config(preset, density=share), learnt), step=step, layer=layer)
            for share in (0.1, 0.35, 0.351, 0.352, 0.7)
        ]
        assert all(bool((one <= more).all()) for one, more in pairwise(masks))


def test_all_other_blocks_are_no_more_important_than_those_that_are_computed(learn: Learn) -> None:
    learnt = learnt_from(learn, config())
    method = Budget(config(), learnt)
    levels = learnt.tables["levels"].flatten(0, 1)
    keep = torch.stack([planned(method, step=step, layer=layer) for step in range(STEPS) for layer in range(LAYERS)])
    assert levels[keep].min() >= levels[~keep].max()
    # where each site has its own budget, that holds within sites alone
    apart = Budget(config("site"), learnt)
    keep = torch.stack([planned(apart, step=step, layer=layer) for step in range(STEPS) for layer in range(LAYERS)])
    assert levels[keep].min() < levels[~keep].max()
    assert all(one[kept].min() >= one[~kept].max() for one, kept in zip(levels, keep, strict=True))


def test_the_budget_goes_to_the_site_and_the_head_that_are_more_important(tabled: Tabled) -> None:
    levels = torch.arange(63).expand(STEPS, LAYERS, 3, 32, 63).clone()
    levels[0, 1] += 30
    levels[:, :, 2] += 15
    learnt = of_levels(tabled, levels)
    densities = {}
    for scope in SCOPES:
        method = Budget(config(scope=scope), learnt)
        densities[scope] = {
            where: planned(method, layer=where).float().mean((1, 2)).tolist() for where in range(LAYERS)
        }
    assert densities["all"][1][0] > densities["all"][0][0] + 0.3
    for scope in ("all", "site"):
        assert densities[scope][0][2] > densities[scope][0][0] + 0.1
    assert densities["row"][0] == pytest.approx([0.35] * 3, rel=0.05)


def test_rows_by_themselves_have_equally_many_blocks_but_for_rounding(learn: Learn) -> None:
    learnt = learnt_from(learn, config("rows"))
    keep = planned(Budget(config("rows"), learnt))
    # 350 of 1000 in each, in blocks of 16
    keys = (keep * block_sizes(GEOMETRY.tokens, BLOCK[1])).sum(-1)
    assert (keys - 350).abs().max() < 16
    ours = planned(Budget(config(), learnt)).sum(-1)
    assert ours.max() > ours.min() + 5


def test_the_rest_of_a_row_is_rounded_up_as_often_as_is_due() -> None:
    levels = torch.tensor([ALWAYS, 5, 9, 7]).to(torch.uint8).expand(2, 500, 4)
    keep = alike_rows(levels, torch.tensor([16, 16, 16, 16]), 2.25 * 16)
    assert keep[..., [0, 2]].all()
    assert keep[..., 3].float().mean().item() == pytest.approx(0.25, abs=0.01)
    assert not keep[..., 1].any()


def test_levels_at_the_edge_have_the_share_that_is_left() -> None:
    cost = torch.tensor([[[4.0, 3.0, 2.0, 1.0]], [[0.0, 3.0, 2.0, 1.0]]], dtype=torch.float64)
    score = torch.tensor([-math.inf, 1, 2, math.inf], dtype=torch.float64).expand(2, 4)
    # of 16, 2 are always computed; 6.5 take the 4 of score 2, and a half of one of the 6 of score 1
    cut = Cut.at(cost.long(), cost, score, density=6.5 / 16, together=True)
    assert cut.above[0, 0].tolist() == [False, False, True, True]
    assert cut.edge[0, 0].tolist() == [False, True, False, False]
    assert cut.share.flatten().tolist() == pytest.approx([0.5 / 6] * 2)
    assert cut.before.flatten().tolist() == [0, 3]


def test_a_step_counts_by_its_sensitivity(tabled: Tabled) -> None:
    sensitivity = torch.tensor([4.0, 1.0, 4.0], dtype=torch.float64)
    score = scores(sensitivity)
    # two powers of two are eight levels
    assert (score[0, 1:ALWAYS] - score[1, 1:ALWAYS]).tolist() == [8.0] * (ALWAYS - 1)
    assert torch.equal(score[2], score[0])
    assert (score[:, 0] == -math.inf).all()
    assert (score[:, ALWAYS] == math.inf).all()
    levels = torch.arange(63).expand(STEPS, LAYERS, 3, 32, 63).clone()
    learnt = of_levels(tabled, levels, sensitivity.float()[:, None].repeat(1, LAYERS))
    method = Budget(config(), learnt)
    found = [planned(method, step=step).float().mean().item() for step in range(STEPS)]
    assert found[0] > found[1] + 0.1
    assert found[0] == pytest.approx(found[2], abs=0.01)
    unweighed = [planned(Budget(config("unweighed"), learnt), step=step).float().mean() for step in range(STEPS)]
    assert max(unweighed) - min(unweighed) < 0.01


# --- trials ----------------------------------------------------------------------------------------------------------


def test_every_step_is_tried_out_once_and_the_first_by_themselves() -> None:
    for steps in (1, 4, 20, 50):
        groups = step_groups(steps)
        assert [step for group in groups for step in group] == list(range(steps))
        assert [len(group) for group in groups[:4]] == [1] * min(4, steps)
    assert (len(step_groups(20)), len(step_groups(50))) == (10, 14)


def test_sensitivity_is_how_far_videos_come_out_for_the_error_that_was_made() -> None:
    left_out = torch.tensor([1.0, 2.0, 3.0, 5.0], dtype=torch.float64)
    groups = [range(1), range(1, 2), range(2, 4)]
    # a video a thousand times as far as the other counts as some thirty times
    distances = torch.tensor([[0.1, 0.1], [0.2, 200.0], [0.08, 0.08]])
    found = sensitivity(distances, left_out, groups)
    expected = torch.tensor([0.1, 0.1 * 1000**0.5, 0.01, 0.01])
    torch.testing.assert_close(found, expected / expected.log().mean().exp())
    # where nothing is left out, nothing moves: as sensitive as what rounding hides
    assert sensitivity(torch.zeros(3, 2), torch.zeros(4), groups).tolist() == [1.0] * 4


def test_a_trial_has_masks_at_its_steps_and_is_dense_at_all_others(learn: Learn) -> None:
    learnt = learnt_from(learn, config())
    trials = Budget.trials(learnt)
    assert trials is not None
    assert trials.prompts == 2
    method = Budget(config("unweighed"), learnt)
    for step, planner in enumerate(trials.planners):
        for where in range(STEPS):
            mask = planner.plan(*qkv(99), site(step=where)).mask
            if where == step:
                assert mask is not None
                assert torch.equal(mask.keep(), planned(method, step=where))
            else:
                assert mask is None
    # the same distance at every step: the less was left out, the more sensitive
    learnt_tables = trials.learn(torch.ones(STEPS, 2))
    keep = torch.stack([torch.stack([planned(method, step=s, layer=y) for y in range(LAYERS)]) for s in range(STEPS)])
    value = level_values()[learnt.tables["levels"].int()].nan_to_num(posinf=0.0)
    inverse = 1 / (value * ~keep).flatten(1).sum(-1)
    expected = (inverse / inverse.log().mean().exp()).float()
    # at the edge of the budget, shares of a level are counted in place of blocks
    torch.testing.assert_close(learnt_tables["sensitivity"], expected[:, None].repeat(1, LAYERS), rtol=0.02, atol=0)
    check_tables(replace(learnt, tables={**learnt.tables, **learnt_tables}))
    assert Budget.trials(learnt_from(learn, config(trials=0))) is None


# --- where and when --------------------------------------------------------------------------------------------------


def test_both_branches_share_a_mask_that_is_made_once(learn: Learn) -> None:
    made = Budget(config(), learnt_from(learn, config()))
    q, k, v = qkv(3)
    first = made.plan(q, k, v, site())
    made.reset()
    assert made.plan(k, q, v, site(branch="uncond")) is first


def test_more_text_than_was_watched_is_refused_in_one_line(learn: Learn) -> None:
    made = Budget(config(), learnt_from(learn, config(), TEXT))
    longer = replace(TEXT, text_tokens=40)
    with pytest.raises(CalibrationMismatch, match=r"^what budget learnt is for .*28 tokens.* run `calibatt"):
        made.plan(*qkv(1, longer), site(longer))


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"density": -0.1}, "density is a share"), ({"density": 1.1}, "density is a share"),
        ({"density": math.nan}, "density is a share"), ({"queries": 0}, "got queries=0"),
        ({"block": (0, 16)}, "at least one token"), ({"trials": -1}, "got trials=-1"),
    ],
    ids=str,
)  # fmt: skip
def test_settings_that_make_no_sense_are_refused(wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says) as error:
        config(**wrong)
    assert "\n" not in str(error.value)


def check_tables(learnt: Learnt) -> None:
    """As a calibration does."""
    Budget.check_tables(learnt)
    for name, table in learnt.tables.items():
        for part in table.flatten(0, 1):
            try:
                Budget.check_part(name, part, learnt.settings, learnt.provenance.geometry)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: {**t, "levels": t["levels"].clamp(max=ALWAYS - 1)}, "levels: a row has no block"),
        (lambda t: {**t, "levels": t["levels"][..., 1:]}, r"levels: \[3, 32, 63\] of torch.uint8 at every site, not"),
        (lambda t: {**t, "levels": t["levels"].int()}, "levels: .*uint8.*not .*int32"),
        (lambda t: {**t, "sensitivity": t["sensitivity"] / 0}, "sensitivity: a factor is not above 0, or not finite"),
        (lambda t: {**t, "sensitivity": 0 * t["sensitivity"]}, "sensitivity: a factor is not above 0, or not finite"),
        (lambda t: {**t, "more": t["levels"]}, "tables: Budget has levels, sensitivity, not levels, sensitivity, more"),
        (lambda t: {}, "tables: Budget has levels, sensitivity, not none"),
    ],
    ids=["row", "shape", "dtype", "not finite", "zero", "more", "none"],
)
def test_tables_that_budget_cannot_have_learnt_are_refused_by_name(
    change: Callable[[dict[str, Tensor]], dict[str, Tensor]], says: str, learn: Learn
) -> None:
    learnt = learnt_from(learn, config())
    check_tables(learnt)
    with pytest.raises(ValueError, match=says) as error:
        check_tables(replace(learnt, tables=change(dict(learnt.tables))))
    assert "\n" not in str(error.value)


def test_a_learner_is_read_from_its_settings(learn: Learn) -> None:
    learnt = learnt_from(learn, config())
    assert read_settings(BudgetLearner, learnt.settings) == config().learner()
    with pytest.raises(ValueError, match="over_prompts"):
        Budget.check_tables(replace(learnt, settings={**learnt.settings, "over_prompts": "least"}))
