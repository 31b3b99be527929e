"""One run of the benchmarks: what was chosen, what has been measured, and what could not be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from calibatt.bench.cells import AnyArm, Arm, Cell, Workload
from calibatt.bench.console import Console
from calibatt.bench.context import Context
from calibatt.bench.failure import guarded
from calibatt.bench.journal import Journal
from calibatt.bench.opening import Prompts, open_workload
from calibatt.bench.preparation import Preparation
from calibatt.bench.record import Record
from calibatt.bench.record import Suite as SuiteName
from calibatt.bench.rounds import SHOWN_ROUNDS, TimeLimit
from calibatt.bench.suites.catalogue import SUITES
from calibatt.bench.suites.suite import Job, Kept, Suite
from calibatt.bench.tuning import TUNING_PROMPTS
from calibatt.bench.video import Round, Rounds, in_order
from calibatt.models.shapes.entry import SHAPES
from calibatt.models.vbench import choose, to_calibrate_on, to_measure_on


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How the chosen cells are measured.

    Args:
        rounds: videos an arm in the denoise suite.
        calibration_prompts: prompts to learn from; never those that are measured.
        calibration: a stored calibration instead.
        prompts: to use in place of the model's own, or of VBench's; first those to calibrate on.
        artifacts: folder for the data of the report's pictures.
        max_time: seconds after which no further round of videos begins, and in the other suites no round beyond the
            least; None for as long as it takes.
        most, interval: in the other suites, the most rounds of an arm, and half the width of a speedup's interval, as a
            share of it, at which they end; None for the default.
    """

    rounds: int
    calibration_prompts: int
    calibration: Path | None
    prompts: tuple[str, ...] | None
    artifacts: Path | None
    max_time: float | None = None
    most: int | None = None
    interval: float | None = None


class BenchSession:
    """Measures the arms of a workload together when the first of them is asked for, then hands out records.

    Args:
        settings: how to measure.
        console: shows how far the work is.
        journal: keeps records as they are measured, and has those of a run that was stopped; None keeps nothing.
        suites: by name.

    Attributes:
        untimed: records that were asked for and have no times.
    """

    def __init__(
        self,
        settings: Settings,
        console: Console,
        *,
        journal: Journal | None = None,
        suites: Mapping[SuiteName, Suite] = SUITES,
    ) -> None:
        self.untimed: list[Record] = []
        self._settings = settings
        self._console = console
        self._journal = journal
        self._suites = suites
        self._chosen: dict[tuple[SuiteName, Workload], list[AnyArm]] = {}
        self._records: dict[tuple[SuiteName, Cell], Record] = {}
        self._opened: tuple[Workload, Context] | None = None
        self._limit = TimeLimit(settings.max_time)
        # whose rounds ended for lack of time
        self._cut: set[tuple[SuiteName, Workload]] = set()

    def choose(self, suite: SuiteName, cell: Cell) -> None:
        """Say that a cell will be asked for.

        Raises:
            ValueError: the cell needs more prompts than there are.
        """
        # kernels by themselves have no steps, and make no videos
        if cell.workload.steps:
            prompts_for(cell.workload, self._settings, [cell.arm])
        self._chosen.setdefault((suite, cell.workload), []).append(cell.arm)
        kept = None if self._journal is None else self._journal.found.get((suite, str(cell)))
        if kept is not None:
            self._records[suite, cell] = kept

    def check(self) -> None:
        """Refuse, once every cell is chosen, to go on where what was learnt for the rounds of a stopped run is gone.

        Raises:
            UnusableJournal: a file is missing or damaged that is needed again.
        """
        for suite, workload in self._chosen:
            if self._missing(suite, workload):
                self._preparation(workload).check()

    def announce(self) -> None:
        """Say, before the first record, what was kept of a stopped run, or that nothing will be."""
        if self._journal is None:
            self._console.line(
                "without --benchmark-json=FILE, a stopped run cannot be resumed, and the report has no pictures"
            )
            return
        if self._records:
            chosen = sum(len(arms) for arms in self._chosen.values())
            self._console.line(
                f"{len(self._records)} of {chosen} cells are not measured again: {self._journal.path} has them"
            )
        for suite, workload in self._chosen:
            if rounds := len(self._rounds(suite, workload)):
                self._console.line(
                    f"{workload}: {rounds} of {self._settings.rounds} rounds are not made again: "
                    f"{self._journal.path} has them"
                )

    def record(self, suite: SuiteName, cell: Cell) -> Record:
        """The record of a cell."""
        if (suite, cell) not in self._records:
            self._measure(suite, cell.workload)
        found = self._records[suite, cell]
        if found.outcome != "ok":
            self.untimed.append(found)
        return found

    @property
    def records(self) -> list[Record]:
        """Those that there are of the chosen cells, in their order."""
        cells = (
            (suite, Cell(workload=workload, arm=arm))
            for (suite, workload), arms in self._chosen.items()
            for arm in arms
        )
        return [self._records[cell] for cell in cells if cell in self._records]

    @property
    def finished(self) -> bool:
        """Whether every chosen cell has its record, of as many rounds as were asked for."""
        return not self._cut and len(self.records) == sum(map(len, self._chosen.values()))

    def _measure(self, suite: SuiteName, workload: Workload) -> None:
        """Measure what is missing of a suite on a workload."""
        missing = self._missing(suite, workload)
        failure = guarded(partial(self._run, suite, workload, missing))
        if failure is None:
            return
        self._console.line(f"{workload}: {failure.reason}")
        for arm in missing:
            cell = Cell(workload=workload, arm=arm)
            if (suite, cell) not in self._records:
                facts = {**workload.facts(), **arm.facts(), "suite": suite}
                self._keep(suite, cell, Record(**facts, outcome=failure.outcome, reason=failure.reason))

    def _missing(self, suite: SuiteName, workload: Workload) -> list[AnyArm]:
        """Arms that have no record yet."""
        return [
            arm
            for arm in self._chosen[suite, workload]
            if (suite, Cell(workload=workload, arm=arm)) not in self._records
        ]

    # kernels that compile would otherwise do so a second time for the pipeline, which runs without gradients
    @torch.no_grad()
    def _run(self, suite: SuiteName, workload: Workload, arms: list[AnyArm]) -> None:
        job = Job(
            workload=workload, rounds=self._settings.rounds, artifacts=self._settings.artifacts, console=self._console,
            open=partial(self._open, workload), kept=self._kept(suite, workload),
            more=partial(self._more, suite, workload), left_s=self._limit.left_s, most=self._settings.most,
            interval=self._settings.interval,
        )  # fmt: skip
        for arm, measured in self._suites[suite].measure(job, arms):
            # a baseline that nobody asked to see is measured all the same
            if arm in arms:
                self._keep(suite, Cell(workload=workload, arm=arm), measured)

    def _more(self, suite: SuiteName, workload: Workload, round_: int) -> bool:
        """Whether there is time for a round; without, what there is goes into the file, and a repetition goes on."""
        # asked every time, since it goes by how long rounds take
        if self._limit.more() or round_ < SHOWN_ROUNDS:
            return True
        self._cut.add((suite, workload))
        self._console.line(
            f"{workload}: {round_} of {self._settings.rounds} rounds in the time given: repeat the command to go on"
        )
        return False

    def _keep(self, suite: SuiteName, cell: Cell, measured: Record) -> None:
        self._records[suite, cell] = measured
        journal = self._journal
        # a record of fewer rounds than were asked for is none to go on from
        if journal is not None and (suite, cell.workload) not in self._cut:
            journal.attempt(partial(journal.keep, suite, str(cell), measured), str(cell), self._console.line)

    def _kept(self, suite: SuiteName, workload: Workload) -> Kept:
        """The rounds that a stopped run has finished, and where this one's go."""
        journal = self._journal
        if journal is None:
            return Kept()

        def keep(rounds: Rounds) -> None:
            write = partial(journal.keep_rounds, suite, str(workload), rounds)
            journal.attempt(write, f"a round of {workload}", self._console.line)

        return Kept(found=self._rounds(suite, workload), keep=keep)

    def _preparation(self, workload: Workload) -> Preparation:
        """What a stopped run has prepared the workload's arms with, and where this one's goes."""
        return Preparation(self._journal, str(workload), self._console.line)

    def _rounds(self, suite: SuiteName, workload: Workload) -> list[Round]:
        """The rounds that a stopped run has finished."""
        kept = [] if self._journal is None else self._journal.rounds.get((suite, str(workload)), [])
        return in_order(kept)[: self._settings.rounds]

    def _open(self, workload: Workload) -> Context:
        if self._opened is None or self._opened[0] != workload:
            # one model at a time is in memory
            self._opened = None
            context = open_workload(
                workload, prompts_for(workload, self._settings, self._arms(workload)),
                preparation=self._preparation(workload), stored=self._settings.calibration,
                turned=self._turned(workload), filmed=("denoise", workload) in self._chosen, console=self._console,
            )  # fmt: skip
            self._opened = (workload, context)
        return self._opened[1]

    def _arms(self, workload: Workload) -> list[AnyArm]:
        """All chosen arms of a workload, whatever the suite."""
        return [arm for (_, other), arms in self._chosen.items() if other == workload for arm in arms]

    def _turned(self, workload: Workload) -> set[str]:
        """Methods whose knob an arm of the workload turns."""
        return {arm.method for arm in _with_target(self._arms(workload))}


