"""Sliding Tile Attention's order and mask, worked out by hand, and token by token where tiles fit nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from calibatt.kernels import oracle
from calibatt.kernels.geometry import Geometry
from calibatt.kernels.plan import Plan
from calibatt.methods.learning import Learnt
from calibatt.methods.site import Site
from calibatt.methods.sta import SlidingTile, SlidingTileConfig
from calibatt.methods.tiles import tile_order

# the original's: 117 frames of HunyuanVideo and 69 of Wan, at 768 × 1280
HUNYUAN = Geometry(grid=(30, 48, 80), heads=2, head_dim=1)
WAN = Geometry(grid=(18, 48, 80), heads=2, head_dim=1)
# Wan at 480p: 4 × 4 × 7 tiles, the last ones of 3 frames, 6 rows and 4 columns
UNEVEN = Geometry(grid=(21, 30, 52), heads=2, head_dim=1)


def method(preset: str = "no-warmup", **settings: Any) -> SlidingTile:
    return SlidingTile(replace(SlidingTile.presets[preset], **settings))


def plan(geometry: Geometry, made: SlidingTile, *, step: int = 0, steps: int = 50) -> Plan:
    q = torch.zeros(geometry.heads, geometry.tokens, geometry.head_dim)
    site = Site(geometry=geometry, step=step, steps=steps, sigma=1.0, branch="cond", layer=0, layers=1)
    return made.plan(q, q, q, site)


def keep(geometry: Geometry, preset: str = "no-warmup", **settings: Any) -> Tensor:
    mask = plan(geometry, method(preset, **settings)).mask
    assert mask is not None
    assert mask.heads == 1
    return mask.keep()[0]


def density(geometry: Geometry, preset: str = "no-warmup", **settings: Any) -> float:
    return plan(geometry, method(preset, **settings)).density()[0].item()


def tokens_kept(plan: Plan) -> Tensor:
    """One boolean a pair of tokens, in the sequence's own order."""
    assert plan.mask is not None
    assert plan.order is not None
    whole = plan.mask.keep()[0].repeat_interleave(plan.mask.block_q, 0).repeat_interleave(plan.mask.block_k, 1)
    place = plan.order.queries[0].argsort()
    return whole[place][:, place]


def tokens_by_hand(geometry: Geometry, tile: tuple[int, int, int], window: tuple[int, int, int]) -> Tensor:
    """The same by another rule: a window starts half of it before its tile, and is pushed back in at the ends."""
    places = torch.cartesian_prod(*map(torch.arange, geometry.grid))
    pairs = torch.ones(geometry.video_tokens, geometry.video_tokens, dtype=torch.bool)
    for place, extent, size, wanted in zip(places.T, geometry.grid, tile, window, strict=True):
        tiles, width, own = -(-extent // size), wanted // 2 * 2 + 1, place // size
        start = (own - wanted // 2).clamp(max=max(0, tiles - width)).clamp(min=0)[:, None]
        pairs &= (own >= start) & (own < start + width)
    expected = torch.ones(geometry.tokens, geometry.tokens, dtype=torch.bool)
    video = slice(geometry.video_start, geometry.video_start + geometry.video_tokens)
    expected[video, video] = pairs
    return expected


# --- order -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("grid", "tile", "expected"),
    [
        # four tiles of a frame
        ((1, 4, 4), (1, 2, 2), [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15]),
        # a tile takes a row of both frames
        ((2, 2, 2), (2, 1, 2), [0, 1, 4, 5, 2, 3, 6, 7]),
        # tiles of four, two, two and one token, frame by frame
        ((2, 3, 3), (1, 2, 2), [0, 1, 3, 4, 2, 5, 6, 7, 8, 9, 10, 12, 13, 11, 14, 15, 16, 17]),
        # one tile holds it all
        ((1, 2, 3), (6, 8, 8), [0, 1, 2, 3, 4, 5]),
    ],
)
def test_tokens_stand_tile_by_tile(grid: tuple[int, int, int], tile: tuple[int, int, int], expected: list[int]) -> None:
    assert tile_order(Geometry(grid=grid, heads=1, head_dim=1), tile).tolist() == [expected]


@pytest.mark.parametrize(
    ("side", "expected"), [("first", [0, 1, 2, 3, 6, 7, 4, 5, 8, 9]), ("last", [0, 1, 4, 5, 2, 3, 6, 7, 8, 9])]
)
def test_text_stays_where_it_is(side: Any, expected: list[int]) -> None:
    geometry = Geometry(grid=(1, 2, 4), heads=1, head_dim=1, text_tokens=2, text_side=side)
    assert tile_order(geometry, (1, 2, 2)).tolist() == [expected]


def test_a_plan_has_the_order_of_its_tiles() -> None:
    order = plan(WAN, method()).order
    assert order is not None
    assert order.shared
    assert torch.equal(order.queries, tile_order(WAN, (6, 8, 8)))


# --- window ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tiles", "window", "expected"),
    [
        (5, 1, [[0], [1], [2], [3], [4]]),
        (5, 3, [[0, 1, 2], [0, 1, 2], [1, 2, 3], [2, 3, 4], [2, 3, 4]]),
        # an even window is the next odd one
        (4, 2, [[0, 1, 2], [0, 1, 2], [1, 2, 3], [1, 2, 3]]),
        (3, 2, [[0, 1, 2]] * 3),
        # as wide as the axis, or wider
        (2, 2, [[0, 1]] * 2),
        (4, 4, [[0, 1, 2, 3]] * 4),
        (3, 5, [[0, 1, 2]] * 3),
        (1, 3, [[0]]),
    ],
)
@pytest.mark.parametrize("axis", range(3))
def test_the_window_stops_at_the_ends(axis: int, tiles: int, window: int, expected: list[list[int]]) -> None:
    # one token a tile and a block: the mask is the window itself
    grid, windows = [1, 1, 1], [1, 1, 1]
    grid[axis], windows[axis] = tiles, window
    made = keep(
        Geometry(grid=(grid[0], grid[1], grid[2]), heads=2, head_dim=1),
        tile=(1, 1, 1),
        block=(1, 1),
        window=(windows[0], windows[1], windows[2]),
    )
    assert [row.nonzero().flatten().tolist() for row in made] == expected


