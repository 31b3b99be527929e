"""A matrix: models × resolutions × steps × seeds × methods, each a run of `calibatt bench` in a process of its own.

Every run has a result file in one folder. Whatever stops a matrix, the same command goes on from there, in as many
processes and on as many machines as share the folder. Two locks keep runs apart: a run's own, so that it is made once,
and its device's, so that nothing is measured beside it. The process that measures holds both too: where the one that
started it was killed, they are let go when the measurement has ended.
"""

from __future__ import annotations

import argparse
import datetime
import fcntl
import hashlib
import itertools
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeAlias

import torch

from calibatt.bench import fingerprint
from calibatt.bench.cells import DENSE, Cell
from calibatt.bench.options import Options, add_options, flag, partial_of
from calibatt.bench.record import Record, Suite, UnusableFile, load_run, plain
from calibatt.bench.suites.catalogue import SUITES
from calibatt.kernels.names import look_up
from calibatt.methods.facts import read_facts

# in the order in which they vary, and how a title has them
_AXES: Mapping[str, str] = {
    "models": "{}", "resolutions": "{}", "steps": "{} steps", "seeds": "seed {}", "methods": "{}",
}  # fmt: skip
# what a run's process is given by the matrix, or would end with what is no whole run
_TAKEN = (*map(flag, _AXES), "--benchmark-json", "--gate", "--max-time", "--collect-only", "--co")
# of a file's name, which may have 255 bytes
_LONGEST_NAME = 100
# letters of what a failed run says
_LONGEST_REASON = 500
# of what a process says, the end, in which the reason is looked for
_TAIL_BYTES = 100_000
# while another run is on a device
_POLL_S = 1.0
# a run's files are named by it, then by one of these
_RESULT, _FAILED, _LOCK, _STDOUT, _STDERR = ".json", ".failed.json", ".lock", ".stdout.txt", ".stderr.txt"

# the command of a run, from the run and the file that it is to write
Command: TypeAlias = "Callable[[Planned, Path], Sequence[str]]"


@dataclass(frozen=True, slots=True, kw_only=True)
class Matrix:
    """What a matrix file says.

    Args:
        suite: that is run; what of it, `options` say.
        models, resolutions, steps, seeds: axes, as the options of `calibatt bench` of those names; where one is absent,
            runs have the option's default.
        methods: the last axis, each as of `--methods`; several with commas between them are measured in turns, in one
            run. Dense is in every run, so that each method is paired with it.
        options: further options of `calibatt bench` for every run, as on the command line.
    """

    suite: Suite = "denoise"
    models: tuple[str, ...] | None = None
    resolutions: tuple[str, ...] | None = None
    steps: tuple[int, ...] | None = None
    seeds: tuple[int, ...] | None = None
    methods: tuple[str, ...] | None = None
    options: str = ""

    def runs(self) -> list[Planned]:
        """All runs, in the order in which they are made.

        Raises:
            ValueError: a value makes no sense, or two runs would measure the same; one line.
        """
        words, axes = self._words(), map(self._axis, _AXES)
        runs = [_planned(self.suite, dict(zip(_AXES, one, strict=True)), words) for one in itertools.product(*axes)]
        seen: dict[Cell, Planned] = {}
        for run in runs:
            for cell in run.cells:
                # which is beside all others
                if cell.arm != DENSE and seen.setdefault(cell, run) is not run:
                    raise ValueError(f"{run.suite} {cell} is in two runs: give each value of an axis once")
        return runs

    def _words(self) -> list[str]:
        try:
            words = shlex.split(self.options)
        except ValueError as error:
            raise ValueError(f"options: {str(error).lower()}") from None
        for word in words:
            if word.partition("=")[0] in _TAKEN or word.startswith("-k"):
                raise ValueError(f"options: leave out {word}: a matrix gives it, or its runs would not be whole")
        return words

    def _axis(self, name: str) -> Sequence[str | None]:
        values = getattr(self, name)
        if values == ():
            raise ValueError(f"{name}: give at least one, or leave it out")
        return [None] if values is None else [str(value) for value in values]


def read(path: Path) -> list[Planned]:
    """The runs of a matrix file, which is TOML with the fields of `Matrix`.

    Raises:
        ValueError: it cannot be read, is no TOML, or has a key or a value that makes no sense; one line that names the
            file and the key.
    """
    try:
        given = tomllib.loads(path.read_text(encoding="utf-8"))
        for key in given:
            look_up({field.name: field for field in fields(Matrix)}, key, "key")
        # JSON has no dates, and no axis has
        return read_facts(Matrix, json.dumps(given, default=str)).runs()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}".replace("\n", " ")) from None


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """A run of a matrix.

    Args:
        title: what tells it from the others.
        name: of its files.
        suite: that is run.
        arguments: of `calibatt bench`, but for the file.
        cells: that it measures.
    """

    title: str
    name: str
    suite: Suite
    arguments: tuple[str, ...]
    cells: tuple[Cell, ...]