def _with_target(arms: Sequence[AnyArm]) -> list[Arm]:
    """Those whose knob is turned for something."""
    return [arm for arm in arms if isinstance(arm, Arm) and arm.mode in ("equal_density", "equal_fidelity")]


def prompts_for(workload: Workload, settings: Settings, arms: Sequence[AnyArm]) -> Prompts:
    """Prompts to calibrate on, one a round, and those to turn knobs on: all different, none of the model's training.

    Args:
        workload: whose model they are for.
        settings: how many of the first two.
        arms: knobs are turned where one of them has a target.

    Raises:
        ValueError: there are too few, or the model cannot read one.
    """
    count, tuned = settings.calibration_prompts, TUNING_PROMPTS if _with_target(arms) else 0
    measured = count + settings.rounds
    needed = measured + tuned
    # the model whose videos are made
    entry = SHAPES if workload.resampled else workload.entry
    if settings.prompts is not None:
        prompts = list(settings.prompts)
    elif entry.captions is not None:
        prompts = entry.captions(needed, 0)
    else:
        learnt = choose(to_calibrate_on(), count + tuned, "to calibrate and to turn knobs on")
        prompts = [*learnt[:count], *choose(to_measure_on(), settings.rounds, "to measure on"), *learnt[count:]]
    if len(prompts) < needed:
        raise ValueError(
            f"{count} prompts to calibrate on{f', {tuned} to turn knobs on' if tuned else ''} and {settings.rounds} "
            f"rounds need {needed} prompts: --prompts has {len(prompts)}"
        )
    for prompt in prompts[:needed]:
        entry.check_prompt(prompt)
    return Prompts(
        calibration=tuple(prompts[:count]), rounds=tuple(prompts[count:measured]),
        tuning=tuple(prompts[measured:needed]),
    )  # fmt: skip