def test_a_tile_of_hunyuanvideo_sees_27_of_300() -> None:
    made = keep(HUNYUAN)
    # 5 × 6 × 10 tiles of three blocks each
    assert made.shape == (900, 900)
    assert (made.sum(-1) == 81).all()
    assert density(HUNYUAN) == pytest.approx(27 / 300)
    tiles = made.view(5, 6, 10, 3, 5, 6, 10, 3)
    # in the middle a tile and its neighbours, in a corner the three tiles next to it on each axis
    for query, keys in (((2, 3, 5), ((1, 4), (2, 5), (4, 7))), ((0, 5, 9), ((0, 3), (3, 6), (7, 10)))):
        expected = torch.zeros(5, 6, 10, dtype=torch.bool)
        expected[tuple(slice(*ends) for ends in keys)] = True
        assert (tiles[query] == expected[None, ..., None]).all()


# on 3 × 6 × 10 tiles, (3, 3, 3) sees all frames
@pytest.mark.parametrize(("preset", "tiles"), [("default", 27), ("no-warmup", 27), ("wide", 35)])
def test_the_presets_see_their_windows_of_wan(preset: str, tiles: int) -> None:
    assert density(WAN, preset, dense_steps=0.0) == pytest.approx(tiles / 180)


@pytest.mark.parametrize("geometry", [HUNYUAN, UNEVEN], ids=["even", "uneven"])
def test_a_window_as_large_as_the_grid_keeps_everything(geometry: Geometry) -> None:
    assert keep(geometry, window=(5, 6, 10)).all()


# --- blocks ----------------------------------------------------------------------------------------------------------


def test_tokens_see_the_tiles_around_theirs_and_nothing_else() -> None:
    # tiles divide the grid and blocks a tile of 12 tokens, so that nothing is rounded up
    geometry = Geometry(grid=(4, 6, 10), heads=2, head_dim=1)
    made = plan(geometry, method(tile=(2, 3, 2), window=(1, 1, 3), block=(6, 12)))
    assert torch.equal(tokens_kept(made), tokens_by_hand(geometry, (2, 3, 2), (1, 1, 3)))


@pytest.mark.parametrize(("text", "side"), [(0, "last"), (10, "first"), (10, "last")])
@pytest.mark.parametrize("window", [(1, 1, 1), (1, 2, 3), (3, 1, 1)])
def test_a_block_across_tiles_is_kept_for_any_of_its_pairs(text: int, side: Any, window: tuple[int, int, int]) -> None:
    # 3 × 3 × 3 tiles of 1 to 24 tokens, and no block starts with a tile for long
    geometry = Geometry(grid=(5, 7, 9), heads=2, head_dim=1, text_tokens=text, text_side=side)
    tile, (block_q, block_k) = (2, 3, 4), (32, 16)
    order = tile_order(geometry, tile)[0].long()
    pairs = tokens_by_hand(geometry, tile, window)[order][:, order]
    expected = torch.stack(
        [torch.stack([part.any() for part in rows.split(block_k, 1)]) for rows in pairs.split(block_q)]
    )
    made = keep(geometry, tile=tile, window=window, block=(block_q, block_k))
    assert not made.all()
    assert torch.equal(made, expected)


