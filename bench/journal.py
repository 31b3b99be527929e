"""What a run has measured so far, on disk: a run that is stopped, however abruptly, goes on from there.

A line of JSON each: first what the run is, then records as they are measured; before those of whole videos, which take
long, their rounds. Once the run's own file is written, there is no more need of it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from calibatt.bench.record import Record, Suite
from calibatt.bench.video import Rounds

_SCHEMA = "calibatt-partial-2"


class UnusableJournal(ValueError):
    """A file that this run cannot go on from; the message is one line that says why and what to do."""


class Journal:
    """Records of a run, kept one by one, and rounds of those that are under way.

    Args:
        path: the file; it is written when something is first kept.
        run: what must be the same for two runs to be one, by name: JSON values.

    Raises:
        UnusableJournal: the file is another run's, or damaged.
        OSError: it cannot be read.
    """

    def __init__(self, path: Path, run: Mapping[str, Any]) -> None:
        self.path = path
        self.found: dict[tuple[str, str], Record] = {}
        self.rounds: dict[tuple[str, str], list[Rounds]] = {}
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
            OSError: they cannot be written; the file is as it was.
        """
        self._append({"suite": suite, "workload": workload, **rounds.to_json()})

    def _append(self, line: Mapping[str, Any]) -> None:
        lines = [line] if self._size else [self._run, line]
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
                    continue
                samples = one["samples_s"]
                record = Record.from_extra_info(one["record"], None if samples is None else tuple(samples))
                self.found[one["suite"], one["cell"]] = record
        except UnusableJournal:
            raise
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            said = " ".join(f"{type(error).__name__}: {error}".split())
            raise UnusableJournal(f"{self.path} is damaged ({said:.200}): delete it to measure anew") from None
        self._size = len(whole)

    def _check(self, run: Mapping[str, Any]) -> None:
        for name in dict.fromkeys([*self._run, *run]):
            mine, other = self._run.get(name), run.get(name)
            if mine != other:
                raise UnusableJournal(
                    f"{self.path} belongs to a run with another {name} ({_shown(other)}, not {_shown(mine)}): "
                    "repeat that run to finish it, or delete the file to measure anew"
                )


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 120 else f"{text[:80]} … {text[-30:]}"
