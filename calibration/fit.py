"""Fitting a method's settings to a model: Optuna proposes them, videos of a few prompts of their own judge them."""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from jaxtyping import UInt8
from torch import Tensor

from calibatt.calibration.artifact import Calibration
from calibatt.calibration.collect import Run, check_prompts
from calibatt.calibration.files import naming, replacing
from calibatt.calibration.shards import Units
from calibatt.calibration.videos import Videos
from calibatt.kernels.base import Attender
from calibatt.kernels.catalogue import DEFAULT
from calibatt.methods.base import Fit, Foreseen, Planner
from calibatt.methods.call import SparseAttention
from calibatt.methods.catalogue import build, fit_of
from calibatt.models.video_metrics import eight_bit, psnr_db

SCHEMA = "calibatt-front-1"
_JOURNAL = "trials.jsonl"
# ours: Optuna's sampler draws the first ten at random and learns from there
TRIALS = 50
# ours: as many as knobs are turned on; each trial makes a video of each
TUNING_PROMPTS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """Values that were tried, and what they come to.

    Args:
        values: of the settings, by name.
        density: mean over all plans of a video.
        psnr_db: of the tuning prompts' videos against the dense ones, mean.
    """

    values: Mapping[str, float]
    density: float
    psnr_db: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Front:
    """What a fit found.

    Args:
        published: the values of the method's authors, judged like the others.
        points: those of all tried, these among them, that no other beats in both, the sparsest first.
    """

    published: Point
    points: tuple[Point, ...]

    def chosen(self, density: float | None = None) -> Point:
        """The point nearest to dense attention at a density of at most this.

        Args:
            density: None takes the sparsest point that is at least as near to dense attention as the published values.

        Raises:
            ValueError: all are denser.
        """
        if density is None:
            return next(point for point in self.points if point.psnr_db >= self.published.psnr_db)
        within = [point for point in self.points if point.density <= density]
        if not within:
            raise ValueError(
                f"the sparsest point has a density of {self.points[0].density:.3f}: ask for that or more, "
                f"not {density:g}, or for more trials"
            )
        return within[-1]

    def save(self, path: Path, **about: Any) -> None:
        """Write it as JSON.

        Args:
            path: of the file.
            about: what else it says.

        Raises:
            OSError: it cannot be written.
        """
        text = json.dumps({"schema": SCHEMA, **about, **asdict(self)}, indent=1)
        with replacing(path) as file, naming(path):
            file.write(text.encode())


