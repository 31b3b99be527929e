"""The denoise suite, on arms whose videos and times are known."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from calibatt.bench.cells import DENSE, Arm
from calibatt.bench.observers import PlanSummary
from calibatt.bench.record import Record, Telemetry
from calibatt.bench.suites.denoise import run
from calibatt.bench.suites.suite import Kept
from calibatt.bench.video import Rounds, in_order
from calibatt.kernels import oracle
from calibatt.kernels.mask import BlockMask
from calibatt.kernels.plan import Plan
from calibatt.methods.call import SparseAttention
from calibatt.models.video_metrics import PSNR_CAP_DB, eight_bit, psnr_db

# calls that check an arm, one at the first probe of either layer, then one a probe; and those of a video
CHECKED, A_VIDEO = 5, 8
# before the first video that is timed: those beside a dense one too
BEFORE = CHECKED + A_VIDEO


def test_times_and_videos_are_compared_with_dense_ones_of_the_same_round(
    fakes: Any, by_round: Callable[..., list[float]]
) -> None:
    dense = by_round(BEFORE, A_VIDEO, [1.0, 2.0, 3.0])
    sparse = by_round(BEFORE, A_VIDEO, [0.5, 1.0, 1.5])
    arms = [fakes.arm("dense", dense), fakes.arm("sparse", sparse)]
    fakes.brightness["sparse"] = 0.25
    record = dict(run(fakes.context(), arms, rounds=3, artifacts=None))[arms[1]]
    assert record.samples_s == (4.0, 8.0, 12.0)
    assert record.baseline_samples_s == (8.0, 16.0, 24.0)
    assert record.prompts == ("prompt 0", "prompt 1", "prompt 2")
    # every round has another brightness, so that the videos of two rounds differ by more
    a, b = (eight_bit(torch.full((3, 2, 16, 16), level)) for level in (-0.5, -0.25))
    assert record.psnr_db == pytest.approx((psnr_db(a, b),) * 3, abs=0.2)
    assert record.ssim is not None
    assert max(record.ssim) < 1


def test_as_many_videos_are_made_as_are_asked_for_and_one_of_each_arm_that_is_not_timed(fakes: Any) -> None:
    # however soon a speedup is known: fidelity is of all videos
    arms = [fakes.arm("dense"), fakes.arm("sparse", [0.5])]
    for faithful in (True, False):
        made, said = len(fakes.videos), len(fakes.said)
        context = replace(fakes.context(prompts=32), faithful=faithful)
        records = dict(run(context, arms, rounds=32, artifacts=None))
        assert [len(records[arm].samples_s or ()) for arm in arms] == [32, 32]
        assert len(fakes.videos) - made == 2 * 32 + 2
        # and each of them has its line
        assert sum("video" in line for line in fakes.said[said:]) == 2 * 32 + 2


def test_when_there_is_no_time_for_more_rounds_those_that_there_are_are_recorded(fakes: Any) -> None:
    # every video takes longer than the one before
    slower = [float(i) for i in range(1, 1000)]
    arms = [fakes.arm("dense", slower), fakes.arm("sparse", slower)]
    records = dict(
        run(fakes.context(prompts=32), arms, rounds=32, artifacts=None, more=lambda round_: fakes.clock.now < 10_000)
    )
    counts = [len(records[arm].samples_s or ()) for arm in arms]
    assert 6 < counts[0] == counts[1] < 32
    sparse = records[arms[1]]
    assert len(sparse.psnr_db or ()) == len(sparse.prompts or ()) == counts[0]
    assert sparse.speedup is not None
    # of videos no interval was asked for
    assert sparse.interval_target is None


def test_rounds_have_the_noise_of_their_workloads_seed(fakes: Any) -> None:
    seen: list[int] = []

    def film(attention: object, prompt: str, seed: int) -> torch.Tensor:
        seen.append(seed)
        return torch.zeros(3, 1, 8, 8)

    dense = fakes.arm("dense")
    context, attention = fakes.context(), SparseAttention(fakes.methods[dense], fakes.kernels[dense])
    context = replace(context, seed=500, film=film)
    for round_ in range(3):
        context.video(attention, round_)
    assert seen == [500, 501, 502]


def test_of_planted_weights_there_are_times_and_neither_fidelity_nor_frames(
    fakes: Any, by_round: Callable[..., list[float]], tmp_path: Path
) -> None:
    # no dense video stands beside the first: no method error is taken, and one of the arm's own is not timed
    arms = [
        fakes.arm("dense", by_round(BEFORE, A_VIDEO, [1.0, 2.0])),
        fakes.arm("sparse", by_round(BEFORE, A_VIDEO, [0.5, 1.0])),
    ]
    context = replace(fakes.context(), faithful=False)
    for record in dict(run(context, arms, rounds=2, artifacts=tmp_path)).values():
        assert record.samples_s == ((8.0, 16.0) if record.method == "dense" else (4.0, 8.0))
        assert record.psnr_db is record.ssim is record.alignment is record.method_error is None
        assert record.density is not None
        with np.load(tmp_path.parent / (record.artifact or "")) as pictures:
            assert "frames" not in pictures
            assert "density" in pictures


def test_what_others_had_is_of_the_videos_and_their_baselines_by_their_length(
    fakes: Any, by_round: Callable[..., list[float]], see: Callable[..., None]
) -> None:
    # of dense 8 s long, of the other 4 s; in the first round dense comes last
    others = [Telemetry(readings=8, disturbed=share, clock_mhz=1000) for share in (0.01, 0.5, 0.02, 0.02)]
    see(*others)
    arms = [fakes.arm(name, by_round(BEFORE, A_VIDEO, [t, t])) for name, t in (("dense", 1.0), ("sparse", 0.5))]
    records = dict(run(fakes.context(), arms, rounds=2, artifacts=None))
    assert records[arms[0]].disturbed == pytest.approx((0.5 + 0.02) / 2)
    assert records[arms[1]].disturbed == pytest.approx((8 * 0.52 + 4 * 0.03) / 24)
    assert records[arms[0]].spoilt == records[arms[1]].spoilt == (True, False)
    assert records[arms[1]].telemetry == Telemetry(readings=16, disturbed=pytest.approx(0.015), clock_mhz=1000)


def test_the_same_video_is_as_near_as_can_be(fakes: Any) -> None:
    arms = [fakes.arm("dense"), fakes.arm("sparse")]
    record = dict(run(fakes.context(), arms, rounds=2, artifacts=None))[arms[1]]
    assert record.psnr_db == (PSNR_CAP_DB,) * 2
    assert record.ssim == pytest.approx((1.0,) * 2)


def test_the_method_error_is_of_all_calls_of_the_first_dense_video(
    fakes: Any, calls_of_video: Callable[[int], Iterator[Any]]
) -> None:
    arms = [fakes.arm("dense"), fakes.arm("sparse")]
    records = dict(run(fakes.context(), arms, rounds=2, artifacts=None))
    mask = BlockMask.from_keep(torch.tensor([[[True, False], [True, False]]]), tokens=16, block_q=8, block_k=8)
    outs = []
    for q, k, v, where in calls_of_video(0):
        dense = oracle.attend(q, k, v, Plan.dense(where.geometry))
        outs.append((oracle.attend(q, k, v, Plan.masked(mask, 2)), dense))
    own, dense = (torch.stack(some) for some in zip(*outs, strict=True))
    assert records[arms[1]].method_error == pytest.approx(((own - dense).norm() / dense.norm()).item(), rel=1e-5)
    assert (records[DENSE].method_error, records[DENSE].error_calls, records[arms[1]].error_calls) == (0.0, 8, 8)


def test_one_video_is_in_memory_at_a_time_and_of_each_arm_three_are_kept(
    fakes: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    frames: list[weakref.ref[torch.Tensor]] = []
    kept: list[int] = []

    def reduced(video: torch.Tensor) -> torch.Tensor:
        kept.append(sum(one() is not None for one in frames))
        made = eight_bit(video)
        frames.append(weakref.ref(made))
        return made

    monkeypatch.setattr("calibatt.bench.suites.denoise.eight_bit", reduced)
    arms = [fakes.arm("dense"), fakes.arm("a"), fakes.arm("b")]
    dict(run(fakes.context(prompts=5), arms, rounds=5, artifacts=None))
    # and one dense video beside each arm
    assert len(fakes.videos) == 15 + 3
    # when the next begins, the last is gone
    assert max(fakes.alive) == 0
    # from the fourth round on, those of the round that is under way come on top
    assert kept[9:] == [9, 10, 11, 9, 10, 11]


@pytest.mark.parametrize("lasts", [0, CHECKED + 3, BEFORE + A_VIDEO + 3])
def test_an_arm_that_runs_out_of_memory_says_so_and_the_others_go_on(fakes: Any, lasts: int) -> None:
    arms = [fakes.arm("dense"), fakes.arm("large", lasts=lasts), fakes.arm("small", [0.25])]
    records = dict(run(fakes.context(), arms, rounds=3, artifacts=None))
    assert records[arms[1]].outcome == "out_of_memory"
    assert records[arms[1]].samples_s is None
    assert records[arms[2]].samples_s == (2.0,) * 3
    assert records[arms[2]].baseline_samples_s == (8.0,) * 3
    assert records[arms[2]].psnr_db == (PSNR_CAP_DB,) * 3


def test_without_its_baseline_an_arm_keeps_its_times(fakes: Any) -> None:
    arms = [fakes.arm("dense", lasts=BEFORE + A_VIDEO + 3), fakes.arm("sparse")]
    records = dict(run(fakes.context(), arms, rounds=3, artifacts=None))
    assert records[DENSE].outcome == "out_of_memory"
    sparse = records[arms[1]]
    assert sparse.samples_s == (8.0,) * 3
    assert (sparse.baseline_samples_s, sparse.psnr_db, sparse.ssim) == (None, None, None)


def test_to_look_at_plans_is_no_part_of_the_time(fakes: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    saw = PlanSummary.saw

    def slowly(self: PlanSummary, call: Any) -> None:
        fakes.clock.now += 10
        saw(self, call)

    monkeypatch.setattr(PlanSummary, "saw", slowly)
    arms = [fakes.arm("dense"), fakes.arm("sparse")]
    record = dict(run(fakes.context(), arms, rounds=2, artifacts=None))[arms[1]]
    # the plans are those of the first video
    assert record.samples_s == (8.0, 8.0)
    assert record.phases_s is not None
    assert record.phases_s.keys() == {"plan", "attend"}


def test_where_events_would_hold_the_host_up_parts_are_timed_in_a_video_that_is_no_sample(
    fakes: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    arms = [fakes.arm("dense"), fakes.arm("sparse")]
    before = dict(run(fakes.context(), arms, rounds=2, artifacts=None))[arms[1]]
    made = len(fakes.videos)
    monkeypatch.setattr("calibatt.bench.suites.denoise._looks_apart", lambda context: True)
    apart = dict(run(fakes.context(), arms, rounds=2, artifacts=None))[arms[1]]
    # one of each arm, in the first round
    assert len(fakes.videos) == made + made + 2
    assert (apart.samples_s, apart.phases_s, apart.density) == (before.samples_s, before.phases_s, before.density)


def test_parts_are_timed_in_one_round_of_eight(fakes: Any) -> None:
    arms = [fakes.arm("dense"), fakes.arm("sparse")]
    record = dict(run(fakes.context(prompts=9), arms, rounds=9, artifacts=None))[arms[1]]
    assert len(record.samples_s or ()) == 9
    assert {len(samples) for samples in (record.phases_s or {}).values()} == {2}


def test_pictures_have_the_densities_of_all_sites_some_masks_and_three_videos(fakes: Any, tmp_path: Path) -> None:
    arms = [fakes.arm("dense"), fakes.arm("sparse")]
    records = dict(run(fakes.context(), arms, rounds=4, artifacts=tmp_path / "run.artifacts"))
    assert records[DENSE].artifact == "run.artifacts/fake-tiny-2-dense-fastest.npz"
    sparse = np.load(tmp_path / str(records[arms[1]].artifact))
    assert sparse["density"].shape == (2, 2, 2)
    assert (sparse["density"] == 0.5).all()
    assert sparse["frames"].shape == (3, 2, 16, 16, 3)
    assert sparse["captions"].tolist() == ["prompt 0", "prompt 1", "prompt 2"]
    assert sparse["masks"].tolist() == [[[True, False], [True, False]]] * 4
    # one from each part of the video
    assert sparse["mask_sites"].tolist() == [[0, 0, 0], [0, 1, 0], [1, 0, 1], [1, 1, 1]]
    assert sparse["frame_starts"].tolist() == [0, 8]
    assert "masks" not in np.load(tmp_path / str(records[DENSE].artifact))
    assert records[arms[1]].density == 0.5


def test_a_density_is_the_mean_over_some_rounds(fakes: Any) -> None:
    arms = [fakes.arm("dense"), fakes.arm("sparse")]

    def more(round_: int) -> bool:
        # from here on it keeps everything
        fakes.methods[arms[1]].sparse = round_ < 8
        return True

    record = dict(run(fakes.context(prompts=9), arms, rounds=9, artifacts=None, more=more))[arms[1]]
    assert record.density == 0.75


class Killed(BaseException):
    """As abrupt as a test can be in its own process."""


class Disk:
    """Keeps rounds as a file does; after so many writes the run is killed, and one of them may be lost."""

    def __init__(self, lasts: int | None = None, loses: int | None = None) -> None:
        self.kept: list[Rounds] = []
        self.lasts, self._loses = lasts, loses
        self._writes = 0

    def keep(self, rounds: Rounds) -> None:
        self._writes += 1
        if self._writes != self._loses:
            self.kept.append(Rounds.from_json(json.loads(json.dumps(rounds.to_json()))))
        if self._writes == self.lasts:
            raise Killed

    def session(self) -> Kept:
        return Kept(found=in_order(self.kept), keep=self.keep)


def test_a_run_that_is_killed_goes_on_with_the_next_round(
    fakes: Any, by_round: Callable[..., list[float]], tmp_path: Path
) -> None:
    def arms(*rounds: float, before: int = BEFORE) -> list[Arm]:
        return [fakes.arm(name, by_round(before, A_VIDEO, rounds)) for name in ("dense", "sparse")]

    fakes.brightness["sparse"] = 0.25
    all_arms = arms(1.0, 2.0, 3.0, 4.0, 5.0)
    whole = dict(run(fakes.context(prompts=5), all_arms, rounds=5, artifacts=tmp_path / "whole"))
    # the first three together, then one by one
    disk = Disk(lasts=2)
    all_arms = arms(1.0, 2.0, 3.0, 4.0, 5.0)
    with pytest.raises(Killed):
        dict(run(fakes.context(prompts=5), all_arms, rounds=5, artifacts=tmp_path / "a", kept=disk.session()))
    assert [(one.first, len(one.rounds)) for one in disk.kept] == [(0, 3), (3, 1)]
    made = len(fakes.videos)
    # the method error is that of the run that was killed, and the first video of this process is not timed
    all_arms = arms(5.0)
    records = dict(run(fakes.context(prompts=5), all_arms, rounds=5, artifacts=tmp_path / "a", kept=disk.session()))
    # two of each
    assert len(fakes.videos) == made + 4
    for arm in all_arms:
        assert whole[arm].error_calls == A_VIDEO
        expected = replace(whole[arm], artifact=None)
        assert replace(records[arm], artifact=None) == expected
        shown = np.load(tmp_path / str(records[arm].artifact))
        assert shown["captions"].tolist() == ["prompt 0", "prompt 1", "prompt 2"]


def test_a_round_that_could_not_be_written_is_made_again(fakes: Any) -> None:
    disk = Disk(lasts=3, loses=2)
    arms = [fakes.arm("dense"), fakes.arm("sparse")]
    with pytest.raises(Killed):
        dict(run(fakes.context(prompts=6), arms, rounds=6, artifacts=None, kept=disk.session()))
    assert [one.first for one in disk.kept] == [0, 4]
    arms = [fakes.arm("dense"), fakes.arm("sparse")]
    made = len(fakes.videos)
    record = dict(run(fakes.context(prompts=6), arms, rounds=6, artifacts=None, kept=disk.session()))[arms[1]]
    # the fourth to the sixth, and one before
    assert len(fakes.videos) == made + 8
    assert len(record.psnr_db or ()) == 6
    # and the file has them all now
    assert len(in_order(disk.kept)) == 6


@pytest.mark.parametrize("lasts", [0, CHECKED + 3, BEFORE + A_VIDEO + 3])
def test_an_arm_that_has_failed_is_not_tried_again_in_any_later_run(fakes: Any, lasts: int) -> None:
    disk = Disk(lasts=1)

    def arms(lasts: int | None = None) -> list[Arm]:
        return [fakes.arm("dense", lasts=lasts), fakes.arm("small")]

    def once(arms: list[Arm]) -> dict[Arm, Record]:
        return dict(run(fakes.context(prompts=5), arms, rounds=5, artifacts=None, kept=disk.session()))

    fails = arms(lasts)
    with pytest.raises(Killed):
        once(fails)
    # what the second run keeps has to tell the third one
    disk.lasts, second = 2, arms()
    with pytest.raises(Killed):
        once(second)
    assert fakes.kernels[DENSE].calls == 0
    disk.lasts, later = None, arms()
    records = once(later)
    assert fakes.kernels[DENSE].calls == 0
    assert records[DENSE].outcome == "out_of_memory"
    assert "allocate 2 GiB" in (records[DENSE].reason or "")
    assert (len(records[later[1]].samples_s or ()), records[later[1]].psnr_db) == (5, None)


@pytest.mark.parametrize(
    "damage",
    [
        {}, [], {"first": 0, "rounds": [{"dense": {"second": 1.0}}]}, {"first": 0, "rounds": [{"dense": 3}]},
        {"first": "0", "rounds": []}, {"first": 0, "rounds": [{"dense": {"seconds": "1", "phases": {}}}]},
    ],
)  # fmt: skip
def test_kept_rounds_that_are_damaged_are_refused_in_a_line(damage: Any) -> None:
    with pytest.raises(ValueError, match=r"^.+$"):
        Rounds.from_json(damage)


def test_a_video_with_nan_is_a_failure(fakes: Any) -> None:
    arms = [fakes.arm("dense"), fakes.arm("sparse")]
    fakes.brightness["sparse"] = float("nan")
    records = dict(run(fakes.context(), arms, rounds=1, artifacts=None))
    assert (records[arms[1]].outcome, records[DENSE].outcome) == ("failed", "ok")
    assert "NaN" in (records[arms[1]].reason or "")
