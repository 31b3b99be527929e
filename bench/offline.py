"""What arms learn offline: once for all that learn the same, and how long it took."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from calibatt.bench.cells import Arm
from calibatt.bench.preparation import Preparation
from calibatt.bench.timer import timed
from calibatt.calibration.artifact import Calibration
from calibatt.calibration.collect import Run, notes_in
from calibatt.calibration.files import UnusableCalibration
from calibatt.calibration.videos import Videos
from calibatt.kernels.base import Attender, Unsupported
from calibatt.methods.base import Planner
from calibatt.methods.catalogue import METHODS, learner, learns_from
from calibatt.methods.learning import Learner, Learnt, settings_of

# of the first calibration prompt's noise: far from those of the videos that are measured
CALIBRATION_SEED = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Lesson:
    """What has to be learnt for an arm; two lessons are one where method and learner are the same.

    Args:
        method: whose learner it is.
        learner: what learns, with all that its result depends on.
        preset, block, settings: what it is made from.
    """

    method: str
    learner: Learner
    preset: str = field(compare=False)
    block: tuple[int, int] | None = field(compare=False)
    settings: Mapping[str, Any] = field(compare=False)

    @property
    def name(self) -> str:
        """Short, and the same in every run: the method and a digest of what its learner's result depends on."""
        digest = hashlib.sha256(json.dumps(settings_of(self.learner), sort_keys=True).encode())
        return f"{self.method}-{digest.hexdigest()[:8]}"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Prepared:
    """What was learnt.

    Args:
        calibration: what the arm's method is built with.
        seconds: that learning it took in this run, before it was stopped too; None where it was made outside of it.
    """

    calibration: Learnt
    seconds: float | None


def block_of(arm: Arm, block: tuple[int, int]) -> tuple[int, int] | None:
    """Tokens of the arm's query and key blocks, in a model whose own are given; None for the preset's own."""
    if isinstance(arm.block, tuple):
        return arm.block
    return None if arm.block == "native" else block


def run_settings(arm: Arm) -> Mapping[str, Any]:
    """Settings of the arm's method that the run asks for.

    Its own; no dense steps of the method where all arms have the same; and how many queries what it learns looks at.
    """
    dense = {} if arm.dense_steps is None else METHODS[arm.method].without_dense
    stride = {} if arm.query_stride == 1 else {"query_stride": arm.query_stride}
    return {**arm.set_values, **dense, **stride}


def lesson_of(arm: Arm, block: tuple[int, int], *, turned: Collection[str] = (), **settings: float) -> Lesson | None:
    """What has to be learnt for an arm; None where nothing has.

    Args:
        arm: what will plan by it.
        block: of the model.
        turned: methods whose knob is turned in this run, by whatever arm: they learn what that takes.
        settings: of the arm's method, beside those that the run asks for.

    Raises:
        ValueError: a setting contradicts the preset.
    """
    own: dict[str, Any] = {**run_settings(arm), **settings}
    method = learns_from(arm.method, arm.preset, **own)
    if method is None:
        return None
    if method == arm.method:
        preset, own_block = arm.preset, block_of(arm, block)
    else:
        # another method's tables are those that it has by itself in this run
        preset, own_block = "default", block
        own = {} if arm.dense_steps is None else dict(METHODS[method].without_dense)
    knob = METHODS[method].knob
    if method in turned and knob is not None:
        own.update(knob.learnt_with)
    learns = learner(method, preset=preset, block=own_block, **own)
    assert learns is not None, f"{method}/{preset} needs its own calibration, but has no learner"
    return Lesson(method=method, learner=learns, preset=preset, block=own_block, settings=own)


def learn(
    lesson: Lesson,
    videos: Videos,
    *,
    prompts: Sequence[str],
    kernel: Attender,
    device: torch.device,
    folder: Path | None,
    progress: bool = False,
) -> tuple[float, Calibration]:
    """Learn a lesson from dense videos.

    Args:
        lesson: what to learn.
        videos: to learn from.
        prompts: of the videos.
        kernel: computes their attention.
        device: where they are made.
        folder: where the notes of each video are kept, and those of a run that was stopped lie; None keeps none.
        progress: whether to show a progress bar.

    Returns:
        Seconds that it took, those of videos that were made before included, and what was learnt.

    Raises:
        UnusableCalibration: the folder is that of another run, in use, or damaged.
        ValueError: as for `calibrate_on`.
        OSError: notes cannot be written.
    """

    def work() -> tuple[float, Calibration]:
        run = Run.of(
            videos, method=lesson.method, preset=lesson.preset, prompts=prompts, seed=CALIBRATION_SEED,
            block=lesson.block, **lesson.settings,
        )  # fmt: skip
        with notes_in(folder) as place:
            units = run.units(place)
            before = units.seconds()
            run.note(units, kernel=kernel, progress=progress)
            return before, run.merge(units, progress=progress)

    seconds, (before, learnt) = timed(device, work)
    return before + seconds, learnt


