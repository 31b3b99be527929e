"""Voting, recording, and a calibration from end to end on a small untrained model."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from calibatt.calibration import collect, videos
from calibatt.calibration.collect import (
    CalibrationConfig,
    Recorder,
    agreement,
    calibrate,
    majority,
    votes_needed,
)
from calibatt.calibration.schedule import Schedule
from calibatt.calibration.store import Calibration
from calibatt.kernels.catalogue import KERNELS
from calibatt.kernels.geometry import Geometry
from calibatt.kernels.plan import Plan
from calibatt.methods.energy import block_energy
from calibatt.methods.selection import smallest_set
from calibatt.methods.site import Site
from calibatt.models.adapter import attached
from calibatt.models.catalogue import SHAPES, Resolution, weights_digest
from calibatt.models.generate import generate
from calibatt.models.shapes.pipeline import assemble, new_transformer

SDPA = KERNELS["sdpa-flash"]
GEOMETRY = Geometry(grid=(2, 6, 5), heads=2, head_dim=16)
SCHEDULE = Schedule(early=0.9, late=0.6, decay=3.0)
PROMPTS = ("a red circle moving left, over stripes", "a blue square moving right, over stripes")
# 2 × 8 × 8 tokens
TINY = replace(
    SHAPES,
    name="tiny",
    layers=2,
    heads=2,
    block=(24, 16),
    steps=3,
    resolutions={"small": Resolution(height=32, width=32, frames=2)},
)


@pytest.fixture(scope="module")
def pipe() -> Any:
    torch.manual_seed(0)
    return assemble(new_transformer(layers=2, heads=2))


def recorder(videos: int = 3, **other: Any) -> Recorder:
    facts: dict[str, Any] = {"schedule": SCHEDULE, "block": (16, 16), "anchors": 2, "similarity_videos": videos}
    return Recorder(GEOMETRY, steps=2, layers=3, videos=videos, **{**facts, **other})


def site(step: int = 0, layer: int = 0, **other: Any) -> Site:
    facts: dict[str, Any] = {"geometry": GEOMETRY, "steps": 2, "layers": 3, "branch": "cond", "sigma": 0.5}
    return Site(step=step, layer=layer, **{**facts, **other})


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    q, k = torch.randn(2, 2, GEOMETRY.tokens, 16).mul(2)
    return q, k


@pytest.mark.parametrize(
    ("prompts", "rho", "needed"), [(4, 0.5, 2), (5, 0.5, 3), (100, 0.07, 7), (3, 1.0, 3), (64, 1e-3, 1)]
)
def test_a_block_needs_the_least_number_of_votes_that_is_the_share(prompts: int, rho: float, needed: int) -> None:
    assert votes_needed(prompts, rho) == needed


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32])
def test_blocks_with_enough_votes_are_kept(dtype: torch.dtype) -> None:
    votes = torch.tensor([[[4, 2, 1, 0], [1, 1, 0, 0], [3, 0, 0, 3]]], dtype=dtype)
    expected = [[True, True, False, False], [True, True, False, False], [True, False, False, True]]
    # in the second row nothing has two votes: those with the most are kept
    assert majority(votes, 2)[0].tolist() == expected


def test_agreement_is_one_where_all_prompts_keep_the_same_and_the_overlap_otherwise() -> None:
    masks = torch.tensor([[[1, 1, 0, 0]], [[1, 0, 1, 0]]], dtype=torch.bool)
    aggregated = torch.tensor([[True, True, True, False]])
    # (2 + 2) kept in common, (3 + 3) kept in either
    assert agreement(masks.sum(0)[None], aggregated[None], 2).item() == pytest.approx(4 / 6)
    assert agreement(2 * masks[:1].to(torch.uint8), masks[0][None], 2).item() == 1.0


def test_the_recorder_counts_the_blocks_that_each_video_needs() -> None:
    notes = recorder()
    expected = torch.zeros(2, 4, 4, dtype=torch.int64)
    for _ in range(3):
        notes.reset()
        q, k = inputs()
        plan = notes.plan(q, k, site(step=1, layer=2))
        assert plan.kinds == ("dense", "dense")
        expected += smallest_set(block_energy(q, k, block_q=16, block_k=16), SCHEDULE.mass(1, 2))
    assert torch.equal(notes.votes[1, 2].long(), expected)
    assert notes.votes.sum() == expected.sum()


def test_the_unconditional_branch_is_not_recorded() -> None:
    notes = recorder()
    notes.reset()
    assert notes.plan(*inputs(), site(branch="uncond")).kinds == ("dense", "dense")
    assert not notes.votes.any()
    assert not notes.similarity.any()


def test_repetition_is_measured_on_as_many_videos_as_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    measured: Iterator[float] = iter((0.2, 0.6))
    monkeypatch.setattr(collect, "row_similarity", lambda *_: torch.full((2,), next(measured)))
    notes = recorder(similarity_videos=2)
    for _ in range(3):
        notes.reset()
        notes.plan(*inputs(), site())
    assert notes.similarity[0, 0].tolist() == pytest.approx([0.4, 0.4])


def test_the_memory_of_the_recorder_does_not_grow_with_the_videos() -> None:
    notes = recorder(videos=255)
    before = {name: value.data_ptr() for name, value in vars(notes).items() if isinstance(value, torch.Tensor)}
    sizes = {name: value.nbytes for name, value in vars(notes).items() if isinstance(value, torch.Tensor)}
    for _ in range(5):
        notes.reset()
        notes.plan(*inputs(), site())
    assert {n: v.data_ptr() for n, v in vars(notes).items() if isinstance(v, torch.Tensor)} == before
    assert sizes["votes"] == 2 * 3 * 2 * 4 * 4
    assert not [value for value in vars(notes).values() if isinstance(value, list | dict)]


def test_votes_of_more_videos_than_a_byte_can_count_are_not_lost() -> None:
    assert recorder(videos=256).votes.dtype == torch.int16


@pytest.mark.parametrize(
    "other", [{"steps": 5}, {"layers": 4}, {"geometry": Geometry(grid=(2, 5, 6), heads=2, head_dim=16)}]
)
def test_a_pipeline_of_another_model_is_refused(other: dict[str, Any]) -> None:
    notes = recorder()
    with pytest.raises(ValueError, match="is it the pipeline of this model"):
        notes.plan(*inputs(), site(**other))


@pytest.mark.parametrize("prompts", [[], [*PROMPTS, " "]])
def test_no_prompts_or_an_empty_one_are_refused_before_any_work(prompts: list[str]) -> None:
    with pytest.raises(ValueError, match="give at least one prompt to calibrate on, and no empty ones"):
        calibrate(TINY, None, resolution="small", prompts=prompts, seed=0, kernel=SDPA)


@pytest.mark.parametrize("wrong", [{"rho": 0.0}, {"rho": 1.5}, {"block": (0, 64)}, {"similarity_prompts": 0}])
def test_options_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="got"):
        CalibrationConfig(**wrong)


@pytest.fixture(scope="module")
def calibration(pipe: Any) -> Calibration:
    config = CalibrationConfig(anchors=2, gamma=0.9, similarity_prompts=1)
    return calibrate(TINY, pipe, resolution="small", prompts=PROMPTS, seed=3, kernel=SDPA, config=config)


def test_a_calibration_knows_where_it_comes_from(calibration: Calibration, pipe: Any) -> None:
    own = calibration.provenance
    assert (own.model, own.weights) == ("tiny", weights_digest(pipe))
    assert (own.prompts, own.seed, own.steps, own.guidance, own.block) == (PROMPTS, 3, 3, 3.0, (24, 16))
    assert (own.anchors, calibration.gamma, own.similarity_prompts) == (2, 0.9, 1)
    assert own.schedule == Schedule.many_step(128)
    assert own.cost_ratio > 1
    assert 0 < own.mask_agreement <= 1
    assert {"calibatt", "torch", "diffusers"} == set(own.versions)


def test_calibrating_twice_gives_the_same_masks(calibration: Calibration, pipe: Any) -> None:
    again = calibrate(
        TINY,
        pipe,
        resolution="small",
        prompts=PROMPTS,
        seed=3,
        kernel=SDPA,
        config=CalibrationConfig(anchors=2, gamma=0.9, similarity_prompts=1),
    )
    assert torch.equal(again.bits, calibration.bits)
    assert torch.equal(again.similarity, calibration.similarity)


def test_one_prompt_gives_the_masks_of_its_own_attention(pipe: Any) -> None:
    schedule = Schedule(early=0.7, late=0.4, decay=2.0)
    config = CalibrationConfig(anchors=2, schedule=schedule, block=(32, 16))
    calibration = calibrate(
        TINY, pipe, resolution="small", prompts=PROMPTS[:1], seed=5, kernel=SDPA, config=config, steps=2, guidance=1.0
    )
    assert calibration.provenance.mask_agreement == 1.0
    assert calibration.provenance.block == (32, 16)

    class Compare:
        """Plans dense, and holds each mask against the attention that it should be made of."""

        compared = 0

        def reset(self) -> None:
            pass

        def plan(self, q: torch.Tensor, k: torch.Tensor, site: Site) -> Plan:
            mask = calibration.plan(site, repetition=False).mask
            expected = smallest_set(block_energy(q, k, block_q=32, block_k=16), schedule.mass(site.step, site.steps))
            assert mask is not None
            assert torch.equal(mask.keep(), expected)
            self.compared += 1
            return Plan.dense(site.geometry)

    compare = Compare()
    with attached(pipe, compare, SDPA):
        generate(TINY, pipe, prompt=PROMPTS[0], resolution="small", seed=5, steps=2, guidance=1.0)
    assert compare.compared == 4


def test_levels_give_the_masks_of_other_schedules(pipe: Any) -> None:
    def calibrated(schedule: Schedule, levels: bool) -> Calibration:
        config = CalibrationConfig(schedule=schedule, block=(32, 16), anchors=2, levels=levels)
        return calibrate(
            TINY, pipe, resolution="small", prompts=PROMPTS, seed=5, kernel=SDPA, config=config, steps=2, guidance=1.0
        )

    adjustable = calibrated(Schedule(early=0.9, late=0.8, decay=1.0), levels=True)
    # 2.25 times what the first leaves out, at every step, which is one of the losses that levels tell apart
    sparser = calibrated(Schedule(early=0.775, late=0.55, decay=1.0), levels=False)
    assert sparser.levels is None
    assert not torch.equal(adjustable.bits, sparser.bits)
    # one vote of two is enough, so there is no row without one
    assert torch.equal(adjustable.at(2.25).bits, sparser.bits)
    assert torch.equal(adjustable.bits, calibrated(adjustable.provenance.schedule, levels=False).bits)


def test_every_prompt_starts_from_noise_of_its_own(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: list[int] = []

    def note_seed(*args: Any, **options: Any) -> torch.Tensor:
        seeds.append(options["seed"])
        return generate(*args, **options)

    monkeypatch.setattr(videos, "generate", note_seed)
    config = CalibrationConfig(anchors=2)
    calibrate(TINY, pipe, resolution="small", prompts=PROMPTS, seed=7, kernel=SDPA, config=config, steps=1)
    assert seeds == [7, 8]


def test_progress_counts_prompts_times_steps_on_stderr(pipe: Any, capfd: pytest.CaptureFixture[str]) -> None:
    def run(progress: bool) -> str:
        config = CalibrationConfig(anchors=2)
        calibrate(
            TINY,
            pipe,
            resolution="small",
            prompts=PROMPTS,
            seed=0,
            kernel=SDPA,
            config=config,
            steps=1,
            guidance=1.0,
            progress=progress,
        )
        out, err = capfd.readouterr()
        assert out == ""
        return err

    assert "2/2" in run(True)
    assert "calibrating" not in run(False)
