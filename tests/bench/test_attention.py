"""The attention suite, on arms whose times are known."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from calibatt.bench.cells import DENSE
from calibatt.bench.record import Telemetry
from calibatt.bench.sampling import Goal
from calibatt.bench.suites.attention import run

# calls before anything is timed: one at the first probe of either layer, then one a probe; and those of a round
CHECKED, A_ROUND = 5, 5
# rounds that count for nothing, of times that do not fall
WARM_UP = 2


def fixed(rounds: int) -> Goal:
    return Goal(least=rounds, most=rounds, interval=None)


def test_a_sample_is_the_mean_over_the_probes(fakes: Any) -> None:
    arms = [fakes.arm("dense", [2.0]), fakes.arm("fast", [0.5])]
    records = dict(run(fakes.context(), arms, goal=fixed(3)))
    assert records[arms[1]].samples_s == (0.5,) * 3
    assert records[arms[1]].phases_s == {"plan": (0.0,) * 3, "attend": (0.5,) * 3}
    assert records[DENSE].samples_s == (2.0,) * 3
    assert records[DENSE].baseline_samples_s is None


def drifting(rounds: int, start: float, end: float) -> list[float]:
    """Times of an arm, round by round, that drift from one to another; each a hundredth up, then one down."""
    return [
        (start + (end - start) * i / (rounds - 1)) * (1.01 if i % 2 else 0.99) for i in range(rounds)
    ]  # fmt: skip


def test_rounds_end_by_the_interval_or_after_the_most_however_the_clock_drifts(
    fakes: Any, by_round: Callable[..., list[float]]
) -> None:
    goal = Goal(least=10, most=50, interval=0.03)
    # the device slows down by half: both alike, and so their ratio stays
    dense = by_round(CHECKED, A_ROUND, [2.0] * WARM_UP + drifting(50, 2.0, 3.0))
    alike = by_round(CHECKED, A_ROUND, [1.0] * WARM_UP + [one / 2 for one in drifting(50, 2.0, 3.0)])
    # this one alone, which is no noise that more rounds would average out
    alone = by_round(CHECKED, A_ROUND, [1.0] * WARM_UP + drifting(50, 1.0, 3.0))
    arms = [fakes.arm("dense", dense), fakes.arm("alike", alike), fakes.arm("alone", alone)]
    records = dict(run(fakes.context(), arms, goal=goal))
    assert [len(records[arm].samples_s or ()) for arm in arms] == [50, 10, 50]
    assert [records[arm].interval_reached for arm in arms] == [None, True, False]
    assert records[arms[1]].speedup is not None
    assert records[arms[1]].speedup.median == pytest.approx(2.0)
    assert "timing attention, 10 to 50 rounds of 3 arms" in fakes.said


def test_when_the_time_has_passed_what_there_is_is_recorded(fakes: Any, by_round: Callable[..., list[float]]) -> None:
    alone = by_round(CHECKED, A_ROUND, [1.0] * WARM_UP + drifting(50, 1.0, 3.0))
    arms = [fakes.arm("dense"), fakes.arm("alone", alone)]
    goal = Goal(least=10, most=50, interval=0.03, seconds=200)
    records = dict(run(fakes.context(), arms, goal=goal))
    # a round takes 10 s at first and 20 s at last, and more than 200 s have passed after the 17th
    assert [len(records[arm].samples_s or ()) for arm in arms] == [20, 20]
    assert len(records[arms[1]].baseline_samples_s or ()) == 20
    assert records[arms[1]].interval_reached is False
    assert records[arms[1]].speedup is not None


def test_every_round_begins_a_new_video(fakes: Any) -> None:
    # planning takes one second more at every call of a video: two first calls, then 3, 4 and 5 seconds
    arms = [fakes.arm("dense"), fakes.arm("tires", tires=True)]
    records = dict(run(fakes.context(), arms, goal=fixed(3)))
    assert records[arms[1]].samples_s == (1.0 + 4.0,) * 3


def test_baseline_samples_are_those_of_the_same_round(fakes: Any, by_round: Callable[..., list[float]]) -> None:
    dense = by_round(CHECKED, A_ROUND, [1.0, 1.0, 1.0, 2.0, 3.0])
    sparse = by_round(CHECKED, A_ROUND, [0.5, 0.5, 0.5, 1.0, 1.5])
    arms = [fakes.arm("dense", dense), fakes.arm("sparse", sparse)]
    record = dict(run(fakes.context(), arms, goal=fixed(3)))[arms[1]]
    # two rounds warm up
    assert record.samples_s == (0.5, 1.0, 1.5)
    assert record.baseline_samples_s == (1.0, 2.0, 3.0)
    assert record.speedup is not None
    assert record.speedup.median == 2.0


def test_what_spoils_the_baseline_spoils_the_pair_and_not_the_other_way(fakes: Any, see: Callable[..., None]) -> None:
    seen = [(True, 0.0), (False, 0.01), (False, 0.2)]
    hot, free, busy = (Telemetry(readings=1, throttled=held, disturbed=share) for held, share in seen)
    # of dense, then of the arm
    see(hot, free, free, free, free, busy, free, None)
    arms = [fakes.arm("dense"), fakes.arm("sparse", [3.0])]
    dense, sparse = dict(run(fakes.context(), arms, goal=fixed(4))).values()
    assert dense.spoilt == (True, False, False, False)
    assert sparse.spoilt == (True, True, False, False)
    assert (dense.throttled, sparse.throttled) == (True, True)
    # by their length, of those that are known
    assert sparse.disturbed == pytest.approx((3 * 0.01 + 3 * (0.01 + 0.2 + 0.01)) / (4 * 1 + 3 * 3))
    assert sparse.telemetry == Telemetry(readings=3, throttled=False, disturbed=pytest.approx(0.22 / 3))


def test_where_nothing_was_seen_nothing_is_said(fakes: Any) -> None:
    arms = [fakes.arm("dense"), fakes.arm("sparse")]
    record = dict(run(fakes.context(), arms, goal=fixed(2)))[arms[1]]
    assert record.spoilt is record.telemetry is record.throttled is record.disturbed is None


@pytest.mark.parametrize("lasts", [0, CHECKED, CHECKED + (WARM_UP + 1) * A_ROUND])
def test_an_arm_that_runs_out_of_memory_says_so_and_the_others_go_on(fakes: Any, lasts: int) -> None:
    arms = [fakes.arm("dense"), fakes.arm("large", lasts=lasts), fakes.arm("small", [0.25])]
    records = dict(run(fakes.context(), arms, goal=fixed(3)))
    assert records[arms[1]].outcome == "out_of_memory"
    assert records[arms[1]].reason == "OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB"
    assert records[arms[2]].samples_s == (0.25,) * 3
    assert records[arms[2]].baseline_samples_s == (1.0,) * 3


def test_without_its_baseline_an_arm_keeps_its_times(fakes: Any) -> None:
    arms = [fakes.arm("dense", lasts=CHECKED + A_ROUND + 1), fakes.arm("sparse")]
    records = dict(run(fakes.context(), arms, goal=fixed(3)))
    assert records[DENSE].outcome == "out_of_memory"
    assert records[arms[1]].samples_s == (1.0,) * 3
    assert records[arms[1]].baseline_samples_s is None


def test_density_memory_and_truth_are_those_of_the_probes(fakes: Any) -> None:
    arms = [fakes.arm("dense"), fakes.arm("sparse")]
    records = dict(run(fakes.context(), arms, goal=fixed(1)))
    assert (records[DENSE].density, records[arms[1]].density) == (1.0, 0.5)
    assert records[arms[1]].plan_memory_bytes is not None
    assert records[arms[1]].plan_memory_bytes > 0
    assert records[DENSE].method_error == 0.0
    assert records[arms[1]].error_calls == 3
    assert records[arms[1]].recall is not None
    assert 0 < records[arms[1]].recall < 1
