"""Jenga's neighbours, and its choice where pooled attention is known."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from calibatt.kernels.geometry import Geometry
from calibatt.kernels.plan import Plan
from calibatt.methods.base import Method
from calibatt.methods.curves import curve_order
from calibatt.methods.jenga import Jenga, JengaConfig, adjacent_blocks, first_frame_blocks
from calibatt.methods.site import Site

# eight frames of one block each: frames are next to the one before and the one after
FRAMES = Geometry(grid=(8, 4, 4), heads=1, head_dim=8)
NEXT = (torch.arange(8)[:, None] - torch.arange(8)).abs() <= 1
# nothing but the choice of one block and the neighbours
PLAIN: dict[str, Any] = {
    "drop": 1.0, "early_drop": None, "mass": 0.0, "ramp": False, "first_frame": False, "block": (16, 16)
}  # fmt: skip


def planned(
    q: Tensor, k: Tensor, geometry: Geometry, *, preset: str = "default", step: int = 40, **changed: Any
) -> Plan:
    site = Site(geometry=geometry, step=step, steps=50, sigma=0.3, branch="cond", layer=0, layers=1)
    return Jenga(replace(Jenga.presets[preset], **changed)).plan(q, k, k, site)


def keep(q: Tensor, k: Tensor, geometry: Geometry = FRAMES, **changed: Any) -> Tensor:
    mask = planned(q, k, geometry, **(PLAIN | changed)).mask
    assert mask is not None
    return mask.keep()


def noise(geometry: Geometry, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q, k = torch.randn(2, geometry.heads, geometry.tokens, geometry.head_dim, generator=generator)
    return 8 * q, k


def qkv(geometry: Geometry, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """The same with values, which play no part."""
    q, k = noise(geometry, seed)
    return q, k, k


def by_weight(weights: list[float]) -> tuple[Tensor, Tensor]:
    """Queries all alike, and keys so that every query's softmax over blocks of 16 is these weights."""
    q, k = torch.zeros(2, 1, 16 * len(weights), 8)
    q[..., 0] = 8**0.5
    k[..., 0] = torch.tensor(weights).log().repeat_interleave(16)
    return q, k


