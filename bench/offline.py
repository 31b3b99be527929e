"""What arms learn offline: once for all that learn the same, and how long it took."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from calibatt.bench.cells import Arm
from calibatt.bench.timer import timed
from calibatt.methods.base import Planner
from calibatt.methods.catalogue import METHODS, learner, learns_from
from calibatt.methods.learning import Learner, Learnt

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


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Prepared:
    """What was learnt.

    Args:
        calibration: what the arm's method is built with.
        seconds: what learning it took here; None where it was made before.
    """

    calibration: Learnt
    seconds: float | None


def block_of(arm: Arm, block: tuple[int, int]) -> tuple[int, int] | None:
    """Tokens of the arm's query and key blocks, in a model whose own are given; None for the preset's own."""
    if isinstance(arm.block, tuple):
        return arm.block
    return None if arm.block == "native" else block


def settings_of(arm: Arm) -> Mapping[str, Any]:
    """Settings of the arm's method that the run asks for: no dense steps of its own where all arms have the same."""
    return {} if arm.dense_steps is None else METHODS[arm.method].without_dense


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
    own: dict[str, Any] = {**settings_of(arm), **settings}
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


class Offline:
    """Makes what arms learn when it is first asked for, and keeps it.

    Args:
        learn: learns a lesson.
        stored: loads what was learnt before and is to be used in place of it, wherever it is the same method's.
        log: says what is being learnt.
        device: where learning runs and its results go.
        block: of the model.
        turned: as for `lesson_of`.
    """

    def __init__(
        self,
        learn: Callable[[Lesson], Learnt],
        *,
        stored: Callable[[], Learnt] | None,
        log: Callable[[str], None],
        device: torch.device,
        block: tuple[int, int],
        turned: Collection[str] = (),
    ) -> None:
        self._learn = learn
        self._load = stored
        self._log = log
        self._device = device
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

    def prepared(self, arm: Arm, **settings: float) -> Prepared | None:
        """What the arm plans by; None where it needs nothing.

        Args:
            arm, settings: as for `lesson_of`.

        Raises:
            ValueError: a setting contradicts the preset, or what is stored is for another pipeline.
        """
        lesson = self.lesson(arm, **settings)
        if lesson is None:
            return None
        if self._stored is not None and self._stored.method == lesson.method:
            return Prepared(calibration=self._stored, seconds=None)
        for known, prepared in self._made:
            if known == lesson:
                return prepared
        self._log(f"learning what {lesson.method}/{lesson.preset} needs")
        seconds, learnt = timed(self._device, lambda: self._learn(lesson))
        self._made.append((lesson, Prepared(calibration=learnt.to(self._device), seconds=seconds)))
        return self._made[-1][1]

    def seconds(self, method: Planner) -> float | None:
        """What it took here to learn what a method was built with; None where it learnt nothing, or before."""
        learnt = getattr(method, "learnt", None)
        return next((made.seconds for _, made in self._made if learnt is made.calibration), None)

    @cached_property
    def _stored(self) -> Learnt | None:
        return None if self._load is None else self._load().to(self._device)