@pytest.mark.parametrize("side", ["first", "last"])
def test_text_sees_and_is_seen_by_everything_and_video_is_as_without_it(side: Any) -> None:
    # 8 text tokens are two blocks, so that the video's blocks stay what they were
    settings: dict[str, Any] = {"tile": (1, 2, 2), "window": (1, 1, 1), "block": (4, 4)}
    made = keep(Geometry(grid=(2, 4, 4), heads=2, head_dim=1, text_tokens=8, text_side=side), **settings)
    text, video = (slice(0, 2), slice(2, None)) if side == "first" else (slice(8, 10), slice(0, 8))
    assert made[text].all()
    assert made[:, text].all()
    # each of the 8 tiles is a block, and sees itself
    assert torch.equal(made[video, video], torch.eye(8, dtype=torch.bool))


@pytest.mark.parametrize(("side", "block"), [("first", 0), ("last", -1)])
def test_a_block_that_is_partly_text_counts_as_text(side: Any, block: int) -> None:
    geometry = Geometry(grid=(2, 4, 4), heads=2, head_dim=1, text_tokens=1, text_side=side)
    made = keep(geometry, tile=(1, 2, 2), window=(1, 1, 1), block=(4, 4))
    assert not made.all()
    assert made[block].all()
    assert made[:, block].all()


# --- reach -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("geometry", [HUNYUAN, UNEVEN], ids=["even", "uneven"])
@pytest.mark.parametrize("preset", ["no-warmup", "wide"])
def test_density_rises_with_reach_to_dense(preset: str, geometry: Geometry) -> None:
    assert SlidingTile.knob is not None
    low, high = SlidingTile.knob.low, SlidingTile.knob.high
    reaches = [low + (high - low) * part / 15 for part in range(16)]
    densities = [density(geometry, preset, dense_steps=0.0, reach=reach) for reach in reaches]
    assert densities == sorted(densities)
    assert densities[0] < 0.05
    assert densities[-1] == 1


def test_without_reach_a_tile_sees_itself() -> None:
    assert density(HUNYUAN, reach=0.0) == pytest.approx(1 / 300)


def test_reach_scales_the_window_and_rounds() -> None:
    # 5 and 9 tiles of frames and columns; 1.6 · (1, 3, 5) = (1.6, 4.8, 8): as if (2, 5, 8)
    geometry = Geometry(grid=(5, 7, 9), heads=2, head_dim=1)
    settings: dict[str, Any] = {"tile": (1, 1, 1), "block": (1, 1)}
    assert torch.equal(
        keep(geometry, window=(1, 3, 5), reach=1.6, **settings), keep(geometry, window=(2, 5, 8), **settings)
    )


@pytest.mark.parametrize("wrong", [{"window": (3, 0, 3)}, {"tile": (6, 8, 0)}, {"tile": (-1, 8, 8)}, {"reach": -0.1}])
def test_a_window_a_tile_or_a_reach_that_is_none_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="sta needs"):
        method(**wrong)


# --- where and when --------------------------------------------------------------------------------------------------


# skip_time_steps: 12 of 50; fewer steps in proportion
@pytest.mark.parametrize(("steps", "dense"), [(50, 12), (8, 2), (4, 1)])
@pytest.mark.parametrize("preset", ["default", "wide"])
def test_the_first_quarter_of_the_steps_is_dense(preset: str, steps: int, dense: int) -> None:
    geometry = Geometry(grid=(2, 4, 4), heads=2, head_dim=1)
    made = method(preset)
    kinds = [plan(geometry, made, step=step, steps=steps).kinds[0] for step in range(steps)]
    assert kinds == ["dense"] * dense + ["masked"] * (steps - dense)


def test_without_warm_up_the_first_call_is_sparse() -> None:
    assert set(plan(WAN, method("no-warmup")).kinds) == {"masked"}


def test_another_geometry_gets_its_own_order_and_mask() -> None:
    settings: dict[str, Any] = {"tile": (2, 2, 2), "window": (1, 1, 1), "block": (4, 4)}
    used = method(**settings)
    # as many tokens in another grid, and then the first again
    for grid in ((10, 4, 4), (4, 10, 4), (10, 4, 4)):
        geometry = Geometry(grid=grid, heads=2, head_dim=1)
        made, fresh = plan(geometry, used), plan(geometry, method(**settings))
        assert torch.equal(tokens_kept(made), tokens_kept(fresh))
        assert torch.equal(tokens_kept(made), tokens_by_hand(geometry, (2, 2, 2), (1, 1, 1)))


def test_a_plan_is_made_once_for_a_geometry_and_outlives_a_reset() -> None:
    made = method()
    first = plan(WAN, made)
    made.reset()
    assert plan(WAN, made, step=7) is first


# --- search ----------------------------------------------------------------------------------------------------------

