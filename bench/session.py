"""One run of the benchmarks: what was chosen, what has been measured, and what could not be."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from calibatt.bench.cells import DENSE, AnyArm, Arm, Cell, Workload
from calibatt.bench.console import Console
from calibatt.bench.record import Record, Suite
from calibatt.bench.stage import Stage
from calibatt.bench.suites import attention, calibration, denoise, kernel
from calibatt.models.catalogue import SHAPES


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
        self.chosen: dict[tuple[Suite, Workload], list[AnyArm]] = {}
        self.untimed: list[Record] = []
        self._records: dict[tuple[Suite, Cell], Record] = {}
        self._stage: Stage | None = None

    def choose(self, suite: Suite, cell: Cell) -> None:
        """Say that a cell will be asked for.

        Raises:
            ValueError: the cell needs more prompts than there are.
        """
        if suite != "kernel":
            prompts_for(cell.workload, self.settings)
        self.chosen.setdefault((suite, cell.workload), []).append(cell.arm)

    def record(self, suite: Suite, cell: Cell) -> Record:
        """The record of a cell."""
        if (suite, cell) not in self._records:
            for arm, record in self._measure(suite, cell.workload):
                self._records[suite, Cell(workload=cell.workload, arm=arm)] = record
        record = self._records[suite, cell]
        if record.outcome != "ok":
            self.untimed.append(record)
        return record

    # kernels that compile would otherwise do so a second time for the pipeline, which runs without gradients
    @torch.no_grad()
    def _measure(self, suite: Suite, workload: Workload) -> Iterable[tuple[AnyArm, Record]]:
        chosen = self.chosen[suite, workload]
        if suite == "kernel":
            return kernel.measure(workload, chosen, self.console).items()
        stage, arms = self._staged(workload), [arm for arm in chosen if isinstance(arm, Arm)]
        if suite == "calibration":
            return [(arm, calibration.measure(stage, arm)) for arm in arms]
        # the baseline is measured even where nobody asked to see it
        arms = [DENSE, *(arm for arm in arms if arm != DENSE)]
        if suite == "attention":
            return attention.measure(stage, arms).items()
        return denoise.measure(stage, arms, rounds=self.settings.rounds, artifacts=self.settings.artifacts).items()

    def _staged(self, workload: Workload) -> Stage:
        # one model at a time is in memory
        if self._stage is None or self._stage.workload != workload:
            self._stage = Stage(
                workload,
                prompts_for(workload, self.settings),
                calibration_prompts=self.settings.calibration_prompts,
                calibration=self.settings.calibration,
                levels=any(
                    arm.method == "calibatt" and arm.mode in ("equal_density", "equal_fidelity")
                    for (_, other), arms in self.chosen.items()
                    for arm in arms
                    if other == workload and isinstance(arm, Arm)
                ),
                console=self.console,
            )
        return self._stage


def prompts_for(workload: Workload, settings: Settings) -> Sequence[str]:
    """Prompts to calibrate on, then one a round: all different, none that the model was trained on.

    Raises:
        ValueError: there are too few.
    """
    needed = settings.calibration_prompts + settings.rounds
    # the captions of the model whose videos are made
    captions = SHAPES.captions if workload.resampled else workload.entry.captions
    if settings.prompts is not None:
        prompts: Sequence[str] = settings.prompts
    elif captions is not None:
        prompts = captions(needed, 0)
    else:
        raise ValueError(f"{workload.model} has no prompts of its own: give a file of them, one a line, by --prompts")
    if len(prompts) < needed:
        raise ValueError(
            f"{settings.calibration_prompts} prompts to calibrate on and {settings.rounds} rounds need {needed} "
            f"prompts: --prompts has {len(prompts)}"
        )
    return prompts[:needed]
