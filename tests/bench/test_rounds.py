"""Turns, and how samples reach pytest-benchmark."""

from __future__ import annotations

import math
import time
from collections import Counter
from itertools import pairwise, permutations

import pytest
import torch

from calibatt.bench.failure import Failure, guarded
from calibatt.bench.replay import Replay
from calibatt.bench.rounds import TimeLimit, in_turns, take_turns


def test_every_arm_runs_once_a_round() -> None:
    turns = list(in_turns(["a", "b", "c"], 6))
    assert Counter(turns) == {(round_, arm): 1 for round_ in range(6) for arm in "abc"}


def test_orders_are_drawn_and_everyone_runs_after_everyone() -> None:
    turns = [arm for _, arm in in_turns("abcd", 40)]
    rounds = ["".join(turns[i : i + 4]) for i in range(0, len(turns), 4)]
    after = Counter(pair for round_ in rounds for pair in pairwise(round_))
    assert set(after) == set(permutations("abcd", 2))
    # three pairs a round of twelve, those with the partner twice as often as the others
    assert max(after.values()) < 2.5 * min(after[pair] for pair in after if "a" in pair)


def test_the_order_of_a_round_is_the_same_wherever_a_run_goes_on() -> None:
    whole = list(in_turns("abcde", 9))
    assert list(in_turns("abcde", 9, first=4)) == whole[20:]


@pytest.mark.parametrize("count", [1, 2, 5, 6])
def test_what_others_are_paired_with_is_in_the_middle_and_comes_first_as_often_as_last(count: int) -> None:
    places = Counter()
    for round_ in range(200):
        order = [arm for _, arm in in_turns(range(count), round_ + 1, first=round_)]
        places[order.index(0) - (count - 1) / 2] += 1
    assert max(map(abs, places)) <= 0.5
    assert all(times > 60 for times in places.values())


def test_an_arm_that_fails_has_no_more_turns_and_the_others_go_on() -> None:
    done: list[tuple[int, str]] = []
    over: list[int] = []

    def turn(round_: int, arm: str) -> None:
        done.append((round_, arm))
        if (round_, arm) == (1, "b"):
            raise MemoryError

    failures = take_turns(["a", "b"], 3, turn, after=over.append)
    assert failures == {"b": Failure("out_of_memory", "MemoryError")}
    assert sorted(done) == [(0, "a"), (0, "b"), (1, "a"), (1, "b"), (2, "a")]
    assert over == [0, 1, 2]


@pytest.mark.parametrize(
    ("error", "outcome", "reason"),
    [
        (torch.OutOfMemoryError("no room\nfor 2 GiB"), "out_of_memory", "OutOfMemoryError: no room"),
        (MemoryError(), "out_of_memory", "MemoryError"),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: 2 bytes"),
            "out_of_memory",
            "RuntimeError: [enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: 2 bytes",
        ),
        (RuntimeError("CUDA error: bad access"), "failed", "RuntimeError: CUDA error: bad access"),
        (KeyError("x"), "failed", "KeyError: 'x'"),
    ],
)  # fmt: skip
def test_what_goes_wrong_is_an_outcome_and_a_line(error: Exception, outcome: str, reason: str) -> None:
    def work() -> None:
        raise error

    assert guarded(work) == Failure(outcome, reason)  # type: ignore[arg-type]


def test_replayed_readings_differ_by_the_samples() -> None:
    timer = Replay()
    timer.load([0.5, 2.0])
    readings = [timer() for _ in range(4)]
    assert [readings[1] - readings[0], readings[3] - readings[2]] == [0.5, 2.0]


def test_after_a_round_that_is_not_made_there_are_no_more() -> None:
    made, asked = [], []

    def more(round_: int) -> bool:
        asked.append(round_)
        return round_ != 4

    take_turns(["a", "b"], 9, lambda round_, arm: made.append(round_), first=2, more=more)
    assert made == [2, 2, 3, 3]
    assert asked == [2, 3, 4]


def test_there_is_time_for_a_round_that_takes_as_long_as_the_longest(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    limit, endless = TimeLimit(60), TimeLimit(None)
    # nothing is known of how long a round takes; it takes 20, then 10
    assert limit.more()
    now[0] = 120
    assert limit.more()
    now[0] = 130
    # another of 20 ends at 150
    assert limit.more()
    now[0] = 145
    assert not limit.more()
    assert limit.left_s() == 15
    now[0] = 1e9
    assert endless.more()
    assert endless.left_s() == math.inf
