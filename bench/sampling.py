"""How many samples arms get: rounds until each arm's paired speedup is known well enough, or there were enough."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, TypeVar

import torch

from calibatt.bench.failure import Failure
from calibatt.bench.record import Telemetry
from calibatt.bench.rounds import take_turns
from calibatt.bench.statistics import Interval, paired_ratio
from calibatt.bench.telemetry import Watch, Watched, circumstances

_T = TypeVar("_T")

# half the width of an interval, as a share of the speedup: what the project asks of either device
INTERVALS = {"cpu": 0.03, "cuda": 0.01}
# rounds from look to look: each look that may end the rounds costs a little of the confidence (docs/decisions.md)
LOOK_EVERY = 5
# as often as an interval of a given width needs where the noise is 2.2 times as strong: it shrinks by the root
_MOST_TIMES_LEAST = 5
# the least rounds of attention in `tox -e bench` take 48 s on two cores (bench/results/cpu/quick.json: five arms, eight
# calls a turn): with this, the whole stays within ten minutes
_BUDGET_S = 120.0
# to see that times do not fall any more takes two rounds; what has not settled after five drifts, and goes on drifting
_LEAST_WARM_UP, _MOST_WARM_UP = 2, 5
# a fall that counts, as a share: of a speedup, the gate must find as much (reports/gate_metrics.py)
_FALL = 0.05


def endless() -> float:
    """Seconds that are left where nobody said how many there are."""
    return math.inf


@dataclass(frozen=True, slots=True, kw_only=True)
class Goal:
    """When an arm has samples enough.

    Args:
        least: rounds of every arm.
        most: rounds after which an arm stops, whether its speedup is known or not.
        interval: half the width that the interval of the paired speedup may have, as a share of the speedup; None for
            as many rounds as there may be.
        seconds: from the first sample on, after which no arm has more than the least rounds; that they have passed is
            found out as often as the interval is looked at.
        left_s: seconds that a run has left, when its first sample is taken; ends the rounds likewise.
    """

    least: int
    most: int
    interval: float | None
    seconds: float = math.inf
    left_s: Callable[[], float] = field(default=endless, compare=False)

    @classmethod
    def of(
        cls,
        least: int,
        *,
        most: int | None,
        interval: float | None,
        device: torch.device,
        left_s: Callable[[], float] = endless,
    ) -> Goal:
        """What is asked for, and where nothing is, the default.

        Args:
            least: rounds of every arm.
            most: where it is more than the least; without it, there is a time after which there are no more either.
            interval: see above.
            device: where the arms run: a CPU is the noisier one.
            left_s: see above.
        """
        return cls(
            least=least,
            most=max(least, _MOST_TIMES_LEAST * least if most is None else most),
            interval=INTERVALS[device.type] if interval is None else interval,
            seconds=_BUDGET_S if most is None else math.inf,
            left_s=left_s,
        )

    def __str__(self) -> str:
        return f"{self.least} rounds" if self.least == self.most else f"{self.least} to {self.most} rounds"

    def looks(self, count: int) -> bool:
        """Whether the interval is looked at after so many rounds."""
        return count == self.most or (count >= self.least and (count - self.least) % LOOK_EVERY == 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """What one turn of an arm took, seconds, and parts of it."""

    seconds: float
    phases: Mapping[str, float] = field(default_factory=dict)


@dataclass(slots=True, kw_only=True, eq=False)
class Course:
    """What an arm has done in its turns, seconds.

    Args:
        goal: when it has done enough.
        partner: what it is paired with, which has a sample of every round of this arm's; None where there is none.
        seconds, phases: of each sample.
        spans: of each sample when it began and ended.
        states: of each sample what was read meanwhile; None where nothing was.
    """

    goal: Goal
    partner: Course | None = None
    seconds: list[float] = field(default_factory=list)
    phases: dict[str, list[float]] = field(default_factory=dict)
    spans: list[tuple[float, float]] = field(default_factory=list)
    states: list[Telemetry | None] = field(default_factory=list)

    def add(self, sample: Sample) -> None:
        """Take a sample in."""
        self.seconds.append(sample.seconds)
        for name, part in sample.phases.items():
            self.phases.setdefault(name, []).append(part)

    @property
    def _watched(self) -> list[Watched]:
        return list(zip(self.seconds, self.states, strict=True))

    @property
    def _baseline(self) -> tuple[float, ...] | None:
        # the partner goes on for others
        return None if self.partner is None else tuple(self.partner.seconds[: len(self.seconds)])

    @property
    def speedup(self) -> Interval | None:
        """That of the record, so far."""
        return None if self._baseline is None else paired_ratio(self._baseline, self.seconds)

    @property
    def reached(self) -> bool:
        """Whether the speedup is known as well as is asked for."""
        return self.goal.interval is not None and self.speedup is not None and self.speedup.within(self.goal.interval)

    def facts(self) -> dict[str, Any]:
        """The fields of a record that are samples, or say how they were taken."""
        partner = self.partner
        return {
            "samples_s": tuple(self.seconds),
            "baseline_samples_s": self._baseline,
            "phases_s": {name: tuple(parts) for name, parts in self.phases.items()} or None,
            "interval_target": None if self.partner is None else self.goal.interval,
            **circumstances(self._watched, None if partner is None else partner._watched[: len(self.seconds)]),
        }


def take_samples(
    arms: Sequence[_T], turn: Callable[[_T], Sample], goal: Goal, device: torch.device, *, partner: _T
) -> dict[_T, Course | Failure]:
    """Let arms take turns, each until its speedup is known; what came of every arm.

    All warm up until their times fall no more. An arm whose interval is reached stops, its partner goes on as long as
    any arm needs it. Without the partner there is nothing to know, and the others stop after the least rounds.

    Args:
        arms: who works; the partner, where it is among them, comes first.
        turn: one sample of an arm.
        goal: when an arm has samples enough.
        device: where they run.
        partner: what the others are paired with.
    """
    failures = _warm_up(arms, turn)
    courses = {arm: Course(goal=goal) for arm in arms}
    others = [arm for arm in arms if arm != partner]
    for arm in others:
        courses[arm].partner = courses.get(partner)
    resting: set[_T] = set()

    def sample(round_: int, arm: _T) -> None:
        watch.between()
        start = perf_counter()
        courses[arm].add(turn(arm))
        courses[arm].spans.append((start, perf_counter()))

    def look(round_: int) -> None:
        if not goal.looks(round_ + 1):
            return
        unpaired = partner in failures or partner not in courses
        known = [arm for arm in others if unpaired or arm in failures or courses[arm].reached]
        resting.update(known)
        # without another arm that needs it, there is nothing to go on for
        if len(known) == len(others):
            resting.add(partner)
        if perf_counter() >= end:
            resting.update(arms)

    end = perf_counter() + min(goal.seconds, goal.left_s())
    with Watch(device) as watch:
        take_turns(
            arms, goal.most, sample, more=lambda round_: not set(arms) <= resting | set(failures), after=look,
            failures=failures, resting=resting,
        )  # fmt: skip
    for course in courses.values():
        course.states = [watch.during(*span) for span in course.spans]
        if partner in failures:
            course.partner = None
    return {arm: failures.get(arm, course) for arm, course in courses.items()}


def _warm_up(arms: Sequence[_T], turn: Callable[[_T], Sample]) -> dict[_T, Failure]:
    """Rounds that count for nothing, until no arm is faster than in the round before; arms that failed, and why."""
    taken: dict[_T, list[float]] = {arm: [] for arm in arms}

    def settled(round_: int) -> bool:
        pairs = [one[-2:] for one in taken.values() if len(one) == round_]
        return round_ >= _LEAST_WARM_UP and all(now >= (1 - _FALL) * before for before, now in pairs)

    return take_turns(
        arms, _MOST_WARM_UP, lambda round_, arm: taken[arm].append(turn(arm).seconds),
        more=lambda round_: not settled(round_),
    )  # fmt: skip
