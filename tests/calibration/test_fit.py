"""Fitting settings to hand-made videos: what is tried, what is kept, and which point is taken."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from calibatt.calibration.collect import calibrate_on
from calibatt.calibration.files import UnusableCalibration
from calibatt.calibration.fit import Fitting, Front, Point
from calibatt.kernels import oracle
from calibatt.kernels.plan import Plan
from calibatt.methods.calibatt.schedule import Schedule

Made = Callable[..., Any]
TRIALS = 4
# few calls, in videos in which eight bits tell the means of different attention apart
SMALL: Mapping[str, Any] = {"layers": 1, "branches": ("cond",), "contrast": 20.0}


class Oracle:
    """Computes blocks of any size."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, plan: Plan) -> Tensor:
        return oracle.attend(q, k, v, plan).to(q.dtype)


@pytest.fixture
def fitting(hand_made: Made, prompts: tuple[str, ...]) -> Made:
    """A fit of CalibAtt by two prompts, judged by a third."""

    def made(videos: Any = None, **other: Any) -> Fitting:
        how = {"prompts": prompts[:2], "tuning": prompts[2:], "seed": 7, "block": (16, 8), "anchors": 2}
        return Fitting.of(videos or hand_made(**SMALL), kernel=Oracle(), **{**how, **other})

    return made


def fronted(fitting: Fitting, folder: Path, trials: int = TRIALS) -> Front:
    units = fitting.run.units(folder)
    fitting.run.note(units, kernel=Oracle())
    return fitting.front(units, trials=trials)


def test_reuse_by_output_errors_is_not_fitted(fitting: Made) -> None:
    with pytest.raises(ValueError, match=r"^output errors are those of one schedule's masks, and a fit tries many"):
        fitting(preset="output-reuse")


def test_the_first_trial_has_the_published_values_and_the_front_is_what_none_beats(
    fitting: Made, tmp_path: Path
) -> None:
    front = fronted(fitting(), tmp_path)
    # two steps are few
    fit = Schedule.distilled()
    assert front.published.values == {
        "early": fit.early, "late": fit.late, "decay": fit.decay, "rho": 0.5, "gamma": 0.87,
    }  # fmt: skip
    densities, psnrs = ([getattr(point, name) for point in front.points] for name in ("density", "psnr_db"))
    assert densities == sorted(densities)
    assert psnrs == sorted(psnrs)
    assert len(set(densities)) > 1
    assert any(
        point.density <= front.published.density and point.psnr_db >= front.published.psnr_db for point in front.points
    )


def test_trials_make_the_tuning_videos_alone(fitting: Made, hand_made: Made, tmp_path: Path) -> None:
    videos = hand_made(**SMALL)
    fronted(fitting(videos), tmp_path)
    # a dense one, and one a trial
    assert videos.shown == [("a circle, “red”", 7), ("a square", 8)] + [("a cross", 9)] * (1 + TRIALS)


def test_a_fit_that_was_stopped_makes_no_trial_twice_and_comes_to_the_same_front(
    fitting: Made, hand_made: Made, tmp_path: Path
) -> None:
    whole = fronted(fitting(), tmp_path / "whole")

    class Stopped(type(hand_made())):  # type: ignore[misc]
        def show(self, *where: Any, **how: Any) -> Any:
            if len(self.shown) == 2 + 1 + 2:
                raise KeyboardInterrupt
            return super().show(*where, **how)

    with pytest.raises(KeyboardInterrupt):
        fronted(fitting(Stopped(**SMALL)), tmp_path / "parts")
    videos = hand_made(**SMALL)
    assert fronted(fitting(videos), tmp_path / "parts") == whole
    assert len(videos.shown) == 1 + TRIALS - 2
    # what is complete costs nothing
    videos = hand_made(**SMALL)
    assert fronted(fitting(videos), tmp_path / "parts") == whole
    assert videos.shown == []


