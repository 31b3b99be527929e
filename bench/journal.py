"""What a run has measured so far, on disk: a run that is stopped, however abruptly, goes on from there.

A line of JSON each: first what the run is, then records as they are measured; before those of whole videos, which
take long, their rounds; and before these what the arms are prepared with: the dense kernel that they are paired with,
turned knobs, and what was learnt, whose files lie in a folder beside. Once the run's own file is written, there is no
more need of it all.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

from calibatt.bench.machine import compare
from calibatt.bench.record import Record, Suite
from calibatt.bench.video import Rounds
from calibatt.methods.facts import read_facts

_SCHEMA = "calibatt-partial-5"


class UnusableJournal(ValueError):
    """A file that this run cannot go on from; the message is one line that says why and what to do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnedKnob:
    """Where an arm's knob was turned to on a workload.

    Args:
        workload, arm, kernel: whose it is, by name.
        value: of the knob; None where it cannot be turned.
        reason: why it cannot; None where it was.

    Raises:
        ValueError: there are both, or neither.
    """

    workload: str
    arm: str
    kernel: str
    value: float | None = None
    reason: str | None = None

    def __post_init__(self) -> None:
        if (self.value is None) == (self.reason is None):
            raise ValueError("a knob has a value, or a reason why it has none")


@dataclass(frozen=True, slots=True, kw_only=True)
class LearntFile:
    """A file of what was learnt on a workload.

    Args:
        workload, lesson: what was learnt, by name.
        sha256: of the file, in hex.
        seconds: that learning took.
    """

    workload: str
    lesson: str
    sha256: str
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ChosenBaseline:
    """The dense kernel that all arms of a workload are paired with.

    Args:
        workload: whose it is, by name.
        baseline: name of the kernel.
    """

    workload: str
    baseline: str


Prepared: TypeAlias = TurnedKnob | LearntFile | ChosenBaseline
# by the name that only they have
_PREPARED: Mapping[str, type[Prepared]] = {"arm": TurnedKnob, "lesson": LearntFile, "baseline": ChosenBaseline}