# --- what is always kept ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("curve", ["frame", "video"])
@pytest.mark.parametrize(
    "geometry",
    [
        Geometry(grid=(3, 4, 5), heads=1, head_dim=4),
        Geometry(grid=(1, 3, 7), heads=1, head_dim=4),
        Geometry(grid=(4, 3, 3), heads=1, head_dim=4, text_tokens=5, text_side="first"),
        Geometry(grid=(4, 3, 3), heads=1, head_dim=4, text_tokens=5, text_side="last"),
    ],
    ids=str,
)
def test_blocks_are_adjacent_where_any_of_their_tokens_are(geometry: Geometry, curve: Any) -> None:
    order = curve_order(geometry, curve)
    expected = torch.zeros(-(-geometry.tokens // 4), -(-geometry.tokens // 3), dtype=torch.bool)
    cells = list(product(*map(range, geometry.grid)))
    for (row, one), (column, other) in product(enumerate(order[0].tolist()), repeat=2):
        a, b = one - geometry.video_start, other - geometry.video_start
        if 0 <= a < len(cells) and 0 <= b < len(cells):
            expected[row // 4, column // 3] |= all(abs(x - y) <= 1 for x, y in zip(cells[a], cells[b], strict=True))
    assert torch.equal(adjacent_blocks(geometry, order, (4, 3)), expected)
    assert not expected.all()


def test_neighbours_are_kept_whatever_is_chosen() -> None:
    kept = keep(*by_weight([0.02] * 7 + [0.86]))[0]
    assert torch.equal(kept, NEXT | (torch.arange(8) == 7))


@pytest.mark.parametrize(("size", "count"), [(16, 7), (32, 3), (128, 0)])
def test_the_first_frame_has_the_blocks_that_lie_in_it_whole(size: int, count: int) -> None:
    # 125 tokens a frame
    geometry = Geometry(grid=(8, 5, 25), heads=1, head_dim=4)
    blocks = first_frame_blocks(geometry, curve_order(geometry, "frame"), size)
    assert blocks.nonzero().flatten().tolist() == list(range(count))


# 591 blocks // 21 frames and 256 // 21, as the original counts
@pytest.mark.parametrize(("grid", "count"), [((21, 45, 80), 28), ((21, 30, 52), 12)])
def test_the_first_frame_of_wan_has_as_many_blocks_as_in_the_original(grid: tuple[int, int, int], count: int) -> None:
    geometry = Geometry(grid=grid, heads=1, head_dim=4)
    assert first_frame_blocks(geometry, curve_order(geometry, "frame"), 128).sum() == count


def test_the_first_frame_keeps_itself_where_the_setting_says_so() -> None:
    # 16 blocks a frame, in a row of squares of 4 × 4
    geometry = Geometry(grid=(3, 4, 64), heads=1, head_dim=8)
    without, within = keep(*noise(geometry), geometry)[0], keep(*noise(geometry), geometry, first_frame=True)[0]
    assert within[:16, :16].all()
    assert not without[:16, :16].all()
    without[:16, :16] = True
    assert torch.equal(within, without)


@pytest.mark.parametrize(("side", "text"), [("first", 0), ("last", 8)])
def test_text_is_kept_in_both_directions_and_is_not_chosen_from(side: Any, text: int) -> None:
    # of nine blocks the text's is by far the heaviest; of the video's, the one of frame 6
    geometry = replace(FRAMES, text_tokens=16, text_side=side)
    weights = [0.01] * 8
    weights[6] = 0.03
    weights.insert(text, 0.9)
    kept = keep(*by_weight(weights), geometry)[0]
    assert kept[text].all()
    assert kept[:, text].all()
    video = torch.arange(9) != text
    assert torch.equal(kept[video][:, video], NEXT | (torch.arange(8) == 6))


def test_a_block_of_both_counts_as_text() -> None:
    # the first of nine blocks holds the 8 tokens of text and half of the first frame
    geometry = replace(FRAMES, text_tokens=8, text_side="first")
    q, k = noise(geometry)
    kept = keep(q, k, geometry)[0]
    assert kept[0].all()
    assert kept[:, 0].all()
    assert not kept[1:, 1:].all()


@pytest.mark.parametrize("side", ["first", "last"])
def test_where_text_leaves_no_block_to_the_video_all_is_kept(side: Any) -> None:
    geometry = Geometry(grid=(1, 1, 3), heads=2, head_dim=8, text_tokens=40, text_side=side)
    assert keep(*noise(geometry), geometry)[0, 0].all()
    assert keep(*noise(geometry), geometry, block=(64, 64)).all()


# --- the choice ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("drop", "mass", "count"),
    [
        # eight blocks less the share dropped, rounded down, and at least one
        (0.5, 0.0, 4), (0.62, 0.0, 3), (0.63, 0.0, 2), (0.75, 0.0, 2), (0.9, 0.0, 1), (1.0, 0.0, 1),
        # one more than those whose sums, 0.4, 0.7, 0.9 and 1, do not pass the mass
        (1.0, 0.3, 1), (1.0, 0.5, 2), (1.0, 0.75, 3), (1.0, 0.95, 4),
        # whichever is more
        (0.75, 0.3, 2), (0.75, 0.75, 3), (0.625, 0.5, 3),
    ],
)  # fmt: skip
def test_the_heaviest_blocks_are_kept_that_drop_leaves_or_mass_needs(drop: float, mass: float, count: int) -> None:
    # of the last frame, whose neighbours are the last two
    kept = keep(*by_weight([0.3, 0.1, 0.4, 0.2, 1e-9, 1e-9, 1e-9, 1e-9]), drop=drop, mass=mass)[0, 7]
    assert kept.nonzero().flatten().tolist() == [*sorted([2, 0, 3, 1][:count]), 6, 7]


def test_the_softmax_is_of_scores_over_the_root_of_the_channels() -> None:
    # sums of 0.4, 0.6, 0.7: three blocks, of which NEXT holds others
    weights = [0.05, 0.4, 0.05, 0.1, 0.05, 0.05, 0.1, 0.2]
    kept = keep(*by_weight(weights), mass=0.65)[0]
    assert torch.equal(kept, NEXT | torch.isin(torch.arange(8), torch.tensor([1, 7, 3])))


def test_blocks_are_pooled_along_the_curve() -> None:
    # one frame of 4 × 4 squares of 16 tokens; each looks for the square opposite, in channels of their own
    geometry = Geometry(grid=(1, 16, 16), heads=1, head_dim=16)
    square = torch.arange(16).view(4, 4).repeat_interleave(4, 0).repeat_interleave(4, 1).flatten()
    plan = planned(8 * torch.eye(16)[15 - square][None], 8 * torch.eye(16)[square][None], geometry, **PLAIN)
    assert plan.mask is not None
    assert plan.order is not None
    assert plan.order.shared
    order = curve_order(geometry, "frame")
    assert torch.equal(plan.order.queries, order)
    squares = square[order[0].long()].view(16, 16)
    assert (squares == squares[:, :1]).all()
    at = squares[:, 0]
    opposite = at[:, None] == 15 - at
    near = ((at[:, None] // 4 - at // 4).abs() <= 1) & ((at[:, None] % 4 - at % 4).abs() <= 1)
    assert torch.equal(plan.mask.keep()[0], near | opposite)


def test_a_query_block_and_a_key_block_are_pooled_by_their_own_sizes() -> None:
    # queries of two frames at a time look for the frame five after the first of them
    q = 8 * torch.eye(8)[torch.tensor([5, 5, 7, 7, 1, 1, 3, 3])].repeat_interleave(16, 0)[None]
    k = 8 * torch.eye(8).repeat_interleave(16, 0)[None]
    expected = NEXT.view(4, 2, 8).any(1)
    expected[torch.arange(4), torch.tensor([5, 7, 1, 3])] = True
    assert torch.equal(keep(q, k, block=(32, 16))[0], expected)


def test_a_shorter_last_block_is_pooled_over_its_own_tokens() -> None:
    # the last of 34 blocks has 2 tokens; its mean over 16 would have an eighth of the score, and lose
    geometry = Geometry(grid=(1, 10, 53), heads=1, head_dim=8)
    q, k = torch.ones(2, 1, 530, 8)
    order = curve_order(geometry, "frame")[0].long()
    k[:, order[-2:]] = 4.0
    assert keep(q, k, geometry)[0, :, -1].all()
    k[:, order[-2:]] = 0.0
    assert not keep(q, k, geometry)[0, :, -1].all()


def test_heads_choose_apart() -> None:
    x = 8 * torch.eye(8).repeat_interleave(16, 0)[None]
    kept = keep(torch.cat((x, x.flip(1))), torch.cat((x, x)), replace(FRAMES, heads=2))
    assert torch.equal(kept, torch.stack((NEXT, NEXT | torch.eye(8, dtype=torch.bool).flip(0))))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("preset", Jenga.presets)
def test_half_precision_chooses_as_single_does(
    preset: str, dtype: torch.dtype, all_ragged: tuple[Geometry, ...]
) -> None:
    for geometry in all_ragged:
        q, k = (x.to(dtype) for x in noise(geometry))
        half = planned(q, k, geometry, preset=preset, block=(32, 16))
        single = planned(q.float(), k.float(), geometry, preset=preset, block=(32, 16))
        assert half.mask is not None
        assert single.mask is not None
        assert torch.equal(half.mask.keep(), single.mask.keep())


# --- the schedule ----------------------------------------------------------------------------------------------------


def drops(steps: int, preset: str = "default", **changed: Any) -> list[float]:
    config = replace(Jenga.presets[preset], **changed)
    return [config.drop_at(step, steps) for step in range(steps)]


def test_the_share_dropped_rises_over_a_tenth_of_the_schedule_and_changes_after_the_middle() -> None:
    rising = [0.7 * 10 * step / 49 for step in range(5)]
    assert drops(50) == pytest.approx(rising + [0.7] * 21 + [0.8] * 24)
    assert drops(50, ramp=False) == [0.7] * 26 + [0.8] * 24
    assert drops(50, "no-warmup") == drops(50, ramp=False)
    assert drops(50, "one-drop") == [0.8] * 50
    assert drops(50, "turbo", ramp=False) == [0.5] * 26 + [0.9] * 24
    assert drops(50, "hunyuan") == [0.75] * 26 + [0.85] * 24


def test_short_schedules_rise_and_change_too() -> None:
    assert drops(4) == [0.0, 0.7, 0.7, 0.8]
    assert drops(1) == [0.0]
    assert drops(1, ramp=False) == [0.7]


def test_one_share_holds_in_both_halves() -> None:
    assert drops(10, drop=0.6, early_drop=None, ramp=False) == [0.6] * 10
    assert drops(4, drop=0.6, early_drop=None) == [0.0, 0.6, 0.6, 0.6]


def dense_steps(preset: str, **changed: Any) -> list[int]:
    q, k = noise(FRAMES)
    return [step for step in range(50) if "dense" in planned(q, k, FRAMES, preset=preset, step=step, **changed).kinds]


def test_steps_that_drop_little_are_dense() -> None:
    # 0, 0.14 and 0.29 of the key blocks at the first steps, of which Wan's code drops none up to 0.25
    assert dense_steps("default") == [0, 1]
    # 0, 0.1, 0.2, 0.31
    assert dense_steps("turbo") == [0, 1, 2]
    assert dense_steps("no-warmup") == []
    assert dense_steps("hunyuan") == []
    assert dense_steps("hunyuan", early_drop=0.0) == list(range(26))


def test_a_share_at_the_limit_is_dense_and_one_above_is_not() -> None:
    assert dense_steps("no-warmup", drop=0.25, early_drop=0.26) == list(range(26, 50))


def test_the_halves_choose_by_their_own_share() -> None:
    # 25 frames of a block: 5 of them in the first half, 15 in the later
    geometry = Geometry(grid=(25, 4, 4), heads=1, head_dim=8)
    q, k = by_weight([2.0**-frame for frame in range(25)])
    shares = {**PLAIN, "early_drop": 0.79, "drop": 0.39}
    for step, count in ((25, 5), (26, 15)):
        mask = planned(q, k, geometry, step=step, **shares).mask
        assert mask is not None
        # the last frame is next to itself and the one before
        assert mask.keep()[0, -1].nonzero().flatten().tolist() == [*range(count), 23, 24]


# --- as a method -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", Jenga.presets)
def test_it_is_a_method(preset: str, all_ragged: tuple[Geometry, ...]) -> None:
    method = Jenga(Jenga.presets[preset])
    assert isinstance(method, Method)
    assert all(method.refusal(geometry) is None for geometry in all_ragged)


@pytest.mark.parametrize("preset", Jenga.presets)
def test_dropping_more_keeps_nothing_else_and_leaves_no_query_without_a_key(
    ragged: Geometry, preset: str, all_ragged: tuple[Geometry, ...]
) -> None:
    q, k = noise(ragged)
    last = torch.ones(1, dtype=torch.bool)
    for drop in (0.0, 0.2, 0.3, 0.5, 0.7, 0.9, 1.0):
        plan = planned(q, k, ragged, preset=preset, drop=drop, block=(32, 16))
        kept = torch.ones(1, 1, 1, dtype=torch.bool) if plan.mask is None else plan.mask.keep()
        assert kept.any(-1).all()
        assert not (kept & ~last).any()
        last = kept
    assert ragged == all_ragged[0] or not last.all()


def test_one_instance_serves_several_geometries(all_ragged: tuple[Geometry, ...]) -> None:
    method = Jenga(replace(Jenga.presets["default"], block=(32, 16)))
    # the third has as many tokens as the second
    for geometry in (*all_ragged, Geometry(grid=(5, 8, 25), heads=3, head_dim=8), *all_ragged):
        site = Site(geometry=geometry, step=40, steps=50, sigma=0.3, branch="cond", layer=0, layers=1)
        plan, alone = method.plan(*qkv(geometry), site), planned(*noise(geometry), geometry, block=(32, 16))
        assert plan.mask is not None
        assert alone.mask is not None
        assert torch.equal(plan.mask.keep(), alone.mask.keep())
        method.reset()


@pytest.mark.parametrize("field", ["drop", "early_drop", "mass", "dense_below"])
@pytest.mark.parametrize("share", [-0.1, 1.1])
def test_what_is_no_share_is_refused(field: str, share: float) -> None:
    with pytest.raises(ValueError, match=f"{field} is a share"):
        replace(Jenga.presets["default"], **{field: share})


def test_the_first_half_may_do_without_a_share_of_its_own() -> None:
    config = JengaConfig(drop=0.5, mass=0.5, curve="frame", ramp=False, dense_below=0.0, first_frame=False)
    assert config.early_drop is None
