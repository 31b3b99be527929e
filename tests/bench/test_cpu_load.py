"""What others do while something is measured on CPUs."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import pytest

from calibatt.bench import cpu_load
from calibatt.bench.cpu_load import CpuReader, Load, children, disturbance, load, usable_cpus
from calibatt.bench.telemetry import PERIODS_S

BUSY = "import time\nend = time.monotonic() + 60\nwhile time.monotonic() < end: pass"


def _load(there: float, used: float, own: float, steal: float = 0.0) -> Load:
    return Load(there_s=there, used_s=used, own_s=own, steal_s=steal)


@pytest.mark.parametrize(
    ("after", "share"),
    [
        (_load(110, 55, 4), 0.1),
        (_load(110, 54, 4), 0.0),
        # the system counts coarsely
        (_load(110, 53.99, 4), 0.0),
        (_load(110, 70, 0), 1.0),
        # counters that stand still
        (_load(110, 50, 4), None),
    ],
)
def test_the_disturbance_is_the_share_that_is_not_ones_own(after: Load, share: float | None) -> None:
    found = disturbance(_load(100, 50, 0), after)
    assert found == (share if share is None else pytest.approx(share))


def test_a_child_that_has_ended_was_ones_own_and_used_a_cpu() -> None:
    this = psutil.Process()
    before, started = load([]), this.cpu_times().children_user
    subprocess.run([sys.executable, "-c", "sum(range(20_000_000))"], check=True)
    after, worked = load([]), this.cpu_times().children_user - started
    assert worked > 0
    # sums are rounded, and the system counts in hundredths of a second
    assert after.own_s - before.own_s >= worked - 0.02
    assert after.used_s > before.used_s


@contextmanager
def busy_child() -> Iterator[psutil.Process]:
    with subprocess.Popen([sys.executable, "-c", BUSY]) as child:
        try:
            yield psutil.Process(child.pid)
        finally:
            child.kill()


def test_a_running_child_is_ones_own() -> None:
    before = load([])
    with busy_child() as child:
        while child.cpu_times().user < 0.2:
            time.sleep(0.1)
        assert load(children()).own_s - before.own_s >= 0.2


def test_there_is_as_much_time_as_cpus_that_may_be_used() -> None:
    before = load([])
    time.sleep(0.2)
    assert load([]).there_s - before.there_s >= 0.2 * len(usable_cpus())


@pytest.fixture
def given_loads(monkeypatch: pytest.MonkeyPatch) -> list[Load]:
    """The loads that are read, one after the other."""
    loads: list[Load] = []
    monkeypatch.setattr(cpu_load, "load", lambda children: loads.pop(0))
    monkeypatch.setattr(cpu_load, "children", list)
    monkeypatch.setattr(cpu_load, "_processes", dict)
    return loads


def test_each_reading_is_of_the_time_since_the_one_before(given_loads: list[Load]) -> None:
    given_loads += [_load(100, 50, 0), _load(110, 58, 7.5, steal=0.25), _load(120, 62, 7.5, steal=0.25)]
    reader = CpuReader()
    first, second = reader.read(), reader.read()
    assert (first.load, first.disturbed, first.steal) == pytest.approx((0.8, 0.05, 0.025))
    assert (second.load, second.disturbed, second.steal) == pytest.approx((0.4, 0.4, 0.0))
    assert (first.spoilt, second.spoilt) == (False, True)


def test_of_counters_that_stand_still_nothing_is_said(given_loads: list[Load]) -> None:
    given_loads += [_load(100, 50, 0), _load(110, 50, 5)]
    found = CpuReader().read()
    assert found.disturbed is found.load is found.steal is None
    assert not found.spoilt


def test_who_had_most_is_looked_up_where_others_had_much_and_seldom(
    given_loads: list[Load], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_load, "usable_cpus", lambda: [0, 1])
    now, looks = [0.0], []
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    # one that was there before, one that has begun, and this process
    tables = [{(1, "old"): 5.0}, {(1, "old"): 11.0, (2, "new"): 3.0, (psutil.Process().pid, "self"): 60.0}]

    def processes() -> dict[tuple[int, str], float]:
        looks.append(now[0])
        return tables[min(len(looks), 2) - 1]

    monkeypatch.setattr(cpu_load, "_processes", processes)
    disturbed = [_load(100 + 10 * i, 50 + 10 * i, 5 * i) for i in range(20)]
    given_loads += disturbed[:2]
    reader = CpuReader()
    now[0] = 1.0
    # too early
    assert reader.read().others is None
    now[0] = 60.0
    # read twice: before and after it was looked who is whose child
    given_loads += [disturbed[2], disturbed[2], disturbed[3]]
    assert reader.read().others == pytest.approx({"old": 6 / 120, "new": 3 / 120})
    now[0] = 61.0
    assert reader.read().others is None
    assert looks == [0.0, 60.0]


def test_a_child_that_begins_meanwhile_is_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_load, "_LOOK_S", 0.0)
    # as if others always had much
    monkeypatch.setattr(cpu_load, "DISTURBED", -1.0)
    reader, seen = CpuReader(), list[Load]()
    whole = load

    def noted(children: list[psutil.Process]) -> Load:
        seen.append(whole(children))
        return seen[-1]

    monkeypatch.setattr(cpu_load, "load", noted)
    with busy_child() as child:
        while child.cpu_times().user < 0.5:
            time.sleep(0.1)
        reader.read()
    # where counters stand still, nobody is looked for
    assert len(seen) == 1 or seen[1].own_s - seen[0].own_s >= 0.5


@pytest.mark.parametrize("error", [NotImplementedError, FileNotFoundError, PermissionError])
def test_a_system_that_does_not_tell_its_clock_is_read_all_the_same(
    error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses() -> None:
        raise error

    monkeypatch.setattr(psutil, "cpu_freq", refuses)
    found = CpuReader().read()
    assert (found.readings, found.clock_mhz, found.lowest_clock_mhz) == (1, None, None)


def test_a_system_without_a_clock_to_ask_is_read_all_the_same_and_a_slip_in_asking_is_not_hidden(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def slips() -> None:
        raise AttributeError

    reader = CpuReader()
    monkeypatch.setattr(psutil, "cpu_freq", slips)
    with pytest.raises(AttributeError):
        reader.read()
    monkeypatch.delattr(psutil, "cpu_freq")
    assert reader.read().clock_mhz is None


def test_readings_take_less_than_a_thousandth_of_a_core() -> None:
    reader, taken = CpuReader(), []
    for _ in range(20):
        start = time.process_time()
        for _ in range(10):
            reader.read()
        taken.append((time.process_time() - start) / 10)
    assert statistics.median(taken) / PERIODS_S["cpu"] < 0.001