class Journal:
    """Records of a run, kept one by one, rounds of those that are under way, and what these were prepared with.

    Args:
        path: the file; it is written when something is first kept.
        run: what must be the same for two runs to be one, by name: JSON values. Of `machine` it is what decides a
            speed; `commit` is for readers, since the same code may have several.

    Attributes:
        found, rounds: what the file had when it was opened.
        knobs, learnt, baselines: that too, and what was turned, learnt and chosen since.
        folder: for files that are too large for lines; made by whoever writes the first of them.

    Raises:
        UnusableJournal: the file is another run's, or damaged.
        OSError: it cannot be read.
    """

    def __init__(self, path: Path, run: Mapping[str, Any]) -> None:
        self.path = path
        self.folder = path.with_suffix(".learnt")
        self.found: dict[tuple[str, str], Record] = {}
        self.rounds: dict[tuple[str, str], list[Rounds]] = {}
        self.knobs: dict[tuple[str, str, str], TurnedKnob] = {}
        self.learnt: dict[tuple[str, str], LearntFile] = {}
        self.baselines: dict[str, ChosenBaseline] = {}
        # workloads of which something that their rounds depend on could not be kept
        self._lacking: set[str] = set()
        # as it comes back from the file
        self._run = json.loads(json.dumps({"schema": _SCHEMA, **run}))
        self._size = 0
        if path.exists():
            self._read(path.read_bytes())

    def keep(self, suite: Suite, cell: str, record: Record) -> None:
        """Add a record; when this returns, it is on the disk.

        Args:
            suite, cell: what was measured.
            record: what came of it.

        Raises:
            OSError: it cannot be written; the file is as it was.
        """
        self._append({"suite": suite, "cell": cell, "record": record.to_extra_info(), "samples_s": record.samples_s})

    def keep_rounds(self, suite: Suite, workload: str, rounds: Rounds) -> None:
        """Add rounds of a suite on a workload; when this returns, they are on the disk, all of them.

        Args:
            suite, workload: what was measured.
            rounds: what came of it.

        Raises:
            OSError: they cannot be written, or what they were made with could not be; the file is as it was.
        """
        if workload in self._lacking:
            raise OSError(errno.ENOENT, "what it was made with is not either")
        self._append({"suite": suite, "workload": workload, **rounds.to_json()})

    def keep_preparation(self, kept: Prepared) -> None:
        """Add what rounds of a workload depend on; when this returns, it is on the disk.

        Raises:
            OSError: it cannot be written; the file is as it was.
        """
        self._append(asdict(kept))
        self._take(kept)

    def attempt(self, keep: Callable[[], None], what: str, log: Callable[[str], None]) -> bool:
        """Keep something, or say why it is not kept, which is no reason to stop.

        Args:
            keep: writes it.
            what: it is, for the line.
            log: shows the line.

        Returns:
            Whether it is kept.
        """
        try:
            keep()
        except OSError as error:
            log(f"{self.path}: {what} is not kept there ({error.strerror or error})")
            return False
        return True

    def lack(self, workload: str) -> None:
        """Keep no more rounds of a workload: without what they were made with, no run can go on from them."""
        self._lacking.add(workload)

    def begin(self) -> None:
        """Have on the disk what the run is: from then on, what lies in the folder is this run's.

        Raises:
            OSError: it cannot be written, or what another run has left in the folder cannot be deleted.
        """
        if not self._size:
            self._append()

    def _append(self, *lines: Mapping[str, Any]) -> None:
        if not self._size:
            # of a run whose file was deleted
            if self.folder.exists():
                shutil.rmtree(self.folder)
            lines = (self._run, *lines)
        content = "".join(json.dumps(one) + "\n" for one in lines).encode()
        with self.path.open("ab") as file:
            # half a line, of a run that was stopped while it wrote
            file.truncate(self._size)
            try:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            except OSError:
                file.truncate(self._size)
                raise
        self._size += len(content)

    def remove(self) -> None:
        """Forget everything: the run's own file is written."""
        # before the file: nobody would look for a folder without one
        shutil.rmtree(self.folder, ignore_errors=True)
        self.path.unlink(missing_ok=True)

    def _read(self, content: bytes) -> None:
        whole = content[: content.rfind(b"\n") + 1]
        lines = whole.splitlines()
        if not lines:
            return
        try:
            run, *kept = (json.loads(line) for line in lines)
            self._check(run)
            for one in kept:
                if "rounds" in one:
                    place = one.pop("suite"), one.pop("workload")
                    self.rounds.setdefault(place, []).append(Rounds.from_json(one))
                elif kinds := [kind for name, kind in _PREPARED.items() if name in one]:
                    self._take(read_facts(kinds[0], json.dumps(one)))
                else:
                    samples = one["samples_s"]
                    record = Record.from_extra_info(one["record"], None if samples is None else tuple(samples))
                    self.found[one["suite"], one["cell"]] = record
        except UnusableJournal:
            raise
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            said = " ".join(f"{type(error).__name__}: {error}".split())
            raise UnusableJournal(f"{self.path} is damaged ({said:.200}): delete it to measure anew") from None
        self._size = len(whole)

    def _take(self, kept: Prepared) -> None:
        if isinstance(kept, TurnedKnob):
            self.knobs[kept.workload, kept.arm, kept.kernel] = kept
        elif isinstance(kept, LearntFile):
            self.learnt[kept.workload, kept.lesson] = kept
        else:
            self.baselines[kept.workload] = kept

    def _check(self, run: Mapping[str, Any]) -> None:
        for name in dict.fromkeys([*self._run, *run]):
            mine, other = self._run.get(name), run.get(name)
            if name == "machine":
                difference = compare(mine or {}, other or {}).difference
                if difference is None:
                    continue
                name, mine, other = f"{difference.name} of the machine", difference.here, difference.there
            if mine != other and name != "commit":
                raise UnusableJournal(
                    f"{self.path} belongs to a run with another {name} ({_shown(other)}, not {_shown(mine)}): "
                    "repeat that run to finish it, or delete the file to measure anew"
                )


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 120 else f"{text[:80]} … {text[-30:]}"
