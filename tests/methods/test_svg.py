"""Sparse VideoGen's order, bands and choice, worked out by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from calibatt.kernels.geometry import Geometry
from calibatt.kernels.plan import Plan
from calibatt.methods import svg
from calibatt.methods.learning import Learnt
from calibatt.methods.site import Site
from calibatt.methods.svg import (
    OutputErrors,
    SparseVideoGen,
    SparseVideoGenConfig,
    band_mask,
    band_width,
    head_orders,
    mask_errors,
    token_major_order,
)

# 720p: 81 frames of Wan, 129 of HunyuanVideo
WAN = Geometry(grid=(21, 45, 80), heads=1, head_dim=1)
HUNYUAN = Geometry(grid=(33, 45, 80), heads=1, head_dim=1, text_tokens=256)
# two frames' blocks are 4 on either side of a block's own, and a place in all frames is one block
VIDEO = Geometry(grid=(8, 4, 4), heads=2, head_dim=16)
SMALL: dict[str, Any] = {"sink": False, "block": (8, 8)}


def config(preset: str = "no-warmup", **settings: Any) -> SparseVideoGenConfig:
    return replace(SparseVideoGen.presets[preset], **settings)


def sampled(made: SparseVideoGenConfig) -> OutputErrors:
    """What the choice is made by."""
    return OutputErrors.of(made)


def line(tokens: int, text: int = 0, side: Any = "last") -> Geometry:
    return Geometry(grid=(tokens - text, 1, 1), heads=1, head_dim=1, text_tokens=text, text_side=side)


def at(geometry: Geometry, **where: Any) -> Site:
    given: dict[str, Any] = {"step": 3, "steps": 50, "layer": 2, "layers": 4, "branch": "cond", **where}
    return Site(geometry=geometry, sigma=0.5, **given)


def kept(geometry: Geometry, **settings: Any) -> list[list[int]]:
    return band_mask(geometry, config(**settings)).keep()[0].int().tolist()


def temporal(plan: Plan) -> list[bool]:
    """Which heads have their tokens place by place; the others have them frame by frame."""
    assert plan.order is not None
    assert plan.order.shared
    frames, places = head_orders(VIDEO)
    assert all(torch.equal(order, frames) or torch.equal(order, places) for order in plan.order.queries)
    return [torch.equal(order, places) for order in plan.order.queries]


# --- order -----------------------------------------------------------------------------------------------------------


def test_the_frames_of_a_place_follow_each_other() -> None:
    assert token_major_order(Geometry(grid=(3, 1, 2), heads=1, head_dim=64)).tolist() == [[0, 2, 4, 1, 3, 5]]


@pytest.mark.parametrize(("side", "expected"), [("first", [0, 1, 2, 4, 3, 5]), ("last", [0, 2, 1, 3, 4, 5])])
def test_text_stays_where_it_is(side: Any, expected: list[int]) -> None:
    geometry = Geometry(grid=(2, 1, 2), heads=1, head_dim=64, text_tokens=2, text_side=side)
    assert token_major_order(geometry).tolist() == [expected]


# --- band ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("preset", "geometry", "width"),
    [
        # 75,600 · (1 − √0.7) = 12,348.5: 96.5 blocks, rounded up to 97
        ("default", WAN, 97 * 128),
        # 0.25 − 2 · 256 / 119,056 = 0.2457, and 119,056 · (1 − √0.7543) = 15,655.3: 122.3 blocks, rounded down to 122
        ("hunyuan", HUNYUAN, 122 * 128),
    ],
)
def test_the_bands_of_the_presets_have_their_models_width(preset: str, geometry: Geometry, width: int) -> None:
    assert band_width(geometry, config(preset)) == width


@pytest.mark.parametrize(
    ("density", "text", "width"),
    # 1 − √(1 − 0.75) = 1/2
    [(0.75, 0, 32), (1.0, 0, 64), (0.0, 0, 0), (1.0, 8, 32), (0.2, 8, 0), (0.25, 8, 0)],
)
def test_text_takes_its_rows_and_columns_off_the_density(density: float, text: int, width: int) -> None:
    assert band_width(line(64, text), config(density=density, block=(8, 8))) == width


@pytest.mark.parametrize("density", [0.1, 0.3, 0.7])
def test_the_band_holds_the_density_and_little_more(density: float) -> None:
    # the width is rounded up by less than a block, and blocks reach past the band by less than another, on either side
    more = band_mask(WAN, config(density=density, sink=False)).density().item() - density
    assert 0 <= more < 4 * 128 / WAN.tokens


@pytest.mark.parametrize("block", [(8, 8), (16, 8), (8, 16), (5, 12)])
@pytest.mark.parametrize(("text", "side"), [(0, "last"), (9, "first"), (9, "last")])
@pytest.mark.parametrize("sink", [False, True])
def test_a_block_is_kept_for_any_of_its_pairs(block: tuple[int, int], text: int, side: Any, sink: bool) -> None:
    geometry = Geometry(grid=(6, 3, 5), heads=1, head_dim=1, text_tokens=text, text_side=side)
    made = config(density=0.4, block=block, sink=sink)
    place = torch.arange(geometry.tokens)
    video = place - geometry.video_start
    is_text = (video < 0) | (video >= 90)
    pairs = ((place[:, None] - place).abs() <= band_width(geometry, made)) | is_text | is_text[:, None]
    if sink:
        pairs |= (video >= 0) & (video < 15)
    expected = [[bool(part.any()) for part in rows.split(block[1], 1)] for rows in pairs.split(block[0])]
    assert not pairs.all()
    assert band_mask(geometry, made).keep()[0].tolist() == expected


def test_the_sink_of_wan_is_as_many_first_keys_as_a_frame_has() -> None:
    # frames of 16 tokens, blocks of 8
    plain, sink = kept(VIDEO, density=0.0, block=(8, 8), sink=False), kept(VIDEO, density=0.0, block=(8, 8))
    assert plain == torch.eye(16).int().tolist()
    assert [row[:2] for row in sink] == [[1, 1]] * 16
    assert [row[2:] for row in sink] == [row[2:] for row in plain]


def test_density_rises_with_the_knob_from_the_diagonal_to_everything() -> None:
    made = [band_mask(VIDEO, config(density=part / 20, **SMALL)).density().item() for part in range(21)]
    assert made == sorted(made)
    assert (made[0], made[-1]) == (1 / 16, 1)
    assert len(set(made)) > 10


# --- choice ----------------------------------------------------------------------------------------------------------


def test_errors_are_what_a_mask_changes() -> None:
    # all queries weigh all four keys 1/4; of two keys each has 1/2, of one it has 1
    q = k = torch.zeros(1, 4, 2)
    rows = torch.tensor([0, 3])
    masks = torch.tensor([[[1, 1, 1, 1], [1, 1, 1, 1]], [[1, 1, 0, 0], [1, 0, 0, 0]], [[0, 0, 1, 1], [0, 1, 1, 0]]])
    # outputs of 2 instead of 1, and of 4; then of 0 twice
    v = torch.tensor([[[4.0, 0.0], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]]])
    assert mask_errors(q, k, v, rows, masks.bool()).flatten().tolist() == [0, 5, 1]


def test_errors_do_not_depend_on_how_many_heads_are_held_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = torch.randn(3, 5, 128, 16, generator=torch.Generator().manual_seed(0))
    rows = torch.arange(0, 128, 2)
    masks = sampled(config(**SMALL)).masks(VIDEO, rows, head_orders(VIDEO))
    whole = mask_errors(q, k, v, rows, masks)
    monkeypatch.setattr(svg, "_CHUNK", 2 * masks[0].numel())
    torch.testing.assert_close(mask_errors(q, k, v, rows, masks), whole)


@pytest.mark.parametrize(("side", "text"), [("first", 4), ("last", 4), ("last", 0)])
def test_the_choice_is_by_bands_of_blocks_in_both_orders(side: Any, text: int) -> None:
    # two frames of 6 tokens, blocks of 2, a band of 0.5 frames: less than one block apart, so that 2 tokens see each
    # other; of pairs in token-major order 0 6 | 1 7 | 2 8 …
    geometry = Geometry(grid=(2, 2, 3), heads=1, head_dim=1, text_tokens=text, text_side=side)
    made = config(density=0.9, sampled_band=0.5, sink=False, block=(4, 2))
    start = geometry.video_start
    rows = torch.tensor([0, 7, 8]) + start
    texts = [token for token in range(geometry.tokens) if not start <= token < start + 12]
    for mask, keys in zip(
        sampled(made).masks(geometry, rows, head_orders(geometry)),
        ([[0, 1], [6, 7], [8, 9]], [[0, 6], [1, 7], [2, 8]]),
        strict=True,
    ):
        expected = [sorted([*(key + start for key in own), *texts]) for own in keys]
        assert [row.nonzero().flatten().tolist() for row in mask] == expected


def test_the_band_of_the_choice_is_two_frames_whatever_the_density() -> None:
    # 2 · 3,600 // 128 = 56 blocks less than which are kept: 55 to the right of the first
    for density in (0.05, 0.9):
        mask = sampled(config(density=density, sink=False)).masks(WAN, torch.tensor([0]), head_orders(WAN)[:1])[0, 0]
        assert mask.sum() == 56 * 128
        assert mask[: 56 * 128].all()
    # HunyuanVideo's is 1.5 frames, 42 blocks, and its text
    mask = sampled(config("hunyuan")).masks(HUNYUAN, torch.tensor([0]), head_orders(HUNYUAN)[:1])[0, 0]
    assert mask.sum() == 42 * 128 + 256


def test_the_sink_of_a_temporal_head_is_the_first_places_of_all_frames() -> None:
    # 16 tokens of a frame, in token-major order: two places in eight frames
    made = config(sampled_band=0.0, block=(8, 8))
    frames, places = sampled(made).masks(VIDEO, torch.tensor([127]), head_orders(VIDEO))[:, 0]
    assert frames.nonzero().flatten().tolist() == [*range(16), *range(120, 128)]
    assert places.view(8, 16).int().tolist() == [[1, 1, *[0] * 13, 1]] * 8


def test_heads_of_frames_are_spatial_and_heads_of_places_temporal() -> None:
    frame, place = torch.arange(128) // 16, torch.arange(128) % 16
    x = 8 * torch.eye(16)[torch.stack((place, frame))]
    # values that all differ, so that what a query sees shows in its output
    v = torch.randn(2, 128, 16, generator=torch.Generator().manual_seed(0))
    made = SparseVideoGen(config(**SMALL))
    assert temporal(made.plan(x, x, v, at(VIDEO))) == [True, False]
    assert temporal(made.plan(x.flip(0), x.flip(0), v, at(VIDEO))) == [False, True]


def test_every_call_is_chosen_by_its_outputs() -> None:
    # queries see all keys alike, so that the weights are the same in both heads and tell nothing: a band of whole
    # frames has all places, a band of whole places all frames
    method, q = SparseVideoGen(config(**SMALL)), torch.zeros(2, 128, 16)
    v = by_frame_and_place()
    assert temporal(method.plan(q, q, v, at(VIDEO))) == [True, False]
    assert temporal(method.plan(q, q, v.flip(0), at(VIDEO))) == [False, True]


def test_heads_whose_errors_are_equal_are_spatial() -> None:
    # queries that see nothing but themselves lose nothing either way
    x = 100 * torch.eye(128).expand(2, -1, -1)
    assert temporal(SparseVideoGen(config(**SMALL)).plan(x, x, x, at(VIDEO))) == [False, False]


def test_one_mask_serves_all_heads() -> None:
    x = torch.zeros(2, 128, 16)
    mask = SparseVideoGen(config(**SMALL)).plan(x, x, x, at(VIDEO)).mask
    assert mask is not None
    assert mask.heads == 1


def test_samples_are_of_the_video_and_of_its_first_tokens_where_so_set() -> None:
    cpu = torch.device("cpu")
    geometry = Geometry(grid=(8, 4, 4), heads=1, head_dim=1, text_tokens=50, text_side="first")
    rows = sampled(config(samples=4000)).rows(at(geometry), cpu)
    assert sorted(set(rows.tolist())) == list(range(50, 178))
    rows = sampled(config(samples=4000, sampled_from=100)).rows(at(geometry), cpu)
    assert sorted(set(rows.tolist())) == list(range(50, 150))
    assert sampled(config(sampled_from=10_000)).rows(at(geometry), cpu).max() < 178


def test_samples_are_the_sites_and_the_seeds_but_not_the_branches() -> None:
    def drawn(seed: int = 0, **where: Any) -> list[int]:
        rows: list[int] = sampled(config(seed=seed)).rows(at(WAN, **where), torch.device("cpu")).tolist()
        return rows

    assert drawn() == drawn() == drawn(branch="uncond", sample=1)
    assert len({tuple(rows) for rows in (drawn(), drawn(step=4), drawn(layer=3), drawn(seed=1))}) == 4


# --- what is learnt --------------------------------------------------------------------------------------------------


Learn = Callable[..., Learnt]


def learnt_from(learn: Learn, *values: Tensor) -> SparseVideoGen:
    """The preset, after videos whose queries see all keys alike."""
    settings = config("learnt", **SMALL)
    q = torch.zeros(2, 128, 16)
    learnt = learn("svg", SparseVideoGen.learner(settings), {at(VIDEO): [(q, q, v) for v in values]})
    return SparseVideoGen(settings, learnt)


def by_frame_and_place() -> Tensor:
    """Values that are those of their frame in the first head, and of their place in the second."""
    frame, place = torch.arange(128) // 16, torch.arange(128) % 16
    return torch.eye(16)[torch.stack((frame, place))]


def test_the_learnt_choice_is_by_outputs_of_other_videos(learn: Learn) -> None:
    method = learnt_from(learn, by_frame_and_place())
    q = torch.zeros(2, 128, 16)
    assert temporal(method.plan(q, q, q, at(VIDEO))) == [True, False]


def test_videos_add_up_and_of_no_error_a_head_is_spatial(learn: Learn) -> None:
    v = by_frame_and_place()
    once = learnt_from(learn, v).learnt
    method = learnt_from(learn, v, 3 * v.flip(0))
    assert once is not None
    assert method.learnt is not None
    alone = once.at("errors", at(VIDEO))
    # three times the value is nine times its square
    torch.testing.assert_close(method.learnt.at("errors", at(VIDEO)), alone + 9 * alone.flip(-1))
    q = torch.zeros(2, 128, 16)
    assert temporal(method.plan(q, q, v, at(VIDEO))) == [False, True]
    assert temporal(method.plan(q, q, v, at(VIDEO, step=4))) == [False, False]


def test_only_the_learnt_preset_learns() -> None:
    learning = [name for name, made in SparseVideoGen.presets.items() if SparseVideoGen.learner(made) is not None]
    assert learning == ["learnt"]


# --- when ------------------------------------------------------------------------------------------------------------


# the scripts' 50 steps, of Wan's 40 layers and HunyuanVideo's 60; shares are rounded down
@pytest.mark.parametrize(
    ("preset", "steps", "layers", "dense_steps", "dense_layers"),
    [
        ("default", 50, 40, 10, 1),
        ("hunyuan", 50, 60, 5, 1),
        ("default", 9, 30, 1, 0),
        ("no-warmup", 50, 40, 0, 0),
    ],
)
def test_the_first_steps_and_layers_are_dense(
    preset: str, steps: int, layers: int, dense_steps: int, dense_layers: int
) -> None:
    method, x = SparseVideoGen(config(preset, block=(8, 8))), torch.zeros(2, 128, 16)

    def dense(step: int, layer: int) -> bool:
        site = at(VIDEO, step=step, steps=steps, layer=layer, layers=layers)
        return method.plan(x, x, x, site).kinds[0] == "dense"

    assert [dense(step, layers - 1) for step in range(dense_steps + 2)] == [*[True] * dense_steps, False, False]
    assert [dense(steps - 1, layer) for layer in range(dense_layers + 2)] == [*[True] * dense_layers, False, False]


@pytest.mark.parametrize(
    "wrong",
    [
        {"density": 1.1}, {"density": -0.1}, {"dense_steps": 2.0}, {"dense_layers": -1.0}, {"samples": 0},
        {"sampled_from": 0}, {"sampled_band": -1.0},
    ],
)  # fmt: skip
def test_settings_that_mean_nothing_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="svg"):
        config(**wrong)
