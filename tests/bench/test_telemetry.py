"""The watch over a device, on readers whose readings are known."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

import pytest
import torch

from calibatt.bench import telemetry
from calibatt.bench.nvml import GpuLost
from calibatt.bench.record import Record, Telemetry
from calibatt.bench.telemetry import Watch, circumstances, merged, reader_of

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


class Numbered:
    """Counts its readings, as clocks of 1, 2, … MHz; after some the GPU is lost."""

    def __init__(self, lasts: int = 10**9) -> None:
        self.count, self.threads, self._lasts = 0, set[str](), lasts

    def read(self) -> Telemetry:
        self.threads.add(threading.current_thread().name)
        if self.count == self._lasts:
            raise GpuLost("gone")
        self.count += 1
        return Telemetry(readings=1, clock_mhz=self.count, lowest_clock_mhz=self.count)

    def energy_j(self) -> float | None:
        if self.count == self._lasts:
            raise GpuLost("gone")
        return 10.0 * self.count


class Now:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.at = 100.0

    def __call__(self) -> float:
        return self.at


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> Now:
    clock = Now()
    monkeypatch.setattr(telemetry, "perf_counter", clock)
    return clock


def read_at(watch: Watch, now: Now, *times: float) -> None:
    for now.at in times:
        watch.read()


@pytest.mark.parametrize(
    ("span", "readings"),
    [
        # each reading stands for the time since the one before
        ((100.1, 100.2), [1]), ((101.5, 101.6), [2]), ((100.5, 101.5), [1, 2]), ((100.5, 103.0), [1, 2, 3]),
        ((101.0, 102.0), [1, 2]),
        # and the last for what comes after it
        ((103.1, 103.2), [3]), ((102.9, 103.2), [3]),
    ],
)  # fmt: skip
def test_a_sample_has_the_readings_that_stand_for_its_time(
    now: Now, span: tuple[float, float], readings: list[int]
) -> None:
    watch = Watch(CPU, Numbered())
    read_at(watch, now, 101, 102, 103)
    found = watch.during(*span)
    assert found is not None
    assert (found.readings, found.lowest_clock_mhz) == (len(readings), min(readings))
    assert found.clock_mhz == sum(readings) / len(readings)


def test_before_the_first_reading_nothing_is_known(now: Now) -> None:
    assert Watch(CPU, Numbered()).during(100, 101) is None


def test_readings_that_follow_too_soon_are_not_taken(now: Now) -> None:
    reader = Numbered()
    read_at(Watch(CPU, reader), now, 100.1, 101.0, 101.1, 101.3)
    assert reader.count == 2


def test_a_gpu_that_is_lost_leaves_what_was_read_and_no_error(now: Now) -> None:
    watch = Watch(CUDA, Numbered(lasts=2))
    assert watch.energy_j() == 0.0
    read_at(watch, now, 101, 102, 103, 104)
    found = watch.during(100.5, 104)
    assert found is not None
    assert found.readings == 2
    # later samples have none
    assert watch.during(103.2, 103.4) is None
    assert watch.energy_j() is None


def test_on_a_gpu_a_thread_reads_whatever_is_timed() -> None:
    reader = Numbered()
    with Watch(CUDA, reader) as watch:
        start = time.perf_counter()
        time.sleep(1.0)
        watch.between()
        end = time.perf_counter()
    assert 5 <= reader.count <= 12
    found = watch.during(start, end)
    assert found is not None
    assert found.readings >= 5
    assert "telemetry" in reader.threads


def test_on_a_cpu_the_thread_keeps_still_where_turns_are_short_and_reads_within_a_long_one() -> None:
    name, reader = threading.current_thread().name, Numbered()
    with Watch(CPU, reader) as watch:
        for _ in range(15):
            watch.between()
            time.sleep(0.1)
    assert reader.threads == {name}
    assert reader.count >= 2
    with Watch(CPU, reader) as watch:
        time.sleep(1.7)
    assert reader.threads == {name, "telemetry"}


def test_the_thread_ends_with_what_is_measured_whatever_goes_wrong() -> None:
    def watched() -> None:
        with Watch(CPU, Numbered()):
            raise MemoryError

    with pytest.raises(MemoryError):
        watched()
    assert "telemetry" not in {thread.name for thread in threading.enumerate()}


def test_a_reading_of_this_machine_tells_its_load() -> None:
    reader = reader_of(CPU)
    time.sleep(0.3)
    found = reader.read()
    assert found.readings == 1
    assert found.load is None or 0 <= found.load <= 1
    assert found.throttled is found.power_w is None


def test_several_states_are_one_with_the_worst_and_the_usual_of_each() -> None:
    a = Telemetry(
        readings=1, clock_mhz=1000, lowest_clock_mhz=900, power_w=100, temperature_c=60, memory_bytes=5,
        reasons=("SwPowerCap",), throttled=False, disturbed=0.5, load=1.0, steal=0.1, others={"x": 0.2},
    )  # fmt: skip
    b = Telemetry(
        readings=3, clock_mhz=2000, lowest_clock_mhz=1500, temperature_c=70, memory_bytes=4,
        reasons=("SwPowerCap", "HwSlowdown"), throttled=True, disturbed=0.1, others={"x": 0.1, "y": 0.3},
    )  # fmt: skip
    assert merged([a, b]) == Telemetry(
        readings=4, clock_mhz=1500, lowest_clock_mhz=900, power_w=100, temperature_c=70, memory_bytes=5,
        reasons=("SwPowerCap", "HwSlowdown"), throttled=True, disturbed=pytest.approx(0.2), load=1.0, steal=0.1,
        others={"x": 0.2, "y": 0.3},
    )  # fmt: skip
    c = Telemetry(readings=1, others={"z": 0.01, "w": 0.15})
    # the names of most
    assert (merged([a, b, c]) or c).others == {"y": 0.3, "x": 0.2, "w": 0.15}
    assert merged([a]) == a
    assert merged([]) is None


def _watched(*shares: float | None) -> list[tuple[float, Telemetry | None]]:
    return [(1.0, None if share is None else Telemetry(readings=1, disturbed=share)) for share in shares]


@pytest.mark.parametrize(
    ("own", "baseline", "marks"),
    [
        ((0.0, 0.05, 0.06), None, (False, False, True)),
        ((0.0, 0.0, 0.0), (0.2, 0.0, None), (True, False, False)),
        ((None, None), (None, None), None),
        ((None,), (0.2,), (True,)),
    ],
)
def test_a_pair_is_marked_where_either_was_spoilt(
    own: Sequence[float | None], baseline: Sequence[float | None] | None, marks: tuple[bool, ...] | None
) -> None:
    found = circumstances(_watched(*own), None if baseline is None else _watched(*baseline))
    assert found["spoilt"] == marks
    times = dict.fromkeys(("samples_s", "baseline_samples_s"), (1.0,) * len(own))
    record = Record(suite="kernel", model="m", method="m", kernel="k", outcome="ok", **times, **found)
    assert Record.from_extra_info(record.to_extra_info()) == record
