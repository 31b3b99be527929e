"""Notes of one call, and the vote over the prompts."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields, replace
from itertools import product
from typing import Any

import pytest
import torch

from calibatt.kernels.geometry import TextSide
from calibatt.kernels.mask import BlockMask, block_count, packed, unpacked
from calibatt.kernels.plan import anchor_rows
from calibatt.methods.blocks import text_blocks, video_blocks, video_part
from calibatt.methods.calibatt import learner as module
from calibatt.methods.calibatt.errors import output_errors
from calibatt.methods.calibatt.learner import CalibAttLearner, MassLearner, votes_needed
from calibatt.methods.calibatt.levels import loss_levels
from calibatt.methods.calibatt.repetition import row_similarity
from calibatt.methods.calibatt.schedule import Schedule
from calibatt.methods.energy import block_energy, block_mass
from calibatt.methods.facts import read_settings
from calibatt.methods.learning import settings_of
from calibatt.methods.selection import mass_before, top_p

Made = Callable[..., Any]


@pytest.mark.parametrize(
    ("prompts", "rho", "needed"), [(4, 0.5, 2), (5, 0.5, 3), (100, 0.07, 7), (3, 1.0, 3), (64, 1e-3, 1)]
)
def test_a_block_needs_the_smallest_number_of_votes_that_is_the_share(prompts: int, rho: float, needed: int) -> None:
    assert votes_needed(prompts, rho) == needed


def test_a_note_is_the_smallest_set_the_similarity_and_the_levels_of_the_call(
    learner: Made, site: Made, inputs: Made
) -> None:
    q, k, v = inputs()
    where = site(1)
    notes = learner(levels=True).note(q, k, v, where, 0)
    energy = block_energy(q, k, block_q=16, block_k=8)
    mass = Schedule(early=0.9, late=0.6, decay=3.0).mass(1, 2)
    assert torch.equal(notes["bits"], packed(top_p(energy, mass)))
    assert torch.equal(notes["levels"], loss_levels(1 - mass_before(energy), mass))
    assert torch.equal(notes["similarity"], row_similarity(q, k, where.geometry, anchor_rows(6, 2)))
    assert "levels" not in learner().note(q, k, v, where, 0)


@pytest.mark.parametrize(("steps", "fit"), [(4, Schedule.distilled()), (6, Schedule.many_step(60))])
def test_without_a_schedule_the_papers_fit_for_the_steps_and_the_length_of_the_video_is_taken(
    learner: Made, site: Made, inputs: Made, steps: int, fit: Schedule
) -> None:
    q, k, v = inputs()
    own, given = (learner(schedule=one).note(q, k, v, site(steps=steps), 0) for one in (None, fit))
    assert torch.equal(own["bits"], given["bits"])


def test_the_merge_keeps_what_enough_prompts_need_and_says_how_far_they_agree(
    learner: Made, site: Made, inputs: Made
) -> None:
    one = learner(rho=0.6)
    notes = [one.note(*inputs(seed=seed), site(), seed) for seed in range(3)]
    masks = torch.stack([unpacked(note["bits"], 8) for note in notes])
    votes = masks.sum(0)
    merged = one.merge(notes)
    # two of three votes; a row without any such block keeps those with one
    expected = torch.where((votes >= 2).any(-1, keepdim=True), votes >= 2, votes >= 1)
    assert torch.equal(unpacked(merged["bits"], 8), expected)
    overlaps = (masks & expected).sum((0, 2, 3)) / (masks | expected).sum((0, 2, 3))
    torch.testing.assert_close(merged["agreement"], overlaps.float())


@pytest.mark.parametrize("text", [0, 17])
def test_notes_of_masses_come_to_what_each_learner_learns_by_itself(
    learner: Made, site: Made, inputs: Made, text: int
) -> None:
    geometry = replace(site().geometry, text_tokens=text)
    calls = [(*inputs(geometry, seed), site(1, geometry=geometry), seed) for seed in range(3)]
    base = learner(similarity_prompts=2)
    noting = MassLearner(**{field.name: getattr(base, field.name) for field in fields(base)})
    masses = [noting.note(*call) for call in calls]
    for mass, rho in ((0.5, 0.5), (0.9, 0.9), (1.0, 0.1)):
        schedule = Schedule(early=0.9, late=mass, decay=3.0)
        one = learner(schedule=schedule, rho=rho, similarity_prompts=2, levels=True)
        own, voted = one.merge([one.note(*call) for call in calls]), one.merge(masses)
        assert own.keys() == voted.keys()
        for name in ("bits", "agreement", "similarity"):
            assert torch.equal(own[name], voted[name]), name
        # half precision may be on the other side of a step
        assert (own["levels"].int() - voted["levels"].int()).abs().max() <= 1


@pytest.mark.parametrize("text", [0, 17])
def test_output_errors_are_those_of_reuse_and_of_the_prompts_own_mask_with_all_text(
    learner: Made, site: Made, inputs: Made, text: int
) -> None:
    where = site(geometry=replace(site().geometry, text_tokens=text))
    geometry, call = where.geometry, inputs(where.geometry)
    notes = learner(output_errors=True).note(*call, where, 0)
    keep = text_blocks(geometry, (16, 8)).repeat(2, 1, 1)
    rows, columns = video_blocks(geometry, 16), video_blocks(geometry, 8)
    keep[:, rows, columns] = video_part(unpacked(notes["bits"], 8), geometry, (16, 8))
    mask = BlockMask.from_keep(keep, tokens=geometry.tokens, block_q=16, block_k=8)
    reused, masked = output_errors(*call, geometry, anchor_rows(6, 2), mask)
    assert torch.equal(notes["reuse_error"], reused)
    assert torch.equal(notes["mask_error"], masked)
    assert min(reused.min(), masked.min()) > 0
    assert learner().note(*call, where, 0).keys() == {"bits", "similarity"}


def test_output_errors_are_means_over_the_prompts_that_repetition_is_measured_on(
    learner: Made, site: Made, inputs: Made
) -> None:
    one = learner(output_errors=True, similarity_prompts=2)
    notes = [one.note(*inputs(seed=prompt), site(), prompt) for prompt in range(3)]
    merged = one.merge(notes)
    for name in ("reuse_error", "mask_error"):
        torch.testing.assert_close(merged[name], (notes[0][name] + notes[1][name]) / 2)
        assert notes[2][name].tolist() == [0.0, 0.0]
    assert merged.keys() - learner().merge(notes).keys() == {"reuse_error", "mask_error"}


def test_one_prompt_gives_the_mask_of_its_own_attention(learner: Made, site: Made, inputs: Made) -> None:
    notes = learner().note(*inputs(), site(), 0)
    merged = learner().merge([notes])
    assert torch.equal(merged["bits"], notes["bits"])
    assert torch.equal(merged["similarity"], notes["similarity"])
    assert merged["agreement"].tolist() == [1.0, 1.0]


def test_repetition_is_measured_on_as_many_prompts_as_asked(
    learner: Made, site: Made, inputs: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = iter((0.2, 0.6))
    seen = module.energy_and_similarity
    monkeypatch.setattr(
        module, "energy_and_similarity",
        lambda *args, **settings: (seen(*args, **settings)[0], torch.full((2,), next(measured))),
    )  # fmt: skip
    one = learner(similarity_prompts=2)
    merged = one.merge([one.note(*inputs(seed=prompt), site(), prompt) for prompt in range(3)])
    assert merged["similarity"].tolist() == pytest.approx([0.4, 0.4])


def test_levels_of_a_merge_give_the_masks_of_other_schedules(learnt: Made, learner: Made, site: Made) -> None:
    from calibatt.methods.calibatt.plans import Plans

    adjustable = learnt(learner(schedule=Schedule(early=0.9, late=0.8, decay=1.0), levels=True), texts=(0, 0))
    # 2.25 times what the first leaves out, at every step, which is one of the losses that levels tell apart
    sparser = learnt(learner(schedule=Schedule(early=0.775, late=0.55, decay=1.0)), texts=(0, 0))
    assert not torch.equal(adjustable.tables["bits"], sparser.tables["bits"])
    # one vote of two is enough, so there is no row without one
    other = Plans(learnt=adjustable, gamma=2.0, loss=2.25)
    same = Plans(learnt=sparser, gamma=2.0)
    assert torch.equal(other.density(), same.density())
    for step, layer in product(range(2), range(2)):
        one, two = (plans.plan(site(step, layer)).mask for plans in (other, same))
        assert isinstance(one, BlockMask)
        assert isinstance(two, BlockMask)
        assert torch.equal(one.bits, two.bits)


@pytest.mark.parametrize("side", ["first", "last"])
@pytest.mark.parametrize("text", [1, 17, 40])
def test_masks_with_text_are_those_of_the_blocks_without(
    learner: Made, site: Made, inputs: Made, side: TextSide, text: int
) -> None:
    where = site()
    geometry = replace(where.geometry, text_tokens=text, text_side=side)
    q, k, v = inputs(geometry)
    keep = unpacked(learner().note(q, k, v, replace(where, geometry=geometry), 0)["bits"], 8)
    rows, columns = video_blocks(geometry, 16), video_blocks(geometry, 8)
    count_q, count_k = rows.stop - rows.start, columns.stop - columns.start
    energy = block_energy(q, k, block_q=16, block_k=8)[:, rows, columns]
    mass = learner().schedule.mass(0, 2)
    assert keep.shape == (2, 4, 8)
    assert torch.equal(keep[:, :count_q, :count_k], top_p(energy, mass))
    # what was not learnt is kept
    assert keep[:, count_q:].all()
    assert keep[:, :, count_k:].all()


def test_a_row_that_attends_to_text_alone_keeps_the_first_blocks_and_nothing_is_nan(
    learner: Made, site: Made, inputs: Made
) -> None:
    geometry = replace(site().geometry, text_tokens=4)
    q, k, v = inputs(geometry)
    q[:] = 0
    q[..., 0], k[..., 0] = 200, 0
    k[:, 60:] = 0
    k[:, 60:, 0] = 200
    notes = learner(levels=True).note(q, k, v, site(1, geometry=geometry), 0)
    keep = unpacked(notes["bits"], 8)[:, :3, :7]
    # all blocks are alike, and the first are taken until 0.67 of the mass is reached
    assert keep[:, :, :5].all()
    assert not keep[:, :, 5:].any()
    assert notes["levels"][:, :3, :7].min() < 255


def test_a_video_smaller_than_a_block_keeps_everything_beside_text(learner: Made, site: Made, inputs: Made) -> None:
    geometry = replace(site().geometry, grid=(1, 3, 2), text_tokens=5)
    notes = learner(levels=True).note(*inputs(geometry), site(geometry=geometry), 0)
    assert unpacked(notes["bits"], 1).all()
    assert (notes["levels"] == 255).all()


@pytest.mark.parametrize(
    "wrong",
    [
        {"rho": 0.0},
        {"rho": 1.5},
        {"rho": math.nan},
        {"block": (0, 64)},
        {"gamma": math.nan},
        {"similarity_prompts": 0},
        {"anchors": 0},
        {"query_stride": 0},
        {"query_stride": 17},
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused(learner: Made, wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="got"):
        learner(**wrong)


def test_a_learner_comes_back_from_its_settings(learner: Made) -> None:
    one = learner(levels=True, similarity_prompts=3)
    assert read_settings(CalibAttLearner, settings_of(one)) == one
    assert read_settings(CalibAttLearner, settings_of(learner(schedule=None))) == learner(schedule=None)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"block": [0, 0]}, "at least one token"),
        ({"block": [16, 16, 16]}, "block: "),
        ({"block": [16.5, 16]}, r"block\.0: "),
        ({"rho": "x"}, "rho: "),
        ({"rho": math.nan}, "rho: .*finite"),
        ({"levels": 1}, "levels: "),
        ({"output_errors": "yes"}, "output_errors: "),
        ({"schedule": {"early": 2.0, "late": 0.5, "decay": 1.0}}, "schedule: .*masses in"),
        ({"mass": 0.5}, "mass: "),
    ],
    ids=lambda x: str(x)[:30],
)
def test_settings_that_no_learner_has_are_refused_by_name(learner: Made, change: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says) as error:
        read_settings(CalibAttLearner, {**settings_of(learner()), **change})
    assert "\n" not in str(error.value)


def test_the_table_has_the_blocks_of_the_video_alone(learner: Made, site: Made, inputs: Made) -> None:
    shapes = set()
    for text in (0, 1, 16, 40):
        geometry = replace(site().geometry, text_tokens=text)
        shapes.add(learner(levels=True).note(*inputs(geometry), site(geometry=geometry), 0)["levels"].shape)
    assert shapes == {(2, block_count(60, 16), block_count(60, 8))}


@pytest.mark.parametrize(
    "text", [{}, {"text_tokens": 7, "text_side": "first"}, {"text_tokens": 5, "text_side": "last"}]
)
@pytest.mark.parametrize("kind", [CalibAttLearner, MassLearner])
def test_a_call_is_noted_by_its_mass_as_by_itself(kind: Any, text: dict[str, Any], site: Made) -> None:
    learner = kind(
        block=(16, 8), schedule=None, rho=0.5, gamma=0.87, anchors=2, similarity_prompts=1, query_stride=1,
        levels=True, output_errors=False, share=None,
    )  # fmt: skip
    where = site(1, 1, geometry=replace(site().geometry, **text))
    geometry = where.geometry
    shape = (3, geometry.heads, geometry.tokens, geometry.head_dim)
    q, k, v = 2 * torch.randn(shape, generator=torch.Generator().manual_seed(0))
    # the first prompt's repetition is measured, which takes the call itself
    assert (learner.weighed(where, 0), learner.weighed(where, 1)) == (None, (16, 8))
    mass, _ = block_mass(q, k, block=(16, 8))
    by_mass = learner.note_weighed(mass, where)
    for name, note in learner.note(q, k, v, where, 1).items():
        torch.testing.assert_close(by_mass[name], note, rtol=1e-3, atol=1e-6)
