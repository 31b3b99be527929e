"""What others do while something is measured."""

from __future__ import annotations

import subprocess
import sys
import time

import psutil
import pytest
import torch

from calibatt.bench.telemetry import Load, Reading, disturbance, load, throttled, usable_cpus

CPU = torch.device("cpu")


def _load(there: float, used: float, own: float) -> Load:
    return Load(there_s=there, used_s=used, own_s=own)


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


def test_nothing_is_known_of_a_gpu() -> None:
    assert load(torch.device("cuda")) is None
    assert disturbance(None, None) is None


def test_a_child_that_has_ended_was_ones_own_and_used_a_cpu() -> None:
    this = psutil.Process()
    before, started = load(CPU), this.cpu_times().children_user
    subprocess.run([sys.executable, "-c", "sum(range(20_000_000))"], check=True)
    after, worked = load(CPU), this.cpu_times().children_user - started
    assert before is not None
    assert after is not None
    assert worked > 0
    # sums are rounded
    assert after.own_s - before.own_s >= worked - 1e-6
    assert after.used_s > before.used_s


def test_a_running_child_is_ones_own() -> None:
    busy = "import time\nend = time.monotonic() + 60\nwhile time.monotonic() < end: pass"
    before = load(CPU)
    with subprocess.Popen([sys.executable, "-c", busy]) as child:
        try:
            time.sleep(1.0)
            while psutil.Process(child.pid).cpu_times().user < 0.2:
                time.sleep(0.1)
            after = load(CPU)
        finally:
            child.kill()
    assert before is not None
    assert after is not None
    assert after.own_s - before.own_s >= 0.2


def test_there_is_as_much_time_as_cpus_that_may_be_used() -> None:
    before = load(CPU)
    time.sleep(0.2)
    after = load(CPU)
    assert before is not None
    assert after is not None
    assert after.there_s - before.there_s >= 0.2 * len(usable_cpus())


def test_one_reading_that_was_throttled_is_enough_and_none_says_nothing() -> None:
    held, free = (Reading(energy_j=0, clock_mhz=0, throttled=state) for state in (True, False))
    assert throttled(free, held) is True
    assert throttled(free, None) is False
    assert throttled(None, True, free) is True
    assert throttled(None, None) is None