def _planned(suite: Suite, values: Mapping[str, str | None], words: Sequence[str]) -> Planned:
    given = {name: value for name, value in values.items() if value is not None}
    title = ", ".join(_AXES[name].format(value) for name, value in given.items()) or suite
    slug = re.sub(r"[^\w.=+-]+", "-", "-".join(given.values()) or suite)[:_LONGEST_NAME]
    if "methods" in given:
        given["methods"] = f"{DENSE.method},{given['methods']}"
    axes = [f"{flag(name)}={value}" for name, value in given.items()]
    try:
        cells = SUITES[suite].cells(_options([*axes, *words]))
    except (ValueError, argparse.ArgumentError) as error:
        raise ValueError(f"{title}: {error}") from None
    if not cells:
        raise ValueError(f"{title}: the {suite} suite measures nothing there")
    arguments = ("-k", suite, *axes, *words)
    # another option is another run
    digest = hashlib.sha256("\0".join(arguments).encode()).hexdigest()[:8]
    return Planned(title=title, name=f"{slug}-{digest}", suite=suite, arguments=arguments, cells=tuple(cells))


def _options(words: Sequence[str]) -> Options:
    """What the words choose; those that pytest knows are its business.

    Raises:
        ValueError, argparse.ArgumentError: one makes no sense.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    add_options(parser.add_argument)
    return Options.read(parser.parse_known_args(words)[0])


def bench_command(run: Planned, out: Path) -> Sequence[str]:
    """What measures a run."""
    return [sys.executable, "-m", "calibatt", "bench", *run.arguments, f"--benchmark-json={out}"]


def devices(runs: Sequence[Planned]) -> list[str | None]:
    """Visible GPUs, as `CUDA_VISIBLE_DEVICES` names each; None alone where runs compute on the CPU."""
    chosen = {cell.workload.device.type for run in runs for cell in run.cells}
    if chosen != {"cuda"}:
        return [None]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    # torch leaves out what stands there and does not exist
    count = torch.cuda.device_count()
    return list(visible.split(",")[:count]) if visible else [str(index) for index in range(count)]


class Runs:
    """The runs of a matrix in a folder: what has become of them, and what is still to be done.

    Args:
        folder: of their files; made where there is none.
        runs: all of them.
        command: what measures a run: `bench_command`.
        log: shows a line.

    Raises:
        OSError: the folder cannot be made.
    """

    def __init__(self, folder: Path, runs: Sequence[Planned], *, command: Command, log: Callable[[str], None]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._runs, self._log, self._command = folder, runs, log, command
        self._guard = threading.Lock()
        self._stopped = False
        self._children: set[subprocess.Popen[bytes]] = set()
        # of the runs that were made here, and of those that failed
        self._seconds: list[float] = []
        # result files that were found whole, and so are for good
        self._whole: set[str] = set()

    def results(self) -> list[Path]:
        """Result files of the runs that have ended; behind them those of failed ones, which say why."""
        ended = {run: self._ended(run) for run in self._runs}
        return [self._file(run, last) for last in (_RESULT, _FAILED) for run in self._runs if ended[run] == last]

    def failures(self) -> list[str]:
        """A line for each run that failed."""
        failed = [run for run in self._runs if self._ended(run) == _FAILED]
        return [f"{run.title}: {load_run(self._file(run, _FAILED)).records[0].reason}" for run in failed]

    def forget_failures(self) -> None:
        """Have those made again that failed; what another process is at work on is its own."""
        for run in self._runs:
            with _locked(self._file(run, _LOCK)) as lock:
                if lock is not None:
                    self._file(run, _FAILED).unlink(missing_ok=True)

    def make(self, on: Sequence[str | None]) -> None:
        """Make what is missing, one run at a time on each device; what other processes are at work on is theirs.

        Args:
            on: devices, as `devices` names them.

        Raises:
            OSError: something cannot be written, or a process not be started.
            KeyboardInterrupt: it was stopped; nothing is at work any more.
        """
        with ThreadPoolExecutor(len(on)) as pool:
            try:
                for work in [pool.submit(self._work, device, len(on)) for device in on]:
                    work.result()
            except BaseException:
                self._stop()
                raise

    def _work(self, device: str | None, workers: int) -> None:
        """Once no other matrix of this user measures on a device, go through the runs there."""
        name, waits = "cpu" if device is None else re.sub(r"\W", "-", device), False
        path = Path(tempfile.gettempdir()) / f"calibatt-matrix-{os.getuid()}-{name}.lock"
        while not self._stopped:
            with _locked(path) as held:
                if held is not None:
                    return self._go_through(device, held, workers)
            if not waits:
                self._log(f"waiting for another run on {'the CPU' if device is None else f'GPU {device}'} to end")
            waits = True
            time.sleep(_POLL_S)
        return None

    def _go_through(self, device: str | None, held: int, workers: int) -> None:
        for run in self._runs:
            with _locked(self._file(run, _LOCK)) as lock:
                if lock is not None and self._ended(run) is None and self._measure(run, device, (lock, held)):
                    self._tell(run, workers)

    def _measure(self, run: Planned, device: str | None, locks: Sequence[int]) -> bool:
        """Make a run; False where that was stopped."""
        environment = os.environ if device is None else {**os.environ, "CUDA_VISIBLE_DEVICES": device}
        start = time.monotonic()
        with self._file(run, _STDOUT).open("wb") as out, self._file(run, _STDERR).open("wb") as err:
            with self._guard:
                if self._stopped:
                    return False
                child = subprocess.Popen(
                    self._command(run, self._file(run, _RESULT)), stdin=subprocess.DEVNULL, stdout=out, stderr=err,
                    env=environment, pass_fds=locks,
                    # what Ctrl-C means is decided here
                    start_new_session=True,
                )  # fmt: skip
                self._children.add(child)
            code = child.wait()
        with self._guard:
            self._children.discard(child)
            if self._stopped:
                return False
            self._seconds.append(time.monotonic() - start)
        if self._ended(run) is None:
            self._keep_failure(run, self._reason(run, code))
        return True

    def _stop(self) -> None:
        """End what is at work, at once: a run goes on from what it has kept."""
        with self._guard:
            self._stopped = True
            for child in self._children:
                with suppress(ProcessLookupError):
                    os.killpg(child.pid, signal.SIGKILL)

    def _tell(self, run: Planned, workers: int) -> None:
        """How far the whole is, and how long the rest takes if its runs take as long as those before."""
        done, count = len(self.results()), len(self._runs)
        line = f"{done} of {count}: {run.title}: {'failed' if self._ended(run) == _FAILED else 'done'}"
        if done < count:
            seconds = sum(self._seconds) / len(self._seconds) * (count - done) / workers
            line += f", about {datetime.timedelta(seconds=round(seconds))} to go"
        self._log(line)

    def _ended(self, run: Planned) -> str | None:
        """Which file says how the run ended; None where it has not."""
        result = self._file(run, _RESULT)
        # what a run keeps of itself goes when its file is written
        if run.name not in self._whole and result.exists() and not partial_of(result).exists():
            with suppress(UnusableFile):
                load_run(result)
                self._whole.add(run.name)
        if run.name in self._whole:
            return _RESULT
        return _FAILED if self._file(run, _FAILED).exists() else None

    def _reason(self, run: Planned, code: int) -> str:
        """How a process ended, and the last that it said."""
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        said = _last_line(self._file(run, _STDERR)) or _last_line(self._file(run, _STDOUT))
        if code == 1:
            # every arm failed: pytest lists them, each with its reason
            said = _last_line(self._file(run, _STDOUT), "FAILED ") or said
        return plain(f"{how}: {said}" if said else how, _LONGEST_REASON)

    def _keep_failure(self, run: Planned, reason: str) -> None:
        """A result file in which each arm of a run has failed, for this reason."""
        records = [
            Record(**cell.workload.facts(), **cell.arm.facts(), suite=run.suite, outcome="failed", reason=reason)
            for cell in run.cells
        ]
        found: dict[str, Any] = {
            "commit_info": fingerprint.commit(),
            "datetime": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "command": " ".join(["calibatt bench", *run.arguments]),
            "benchmarks": [],
            "untimed": [record.to_extra_info() for record in records],
        }
        aside = self._file(run, f"{_FAILED}.partial")
        aside.write_text(json.dumps(found), encoding="utf-8")
        os.replace(aside, self._file(run, _FAILED))

    def _file(self, run: Planned, last: str) -> Path:
        return self._folder / f"{run.name}{last}"


@contextmanager
def _locked(path: Path) -> Iterator[int | None]:
    """Hold a lock; its descriptor, or None where another process has it.

    Unlike those of the package filelock it can be handed on to a process that is started: it is let go when all that
    have the descriptor have ended.
    """
    # for writing, as NFS asks of a lock
    with path.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield None
        else:
            yield file.fileno()


def _last_line(path: Path, start: str = "") -> str | None:
    """The last line of a file that begins so and is not blank."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
        # a bar that shows progress goes back to the beginning of its line
        lines = re.split(r"[\r\n]+", file.read().decode(errors="replace"))
    return next((line.strip() for line in reversed(lines) if line.strip() and line.startswith(start)), None)
