"""One run of the benchmarks: what was chosen, what has been measured, and what could not be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from calibatt.bench import attention, denoise, preparation
from calibatt.bench.cells import DENSE, Arm, Cell, Workload
from calibatt.bench.console import Console
from calibatt.bench.record import Record, Suite
from calibatt.bench.stage import Stage


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How the chosen cells are measured.

    Args:
        rounds: videos an arm in the denoise suite.
        calibration_prompts: prompts that CalibAtt calibrates on; never those that are measured.
        calibration: a stored calibration instead.
        prompts: prompts for models that have none of their own; first those to calibrate on.
        artifacts: folder for the data of the report's pictures.
    """

    rounds: int
    calibration_prompts: int
    calibration: Path | None
    prompts: tuple[str, ...] | None
    artifacts: Path | None


class BenchSession:
    """Measures the arms of a workload together when the first of them is asked for, then hands out records.

    Args:
        settings: how to measure.
        console: shows how far the work is.
    """

    def __init__(self, settings: Settings, console: Console) -> None:
        self.settings = settings
        self.console = console
        self.chosen: dict[tuple[Suite, Workload], list[Arm]] = {}
        self.untimed: list[Record] = []
        self._records: dict[tuple[Suite, Cell], Record] = {}
        self._stage: Stage | None = None

    def choose(self, suite: Suite, cell: Cell) -> None:
        """Say that a cell will be asked for."""
        self.chosen.setdefault((suite, cell.workload), []).append(cell.arm)

    def record(self, suite: Suite, cell: Cell) -> Record:
        """The record of a cell."""
        if (suite, cell) not in self._records:
            stage = self._staged(cell.workload)
            for arm, record in self._measure(stage, suite, self.chosen[suite, cell.workload]).items():
                self._records[suite, Cell(workload=cell.workload, arm=arm)] = record
        record = self._records[suite, cell]
        if record.outcome != "ok":
            self.untimed.append(record)
        return record

    # kernels that compile would otherwise do so a second time for the pipeline, which runs without gradients
    @torch.no_grad()
    def _measure(self, stage: Stage, suite: Suite, arms: Sequence[Arm]) -> dict[Arm, Record]:
        if suite == "calibration":
            return {arm: preparation.measure(stage, arm) for arm in arms}
        # the baseline is measured even where nobody asked to see it
        with_dense = [DENSE, *(arm for arm in arms if arm != DENSE)]
        if suite == "attention":
            return attention.measure(stage, with_dense)
        return denoise.measure(stage, with_dense, rounds=self.settings.rounds, artifacts=self.settings.artifacts)

    def _staged(self, workload: Workload) -> Stage:
        # one model at a time is in memory
        if self._stage is None or self._stage.workload != workload:
            self._stage = Stage(
                workload,
                prompts_for(workload, self.settings),
                calibration_prompts=self.settings.calibration_prompts,
                calibration=self.settings.calibration,
                console=self.console,
            )
        return self._stage


def prompts_for(workload: Workload, settings: Settings) -> Sequence[str]:
    """Prompts to calibrate on, then one a round: all different, none that the model was trained on.

    Raises:
        ValueError: there are too few.
    """
    needed = settings.calibration_prompts + settings.rounds
    if settings.prompts is not None:
        prompts: Sequence[str] = settings.prompts
    elif workload.entry.captions is not None:
        prompts = workload.entry.captions(needed, 0)
    else:
        raise ValueError(f"{workload.model} has no prompts of its own: give a file of them, one a line, by --prompts")
    if len(prompts) < needed:
        raise ValueError(
            f"{settings.calibration_prompts} prompts to calibrate on and {settings.rounds} rounds need {needed} "
            f"prompts: --prompts has {len(prompts)}"
        )
    return prompts[:needed]