def test_another_fit_in_the_same_folder_has_trials_of_its_own(fitting: Made, hand_made: Made, tmp_path: Path) -> None:
    fronted(fitting(), tmp_path, trials=1)
    videos = hand_made(**SMALL)
    fronted(fitting(videos, tuning=["a star"]), tmp_path, trials=1)
    assert videos.shown == [("a star", 9)] * 2
    videos = hand_made(**SMALL)
    # all heads have masks: another density
    fronted(fitting(videos, preset="masks-only"), tmp_path, trials=1)
    assert len(videos.shown) == 2
    with pytest.raises(UnusableCalibration, match="another seed"):
        fronted(fitting(seed=8), tmp_path)


def test_the_calibration_of_a_point_is_what_its_settings_learn_by_themselves(
    fitting: Made, hand_made: Made, prompts: tuple[str, ...], same: Made, tmp_path: Path
) -> None:
    fit = fitting()
    units = fit.run.units(tmp_path)
    fit.run.note(units, kernel=Oracle())
    values: Mapping[str, float] = {"early": 0.9, "late": 0.6, "decay": 3.0, "rho": 1.0, "gamma": 0.7}
    made = fit.calibration(units, values)
    own = calibrate_on(
        hand_made(**SMALL), prompts=prompts[:2], seed=7, kernel=Oracle(), block=(16, 8), anchors=2,
        schedule=Schedule(early=0.9, late=0.6, decay=3.0), rho=1.0, gamma=0.7,
    )  # fmt: skip
    assert same(made, own)
    made.save(tmp_path / "c")
    assert type(made).load(tmp_path / "c").settings["gamma"] == 0.7


def front(*points: tuple[float, float], published: tuple[float, float] = (0.5, 20.0)) -> Front:
    all_of_them = [Point(values={}, density=density, psnr_db=psnr) for density, psnr in (published, *points)]
    return Front(published=all_of_them[0], points=tuple(all_of_them[1:]))


def test_the_point_taken_is_the_best_within_the_density_or_the_sparsest_as_good_as_the_published_values() -> None:
    found = front((0.2, 15.0), (0.35, 19.0), (0.4, 21.0), (0.8, 30.0))
    assert [found.chosen(density).density for density in (0.2, 0.36, 1.0)] == [0.2, 0.35, 0.8]
    assert found.chosen().density == 0.4
    with pytest.raises(ValueError, match=r"sparsest point has a density of 0\.200: ask for that or more, not 0\.1"):
        found.chosen(0.1)


def test_a_front_is_a_file(tmp_path: Path) -> None:
    front((0.2, 15.0)).save(tmp_path / "front.json", method="calibatt")
    written = json.loads((tmp_path / "front.json").read_text())
    assert written["schema"] == "calibatt-front-1"
    assert written["method"] == "calibatt"
    assert written["points"] == [{"values": {}, "density": 0.2, "psnr_db": 15.0}]
    assert written["published"]["density"] == 0.5


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"method": "sparge", "anchors": None}, "sparge has no settings that are fitted to a model"),
        ({"tuning": ["a square"]}, "tuning prompts are not learnt from: take another than 'a square'"),
        ({"tuning": []}, "give at least one prompt"),
    ],
    ids=["method", "shared", "none"],
)
def test_what_cannot_be_fitted_is_refused_before_any_work(
    fitting: Made, hand_made: Made, wrong: dict[str, Any], says: str
) -> None:
    videos = hand_made()
    if "method" in wrong:
        with pytest.raises(ValueError, match=says):
            Fitting.of(videos, method="sparge", prompts=["a circle"], tuning=["a square"], seed=0)
    else:
        with pytest.raises(ValueError, match=says):
            fitting(videos, **wrong)
    assert videos.asked == []


def test_videos_that_show_nothing_are_refused(fitting: Made, hand_made: Made, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="do not show what attention computes"):
        fronted(fitting(hand_made(**SMALL, visible=False)), tmp_path)
    with pytest.raises(ValueError, match="at least one trial"):
        fronted(fitting(), tmp_path, trials=0)


def test_without_optuna_it_is_said_what_to_install(fitting: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ValueError, match=r"not installed: pip install 'calibatt\[fit\]'"):
        fitting()
