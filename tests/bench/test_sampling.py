"""How many samples an arm gets, by times that are drawn, not measured."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import count, islice
from typing import Any

import pytest
import torch

from calibatt.bench import sampling
from calibatt.bench.failure import Failure
from calibatt.bench.record import Record
from calibatt.bench.sampling import LOOK_EVERY, Course, Goal, Sample, take_samples

CPU = torch.device("cpu")
GOAL = Goal(least=10, most=50, interval=0.03)


@pytest.fixture(autouse=True)
def watched_by_nobody(clock: object) -> None:
    """What others do meanwhile is no part of these tests."""


def noisy(seconds: float, spread: float, seed: int = 0) -> Callable[[], float]:
    """Gives times that vary by this share."""
    draw = random.Random(seed)
    return lambda: seconds * draw.lognormvariate(0, spread)


def sampled(
    times: Mapping[str, Callable[[], float]], goal: Goal = GOAL, partner: str = "dense"
) -> dict[str, Course | Failure]:
    return take_samples(list(times), lambda arm: Sample(seconds=times[arm]()), goal, CPU, partner=partner)


def record(course: Course | Failure) -> Record:
    assert isinstance(course, Course)
    return Record(suite="kernel", model="m", method="blocks", kernel="k", outcome="ok", **course.facts())


def test_an_arm_stops_when_its_speedup_is_known_and_its_partner_goes_on_for_the_others() -> None:
    courses = sampled({"dense": noisy(2, 0), "quiet": noisy(1, 0.001), "loud": noisy(1, 0.06), "wild": noisy(1, 0.5)})
    dense, quiet, loud, wild = map(record, courses.values())
    assert len(quiet.samples_s or ()) == GOAL.least < len(loud.samples_s or ()) < GOAL.most
    assert len(wild.samples_s or ()) == len(dense.samples_s or ()) == GOAL.most
    assert [one.interval_reached for one in (dense, quiet, loud, wild)] == [None, True, True, False]
    # those of the same rounds
    assert loud.baseline_samples_s == (dense.samples_s or ())[: len(loud.samples_s or ())]


def test_what_ends_the_rounds_is_the_interval_of_the_record() -> None:
    for seed in range(5):
        course = sampled({"dense": noisy(2, 0.02, seed), "a": noisy(1, 0.05, seed + 100)})["a"]
        whole = record(course)
        assert isinstance(course, Course)
        assert course.speedup == whole.speedup
        assert course.reached == whole.interval_reached
        found = whole.speedup
        assert found is not None
        assert found.low is not None
        assert found.high is not None
        assert whole.interval_reached == ((found.high - found.low) / 2 / found.median <= 0.03)
        taken = len(course.seconds)
        assert taken == GOAL.most or (taken - GOAL.least) % LOOK_EVERY == 0
        # at every look before, it was not
        for before in range(GOAL.least, taken, LOOK_EVERY):
            assert course.partner is not None
            shorter = Course(goal=GOAL, partner=course.partner, seconds=course.seconds[:before])
            assert not shorter.reached


@pytest.mark.parametrize(("seconds", "rounds"), [(0, 10), (29, 10), (31, 15), (44, 15), (46, 20), (1e9, 50)])
def test_once_the_time_has_passed_no_arm_has_more_than_the_least(clock: Any, seconds: float, rounds: int) -> None:
    draws = [random.Random(seed) for seed in range(2)]

    def turn(arm: str) -> Sample:
        # a round takes three seconds, whatever its times are
        clock.now += 2.0 if arm == "dense" else 1.0
        return Sample(seconds=draws[arm == "dense"].lognormvariate(0, 0.5))

    # whether it is that of the suite or what the run has left, of which warming up takes some
    for goal in (replace(GOAL, seconds=seconds), replace(GOAL, left_s=lambda: seconds)):
        courses = take_samples(["dense", "a"], turn, goal, CPU, partner="dense")
        dense, a = map(record, courses.values())
        assert len(dense.samples_s or ()) == len(a.samples_s or ()) == rounds
        assert a.interval_reached is False
        assert a.speedup is not None


def test_without_what_it_is_paired_with_an_arm_stops_after_the_least_rounds() -> None:
    def breaks() -> Callable[[], float]:
        left = iter([2.0] * 15)
        return lambda: next(left)

    for times in ({"a": noisy(1, 0.5)}, {"dense": breaks(), "a": noisy(1, 0.5)}):
        courses = sampled(times)
        alone = record(courses["a"])
        assert len(alone.samples_s or ()) in (GOAL.least, GOAL.least + LOOK_EVERY)
        assert (alone.baseline_samples_s, alone.interval_target, alone.interval_reached) == (None, None, None)
    assert isinstance(courses["dense"], Failure)


def test_alone_the_partner_has_the_least_rounds_and_so_it_has_when_all_others_fail() -> None:
    def broken() -> float:
        raise MemoryError

    for times in ({"dense": noisy(1, 0.5)}, {"dense": noisy(1, 0.5), "a": broken}):
        assert len(record(sampled(times)["dense"]).samples_s or ()) == GOAL.least


def test_a_fixed_number_of_rounds_is_made_however_quiet_it_is() -> None:
    courses = sampled({"dense": noisy(2, 0), "a": noisy(1, 0)}, Goal(least=7, most=7, interval=None))
    for course in courses.values():
        assert len(record(course).samples_s or ()) == 7
        assert record(course).interval_reached is None


@pytest.mark.parametrize(
    ("times", "rounds"),
    [
        ([3, 3], 2), ([3, 3.1], 2), ([3, 2.9], 2), ([9, 3, 3], 3), ([9, 5, 4, 3, 3], 5),
        # what goes on falling is not waited for
        ([9, 8, 7, 6, 5, 4, 3, 2, 1], 5),
    ],
)  # fmt: skip
def test_rounds_warm_up_until_times_fall_no_more(times: list[float], rounds: int) -> None:
    given = iter([*times, *[times[-1]] * 100])
    made: Counter[str] = Counter()

    def turn(arm: str) -> Sample:
        made[arm] += 1
        return Sample(seconds=next(given) if arm == "a" else 1.0)

    courses = take_samples(["dense", "a"], turn, Goal(least=1, most=1, interval=None), CPU, partner="dense")
    assert made == {"dense": rounds + 1, "a": rounds + 1}
    assert all(len(record(course).samples_s or ()) == 1 for course in courses.values())


def test_an_arm_that_fails_while_it_warms_up_has_no_more_turns() -> None:
    calls = count()

    def fails() -> float:
        next(calls)
        raise MemoryError

    assert isinstance(sampled({"dense": noisy(1, 0), "a": fails})["a"], Failure)
    assert next(calls) == 1


def test_defaults_are_the_devices_and_what_is_given_is_never_below_the_least() -> None:
    assert Goal.of(20, most=None, interval=None, device=CPU) == Goal(least=20, most=100, interval=0.03, seconds=120)
    assert Goal.of(20, most=None, interval=None, device=torch.device("cuda")).interval == 0.01
    assert Goal.of(20, most=6, interval=0.5, device=CPU) == Goal(least=20, most=20, interval=0.5)
    # who says how many has as many, unless the time ends
    assert Goal.of(10, most=32, interval=None, device=CPU) == Goal(least=10, most=32, interval=0.03)
    assert Goal.of(10, most=32, interval=None, device=CPU, left_s=lambda: -1.0).left_s() == -1


def test_looking_costs_little_of_the_confidence(monkeypatch: pytest.MonkeyPatch) -> None:
    # simulated: the median of the ratios is 2, of noise for which the rounds end anywhere from the least to the most
    goal, covered, lengths = Goal(least=20, most=100, interval=0.03), 0, set()
    draw = random.Random(0)
    for _ in range(1000):
        dense = Course(goal=goal, seconds=[2 * draw.lognormvariate(0, 0.07) for _ in range(goal.most)])
        whole = [draw.lognormvariate(0, 0.07) for _ in range(goal.most)]
        looks = (n for n in range(goal.least, goal.most + 1) if goal.looks(n))
        courses = (Course(goal=goal, partner=dense, seconds=list(islice(whole, n))) for n in looks)
        course = next(one for one in courses if one.reached or len(one.seconds) == goal.most)
        assert course.speedup is not None
        assert course.speedup.low is not None
        assert course.speedup.high is not None
        lengths.add(len(course.seconds))
        covered += course.speedup.low <= 2 <= course.speedup.high
    assert min(lengths) < 40
    assert max(lengths) > 70
    # of 0.95; docs/decisions.md has the figure
    assert covered >= 920
    assert sampling.LOOK_EVERY == 5