# 2 × 3 × 4 tiles; the last window is all of it
SEARCHED = Geometry(grid=(4, 6, 8), heads=3, head_dim=8)
FOUND = SlidingTileConfig(
    candidates=((1, 1, 4), (1, 3, 1), (2, 1, 1), (2, 3, 4)), dense_steps=0.5, tile=(2, 2, 2), block=(8, 16)
)


def place(step: int = 3, layer: int = 0) -> Site:
    return Site(geometry=SEARCHED, step=step, steps=4, sigma=0.5, branch="cond", layer=layer, layers=2)


def qkv(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = 2 * torch.randn(3, 3, SEARCHED.tokens, 8, generator=generator)
    return q, k, v


def search(*seeds: int, config: SlidingTileConfig = FOUND) -> Tensor:
    """The distances of candidates and heads, over videos."""
    learner = SlidingTile.learner(config)
    assert learner is not None
    merged = learner.merge([learner.note(*qkv(seed), place(), prompt) for prompt, seed in enumerate(seeds)])
    return merged["distance"]


Found = Callable[..., Plan]


@pytest.fixture
def found(tabled: Callable[..., Learnt]) -> Found:
    """The plan by a table of distances."""

    def planned(distance: Tensor, config: SlidingTileConfig = FOUND, step: int = 3) -> Plan:
        learnt = tabled("sta", place(), {"distance": distance}, SlidingTile.learner(config))
        return SlidingTile(config, learnt).plan(*qkv(99), place(step))

    return planned


def of_window(window: tuple[int, int, int], **settings: Any) -> Plan:
    return plan(SEARCHED, SlidingTile(replace(FOUND, window=window, candidates=(), dense_steps=0.0, **settings)))


def test_candidates_are_compared_by_their_outputs_over_all_prompts() -> None:
    distance = search(1, 2)
    for candidate, window in enumerate(FOUND.candidates[:3]):
        expected = torch.zeros(3, dtype=torch.float64)
        for seed in (1, 2):
            made = of_window(window)
            assert made.order is not None
            q, k, v = (x[None, :, made.order.queries[0].long()] for x in qkv(seed))
            full = oracle.attend(q, k, v, Plan.dense(SEARCHED))
            masked = oracle.attend(q, k, v, made.unordered())
            expected += (masked - full).square().mean((0, 2, 3)).sqrt() / 2
        torch.testing.assert_close(distance[candidate].double(), expected, rtol=1e-4, atol=1e-6)


def test_a_candidate_that_leaves_nothing_out_is_not_chosen() -> None:
    assert search(1)[3].tolist() == [float("inf")] * 3
    # but where all are such, there is no other
    assert (search(1, config=replace(FOUND, candidates=((2, 3, 4), (4, 3, 4)))) < 1e-6).all()


def test_windows_are_searched_as_they_are_and_scaled_afterwards() -> None:
    assert SlidingTile.learner(replace(FOUND, reach=4.0)) == SlidingTile.learner(FOUND)


def test_each_head_has_the_nearest_window(found: Found) -> None:
    distance = torch.zeros(4, 2, 4, 3)
    distance[3, 0] = torch.tensor([[0.2, 0.1, 0.3], [0.1, 0.2, 0.2], [0.3, 0.3, 0.1], [9.0, 9.0, 9.0]])
    for reach in (1.0, 0.4):
        made = found(distance, replace(FOUND, reach=reach))
        assert made.mask is not None
        for head, candidate in enumerate((1, 0, 2)):
            expected = of_window(FOUND.candidates[candidate], reach=reach).mask
            assert expected is not None
            assert torch.equal(made.mask.keep()[head], expected.keep()[0])


def test_a_search_costs_nothing_at_steps_that_stay_dense(monkeypatch: pytest.MonkeyPatch, found: Found) -> None:
    learner = SlidingTile.learner(FOUND)
    assert learner is not None
    monkeypatch.setattr("calibatt.methods.sta.window_distance", None)
    assert not learner.note(*qkv(1), place(step=1), 0)["distance"].any()
    assert set(found(torch.zeros(4, 2, 4, 3), step=1).kinds) == {"dense"}


def test_queries_of_large_inputs_are_drawn_alike_for_all_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = search(1)
    monkeypatch.setattr("calibatt.methods.sta._QUERIES", 96)
    drawn = search(1)
    assert not torch.equal(drawn, whole)
    torch.testing.assert_close(drawn[:3], whole[:3], rtol=0.2, atol=0.0)
    torch.testing.assert_close(search(1, 1), drawn)


@pytest.mark.parametrize("wrong", [{"window": (1, 1, 1)}, {"candidates": ()}])
def test_both_a_window_and_candidates_or_neither_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="either one window or candidates"):
        replace(FOUND, **wrong)


def test_presets_with_one_window_learn_nothing() -> None:
    learns = [name for name, config in SlidingTile.presets.items() if SlidingTile.learner(config) is not None]
    assert learns == ["searched", "searched-no-warmup"]
