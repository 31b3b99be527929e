"""What a workload is prepared with, kept for a run that goes on: its baseline, turned knobs, and what was learnt."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

from calibatt.bench.cells import Arm
from calibatt.bench.journal import ChosenBaseline, Journal, LearntFile, TurnedKnob, UnusableJournal
from calibatt.calibration.artifact import Calibration
from calibatt.kernels.base import Unsupported

# read at a time: with levels, a calibration of a large model has gigabytes
_PIECE_BYTES = 1 << 20


class Preparation:
    """What the journal has of a workload's preparation, and is to keep of it.

    Args:
        journal: of the run; None keeps nothing.
        workload: its name.
        log: says what cannot be kept, or is gone.
    """

    def __init__(self, journal: Journal | None, workload: str, log: Callable[[str], None]) -> None:
        self._journal = journal
        self._workload = workload
        self._log = log

    def check(self) -> None:
        """Refuse to go on with rounds whose calibrations are gone: masks of two runs must not be mixed.

        Raises:
            UnusableJournal: a file is missing or damaged.
        """
        if self._journal is None or not self._has_rounds(self._journal):
            return
        for workload, lesson in self._journal.learnt:
            if workload == self._workload:
                self._intact(self._journal, self._journal.learnt[workload, lesson])

    def baseline(self) -> str | None:
        """The dense kernel that arms are paired with; None where it is not chosen yet."""
        kept = None if self._journal is None else self._journal.baselines.get(self._workload)
        return None if kept is None else kept.baseline

    def keep_baseline(self, kernel: str) -> None:
        """Keep what `baseline` is to return, where it can be kept."""
        journal = self._journal
        if journal is not None:
            chosen = ChosenBaseline(workload=self._workload, baseline=kernel)
            self._keep(journal, partial(journal.keep_preparation, chosen), f"the baseline of {self._workload}")

    def knob(self, arm: Arm) -> float | Unsupported | None:
        """Where the arm's knob was turned to, or why it cannot be turned; None where that is not known yet."""
        kept = None if self._journal is None else self._journal.knobs.get((self._workload, str(arm), arm.kernel))
        if kept is None:
            return None
        return kept.value if kept.reason is None else Unsupported(kept.reason)

    def keep_knob(self, arm: Arm, found: float | Unsupported) -> None:
        """Keep what `knob` is to return, where it can be kept."""
        journal = self._journal
        if journal is None:
            return
        value, reason = (None, found.reason) if isinstance(found, Unsupported) else (found, None)
        knob = TurnedKnob(workload=self._workload, arm=str(arm), kernel=arm.kernel, value=value, reason=reason)
        self._keep(journal, partial(journal.keep_preparation, knob), f"the knob of {arm} on {arm.kernel}")

    def learnt(self, lesson: str) -> tuple[float, Calibration] | None:
        """Seconds that a lesson took, and what was learnt; None where it is to be learnt.

        Args:
            lesson: its name.

        Raises:
            UnusableJournal: the file is missing or damaged, and rounds were measured with it.
        """
        journal = self._journal
        kept = None if journal is None else journal.learnt.get((self._workload, lesson))
        if journal is None or kept is None or not self._intact(journal, kept):
            return None
        return kept.seconds, Calibration.load(self._path(journal, lesson))

    def keep_learnt(self, lesson: str, seconds: float, calibration: Calibration) -> None:
        """Keep what `learnt` is to return, where it can be kept; the notes that it comes from are deleted.

        Args:
            lesson: its name.
            seconds: that it took.
            calibration: what was learnt.
        """
        journal = self._journal
        if journal is None:
            return
        path = self._path(journal, lesson)

        def keep() -> None:
            journal.begin()
            calibration.save(path)
            file = LearntFile(workload=self._workload, lesson=lesson, sha256=_sha256(path), seconds=seconds)
            journal.keep_preparation(file)

        self._keep(journal, keep, f"{lesson} of {self._workload}")
        shutil.rmtree(self._notes(journal, lesson), ignore_errors=True)

    def notes(self, lesson: str) -> Path | None:
        """A folder for the notes of a lesson, with those that a stopped run has taken; None where none can be kept."""
        journal = self._journal
        if journal is None or not journal.attempt(journal.begin, f"what {lesson} notes", self._log):
            return None
        return self._notes(journal, lesson)

    def _keep(self, journal: Journal, keep: Callable[[], None], what: str) -> None:
        if not journal.attempt(keep, what, self._log):
            journal.lack(self._workload)

    def _intact(self, journal: Journal, kept: LearntFile) -> bool:
        """Whether a file is as it was written.

        Raises:
            UnusableJournal: it is not, and rounds were measured with it.
        """
        path = self._path(journal, kept.lesson)
        try:
            if _sha256(path) == kept.sha256:
                return True
        except OSError:
            pass
        if self._has_rounds(journal):
            raise UnusableJournal(
                f"{path} is missing or damaged, and rounds of {self._workload} were measured with it: put it back, or "
                f"delete {journal.path} to measure anew"
            )
        self._log(f"{path} is missing or damaged: it is learnt anew")
        return False

    def _has_rounds(self, journal: Journal) -> bool:
        return any(workload == self._workload for _, workload in journal.rounds)

    def _path(self, journal: Journal, lesson: str) -> Path:
        return journal.folder / f"{self._workload}-{lesson}.safetensors"

    def _notes(self, journal: Journal, lesson: str) -> Path:
        return journal.folder / f"{self._workload}-{lesson}.units"


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_PIECE_BYTES):
            digest.update(piece)
    return digest.hexdigest()
