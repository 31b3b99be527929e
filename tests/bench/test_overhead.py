"""What measuring does to what is measured: that the tool which says so sees it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from calibatt.bench import overhead
from calibatt.bench.overhead import Overhead, measure, verdict
from calibatt.bench.record import Telemetry
from calibatt.bench.statistics import Interval
from calibatt.bench.telemetry import Reader, Watch
from calibatt.bench.timer import PhaseTimer

CPU = torch.device("cpu")


@pytest.fixture
def rested(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Overhead]:
    """Six short rounds of work that leaves the CPU alone, so that others on it hardly matter."""
    monkeypatch.setattr(overhead, "PERIODS_S", {"cpu": 0.05})

    def run(**how: Any) -> Overhead:
        return measure(lambda: time.sleep(0.01), CPU, seconds=0.1, **how)

    return run


class _Busy(Watch):
    """Reads all the time, and holds the interpreter meanwhile."""

    def __init__(self, device: torch.device, reader: Reader) -> None:
        super().__init__(device, reader)
        self._patient, self._period = False, 0.002

    def read(self) -> None:
        end = time.perf_counter() + 0.02
        while time.perf_counter() < end:
            pass
        super().read()


def test_the_harness_and_the_telemetry_add_little_to_work_that_rests(rested: Callable[..., Overhead]) -> None:
    found = rested()
    assert (found.calls, len(found.bare_s), len(found.timed_s), len(found.watched_s)) == (1, 6, 6, 6)
    # a sleep of 10 ms takes some hundredths of a millisecond more, now and then
    assert all(0.9 < ratio.median < 1.1 for ratio in found.ratios.values())


def test_what_the_harness_does_between_its_marks_is_seen(
    rested: Callable[..., Overhead], monkeypatch: pytest.MonkeyPatch
) -> None:
    mark = PhaseTimer._mark

    def slow(timer: PhaseTimer) -> Any:
        time.sleep(0.001)
        return mark(timer)

    monkeypatch.setattr(PhaseTimer, "_mark", slow)
    found = rested()
    # of the marks of several pieces of work, by itself it has one
    assert found.a_turn > 3
    assert found.ratios["harness"].median > 1.04
    assert found.ratios["harness"].median > found.ratios["telemetry"].median + 0.03


def test_telemetry_that_holds_up_what_is_timed_is_seen(rested: Callable[..., Overhead]) -> None:
    found = rested(watch=_Busy)
    assert found.ratios["telemetry"].median > 1.04
    assert found.ratios["telemetry"].median > found.ratios["harness"].median + 0.03
    assert len(found.readings_s) > 6


def test_work_that_takes_less_than_ten_milliseconds_is_done_several_times(rested: Callable[..., Overhead]) -> None:
    found = measure(lambda: time.sleep(0.003), CPU, seconds=0.1)
    assert found.calls in (3, 4)
    assert min(found.timed_s) > 0.009


def test_an_overhead_is_within_its_limit_or_beyond_it_only_where_the_whole_interval_is() -> None:
    def of(low: float | None, high: float | None) -> str:
        return verdict(Interval(median=1.005, low=low, high=high), 0.01)

    assert (of(0.99, 1.01), of(1.011, 1.02), of(1.0, 1.02), of(None, None)) == (
        "within", "beyond", "not known", "not known",
    )  # fmt: skip
    # what is faster when it is measured was not measured under like conditions
    assert of(0.9, 0.98) == "not known"


def test_where_others_had_the_device_nothing_is_known() -> None:
    alike = (1.0,) * 6
    state = Telemetry(readings=1, disturbed=0.0)
    quiet = Overhead(
        calls=1, a_turn=1, bare_s=alike, timed_s=alike, watched_s=alike, watched_for_s=6.0, readings_s=(0.001,),
        state=state,
    )  # fmt: skip
    assert set(quiet.verdicts.values()) == {"within"}
    assert set(replace(quiet, state=replace(state, disturbed=0.5)).verdicts.values()) == {"not known"}
    assert replace(quiet, timed_s=(1.02,) * 6, watched_s=(1.02,) * 6).verdicts == {
        "harness": "beyond", "telemetry": "within",
    }  # fmt: skip


@pytest.mark.slow
def test_a_file_says_what_was_measured_where_and_by_what_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out" / "overhead.json"
    arguments = ["--device", "cpu", "--seconds", "1", "-o", str(out)]
    assert overhead.main(arguments) in (0, 1)
    found = json.loads(out.read_text())
    assert found["command"] == f"python -m calibatt.bench.overhead {' '.join(arguments)}"
    assert found["machine_info"]["versions"]["torch"] == torch.__version__
    assert set(found["cells"]) == {"dense", "density 0.25"}
    for cell in found["cells"].values():
        assert len(cell["bare_s"]) == len(cell["timed_s"]) == len(cell["watched_s"]) >= 6
        assert cell["harness"]["low"] <= cell["harness"]["median"] <= cell["harness"]["high"]
    assert "dense: harness " in capsys.readouterr().out
