"""A watch over a device while something is measured, and what it saw of each sample.

A thread reads the state: of a GPU its clocks, power, heat, what holds the clock down and who else is on it
(`bench/nvml.py`), of a CPU who has it (`bench/cpu_load.py`). A reading stands for the time since the one before. A
sample has the readings that stand for any of its time: by these it is marked where it was taken while the GPU was
throttled or others had more than a twentieth of what computes.
"""

from __future__ import annotations

import statistics
import threading
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from time import perf_counter
from types import TracebackType
from typing import Any, Protocol, runtime_checkable

import torch

from calibatt.bench.cpu_load import NAMED, CpuReader
from calibatt.bench.nvml import GpuLost, GpuReader
from calibatt.bench.record import Telemetry

# ten a second of a GPU: its driver renews most figures no more often. Two of a CPU, whose system counts in hundredths
# of a second; what the latter cost is in docs/decisions.md
PERIODS_S = {"cuda": 0.1, "cpu": 0.5}


# a sample's seconds, and what was read meanwhile
Watched = tuple[float, Telemetry | None]


@runtime_checkable
class Reader(Protocol):
    """Reads the state of a device."""

    def read(self) -> Telemetry:
        """One reading."""
        ...

    def energy_j(self) -> float | None:
        """Energy used since some moment."""
        ...


def reader_of(device: torch.device) -> Reader:
    """What reads a device's state."""
    return GpuReader(device) if device.type == "cuda" else CpuReader()


class Watch:
    """Reads a device's state again and again, from entering it to leaving it.

    On a CPU a thread that reads takes a core from what is timed, for a tenth of a millisecond. So there readings are
    taken between turns, where `between` is called, and by the thread only while a turn takes longer than two periods.

    Args:
        device: which one.
        reader: what reads it; None for the device's own.
    """

    def __init__(self, device: torch.device, reader: Reader | None = None) -> None:
        self._reader = reader_of(device) if reader is None else reader
        self._period = PERIODS_S[device.type]
        self._patient = device.type == "cpu"
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="telemetry", daemon=True)
        # when each was taken
        self._at: list[float] = []
        self._states: list[Telemetry] = []
        self._last = perf_counter()
        self._lost = False

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()
        self.read()

    def between(self) -> None:
        """Say that nothing is timed now."""
        if self._patient and perf_counter() - self._last >= self._period:
            self.read()

    def read(self) -> None:
        """Take a reading now, unless one was just taken: of shorter times it says little."""
        with self._lock:
            if self._lost or perf_counter() - self._last < self._period / 2:
                return
            try:
                state = self._reader.read()
            except GpuLost:
                # what runs on it fails by itself, and says so
                self._lost = True
                return
            self._last = perf_counter()
            self._at.append(self._last)
            self._states.append(state)

    def energy_j(self) -> float | None:
        """Energy that the device has used since some moment; None where nothing tells."""
        with self._lock:
            try:
                return None if self._lost else self._reader.energy_j()
            except GpuLost:
                self._lost = True
                return None

    def during(self, start: float, end: float) -> Telemetry | None:
        """The readings of a time, as one; None where there are none.

        Args:
            start, end: seconds of `time.perf_counter`.
        """
        with self._lock:
            first = bisect_left(self._at, start)
            # after the last reading, that is the nearest
            found = self._states[first : bisect_left(self._at, end) + 1] or ([] if self._lost else self._states[-1:])
        return merged(found)

    def _run(self) -> None:
        while not self._over.wait(self._period):
            if not self._patient or perf_counter() - self._last >= 2 * self._period:
                self.read()


def merged(states: Sequence[Telemetry]) -> Telemetry | None:
    """Several as one; None of none. Medians are those of the medians."""
    if not states:
        return None
    others: dict[str, float] = {}
    for state in states:
        for name, share in (state.others or {}).items():
            others[name] = max(share, others.get(name, 0.0))
    most = sorted(others, key=others.__getitem__, reverse=True)[:NAMED]
    reasons = _known(states, "reasons", lambda each: tuple(dict.fromkeys(name for names in each for name in names)))
    return Telemetry(
        readings=sum(state.readings for state in states),
        clock_mhz=_known(states, "clock_mhz", statistics.median),
        lowest_clock_mhz=_known(states, "lowest_clock_mhz", min),
        memory_clock_mhz=_known(states, "memory_clock_mhz", statistics.median),
        power_w=_known(states, "power_w", statistics.median),
        temperature_c=_known(states, "temperature_c", max),
        memory_bytes=_known(states, "memory_bytes", max),
        reasons=reasons,
        throttled=_known(states, "throttled", any),
        disturbed=_mean(states, "disturbed"),
        load=_mean(states, "load"),
        steal=_mean(states, "steal"),
        others={name: others[name] for name in most} or None,
    )


def _known(states: Iterable[Telemetry], name: str, join: Callable[[list[Any]], Any]) -> Any:
    known = [value for state in states if (value := getattr(state, name)) is not None]
    return join(known) if known else None


def _mean(states: Iterable[Telemetry], name: str) -> float | None:
    known = [(value, state.readings) for state in states if (value := getattr(state, name)) is not None]
    return sum(value * count for value, count in known) / sum(count for _, count in known) if known else None


def circumstances(own: Sequence[Watched], baseline: Sequence[Watched] | None) -> dict[str, Any]:
    """The fields of a record that say what went on: what spoils a sample of the baseline spoils the pair.

    Args:
        own, baseline: samples of the arm, and of the same rounds those that they are paired with.
    """
    sides = [own] if baseline is None else [own, baseline]
    known = [(lasted, state) for side in sides for lasted, state in side if state is not None]
    shares = [(state.disturbed, lasted) for lasted, state in known if state.disturbed is not None]
    whole = sum(lasted for _, lasted in shares)
    pairs = zip(*sides, strict=True)
    return {
        "telemetry": merged([state for _, state in own if state is not None]),
        "throttled": _known([state for _, state in known], "throttled", any),
        "disturbed": sum(share * lasted for share, lasted in shares) / whole if whole else None,
        "spoilt": tuple(any(state and state.spoilt for _, state in pair) for pair in pairs) if known else None,
    }
