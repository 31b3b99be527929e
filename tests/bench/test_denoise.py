"""The denoise suite, on arms whose videos and times are known."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from calibatt.bench.cells import DENSE, Arm
from calibatt.bench.observers import PlanSummary
from calibatt.bench.suites.denoise import run
from calibatt.bench.suites.suite import Kept
from calibatt.bench.video_metrics import PSNR_CAP_DB, eight_bit, psnr_db

# calls before the first video: one at the first probe of either layer, then one a probe; and those of a video
CHECKED, A_VIDEO = 5, 8


def test_times_and_videos_are_compared_with_dense_ones_of_the_same_round(
    fakes: Any, by_round: Callable[..., list[float]]
) -> None:
    dense = by_round(CHECKED, A_VIDEO, [1.0, 2.0, 3.0])
    sparse = by_round(CHECKED, A_VIDEO, [0.5, 1.0, 1.5])
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


def test_the_same_video_is_as_near_as_can_be(fakes: Any) -> None:
    arms = [fakes.arm("dense"), fakes.arm("sparse")]
    record = dict(run(fakes.context(), arms, rounds=2, artifacts=None))[arms[1]]
    assert record.psnr_db == (PSNR_CAP_DB,) * 2
    assert record.ssim == pytest.approx((1.0,) * 2)


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
    assert len(fakes.videos) == 15
    # when the next begins, the last is gone
    assert max(fakes.alive) == 0
    # from the fourth round on, those of the round that is under way come on top
    assert kept[9:] == [9, 10, 11, 9, 10, 11]


@pytest.mark.parametrize("lasts", [0, CHECKED + A_VIDEO + 3])
def test_an_arm_that_runs_out_of_memory_says_so_and_the_others_go_on(fakes: Any, lasts: int) -> None:
    arms = [fakes.arm("dense"), fakes.arm("large", lasts=lasts), fakes.arm("small", [0.25])]
    records = dict(run(fakes.context(), arms, rounds=3, artifacts=None))
    assert records[arms[1]].outcome == "out_of_memory"
    assert records[arms[1]].samples_s is None
    assert records[arms[2]].samples_s == (2.0,) * 3
    assert records[arms[2]].baseline_samples_s == (8.0,) * 3
    assert records[arms[2]].psnr_db == (PSNR_CAP_DB,) * 3


def test_without_its_baseline_an_arm_keeps_its_times(fakes: Any) -> None:
    arms = [fakes.arm("dense", lasts=CHECKED + A_VIDEO + 3), fakes.arm("sparse")]
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


class Killed(BaseException):
    """As abrupt as a test can be in its own process."""


class Disk:
    """Keeps rounds as a file does; after so many, the run is killed."""

    def __init__(self, lasts: int | None = None) -> None:
        self.rounds: list[Any] = []
        self._lasts = lasts

    def keep(self, round_: Any) -> None:
        self.rounds.append(json.loads(json.dumps(round_)))
        if len(self.rounds) == self._lasts:
            raise Killed


def test_a_run_that_is_killed_goes_on_with_the_next_round(
    fakes: Any, by_round: Callable[..., list[float]], tmp_path: Path
) -> None:
    def arms(*rounds: float) -> list[Arm]:
        return [fakes.arm(name, by_round(CHECKED, A_VIDEO, rounds)) for name in ("dense", "sparse")]

    fakes.brightness["sparse"] = 0.25
    all_arms = arms(1.0, 2.0, 3.0, 4.0, 5.0)
    whole = dict(run(fakes.context(prompts=5), all_arms, rounds=5, artifacts=tmp_path / "whole"))
    disk = Disk(lasts=4)
    all_arms = arms(1.0, 2.0, 3.0, 4.0, 5.0)
    with pytest.raises(Killed):
        dict(run(fakes.context(prompts=5), all_arms, rounds=5, artifacts=tmp_path / "a", kept=Kept(keep=disk.keep)))
    made = len(fakes.videos)
    all_arms = arms(5.0)
    kept = Kept(found=disk.rounds, keep=Disk().keep)
    records = dict(run(fakes.context(prompts=5), all_arms, rounds=5, artifacts=tmp_path / "a", kept=kept))
    # one of each
    assert len(fakes.videos) == made + 2
    for arm in all_arms:
        expected = replace(whole[arm], artifact=None)
        assert replace(records[arm], artifact=None) == expected
        assert (tmp_path / str(records[arm].artifact)).is_file()


def test_rounds_that_pictures_are_of_are_kept_together(fakes: Any) -> None:
    disk = Disk(lasts=1)
    arms = [fakes.arm("dense"), fakes.arm("sparse")]
    with pytest.raises(Killed):
        dict(run(fakes.context(), arms, rounds=4, artifacts=None, kept=Kept(keep=disk.keep)))
    assert len(fakes.videos) == 6


def test_an_arm_that_has_failed_is_not_tried_again(fakes: Any) -> None:
    disk = Disk(lasts=3)
    arms = [fakes.arm("dense"), fakes.arm("large", lasts=CHECKED + A_VIDEO + 3), fakes.arm("small")]
    with pytest.raises(Killed):
        dict(run(fakes.context(), arms, rounds=4, artifacts=None, kept=Kept(keep=disk.keep)))
    arms = [fakes.arm("dense"), fakes.arm("large"), fakes.arm("small")]
    records = dict(run(fakes.context(), arms, rounds=4, artifacts=None, kept=Kept(found=disk.rounds)))
    assert records[arms[1]].outcome == "out_of_memory"
    assert "allocate 2 GiB" in (records[arms[1]].reason or "")
    assert fakes.kernels[arms[1]].calls == 0
    assert len(records[arms[2]].psnr_db or ()) == 4


@pytest.mark.parametrize("damage", [{}, {"dense on fastest": {"second": 1.0}}, {"dense on fastest": 3}, []])
def test_kept_rounds_that_are_damaged_are_refused_in_a_line(fakes: Any, damage: Any) -> None:
    arms = [fakes.arm("dense")]
    with pytest.raises(ValueError, match=r"^the rounds kept .* damaged .*: delete the file .*$"):
        dict(run(fakes.context(), arms, rounds=2, artifacts=None, kept=Kept(found=[damage])))


def test_a_video_with_nan_is_a_failure(fakes: Any) -> None:
    arms = [fakes.arm("dense"), fakes.arm("sparse")]
    fakes.brightness["sparse"] = float("nan")
    records = dict(run(fakes.context(), arms, rounds=1, artifacts=None))
    assert (records[arms[1]].outcome, records[DENSE].outcome) == ("failed", "ok")
    assert "NaN" in (records[arms[1]].reason or "")
