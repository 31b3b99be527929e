"""What measuring does to what is measured: the harness and the telemetry, each as a share of the time of real calls.

    python -m calibatt.bench.overhead --device cuda -o out/overhead.json

The harness's overhead is what a sample has more than the same work has by itself. A sample is taken as the kernel suite
takes it: the device is led, the work stands between two events (on a CPU between two readings of the clock), and the
host waits for it. By itself the work is done as often, back to back, between two events alone. So this is by how much
figures of a record may be wrong. What a run does between samples (to lead and to wait, warm-up, checks) is in none of
them, and not counted.

The telemetry's overhead is what a sample has more while a `Watch` reads the device. On a CPU it reads between samples:
what a reading takes of a core is said beside, since it is in none.

Work is one attention call, dense or under a mask, or as many as take ten milliseconds. All three ways take turns in
random order. In a GPU's turns by itself nothing rests, so that where its power limit holds the clock down, a sample may
be the faster one.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from time import perf_counter, thread_time
from typing import Any, Literal

import torch

from calibatt.bench import fingerprint
from calibatt.bench.gate_cell import DENSITIES, Cells, time_call
from calibatt.bench.record import Telemetry
from calibatt.bench.rounds import TimeLimit, take_turns
from calibatt.bench.statistics import Interval, paired_ratio
from calibatt.bench.telemetry import PERIODS_S, Reader, Watch, merged, reader_of
from calibatt.bench.timer import PhaseTimer
from calibatt.kernels.base import dtype_name
from calibatt.models.device import pick_device

SCHEMA = "calibatt-overhead-1"
# what the project promises of work that takes ten milliseconds or more
LIMITS = {"harness": 0.01, "telemetry": 0.001}
LEAST_WORK_S = 0.01
# in all, beside the half minute that kernels may take to be compiled
SECONDS = 30.0
# of a turn's work: the telemetry's period, and some more, so that there is a reading in every turn
_TURN_PERIODS = 1.2
# an interval exists from six rounds on
_LEAST_ROUNDS, _MOST_ROUNDS = 6, 1000
# calls that warm up, and those after them by which it is known how long one takes
_WARM_UP, _TRIED = 5, 5

Way = Literal["timed", "bare", "watched"]
Verdict = Literal["within", "beyond", "not known"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Overhead:
    """How long some work takes in each way, and what the harness and the telemetry add.

    Args:
        calls: that the work is, so that it takes ten milliseconds.
        a_turn: how often it is done in a turn.
        bare_s, timed_s, watched_s: seconds of the work by itself, in a sample, and in a sample while the device is
            read: means over a turn, one a round.
        watched_for_s: seconds of the turns in which the device was read.
        readings_s: CPU seconds of every reading.
        state: of the device in these turns; None where nothing was read.
    """

    calls: int
    a_turn: int
    bare_s: Sequence[float]
    timed_s: Sequence[float]
    watched_s: Sequence[float]
    watched_for_s: float
    readings_s: Sequence[float]
    state: Telemetry | None

    @property
    def ratios(self) -> Mapping[str, Interval]:
        """A sample over the work by itself, and one while the device is read over one while it is not; paired."""
        return {
            "harness": paired_ratio(self.timed_s, self.bare_s),
            "telemetry": paired_ratio(self.watched_s, self.timed_s),
        }

    @property
    def of_a_core(self) -> float:
        """Share of a core that readings take while the device is read."""
        return sum(self.readings_s) / self.watched_for_s

    @property
    def verdicts(self) -> Mapping[str, Verdict]:
        """Of each whether it is within its limit; not known where others had the device, or heat held it down."""
        spoilt = self.state is not None and self.state.spoilt
        return {name: "not known" if spoilt else verdict(ratio, LIMITS[name]) for name, ratio in self.ratios.items()}

    def facts(self) -> dict[str, Any]:
        """As the file has it."""
        ratios = {
            name: {**asdict(ratio), "limit": LIMITS[name], "verdict": self.verdicts[name]}
            for name, ratio in self.ratios.items()
        }
        readings = {
            "readings": len(self.readings_s),
            "reading_cpu_s": statistics.median(self.readings_s) if self.readings_s else None,
            "readings_of_a_core": self.of_a_core,
        }
        return {**ratios, **readings, **asdict(self)}


def verdict(ratio: Interval, limit: float) -> Verdict:
    """Whether an overhead is within its limit, as far as the interval of the ratio tells."""
    if ratio.low is None or ratio.high is None or ratio.high < 1 - limit:
        # what is faster when it is measured was not measured under like conditions
        return "not known"
    if ratio.high <= 1 + limit:
        return "within"
    return "beyond" if ratio.low > 1 + limit else "not known"


@torch.no_grad()
def measure(
    call: Callable[[], object],
    device: torch.device,
    *,
    seconds: float,
    watch: Callable[[torch.device, Reader], Watch] = Watch,
) -> Overhead:
    """Do a call in each way, in turns.

    Args:
        call: what is timed.
        device: where it runs.
        seconds: after which no further round begins; there are six at least.
        watch: reads the device.

    Raises:
        RuntimeError: the call failed.
    """
    timer = PhaseTimer(device)
    alone = statistics.median([time_call(timer, call) for _ in range(_WARM_UP + _TRIED)][_WARM_UP:])
    calls = math.ceil(LEAST_WORK_S / alone)
    a_turn = math.ceil(_TURN_PERIODS * PERIODS_S[device.type] / (calls * alone))
    turns = _Turns(device, timer, partial(_repeated, call, calls), a_turn, watch)
    taken: dict[Way, list[float]] = {"timed": [], "bare": [], "watched": []}
    limit = TimeLimit(seconds)
    failures = take_turns(
        list(taken), _MOST_ROUNDS, lambda round_, way: taken[way].append(turns.take(way)),
        more=lambda round_: limit.more() or round_ < _LEAST_ROUNDS,
    )  # fmt: skip
    if failures:
        raise RuntimeError("; ".join(f"{way}: {failure.reason}" for way, failure in failures.items()))
    return Overhead(
        calls=calls, a_turn=a_turn, bare_s=taken["bare"], timed_s=taken["timed"], watched_s=taken["watched"],
        watched_for_s=turns.watched_for_s, readings_s=turns.reader.seconds, state=merged(turns.states),
    )  # fmt: skip


def _repeated(call: Callable[[], object], calls: int) -> None:
    for _ in range(calls):
        call()


@dataclass(slots=True)
class _Counted:
    """A reader that keeps the CPU seconds of each reading, of the thread that takes it."""

    reader: Reader
    seconds: list[float] = field(default_factory=list)

    def read(self) -> Telemetry:
        start = thread_time()
        state = self.reader.read()
        self.seconds.append(thread_time() - start)
        return state

    def energy_j(self) -> float | None:
        return self.reader.energy_j()


class _Turns:
    """The ways to do some work, each so many times a turn."""

    def __init__(
        self,
        device: torch.device,
        timer: PhaseTimer,
        work: Callable[[], object],
        count: int,
        watch: Callable[[torch.device, Reader], Watch],
    ) -> None:
        self._device, self._timer, self._work, self._count, self._watch = device, timer, work, count, watch
        self.reader = _Counted(reader_of(device))
        self.watched_for_s = 0.0
        self.states: list[Telemetry] = []

    def take(self, way: Way) -> float:
        """Seconds of the work in a way, mean over a turn."""
        return {"bare": self._bare, "timed": self._timed, "watched": self._watched}[way]()

    def _bare(self) -> float:
        return time_call(self._timer, partial(_repeated, self._work, self._count)) / self._count

    def _timed(self) -> float:
        return statistics.fmean(time_call(self._timer, self._work) for _ in range(self._count))

    def _watched(self) -> float:
        with self._watch(self._device, self.reader) as watch:
            start = perf_counter()
            samples = []
            for _ in range(self._count):
                watch.between()
                samples.append(time_call(self._timer, self._work))
            end = perf_counter()
        self.watched_for_s += end - start
        if (state := watch.during(start, end)) is not None:
            self.states.append(state)
        return statistics.fmean(samples)


def main(arguments: Sequence[str]) -> int:
    """Measure, print and write a JSON file; 1 where an overhead is surely beyond its limit, else 0."""
    parser = argparse.ArgumentParser(prog="calibatt.bench.overhead", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", help="cpu or cuda; default: cuda where there is one")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="to measure for; default: %(default)s")
    parser.add_argument("-o", "--out", type=Path, required=True, metavar="FILE", help="the JSON file")
    own = parser.parse_args(arguments)
    try:
        device = pick_device(own.device)
    except ValueError as problem:
        parser.error(str(problem))
    if own.out.is_dir():
        parser.error(f"{own.out} is a folder: name a file")
    own.out.parent.mkdir(parents=True, exist_ok=True)
    cells = Cells(device)
    densities = {"dense": None, **{f"density {density:g}": density for density in DENSITIES[:1]}}
    found = {
        name: measure(partial(cells.attend, density), device, seconds=own.seconds / len(densities))
        for name, density in densities.items()
    }
    whole = {
        "schema": SCHEMA, "command": " ".join(["python -m calibatt.bench.overhead", *arguments]),
        "datetime": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine_info": fingerprint.machine(), "commit_info": fingerprint.commit(), "device": device.type,
        "dtype": dtype_name(cells.dtype), "geometry": asdict(cells.geometry), "dense_kernel": cells.dense.name,
        "cells": {name: one.facts() for name, one in found.items()},
    }  # fmt: skip
    own.out.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    for name, one in found.items():
        print("\n".join(f"{name}: {line}" for line in _lines(one)))
    print(f"wrote {own.out}")
    return int(any("beyond" in one.verdicts.values() for one in found.values()))


def _lines(one: Overhead) -> list[str]:
    """What is printed."""
    lines = [
        f"{kind} {ratio.median - 1:+.3%}{_interval(ratio)}, limit {LIMITS[kind]:.1%}: {one.verdicts[kind]}"
        for kind, ratio in one.ratios.items()
    ]
    work = f"{statistics.median(one.timed_s) * 1e3:.2f} ms of {one.calls} calls, {len(one.timed_s)} rounds"
    spoilt = "; throttled or disturbed" if one.state is not None and one.state.spoilt else ""
    return [*lines, f"{work}; {len(one.readings_s)} readings, {one.of_a_core:.3%} of a core{spoilt}"]


def _interval(ratio: Interval) -> str:
    if ratio.low is None or ratio.high is None:
        return ""
    return f" ({ratio.low - 1:+.3%} to {ratio.high - 1:+.3%})"


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
