"""What a run that is stopped leaves, and how the next one goes on."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from calibatt.bench.cells import AnyArm, Arm, Cell, Workload
from calibatt.bench.journal import Journal, UnusableJournal
from calibatt.bench.options import Options
from calibatt.bench.record import Record, load_run
from calibatt.bench.record import Suite as SuiteName
from calibatt.bench.session import BenchSession, Settings
from calibatt.bench.suites.suite import Job
from calibatt.bench.video import Rounds, Video

ROOT = Path(__file__).resolve().parent.parent.parent
RUN = {"command": "pytest bench", "machine": {"threads": 1}}
WORKLOADS = [Workload(model="shapes", resolution="quick", steps=0, device=torch.device("cpu")),
             Workload(model="shapes", resolution="standard", steps=0, device=torch.device("cpu"))]  # fmt: skip


def arm(method: str) -> Arm:
    return Arm(method=method, preset="default", mode="native", kernel="flex")


def record(method: str = "radial", **more: Any) -> Record:
    return Record(suite="kernel", model="shapes", method=method, kernel="flex", **{"outcome": "ok", **more})


class Killed(BaseException):
    """As abrupt as a test can be in its own process."""


class FakeSuite:
    """Measures nothing, and says what it was asked to; is killed at a workload."""

    NAME: SuiteName = "kernel"

    def __init__(self, dies_at: Workload | None = None, failing: Workload | None = None) -> None:
        self.asked: list[tuple[str, list[str]]] = []
        self.rounds: Sequence[Any] = ()
        self._dies_at = dies_at
        self._failing = failing

    def cells(self, options: Options) -> list[Cell]:
        return []

    def measure(self, job: Job, arms: Sequence[AnyArm]) -> Iterator[tuple[AnyArm, Record]]:
        self.asked.append((job.workload.resolution, [str(arm) for arm in arms]))
        if job.workload == self._dies_at:
            job.kept.keep(Rounds(first=0, rounds=[{"radial": Video(seconds=1.5, phases={})}]))
            raise Killed
        self.rounds = job.kept.found
        if job.workload == self._failing:
            raise MemoryError("no room for the model")
        for one in arms:
            yield one, record(str(one), samples_s=(1.0, 2.0), resolution=job.workload.resolution)
        # a baseline that nobody asked to see
        yield arm("dense"), record("dense", samples_s=(3.0, 4.0))


class Quiet:
    """Remembers the lines that it was to show."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def line(self, text: str) -> None:
        self.lines.append(text)

    def open(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


def session(suite: FakeSuite, path: Path | None, console: Quiet) -> BenchSession:
    """A session in which two methods are chosen on two workloads."""
    settings = Settings(rounds=1, calibration_prompts=1, calibration=None, prompts=None, artifacts=None)
    journal = None if path is None else Journal(path, RUN)
    made = BenchSession(settings, console, journal=journal, suites={"kernel": suite})
    for workload in WORKLOADS:
        for method in ("radial", "sparge"):
            made.choose("kernel", Cell(workload=workload, arm=arm(method)))
    return made


def ask(session: BenchSession) -> list[Record]:
    """All records, one after the other, as pytest does it."""
    return [
        session.record("kernel", Cell(workload=workload, arm=arm(method)))
        for workload in WORKLOADS
        for method in ("radial", "sparge")
    ]


def test_a_run_that_is_killed_goes_on_where_it_was(tmp_path: Path) -> None:
    path = tmp_path / "run.json.partial.jsonl"
    with pytest.raises(Killed):
        ask(session(FakeSuite(dies_at=WORKLOADS[1]), path, Quiet()))
    suite, console = FakeSuite(), Quiet()
    again = session(suite, path, console)
    again.announce()
    assert console.lines == [
        f"2 of 4 cells are not measured again: {path} has them",
        f"shapes-standard: 1 of 1 rounds are not made again: {path} has them",
    ]
    assert not again.finished
    records = ask(again)
    assert suite.asked == [("standard", ["radial", "sparge"])]
    assert list(suite.rounds) == [{"radial": Video(seconds=1.5, phases={})}]
    assert [(one.method, one.resolution, one.samples_s) for one in records] == [
        (method, resolution, (1.0, 2.0)) for resolution in ("quick", "standard") for method in ("radial", "sparge")
    ]
    assert again.finished


def test_a_run_that_is_out_of_time_has_records_of_what_there_is_and_can_go_on(tmp_path: Path) -> None:
    class Filming(FakeSuite):
        def measure(self, job: Job, arms: Sequence[AnyArm]) -> Iterator[tuple[AnyArm, Record]]:
            made = len(job.kept.found)
            while made < job.rounds and job.more(made):
                job.kept.keep(Rounds(first=made, rounds=[{"radial": Video(seconds=1.0, phases={})}]))
                made += 1
            for one in arms:
                yield one, record(str(one), samples_s=(1.0,) * made, resolution=job.workload.resolution)

    path = tmp_path / "run.json.partial.jsonl"
    cell = Cell(workload=WORKLOADS[0], arm=arm("radial"))

    def run(max_time: float | None) -> tuple[BenchSession, Quiet, Record]:
        settings = Settings(
            rounds=5, calibration_prompts=1, calibration=None, prompts=None, artifacts=None, max_time=max_time
        )  # fmt: skip
        console = Quiet()
        made = BenchSession(settings, console, journal=Journal(path, RUN), suites={"kernel": Filming()})
        made.choose("kernel", cell)
        return made, console, made.record("kernel", cell)

    # however little it is, what is shown is made
    first, console, short = run(1e-9)
    assert console.lines == ["shapes-quick: 3 of 5 rounds in the time given: repeat the command to go on"]
    assert len(short.samples_s or ()) == 3
    assert not first.finished
    again, console, whole = run(None)
    assert len(whole.samples_s or ()) == 5
    assert console.lines == []
    assert again.finished
    # and only that can be repeated without measuring anything
    assert run(1e-9)[2].samples_s == whole.samples_s


def test_every_record_is_on_the_disk_when_it_is_measured(tmp_path: Path) -> None:
    path = tmp_path / "run.json.partial.jsonl"
    running = session(FakeSuite(), path, Quiet())
    assert not path.exists()
    running.record("kernel", Cell(workload=WORKLOADS[0], arm=arm("radial")))
    first, *kept = map(json.loads, path.read_text().splitlines())
    assert first == {"schema": "calibatt-partial-5", **RUN}
    # nobody chose dense
    assert [one["cell"] for one in kept] == ["shapes-quick-radial-flex", "shapes-quick-sparge-flex"]
    assert [one["samples_s"] for one in kept] == [[1.0, 2.0]] * 2


def test_without_a_file_nothing_is_kept_and_the_run_says_so() -> None:
    console = Quiet()
    running = session(FakeSuite(), None, console)
    running.announce()
    assert "a stopped run cannot be resumed" in console.lines[0]
    assert len(ask(running)) == 4


def test_what_goes_wrong_for_a_whole_workload_is_the_outcome_of_its_arms(tmp_path: Path) -> None:
    path, console = tmp_path / "kept", Quiet()
    running = session(FakeSuite(failing=WORKLOADS[0]), path, console)
    records = ask(running)
    assert [one.outcome for one in records] == ["out_of_memory"] * 2 + ["ok"] * 2
    assert records[0].reason == "MemoryError: no room for the model"
    assert (records[0].model, records[0].method, records[0].tokens) == ("shapes", "radial", 3072)
    assert [one.method for one in running.untimed] == ["radial", "sparge"]
    # they are kept too
    assert [one.outcome for one in Journal(path, RUN).found.values()] == [one.outcome for one in records]


def test_records_come_back_as_they_were(tmp_path: Path) -> None:
    path = tmp_path / "kept"
    records = [
        record(samples_s=(1.0, 2.5), phases_s={"attend": (0.5, 0.25)}, block=(64, 64), prompts=("a", "b")),
        record(outcome="unsupported", reason="no blocks\nhere"),
    ]
    journal = Journal(path, RUN)
    for number, one in enumerate(records):
        journal.keep("kernel", f"cell {number}", one)
    assert list(Journal(path, RUN).found.values()) == records
    journal.remove()
    assert not path.exists()


def test_half_a_line_of_a_run_that_was_stopped_while_it_wrote_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "kept"
    journal = Journal(path, RUN)
    journal.keep("kernel", "first", record(samples_s=(1.0,)))
    journal.keep("kernel", "second", record(samples_s=(2.0,)))
    whole = path.read_bytes()
    path.write_bytes(whole[:-7])
    again = Journal(path, RUN)
    assert list(again.found) == [("kernel", "first")]
    again.keep("kernel", "second", record(samples_s=(2.0,)))
    assert path.read_bytes() == whole
    # stopped within its very first line
    path.write_bytes(whole[:20])
    assert Journal(path, RUN).found == {}


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({**RUN, "command": "pytest bench -k kernel"}, r"another command \(pytest bench, not pytest bench -k kernel\)"),
        ({**RUN, "machine": {"threads": 2}}, r"another number of threads of the machine \(1, not 2\)"),
        ({**RUN, "code": "ab"}, r"another code \(null, not ab\)"),
    ],
)
def test_what_another_run_left_is_refused_in_a_line_that_says_what_to_do(
    tmp_path: Path, other: dict[str, Any], message: str
) -> None:
    path = tmp_path / "kept"
    Journal(path, RUN).keep("kernel", "cell", record(samples_s=(1.0,)))
    with pytest.raises(UnusableJournal, match=message) as raised:
        Journal(path, other)
    assert "delete the file" in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "other",
    [{"commit": {"id": "ab", "dirty": True}}, {"machine": {"threads": 1, "cpu": {"hz_actual": [2_600_000_001, 0]}}}],
)
def test_another_commit_of_the_same_code_and_another_minute_are_the_same_run(
    tmp_path: Path, other: dict[str, Any]
) -> None:
    path = tmp_path / "kept"
    Journal(path, {**RUN, "commit": {"id": "cd", "dirty": False}}).keep("kernel", "cell", record(samples_s=(1.0,)))
    assert list(Journal(path, {**RUN, **other}).found) == [("kernel", "cell")]


