"""Budget's importances, levels and cuts, against what leaving a block out does."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from calibatt.kernels.geometry import Geometry
from calibatt.methods.budget import (
    ALWAYS,
    LEVELS,
    Budget,
    BudgetConfig,
    Cut,
    cut_at,
    from_levels,
    level_shares,
    most_of_each_row,
    output_importance,
    to_levels,
    within,
)
from calibatt.methods.learning import Learnt
from calibatt.methods.site import Site

# 5 × 10 blocks of 32 × 16, the last of each shorter
GEOMETRY = Geometry(grid=(3, 5, 10), heads=2, head_dim=8)
BLOCK = (32, 16)
SITES = [
    Site(geometry=GEOMETRY, step=step, steps=2, sigma=0.5, branch="cond", layer=layer, layers=2)
    for step in range(2)
    for layer in range(2)
]
Learn = Callable[..., Learnt]


def config(preset: str = "default", **settings: Any) -> BudgetConfig:
    return replace(Budget.presets[preset], **{"block": BLOCK, **settings})


def qkv(seed: int, geometry: Geometry = GEOMETRY, sharpness: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Neighbouring tokens are alike, as in videos."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(3, geometry.heads, geometry.head_dim, geometry.tokens // 12, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse.flatten(0, 1), geometry.tokens, mode="linear").view(
        *coarse.shape[:3], -1
    )
    q, k, v = smooth.mT + 0.2 * torch.randn(3, geometry.heads, geometry.tokens, geometry.head_dim, generator=generator)
    return sharpness * q, sharpness * k, v


@pytest.fixture
def learnt(learn: Learn) -> Learnt:
    """Of two prompts; attention is sharper in later sites."""
    videos = {
        site: [qkv(10 * number + prompt, sharpness=1 + number) for prompt in range(2)]
        for number, site in enumerate(SITES)
    }
    return learn("budget", Budget.learner(config()), videos)


def exact_importance(q: Tensor, k: Tensor, v: Tensor, *, drop: float) -> Tensor:
    """What a share `drop` less weight on a block does to the output, squared, over `drop` squared; all queries."""
    q, k, v = q.double(), k.double(), v.double()
    weights = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1)
    output = weights @ v
    columns = math.ceil(k.shape[1] / BLOCK[1])
    found = []
    for column in range(columns):
        part = slice(column * BLOCK[1], (column + 1) * BLOCK[1])
        less = weights.clone()
        less[..., part] *= 1 - drop
        change = (less / less.sum(-1, keepdim=True)) @ v - output
        squared = change.square().sum(-1) / drop**2
        found.append(torch.stack([rows.mean(-1) for rows in squared.split(BLOCK[0], -1)], -1))
    return torch.stack(found, -1) / output.square().sum(-1).mean()


# --- importance ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_importance_is_what_the_output_moves_by_for_a_little_weight_taken_off_a_block(seed: int) -> None:
    q, k, v = qkv(seed)
    # so many queries that each is looked at; of the last, shorter block some twice, which weighs them more
    found = output_importance(q, k, v, block=BLOCK, queries=BLOCK[0])
    expected = exact_importance(q, k, v, drop=1e-6)
    # the layer's mean output counts the last block's queries twice too
    scale = found[:, :4].sum() / expected[:, :4].sum()
    assert 0.9 < scale < 1.1
    torch.testing.assert_close(found[:, :4].double(), expected[:, :4] * scale, rtol=1e-3, atol=1e-7)


def test_a_block_whose_values_are_the_output_has_no_importance_whatever_its_mass() -> None:
    q, k, _ = qkv(0)
    v = torch.ones(1, 1, GEOMETRY.head_dim).expand_as(q)
    assert output_importance(q, k, v, block=BLOCK, queries=4).max() < 1e-9


def test_a_few_queries_of_a_block_stand_for_all() -> None:
    q, k, v = qkv(0, Geometry(grid=(8, 10, 16), heads=2, head_dim=8))
    whole = output_importance(q, k, v, block=(128, 128), queries=128)
    errors = [
        ((output_importance(q, k, v, block=(128, 128), queries=count) - whole).abs().sum() / whole.sum()).item()
        for count in (4, 8, 16, 32)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[1] < 0.5


def test_outputs_of_zeros_have_nothing_to_lose() -> None:
    q, k, _ = qkv(0)
    assert not output_importance(q, k, torch.zeros_like(q), block=BLOCK, queries=4).any()


def test_half_precision_is_computed_in_fp32() -> None:
    q, k, v = (x.bfloat16() for x in qkv(0))
    rounded = output_importance(q, k, v, block=BLOCK, queries=8)
    torch.testing.assert_close(
        rounded, output_importance(q.float(), k.float(), v.float(), block=BLOCK, queries=8), rtol=1e-4, atol=1e-7
    )


# --- levels ----------------------------------------------------------------------------------------------------------


def test_a_level_errs_by_six_percent_over_forty_octaves() -> None:
    importance = torch.logspace(-9, 3, 1000)
    back = from_levels(to_levels(importance))
    assert ((back / importance - 1).abs() < 0.06).all()
    assert to_levels(torch.tensor([0.0, 1e-30, 1e30])).tolist() == [0, 0, ALWAYS - 1]
    assert from_levels(torch.tensor([0], dtype=torch.uint8)).item() == 0


def test_prompts_are_averaged_and_every_row_has_a_block(learnt: Learnt) -> None:
    learner = Budget.learner(config())
    notes = [learner.note(*qkv(seed), SITES[0], seed) for seed in range(2)]
    merged = learner.merge(notes)["importance"]
    mean = torch.stack([from_levels(note["importance"]) for note in notes]).mean(0)
    always = merged == ALWAYS
    assert always.sum(-1).unique().tolist() == [1]
    assert (mean.argmax(-1, keepdim=True) == always.long().argmax(-1, keepdim=True)).float().mean() > 0.9
    assert torch.equal(merged[~always], to_levels(mean)[~always])
    assert (learnt.tables["importance"] == ALWAYS).any(-1).all()


def test_text_is_always_kept_and_prompts_of_another_length_refused() -> None:
    geometry = Geometry(grid=(3, 5, 10), heads=2, head_dim=8, text_tokens=10)
    learner = Budget.learner(config())
    note = learner.note(*qkv(0, geometry), replace(SITES[0], geometry=geometry), 0)
    merged = learner.merge([note])["importance"]
    assert (merged[:, -1] == ALWAYS).all()
    assert (merged[..., -1] == ALWAYS).all()
    with pytest.raises(ValueError, match="prompts of one number of text tokens"):
        learner.merge([note, {"importance": note["importance"][..., :-1]}])


# --- the cut ---------------------------------------------------------------------------------------------------------


def test_a_cut_is_where_the_shares_of_the_levels_above_come_to_the_density() -> None:
    share = torch.zeros(LEVELS, dtype=torch.float64)
    share[[0, 10, 20, ALWAYS]] = torch.tensor([0.4, 0.2, 0.3, 0.1], dtype=torch.float64)
    cut = cut_at(share, 0.25)
    assert (cut.level, cut.share) == (20, pytest.approx(0.5))
    assert cut_at(share, 0.05) == Cut(level=ALWAYS, share=1.0)
    assert cut_at(share, 1.0).level == 0
    assert cut_at(share, 1.0).share == pytest.approx(1)


def test_of_equals_at_the_end_a_share_is_kept_that_is_spread() -> None:
    levels = torch.full((2, 10, 10), 7, dtype=torch.uint8)
    kept = within(levels, Cut(level=7, share=0.3))
    assert kept.sum() == 60
    assert (kept.sum(-1) == 3).all()
    assert not within(levels, Cut(level=7, share=0.0)).any()
    assert within(levels, Cut(level=6, share=0.0)).all()


def test_rows_share_equally_to_the_block() -> None:
    levels = torch.randint(0, LEVELS - 1, (2, 5, 10), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    kept = most_of_each_row(levels, 0.35)
    assert set(kept.sum(-1).flatten().tolist()) == {3, 4}
    assert kept.sum() == 35
    least = torch.where(kept, levels.int(), LEVELS).amin(-1)
    most_left_out = torch.where(kept, -1, levels.int()).amax(-1)
    assert (least >= most_left_out).all()


def test_shares_count_products_not_blocks() -> None:
    levels = torch.tensor([[[1, 2], [1, 1]]], dtype=torch.uint8)
    area = torch.tensor([[4.0, 2.0], [2.0, 1.0]], dtype=torch.float64)
    share = level_shares(levels, area)
    assert share[1] == pytest.approx(7 / 9)
    assert share[2] == pytest.approx(2 / 9)


# --- plans -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", Budget.presets)
@pytest.mark.parametrize("density", [0.15, 0.25, 0.35, 0.5, 0.9, 1.0])
def test_a_density_is_met_and_known_beforehand(learnt: Learnt, preset: str, density: float) -> None:
    method = Budget(config(preset, density=density), learnt)
    plans = [method.plan(*qkv(99), site) for site in SITES]
    realised = torch.stack([plan.density() for plan in plans]).mean().item()
    assert method.mean_density() == pytest.approx(realised, abs=1e-6)
    # a site has a hundred blocks here, one more or less; rows count blocks, of which the last is shorter
    assert realised == pytest.approx(density, rel=0.02, abs=0.03 if preset == "rows" else 0.01)
    for plan in plans:
        assert plan.mask is not None
        assert plan.mask.keep().any(-1).all()


def test_one_budget_goes_where_importance_is_and_others_stay(learnt: Learnt) -> None:
    def densities(preset: str) -> list[float]:
        method = Budget(config(preset, density=0.4), learnt)
        return [method.plan(*qkv(99), site).density().mean().item() for site in SITES]

    shared, apart = densities("default"), densities("site")
    assert max(shared) - min(shared) > 0.1
    assert max(apart) - min(apart) < 0.02
    # at one threshold no block that is left out is more important than one that is kept
    method = Budget(config(density=0.4), learnt)
    kept = torch.stack([method.plan(*qkv(99), site).mask.keep() for site in SITES])  # type: ignore[union-attr]
    levels = torch.stack([learnt.tables["importance"][site.step, site.layer] for site in SITES]).int()
    assert levels[kept].min() >= levels[~kept].max()


def test_what_was_learnt_elsewhere_is_refused(learnt: Learnt) -> None:
    method = Budget(config(), learnt)
    other = replace(SITES[0], geometry=replace(GEOMETRY, grid=(5, 3, 10)))
    with pytest.raises(ValueError, match=r"^what budget learnt is for"):
        method.plan(*qkv(0), other)


def test_tables_that_are_not_its_own_are_refused(learnt: Learnt) -> None:
    Budget.check_tables(learnt)
    table = learnt.tables["importance"]
    for tables, message in (
        ({}, "tables: Budget has importance, not none"),
        ({"importance": table.float()}, "importance: .* of torch.uint8"),
        ({"importance": table[..., :-1]}, "importance: .* at every site"),
        ({"importance": torch.zeros_like(table)}, "a row at step 0 has no block"),
    ):
        with pytest.raises(ValueError, match=message):
            Budget.check_tables(replace(learnt, tables=tables))


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"density": math.nan}, "density"), ({"density": 1.1}, "density"), ({"queries": 0}, "query")],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BudgetConfig(**settings)
