"""Compact Attention's distances, windows and masks, worked out by hand, and query by query where tiles fit nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from calibatt.kernels.geometry import Geometry
from calibatt.methods.compact import (
    Compact,
    CompactConfig,
    attention_by_distance,
    by_cell,
    cells_of_pairs,
    token_pairs,
    windows,
)
from calibatt.methods.learning import Learnt
from calibatt.methods.site import Site

# 9 × 2 × 3 tiles of up to 12 tokens, smaller ones at the ends
UNEVEN = Geometry(grid=(9, 5, 7), heads=2, head_dim=8)
TILE = (1, 4, 3)
# 2 × 3 × 4 tiles of 8 tokens, each a block
EVEN = Geometry(grid=(4, 6, 8), heads=2, head_dim=8)
SETTINGS = CompactConfig(recall=0.8, cost_weight=0.011, dense_steps=0.0, tile=(2, 2, 2), block=(8, 8))
SITE = Site(geometry=EVEN, step=1, steps=2, sigma=0.5, branch="cond", layer=0, layers=2)


def qkv(seed: int, geometry: Geometry = EVEN) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = 2 * torch.randn(3, geometry.heads, geometry.tokens, geometry.head_dim, generator=generator)
    return q, k, v


Learn = Callable[..., Learnt]
Masks = Callable[..., Tensor]


@pytest.fixture
def keep(learn: Learn) -> Masks:
    """The blocks that are kept after learning from some videos."""

    def kept(settings: CompactConfig, *seeds: int, site: Site = SITE) -> Tensor:
        learnt = learn("compact", Compact.learner(settings), {site: [qkv(seed, site.geometry) for seed in seeds]})
        mask = Compact(settings, learnt).plan(*qkv(99, site.geometry), site).mask
        assert mask is not None
        return mask.keep()

    return kept


# --- distances -------------------------------------------------------------------------------------------------------


def test_tiles_of_frames_are_grouped_by_powers_of_two() -> None:
    geometry = Geometry(grid=(9, 1, 1), heads=1, head_dim=1)
    assert cells_of_pairs(geometry, (1, 1, 1))[0].tolist() == [0, 1, 2, 2, 3, 3, 3, 3, 4]


def test_cells_tell_rows_and_columns_apart() -> None:
    geometry = Geometry(grid=(1, 2, 3), heads=1, head_dim=1)
    # from the tile in the second row and the middle column
    assert cells_of_pairs(geometry, (1, 1, 1))[4].tolist() == [4, 3, 4, 1, 0, 1]


def test_pairs_of_smaller_tiles_count_less() -> None:
    geometry = Geometry(grid=(1, 1, 5), heads=1, head_dim=1, text_tokens=3)
    # tiles of 4 tokens and 1
    assert (25 * token_pairs(geometry, (1, 1, 4))).tolist() == pytest.approx(torch.tensor([[16.0, 4], [4, 1]]))


@pytest.mark.parametrize(("text", "side"), [(0, "last"), (10, "first"), (10, "last")])
def test_attention_is_that_of_the_video_to_the_video_by_distance(
    text: int, side: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # some tiles at a time
    monkeypatch.setattr("calibatt.methods.compact.CHUNK", 5 * 12 * 700)
    geometry = replace(UNEVEN, text_tokens=text, text_side=side)
    q, k, _ = qkv(0, geometry)
    weights = (q @ k.mT / 8**0.5).double().softmax(-1)
    video = slice(geometry.video_start, geometry.video_start + geometry.video_tokens)
    weights = weights[:, video, video] / geometry.video_tokens
    places = torch.cartesian_prod(*map(torch.arange, geometry.grid)) // torch.tensor(TILE)
    apart = (places[:, None] - places).abs()
    group = torch.tensor([0, 1, 2, 2, 3, 3, 3, 3, 4])[apart[..., 0]]
    made = attention_by_distance(q, k, geometry, TILE)
    assert made.shape == (2, 5, 2, 3)
    for cell in torch.cartesian_prod(torch.arange(5), torch.arange(2), torch.arange(3)):
        here = (group == cell[0]) & (apart[..., 1] == cell[1]) & (apart[..., 2] == cell[2])
        torch.testing.assert_close(
            made[(slice(None), *cell)].double(), (weights * here).sum((-2, -1)), rtol=1e-4, atol=1e-6
        )


# --- windows ---------------------------------------------------------------------------------------------------------

# by rows and columns apart
CROSS = torch.tensor([[0.4, 0.2, 0.1], [0.15, 0.04, 0.02], [0.05, 0.03, 0.01]])


def shapes(recall: float, attention: Tensor = CROSS, cost_weight: float = 0.0) -> list[list[int]]:
    cost = torch.full(attention.shape, 1 / attention.numel())
    seen = windows(attention[None, None, None], cost[None], recall=recall, cost_weight=cost_weight)
    made: list[list[int]] = seen[0, 0, 0].int().tolist()
    return made


@pytest.mark.parametrize(
    ("recall", "expected"),
    [
        (0.995, [[1, 1, 1], [1, 1, 1], [1, 1, 1]]),
        # the corner opens: 0.01; then it grows by the rest of a column, 0.02, and of a row, 0.04 + 0.03
        (0.985, [[1, 1, 1], [1, 1, 1], [1, 1, 0]]),
        (0.965, [[1, 1, 1], [1, 1, 0], [1, 1, 0]]),
        (0.895, [[1, 1, 1], [1, 0, 0], [1, 0, 0]]),
        # then the arms grow shorter, by 0.05 and 0.1
        (0.845, [[1, 1, 1], [1, 0, 0], [0, 0, 0]]),
        (0.745, [[1, 1, 0], [1, 0, 0], [0, 0, 0]]),
        # the middle stays, whatever is left out
        (0.0, [[1, 0, 0], [0, 0, 0], [0, 0, 0]]),
    ],
)
def test_boundaries_are_drawn_in_where_least_is_lost(recall: float, expected: list[list[int]]) -> None:
    assert shapes(recall) == expected


def test_the_saving_of_computation_is_worth_its_weight() -> None:
    # to lose all of a row rather than its corner costs 0.08, and saves two cells of nine more: worth it from 0.36 on
    assert shapes(0.905, cost_weight=0.3) == [[1, 1, 1], [1, 1, 0], [1, 1, 0]]
    assert shapes(0.905, cost_weight=0.4) == [[1, 1, 1], [1, 1, 1], [0, 0, 0]]


@pytest.mark.parametrize("cost_weight", [0.0, 0.011, 0.04, 1.0])
def test_windows_hold_the_recall_and_shrink_with_it(cost_weight: float) -> None:
    generator = torch.Generator().manual_seed(1)
    attention = torch.rand(2, 3, 4, 6, 10, generator=generator) ** 4
    attention /= 1.05 * attention.sum((-3, -2, -1), keepdim=True)
    cost = torch.rand(4, 6, 10, generator=generator)
    cost /= cost.sum()
    last = torch.ones_like(attention, dtype=torch.bool)
    for recall in (1.0, 0.95, 0.9, 0.6, 0.3, 0.0):
        seen = windows(attention, cost, recall=recall, cost_weight=cost_weight)
        lost = (attention * ~seen).sum((-3, -2, -1))
        assert (lost <= 1 - recall + 1e-6).all()
        assert (seen <= last).all()
        last = seen
    # only the middles
    assert (last.sum((-2, -1)) == 1).all()
    assert last[..., 0, 0].all()


def test_groups_shrink_by_themselves_and_heads_too() -> None:
    near, far = torch.zeros(2, 2), torch.zeros(2, 2)
    # the first head goes to its own row near by and to its own column far off, the second the other way round
    near[0], far[:, 0] = 0.25, 0.25
    attention = torch.stack((torch.stack((near, far)), torch.stack((far, near))))[None]
    seen = windows(attention, torch.full((2, 2, 2), 1 / 8), recall=0.99, cost_weight=0.011)
    assert torch.equal(seen, attention > 0)


# --- masks -----------------------------------------------------------------------------------------------------------


def test_tiles_see_the_cells_of_their_windows_and_prompts_are_joined(keep: Masks) -> None:
    cells = cells_of_pairs(EVEN, SETTINGS.tile)
    cost = by_cell(token_pairs(EVEN, SETTINGS.tile)[None], cells, EVEN, SETTINGS.tile)[0]
    expected = torch.zeros(2, 24, 24, dtype=torch.bool)
    for seed in (1, 2):
        attention = attention_by_distance(*qkv(seed)[:2], EVEN, SETTINGS.tile)
        seen = windows(attention[None], cost, recall=0.8, cost_weight=0.011)[0]
        expected |= seen.flatten(1)[:, cells]
        assert not torch.equal(seen.flatten(1)[:, cells], keep(SETTINGS, 1, 2))
    assert torch.equal(keep(SETTINGS, 1, 2), expected)


def test_less_recall_keeps_less_down_to_the_same_place_in_every_frame(keep: Masks) -> None:
    masks = [keep(replace(SETTINGS, recall=recall), 1, 2) for recall in (1.0, 0.9, 0.7, 0.5, 0.0)]
    assert masks[0].all()
    for one, less in pairwise(masks):
        assert (less <= one).all()
    # 12 places in 2 tiles of frames
    assert torch.equal(masks[-1], torch.eye(12, dtype=torch.bool).repeat(2, 2).expand(2, -1, -1))


@pytest.mark.parametrize("side", ["first", "last"])
def test_text_sees_and_is_seen_by_everything(side: Any, keep: Masks) -> None:
    site = replace(SITE, geometry=replace(EVEN, text_tokens=8, text_side=side))
    made = keep(replace(SETTINGS, recall=0.0), 1, site=site)
    text, video = (slice(0, 1), slice(1, None)) if side == "first" else (slice(24, 25), slice(0, 24))
    assert made[:, text].all()
    assert made[:, :, text].all()
    assert made[:, video, video].float().mean() == pytest.approx(1 / 12)


# --- where and when --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("preset", "dense"), [("default", 2), ("hunyuan", 2), ("no-warmup", 0)])
def test_three_tenths_of_the_steps_are_dense(preset: str, dense: int, learn: Learn) -> None:
    settings = replace(Compact.presets[preset], tile=(2, 2, 2), block=(8, 8))
    sites = [replace(SITE, step=step, steps=10) for step in (0, 2, 3, 9)]
    made = Compact(settings, learn("compact", Compact.learner(settings), {site: [qkv(0)] for site in sites}))
    kinds = [made.plan(*qkv(0), site).kinds[0] for site in sites]
    assert kinds == ["dense"] * dense + ["masked"] * (4 - dense)


def test_both_branches_share_a_mask_that_is_made_once(learn: Learn) -> None:
    made = Compact(SETTINGS, learn("compact", Compact.learner(SETTINGS), {SITE: [qkv(1)]}))
    q, k, _ = qkv(3)
    first = made.plan(q, k, k, SITE)
    made.reset()
    assert made.plan(k, q, q, replace(SITE, branch="uncond")) is first


def test_a_dense_step_is_noted_as_zeros_of_the_same_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    learner = Compact.learner(replace(SETTINGS, dense_steps=0.5))
    here = learner.note(*qkv(1), SITE, 0)["attention"]
    monkeypatch.setattr("calibatt.methods.compact.attention_by_distance", None)
    there = learner.note(*qkv(1), replace(SITE, step=0), 0)["attention"]
    assert (there.shape, there.dtype, there.any().item()) == (here.shape, here.dtype, False)


def test_a_prompt_with_fewer_text_tokens_has_the_same_windows(learn: Learn) -> None:
    long, short = (replace(SITE, geometry=replace(EVEN, text_tokens=text)) for text in (16, 8))
    made = Compact(SETTINGS, learn("compact", Compact.learner(SETTINGS), {long: [qkv(1, long.geometry)]}))
    plans = [made.plan(*qkv(2, site.geometry), site) for site in (long, short)]
    assert [plan.tokens for plan in plans] == [long.geometry.tokens, short.geometry.tokens]
    one, other = (plan.mask for plan in plans)
    assert one is not None
    assert other is not None
    assert torch.equal(one.keep()[:, :24, :24], other.keep()[:, :24, :24])


@pytest.mark.parametrize(
    ("wrong", "said"),
    [({"recall": 1.1}, "recall is"), ({"cost_weight": -1.0}, "compact"), ({"tile": (0, 8, 8)}, "compact")],
)
def test_settings_that_mean_nothing_are_refused(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        replace(SETTINGS, **wrong)