# without slots: cached_property keeps its values in the instance's dictionary
@dataclass(frozen=True, kw_only=True, eq=False)
class Fitting:
    """One fit. The videos to learn from are made once, whatever is tried.

    Args:
        run: takes the notes.
        fit: of the method.
        tuning: prompts whose videos judge, none of which is learnt from; their noise follows that of the run's prompts.
        kernel: computes the videos.
    """

    run: Run
    fit: Fit
    tuning: tuple[str, ...]
    kernel: Attender = DEFAULT

    @classmethod
    def of(
        cls,
        videos: Videos,
        *,
        method: str = "calibatt",
        preset: str = "default",
        prompts: Sequence[str],
        tuning: Sequence[str],
        seed: int,
        kernel: Attender = DEFAULT,
        block: tuple[int, int] | None = None,
        **settings: Any,
    ) -> Fitting:
        """A fit of a method of the catalogue.

        Args:
            videos, method, preset, prompts, seed, block, settings: as for `calibrate_on`.
            tuning, kernel: as for `Fitting`.

        Raises:
            UnknownName: there is no such method or preset.
            ValueError: prompts or tuning are empty, or share one; the method has no settings that are fitted; a setting
                does not exist or is out of range; Optuna is missing.
        """
        check_optuna()
        check_prompts(tuning)
        if shared := set(prompts) & set(tuning):
            raise ValueError(f"tuning prompts are not learnt from: take another than {min(shared)!r}")
        how: dict[str, Any] = {"preset": preset, "block": block, **settings}
        fit = fit_of(method, geometry=videos.geometry, steps=videos.steps, **how)
        run = Run.of(videos, method=method, prompts=prompts, seed=seed, **how)
        return cls(run=replace(run, learner=fit.noting), fit=fit, tuning=tuple(tuning), kernel=kernel)

    def front(self, units: Units, *, trials: int, progress: bool = False) -> Front:
        """Try values until there have been this many trials, those of a stopped fit among them.

        The first has the published values. A trial depends on those before it alone, so a fit that was stopped comes
        to what it would have come to.

        Args:
            units: of the run, with notes of every prompt; trials are kept beside them.
            trials: at least 1.
            progress: whether to show a progress bar over trials on stderr.

        Raises:
            UnusableCalibration: notes are missing, damaged, or of another run.
            ValueError: there is less than one trial; the videos do not show what attention computes.
        """
        from optuna.distributions import BaseDistribution, FloatDistribution
        from optuna.samplers import TPESampler
        from optuna.trial import TrialState, create_trial
        from tqdm import tqdm

        if trials < 1:
            raise ValueError(f"a fit takes at least one trial: got {trials}")
        ranges: dict[str, BaseDistribution] = {name: FloatDistribution(*ends) for name, ends in self.fit.ranges.items()}
        study = self._study(units.folder)

        def done() -> int:
            return len(study.get_trials(deepcopy=False, states=[TrialState.COMPLETE]))

        with tqdm(total=trials, initial=min(done(), trials), desc="fitting", unit="trial", disable=not progress) as bar:
            while (number := done()) < trials:
                if number == 0:
                    values = dict(self.fit.published)
                    study.add_trial(
                        create_trial(params=values, distributions=ranges, values=self._judged(units, values))
                    )
                else:
                    study.sampler = TPESampler(seed=self.run.seed + number)
                    trial = study.ask(ranges)
                    study.tell(trial, self._judged(units, trial.params))
                bar.update()
        first = study.get_trials(states=[TrialState.COMPLETE])[0]
        points = [_point(trial) for trial in study.best_trials]
        return Front(published=_point(first), points=tuple(sorted(points, key=lambda point: point.density)))

    def calibration(self, units: Units, values: Mapping[str, float]) -> Calibration:
        """What the method learns from the notes by these values.

        Raises:
            UnusableCalibration: notes are missing, damaged, or of another run.
        """
        return replace(self.run, learner=self.fit.learner(values)).merge(units)

    def _judged(self, units: Units, values: Mapping[str, float]) -> tuple[float, float]:
        """Density and PSNR in dB."""
        run = self.run
        method = build(run.method, preset=run.preset, calibration=self.calibration(units, values))
        # nothing else tells the density of a video that nobody watches
        assert isinstance(method, Foreseen)
        psnrs = [psnr_db(self._video(method, i), reference) for i, reference in enumerate(self._references)]
        return method.mean_density(), statistics.mean(psnrs)

    @cached_property
    def _references(self) -> tuple[UInt8[Tensor, "3 frames height width"], ...]:
        dense = build("dense")
        return tuple(self._video(dense, number) for number in range(len(self.tuning)))

    def _video(self, planner: Planner, number: int) -> UInt8[Tensor, "3 frames height width"]:
        seed = self.run.seed + len(self.run.prompts) + number
        attention = SparseAttention(planner, self.kernel)
        shown = self.run.videos.show(attention, prompts=self.tuning[number : number + 1], seed=seed)
        if shown is None:
            raise ValueError("these videos do not show what attention computes: nothing can be fitted to them")
        return eight_bit(shown[0])

    def _study(self, folder: Path) -> Any:
        """The trials so far of this fit; another one's, in the same folder, are left alone."""
        import optuna
        from optuna.storages.journal import JournalFileBackend

        # the folder is that of one run; a fit depends on more
        own = {
            "preset": self.run.preset,
            "tuning": self.tuning,
            "ranges": dict(self.fit.ranges),
            "published": dict(self.fit.published),
        }
        name = hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        return optuna.create_study(
            study_name=name, storage=optuna.storages.JournalStorage(JournalFileBackend(str(folder / _JOURNAL))),
            directions=["minimize", "maximize"], load_if_exists=True,
        )  # fmt: skip


def check_optuna() -> None:
    """Refuse, before any work is done, to fit without Optuna.

    Raises:
        ValueError: it is not installed.
    """
    try:
        import optuna  # noqa: F401
    except ModuleNotFoundError:
        raise ValueError("fitting needs Optuna, which is not installed: pip install 'calibatt[fit]'") from None


def _point(trial: Any) -> Point:
    density, psnr = trial.values
    return Point(values=dict(trial.params), density=density, psnr_db=psnr)