@pytest.mark.parametrize(
    "line",
    [
        "[]",
        '{"suite": 3}',
        "nonsense",
        '{"suite": "denoise", "workload": "a", "first": 0, "rounds": [{"b": 1}]}',
        '{"cell": "a", "suite": "b", "samples_s": null, "record": {}}',
        '{"workload": "a", "arm": "b", "kernel": "c", "value": "0.5", "reason": null}',
        '{"workload": "a", "arm": "b", "kernel": "c", "value": null, "reason": null}',
        '{"workload": "a", "lesson": "b", "seconds": 1.0}',
        '{"workload": "a", "lesson": "b", "seconds": NaN, "sha256": ""}',
    ],
)
def test_a_damaged_file_is_refused(tmp_path: Path, line: str) -> None:
    path = tmp_path / "kept"
    Journal(path, RUN).keep("kernel", "cell", record(samples_s=(1.0,)))
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(UnusableJournal, match="damaged"):
        Journal(path, RUN)


def test_a_record_that_cannot_be_written_leaves_the_file_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, console = tmp_path / "kept", Quiet()
    running = session(FakeSuite(), path, console)
    running.record("kernel", Cell(workload=WORKLOADS[0], arm=arm("radial")))
    before = path.read_bytes()

    def full(number: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        running.record("kernel", Cell(workload=WORKLOADS[1], arm=arm("radial")))
    assert path.read_bytes() == before
    assert "is not kept there (No space left on device)" in console.lines[0]


def kill_when(ready: Callable[[], bool], command: list[str], environment: dict[str, str]) -> None:
    """Run a command, and kill it as soon as it is that far."""
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL) as running:
        while not ready():
            assert running.poll() is None, "it ended before it could be killed"
            time.sleep(0.05)
        running.send_signal(signal.SIGKILL)


