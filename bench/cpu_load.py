"""What goes on beside a measurement on CPUs: how busy they are, how much of them others have, and who."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import psutil

from calibatt.bench.record import DISTURBED, Telemetry

# seconds from one look at all processes to the next: it takes some milliseconds, a reading a tenth of one
_LOOK_S = 30.0
# of those that had most of the CPUs
NAMED = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """CPU seconds, since some moment, on the CPUs that this process may use.

    Args:
        there_s: that there were, used or not.
        used_s: that any process had, and that the host gave to other machines (steal).
        own_s: that this process and its children had.
        steal_s: that the host gave to other machines.
    """

    there_s: float
    used_s: float
    own_s: float
    steal_s: float = 0.0


def load(children: Sequence[psutil.Process]) -> Load:
    """The load up to now.

    Args:
        children: that run, of this process; those that have ended are counted anyhow.
    """
    own = _own_s(children)
    now, counted = time.perf_counter(), psutil.cpu_times(percpu=True)
    cpus = [counted[cpu] for cpu in usable_cpus() if cpu < len(counted)]
    # a guest's time is in the user's too
    idle = ("idle", "iowait", "guest", "guest_nice")
    return Load(
        there_s=now * len(cpus),
        used_s=sum(sum(cpu) - sum(getattr(cpu, name, 0.0) for name in idle) for cpu in cpus),
        own_s=own,
        steal_s=sum(getattr(cpu, "steal", 0.0) for cpu in cpus),
    )


def disturbance(before: Load, after: Load) -> float | None:
    """Share of the CPUs that others had between two readings; None where nothing can tell.

    The system counts in hundredths of a second: of what is shorter than half a second, this says little.
    """
    # counters that stand still, as in some sandboxes
    if after.used_s <= before.used_s:
        return None
    others = (after.used_s - before.used_s) - (after.own_s - before.own_s)
    return _share(others, before, after)


def children() -> list[psutil.Process]:
    """The processes that this one has begun and that run: a compiler's workers among them."""
    return list(psutil.Process().children(recursive=True))


def usable_cpus() -> Sequence[int]:
    """Numbers of the CPUs that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return range(psutil.cpu_count() or 1)


class CpuReader:
    """Reads the load; each reading is of the time since the one before, the first since this was made."""

    def __init__(self) -> None:
        self._children = children()
        self._processes = _processes()
        self._looked = time.perf_counter()
        self._before = load(self._children)

    def read(self) -> Telemetry:
        """What went on since the last reading."""
        before, now, others = self._before, load(self._children), {}
        share = disturbance(before, now)
        if share is not None and share > DISTURBED and (since := time.perf_counter() - self._looked) >= _LOOK_S:
            # a child that has begun meanwhile is no other
            self._children = children()
            others, now = self._others(since), load(self._children)
            share = disturbance(before, now)
        self._before = now
        clock = _clock_mhz()
        return Telemetry(
            readings=1, clock_mhz=clock, lowest_clock_mhz=clock, disturbed=share,
            load=None if share is None else _share(now.used_s - before.used_s, before, now),
            steal=None if share is None else _share(now.steal_s - before.steal_s, before, now),
            others=others or None,
        )  # fmt: skip

    def energy_j(self) -> None:
        """Nobody tells."""

    def _others(self, since: float) -> dict[str, float]:
        """Who else had most of the CPUs since all processes were last looked at, and which share."""
        before, self._processes, self._looked = self._processes, _processes(), time.perf_counter()
        own, shares = {os.getpid(), *(child.pid for child in self._children)}, dict[str, float]()
        for (pid, name), seconds in self._processes.items():
            if pid not in own:
                taken = (seconds - before.get((pid, name), 0.0)) / (since * len(usable_cpus()))
                shares[name] = shares.get(name, 0.0) + taken
        most = sorted(shares, key=shares.__getitem__, reverse=True)[:NAMED]
        return {name: shares[name] for name in most if shares[name] > 0}


def _share(seconds: float, before: Load, after: Load) -> float:
    return min(max(seconds / (after.there_s - before.there_s), 0.0), 1.0)


def _clock_mhz() -> float | None:
    """Of the CPUs on average; None where the system does not tell."""
    # psutil has no such function on some systems
    if not hasattr(psutil, "cpu_freq"):
        return None
    try:
        frequency = psutil.cpu_freq()
    # and raises where there is no file of frequencies, or it must not be read
    except (NotImplementedError, FileNotFoundError, PermissionError):
        return None
    return float(frequency.current) or None if frequency else None


def _own_s(running: Sequence[psutil.Process]) -> float:
    """Of this process and its children: those that run, and those that have ended."""
    total = sum(os.times()[:4])
    for one in running:
        # it may end meanwhile
        with contextlib.suppress(psutil.NoSuchProcess):
            total += sum(one.cpu_times()[:4])
    return total


def _processes() -> Mapping[tuple[int, str], float]:
    """CPU seconds of all processes that may be looked at."""
    found = {}
    for one in psutil.process_iter(["name", "cpu_times"]):
        if one.info["cpu_times"] is not None:
            found[one.pid, str(one.info["name"])] = sum(one.info["cpu_times"][:2])
    return found
