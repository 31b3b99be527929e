"""What a suite is: its name, the cells that the options ask for, and how it measures the arms of one workload."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, runtime_checkable

from calibatt.bench.cells import AnyArm, Cell, Workload
from calibatt.bench.console import Console
from calibatt.bench.context import Context
from calibatt.bench.options import Options
from calibatt.bench.record import Record
from calibatt.bench.record import Suite as SuiteName
from calibatt.bench.sampling import Goal, endless
from calibatt.bench.video import Round, Rounds


def _forget(rounds: Rounds) -> None:
    """Keep nothing."""


def _any_time(round_: int) -> bool:
    """There is time for every round."""
    return True


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Kept:
    """Rounds that are finished, of a suite whose arms take long.

    Args:
        found: of a run that was stopped, from the first on.
        keep: puts more on the disk, where the run has a file.
    """

    found: Sequence[Round] = ()
    keep: Callable[[Rounds], None] = _forget


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Job:
    """One suite's work on one workload.

    Args:
        workload: what runs.
        rounds: videos an arm, where there are videos.
        most, interval: of the suites without videos: `--rounds` and `--interval`, where they are given.
        artifacts: folder for the data of the report's pictures; None leaves them out.
        console: shows how far the work is.
        open: what the arms of the workload share; opened once for all suites.
        kept: rounds that need not be repeated.
        more: whether there is time for a round, by its number; asked before each.
        left_s: seconds until the time given is over, whenever it is asked.
    """

    workload: Workload
    rounds: int
    artifacts: Path | None
    console: Console
    open: Callable[[], Context]
    kept: Kept = field(default_factory=Kept)
    more: Callable[[int], bool] = _any_time
    left_s: Callable[[], float] = endless
    most: int | None = None
    interval: float | None = None

    def goal(self, least: int) -> Goal:
        """When an arm has samples enough.

        Args:
            least: rounds of every arm, which is the suite's to say.
        """
        return Goal.of(least, most=self.most, interval=self.interval, device=self.workload.device, left_s=self.left_s)


@runtime_checkable
class Suite(Protocol):
    """A module of this folder."""

    NAME: SuiteName

    def cells(self, options: Options) -> list[Cell]:
        """The cells of the suite, in the order they will run.

        Raises:
            ValueError: an option makes no sense; the message is one line that says what to do.
        """
        ...

    def measure(self, job: Job, arms: Sequence[AnyArm]) -> Iterable[tuple[AnyArm, Record]]:
        """Measure arms; each record is handed over as soon as nothing more can change it.

        What goes wrong for one arm is its record's outcome; what goes wrong for all is raised.
        """
        ...
