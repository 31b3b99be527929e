"""Plans of what was learnt, with and without text, and the method that hands them on."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from calibatt.kernels import oracle
from calibatt.kernels.geometry import Geometry, TextSide
from calibatt.kernels.mask import BlockMask, unpacked
from calibatt.kernels.plan import RowReuse, anchor_rows
from calibatt.methods.base import Foreseen
from calibatt.methods.blocks import text_blocks, video_blocks
from calibatt.methods.calibatt.levels import keep_at
from calibatt.methods.calibatt.method import CalibAtt, CalibAttConfig
from calibatt.methods.calibatt.plans import Plans
from calibatt.methods.catalogue import build
from calibatt.methods.learning import CalibrationMismatch, Learnt

Made = Callable[..., Any]
LEVELS = torch.randint(0, 255, (2, 2, 2, 4, 8), generator=torch.Generator().manual_seed(1)).to(torch.uint8)


@pytest.fixture
def four_heads(learnt: Made, learner: Made) -> Learnt:
    """Two heads, of which the first repeats at layer 0 only, and the second nowhere."""
    made: Learnt = learnt(learner())
    similarity = torch.tensor([[0.87, 0.86], [0.5, 0.1]]).repeat(2, 1, 1)
    return replace(made, tables={**made.tables, "similarity": similarity})


def test_repetitive_heads_reuse_rows_and_the_others_have_their_mask(four_heads: Learnt, site: Made) -> None:
    plans = Plans(learnt=four_heads, gamma=0.87)
    plan = plans.plan(site(1, 0))
    assert plan.kinds == ("reused", "masked")
    assert plans.plan(site(1, 1)).kinds == ("masked", "masked")
    assert plan.mask is not None
    assert torch.equal(plan.mask.keep(), unpacked(four_heads.tables["bits"][1, 0], 8))
    expected = RowReuse.of_anchor_rows(site().geometry, anchor_rows(6, 2))
    assert plan.reuse is not None
    assert torch.equal(plan.reuse.computed[plan.reuse.source], expected.computed[expected.source])


def test_without_repetition_every_head_has_its_mask(four_heads: Learnt, site: Made) -> None:
    plan = Plans(learnt=four_heads, gamma=0.0, repetition=False).plan(site())
    assert plan.kinds == ("masked", "masked")
    assert plan.reuse is None


def test_a_lower_threshold_makes_all_heads_reuse_rows(four_heads: Learnt, site: Made) -> None:
    plan = Plans(learnt=four_heads, gamma=0.0).plan(site())
    assert plan.kinds == ("reused", "reused")
    assert plan.mask is None


@pytest.fixture
def errors(learnt: Made, learner: Made) -> Learnt:
    """Errors of two heads at each layer: far less and more than four times those of masks, just that, no error."""
    made: Learnt = learnt(learner(output_errors=True))
    table = {
        "reuse_error": torch.tensor([[0.01, 0.5], [0.25, 0.0]]).repeat(2, 1, 1),
        "mask_error": torch.tensor([[0.02, 0.1], [0.0625, 0.0]]).repeat(2, 1, 1),
    }
    # attention that is alike counts for nothing
    return replace(made, tables={**made.tables, **table, "similarity": torch.tensor([0.0, 1.0]).repeat(2, 2, 1)})


@pytest.mark.parametrize(
    ("ratio", "kinds"),
    [
        (0.0, [["masked", "masked"], ["masked", "reused"]]),
        (0.5, [["reused", "masked"], ["masked", "reused"]]),
        (4.0, [["reused", "masked"], ["reused", "reused"]]),
        (5.0, [["reused", "reused"], ["reused", "reused"]]),
    ],
)
def test_by_outputs_heads_reuse_rows_that_lose_at_most_so_many_times_what_their_masks_do(
    errors: Learnt, site: Made, ratio: float, kinds: list[list[str]]
) -> None:
    plans = Plans(learnt=errors, gamma=0.87, error_ratio=ratio)
    assert [list(plans.plan(site(1, layer)).kinds) for layer in range(2)] == kinds
    method = build("calibatt", preset="output-reuse", calibration=errors, error_ratio=ratio)
    assert isinstance(method, CalibAtt)
    assert torch.equal(method.plans.repetitive, plans.repetitive)
    assert method.mean_density() == plans.density().mean().item()


def test_other_presets_go_by_similarity_whatever_output_errors_there_are(errors: Learnt, site: Made) -> None:
    for preset, kinds in (("default", ("masked", "reused")), ("masks-only", ("masked", "masked"))):
        method = build("calibatt", preset=preset, calibration=errors)
        assert isinstance(method, CalibAtt)
        assert method.plans.plan(site()).kinds == kinds


def test_without_output_errors_reuse_by_them_is_refused(four_heads: Learnt) -> None:
    says = r"^the calibration has no output errors .*: make one by `calibatt calibrate --preset output-reuse`$"
    for choice in ({"preset": "output-reuse"}, {"reuse_by": "output"}):
        with pytest.raises(ValueError, match=says):
            build("calibatt", calibration=four_heads, **choice)


def test_a_criterion_that_there_is_not_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    # as callers without a type checker meet it
    monkeypatch.setattr(CalibAttConfig, "__init__", inspect.unwrap(CalibAttConfig.__init__))
    with pytest.raises(ValueError, match=r"^rows are reused by similarity or by output: got 'outputs'$"):
        CalibAttConfig(reuse_by="outputs")  # type: ignore[arg-type]


def test_both_branches_have_the_same_plan_and_nothing_of_it_is_copied(four_heads: Learnt, site: Made) -> None:
    plans = Plans(learnt=four_heads, gamma=0.87)
    one, other = plans.plan(site()), plans.plan(site(branch="uncond", sigma=0.1, sample=1))
    assert one.mask is not None
    assert other.mask is not None
    bits = four_heads.tables["bits"]
    assert one.mask.tensors()[0].data_ptr() == other.mask.tensors()[0].data_ptr() == bits.data_ptr()
    assert one.reuse is other.reuse


def test_density_is_that_of_the_plans(four_heads: Learnt, site: Made) -> None:
    plans = Plans(learnt=four_heads, gamma=0.87)
    density = plans.density()
    assert density.shape == (2, 2, 2)
    assert torch.equal(density[1, 0], plans.plan(site(1, 0)).density())
    # repetitive: 2 of 6 rows are computed
    assert density[1, 0, 0].item() == pytest.approx(1 / 3)
    method = build("calibatt", calibration=four_heads)
    assert isinstance(method, Foreseen)
    assert method.mean_density() == density.mean().item()


@pytest.mark.parametrize(
    ("other", "says"),
    [
        ({"geometry": Geometry(grid=(2, 5, 6), heads=2, head_dim=16)}, r"2×6×5 .* not for 2×5×6"),
        ({"geometry": Geometry(grid=(2, 6, 5), heads=2, head_dim=16, text_tokens=3)}, r"not for 2×6×5\+3"),
        ({"steps": 4}, "2 steps, not for 4"),
        ({"layers": 3}, "2 layers, not for 3"),
    ],
    ids=["grid", "text", "steps", "layers"],
)
def test_another_site_is_refused_by_naming_both(
    four_heads: Learnt, site: Made, other: dict[str, Any], says: str
) -> None:
    with pytest.raises(CalibrationMismatch, match=says):
        Plans(learnt=four_heads, gamma=0.87).plan(site(**other))


def test_masks_of_another_loss_come_from_levels_and_those_of_the_schedule_from_the_bits(
    learnt: Made, learner: Made, site: Made
) -> None:
    made = learnt(learner(levels=True))
    made = replace(made, tables={**made.tables, "levels": LEVELS})
    for loss in (0.0, 1.0, 4.0):
        mask = Plans(learnt=made, gamma=2.0, loss=loss).plan(site(1, 0)).mask
        assert mask is not None
        expected = unpacked(made.tables["bits"][1, 0], 8) if loss == 1 else keep_at(LEVELS[1, 0], loss)
        assert torch.equal(mask.keep(), expected)


def test_without_levels_another_loss_is_refused(four_heads: Learnt) -> None:
    with pytest.raises(ValueError, match=r"a loss of 1, not for 2: make one by `calibatt calibrate --levels`"):
        Plans(learnt=four_heads, gamma=0.87, loss=2.0)


def test_a_loss_beyond_levels_is_refused_when_the_method_is_built(learnt: Made, learner: Made) -> None:
    with pytest.raises(ValueError, match=r"from 0 to 15\.75"):
        build("calibatt", calibration=learnt(learner(levels=True)), loss=16.0)


@pytest.mark.parametrize("side", ["first", "last"])
@pytest.mark.parametrize("text", [25, 16, 1, 40])
def test_one_calibration_serves_prompts_of_any_length_and_text_is_always_kept(
    learnt: Made, learner: Made, site: Made, side: TextSide, text: int
) -> None:
    geometry = replace(site().geometry, text_side=side)
    made = learnt(learner(), texts=(17, 40), geometry=geometry)
    own = replace(geometry, text_tokens=text)
    plan = Plans(learnt=made, gamma=2.0).plan(site(1, 1, geometry=own))
    assert plan.tokens == 60 + text
    assert isinstance(plan.mask, BlockMask)
    keep = plan.mask.keep()
    assert keep[:, text_blocks(own, (16, 8))].all()
    rows, columns = video_blocks(own, 16), video_blocks(own, 8)
    learnt_part = unpacked(made.tables["bits"][1, 1], 8)[:, : rows.stop - rows.start, : columns.stop - columns.start]
    assert torch.equal(keep[:, rows, columns], learnt_part)
    assert not keep.all()
    method = build("calibatt", calibration=made, gamma=2.0)
    assert isinstance(method, Foreseen)
    plans = [
        method.plan(*(torch.zeros(2, plan.tokens, 16),) * 3, site(step, layer, geometry=own))
        for step in range(2)
        for layer in range(2)
    ]
    assert method.mean_density(text) == pytest.approx(torch.stack([one.density() for one in plans]).mean().item())


@pytest.mark.parametrize("side", ["first", "last"])
def test_text_queries_are_computed_where_rows_are_reused(
    learnt: Made, learner: Made, site: Made, inputs: Made, side: TextSide
) -> None:
    geometry = replace(site().geometry, text_side=side)
    made = learnt(learner(), texts=(17, 40), geometry=geometry)
    own = replace(geometry, text_tokens=25)
    plan = Plans(learnt=made, gamma=-1.0).plan(site(geometry=own))
    assert plan.kinds == ("reused", "reused")
    assert plan.reuse is not None
    text = torch.arange(25) if side == "first" else torch.arange(60, 85)
    assert torch.isin(text, plan.reuse.computed).all()
    assert torch.equal(plan.reuse.computed[plan.reuse.source[text]], text)


@pytest.mark.parametrize("side", ["first", "last"])
def test_outputs_of_text_queries_are_dense_attention(
    learnt: Made, learner: Made, site: Made, inputs: Made, side: TextSide
) -> None:
    geometry = replace(site().geometry, text_side=side)
    method = build("calibatt", calibration=learnt(learner(gamma=2.0), texts=(17, 40), geometry=geometry))
    own = replace(geometry, text_tokens=25)
    where = site(1, 1, geometry=own)
    q, k, v = inputs(own, seed=5)
    out = oracle.attend(q[None], k[None], v[None], method.plan(q, k, v, where))[0]
    dense = torch.nn.functional.scaled_dot_product_attention(q.double(), k.double(), v.double())
    text = slice(0, 25) if side == "first" else slice(60, 85)
    video = slice(25, 85) if side == "first" else slice(0, 60)
    torch.testing.assert_close(out[:, text], dense[:, text])
    assert not torch.allclose(out[:, video], dense[:, video], atol=1e-3)


def test_without_text_at_use_what_only_text_left_over_is_kept(learnt: Made, learner: Made, site: Made) -> None:
    made = learnt(learner(), texts=(17, 40))
    plan = Plans(learnt=made, gamma=2.0).plan(site())
    assert plan.mask is not None
    # the last blocks of the video's 60 tokens were shared with text, and never learnt
    assert plan.mask.keep()[:, 3:].all()
    assert plan.mask.keep()[:, :, 7:].all()


@pytest.mark.parametrize(("preset", "kinds"), [("default", {"reused"}), ("masks-only", {"masked"})])
def test_presets_share_one_calibration(
    learnt: Made, learner: Made, site: Made, inputs: Made, preset: str, kinds: set[str]
) -> None:
    made = learnt(learner())
    made = replace(made, tables={**made.tables, "similarity": torch.ones(2, 2, 2)})
    method = build("calibatt", preset=preset, calibration=made)
    assert isinstance(method, CalibAtt)
    assert set(method.plan(*inputs(), site()).kinds) == kinds
    # the learner's settings are those that the calibration was learnt under, not the preset's
    assert (method.config.block, method.config.anchors) == ((16, 8), 2)
    assert method.learnt is made


@pytest.mark.parametrize(
    "wrong",
    [{"loss": -0.5}, {"loss": math.nan}, {"error_ratio": -1.0}, {"error_ratio": math.nan}, {"error_ratio": math.inf}],
    ids=str,
)
def test_settings_of_use_out_of_range_are_refused(learnt: Made, learner: Made, wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="got"):
        build("calibatt", calibration=learnt(learner()), **wrong)


def checked(learnt: Learnt) -> None:
    """As a calibration does."""
    CalibAtt.check_tables(learnt)
    for name, table in learnt.tables.items():
        for part in table.flatten(0, 1):
            try:
                CalibAtt.check_part(name, part, learnt.settings, learnt.provenance.geometry)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None


def without_a_row(tables: dict[str, Tensor]) -> dict[str, Tensor]:
    bits = tables["bits"].clone()
    bits[1, 0, 1, 2] = 0
    return {**tables, "bits": bits}


def with_padding_only(tables: dict[str, Tensor]) -> dict[str, Tensor]:
    bits = without_a_row(tables)["bits"]
    bits[1, 0, 1, 2, 1:] = 255
    return {**tables, "bits": bits}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (without_a_row, "bits: a row of a mask has no block"),
        (with_padding_only, "bits: a row of a mask has no block"),
        (lambda t: {**t, "similarity": torch.full((2, 2, 2), 1.5)}, "similarity: .* 0 to 1"),
        (lambda t: {**t, "agreement": torch.full((2, 2, 2), math.nan)}, "agreement: .* 0 to 1"),
        (lambda t: {**t, "similarity": t["similarity"].double()}, "similarity: .*float32.*not .*float64"),
        (lambda t: {**t, "bits": t["bits"][..., :2]}, r"bits: \[2, 4, 4\] of torch.uint8 at every site, not"),
        (lambda t: {**t, "levels": LEVELS}, "tables: CalibAtt has bits, agreement, similarity, not"),
        (lambda t: {"bits": t["bits"]}, "tables: "),
    ],
    ids=["row", "padding", "range", "nan", "dtype", "shape", "more", "fewer"],
)
def test_tables_that_calibatt_cannot_have_learnt_are_refused_by_name(
    learnt: Made, learner: Made, change: Callable[[dict[str, Tensor]], dict[str, Tensor]], says: str
) -> None:
    made = learnt(learner())
    checked(made)
    with pytest.raises(ValueError, match=says) as error:
        checked(replace(made, tables=change(dict(made.tables))))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: {**t, "reuse_error": t["reuse_error"] - 1}, "^reuse_error: a value is below 0, or not finite$"),
        (lambda t: {**t, "mask_error": t["mask_error"] / 0}, "^mask_error: a value is below 0, or not finite$"),
        (lambda t: {**t, "mask_error": t["mask_error"].double()}, "mask_error: .*float32.*not .*float64"),
        (lambda t: {name: t[name] for name in t if name != "reuse_error"}, "tables: CalibAtt has .*reuse_error"),
    ],
    ids=["negative", "infinite", "dtype", "missing"],
)
def test_output_errors_that_cannot_be_are_refused_by_name(
    errors: Learnt, change: Callable[[dict[str, Tensor]], dict[str, Tensor]], says: str
) -> None:
    checked(errors)
    with pytest.raises(ValueError, match=says):
        checked(replace(errors, tables=change(dict(errors.tables))))


def test_settings_that_do_not_fit_the_videos_are_refused(learnt: Made, learner: Made) -> None:
    made = learnt(learner())
    with pytest.raises(ValueError, match="anchors"):
        CalibAtt.check_tables(replace(made, settings={**made.settings, "anchors": 6}))