class Offline:
    """Makes what arms learn when it is first asked for, and keeps it.

    Args:
        learn: learns a lesson and says how many seconds it took; notes go into the folder, where there is one; None
            where there are no videos to learn from.
        preparation: what a stopped run has learnt, and keeps what this one does.
        stored: loads what was learnt before and is to be used in place of it, wherever it is the same method's.
        log: says what is being learnt.
        block: of the model.
        turned: as for `lesson_of`.
    """

    def __init__(
        self,
        learn: Callable[[Lesson, Path | None], tuple[float, Calibration]] | None,
        *,
        preparation: Preparation,
        stored: Callable[[], Learnt] | None,
        log: Callable[[str], None],
        block: tuple[int, int],
        turned: Collection[str] = (),
    ) -> None:
        self._learn = learn
        self._preparation = preparation
        self._load = stored
        self._log = log
        self._block = block
        self._turned = turned
        self._made: list[tuple[Lesson, Prepared]] = []

    def lesson(self, arm: Arm, **settings: float) -> Lesson | None:
        """What has to be learnt for an arm; None where nothing has.

        Args:
            arm, settings: as for `lesson_of`.

        Raises:
            ValueError: a setting contradicts the preset.
        """
        return lesson_of(arm, self._block, turned=self._turned, **settings)

    def missing(self, arm: Arm) -> Unsupported | None:
        """Why what an arm needs cannot be learnt; None where it can be, is there, or is not needed."""
        lesson = None if self._learn is not None else self.lesson(arm)
        if lesson is None or (self._stored is not None and self._stored.method == lesson.method):
            return None
        return Unsupported(
            f"{lesson.method} learns from whole videos, of which there are none here: give --calibration"
        )

    def prepared(self, arm: Arm, **settings: float) -> Prepared | None:
        """What the arm plans by; None where it needs nothing.

        Args:
            arm, settings: as for `lesson_of`.

        Raises:
            ValueError: a setting contradicts the preset, what is stored is for another pipeline, or what a stopped run
                has learnt is gone.
        """
        lesson = self.lesson(arm, **settings)
        if lesson is None:
            return None
        if self._stored is not None and self._stored.method == lesson.method:
            return Prepared(calibration=self._stored, seconds=None)
        for known, prepared in self._made:
            if known == lesson:
                return prepared
        seconds, learnt = self._found(lesson) or self._learnt(lesson)
        self._made.append((lesson, Prepared(calibration=learnt, seconds=seconds)))
        return self._made[-1][1]

    def seconds(self, method: Planner) -> float | None:
        """What it took here to learn what a method was built with; None where it learnt nothing, or before."""
        learnt = getattr(method, "learnt", None)
        return next((made.seconds for _, made in self._made if learnt is made.calibration), None)

    def _found(self, lesson: Lesson) -> tuple[float, Calibration] | None:
        found = self._preparation.learnt(lesson.name)
        if found is not None:
            self._log(f"what {lesson.method}/{lesson.preset} needs was learnt before")
        return found

    def _learnt(self, lesson: Lesson) -> tuple[float, Calibration]:
        assert self._learn is not None, "an arm that learns has been refused"
        self._log(f"learning what {lesson.method}/{lesson.preset} needs")
        folder = self._preparation.notes(lesson.name)
        try:
            seconds, learnt = self._learn(lesson, folder)
        except (OSError, UnusableCalibration) as error:
            if folder is None:
                raise
            # notes that cannot be written, or read, are no reason to stop
            self._log(f"{error}: learning without keeping notes")
            seconds, learnt = self._learn(lesson, None)
        self._preparation.keep_learnt(lesson.name, seconds, learnt)
        return seconds, learnt

    @cached_property
    def _stored(self) -> Learnt | None:
        return None if self._load is None else self._load()