@pytest.mark.slow
def test_a_benchmark_that_is_killed_loses_nothing_that_was_measured(
    tmp_path: Path, as_a_user_has_it: dict[str, str]
) -> None:
    path = tmp_path / "bench.json"
    kept = tmp_path / "bench.json.partial.jsonl"
    command = [
        sys.executable, "-m", "pytest", "bench", "-k", "kernel", "--resolutions", "quick,standard", "--densities", "1",
        "--kernels", "sdpa-flash", f"--benchmark-json={path}",
    ]  # fmt: skip
    kill_when(lambda: kept.exists() and kept.read_bytes().count(b"\n") >= 3, command, as_a_user_has_it)
    assert not path.exists()
    measured = {line["cell"]: line["samples_s"] for line in map(json.loads, kept.read_text().splitlines()[1:])}
    done = subprocess.run(command, cwd=ROOT, env=as_a_user_has_it, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(measured)} of 4 cells are not measured again: {kept} has them" in done.stdout
    assert "shapes-quick: timing" not in done.stdout
    records = load_run(path).records
    assert [(one.resolution, one.outcome) for one in records] == [("quick", "ok")] * 2 + [("standard", "ok")] * 2
    assert [list(one.samples_s or ()) for one in records[: len(measured)]] == list(measured.values())
    assert not kept.exists()


@pytest.mark.slow
def test_videos_of_a_run_that_is_killed_go_on_with_what_it_had_learnt_and_turned(
    tmp_path: Path, as_a_user_has_it: dict[str, str]
) -> None:
    path = tmp_path / "bench.json"
    kept, folder = tmp_path / "bench.json.partial.jsonl", tmp_path / "bench.json.partial.learnt"
    command = [
        sys.executable, "-m", "pytest", "bench", "-k", "denoise", "--methods", "dense,calibatt/masks-only=0.6",
        "--steps", "2", "--rounds", "5", "--calibration-prompts", "1", f"--benchmark-json={path}",
    ]  # fmt: skip
    kill_when(lambda: kept.exists() and b'"rounds"' in kept.read_bytes(), command, as_a_user_has_it)
    lines = [json.loads(line) for line in kept.read_text().splitlines()[1:]]
    (seconds,) = (line["seconds"] for line in lines if "lesson" in line)
    (loss,) = (line["value"] for line in lines if "arm" in line)

    def again() -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, cwd=ROOT, env=as_a_user_has_it, capture_output=True, text=True, check=False)

    (lost,) = folder.iterdir()
    aside = lost.rename(tmp_path / "aside")
    before = kept.read_bytes()
    refused = again()
    assert refused.returncode == pytest.ExitCode.USAGE_ERROR
    assert f"ERROR: {lost} is missing or damaged" in refused.stderr
    assert kept.read_bytes() == before
    aside.rename(lost)
    done = again()
    assert done.returncode == 0, done.stdout + done.stderr
    assert "learning what" not in done.stdout
    assert f"calibatt/masks-only=0.6 has loss {loss:.4g}" in done.stdout
    records = load_run(path).records
    assert [(one.method, one.preparation_s, len(one.samples_s or ())) for one in records] == [
        ("dense", None, 5), ("calibatt", seconds, 5),
    ]  # fmt: skip
    assert not kept.exists()
    assert not folder.exists()
