"""Turns, and how samples reach pytest-benchmark."""

from __future__ import annotations

from collections import Counter

from calibatt.bench.replay import Replay
from calibatt.bench.rounds import in_turns


def test_every_arm_runs_once_a_round() -> None:
    turns = list(in_turns(["a", "b", "c"], 6))
    assert Counter(turns) == {(round_, arm): 1 for round_ in range(6) for arm in "abc"}


def test_no_arm_is_always_first_or_last() -> None:
    turns = list(in_turns(["a", "b", "c"], 6))
    assert {arm for _, arm in turns[0::3]} == {"a", "b", "c"}
    assert {arm for _, arm in turns[2::3]} == {"a", "b", "c"}


def test_replayed_readings_differ_by_the_samples() -> None:
    timer = Replay()
    timer.load([0.5, 2.0])
    readings = [timer() for _ in range(4)]
    assert [readings[1] - readings[0], readings[3] - readings[2]] == [0.5, 2.0]
