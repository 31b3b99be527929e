"""The calibration suite: what it costs to prepare CalibAtt, and how far prompts agree on its masks."""

from __future__ import annotations

from calibatt.bench.arms import Failure, facts, failed, guarded
from calibatt.bench.cells import Arm
from calibatt.bench.record import Record
from calibatt.bench.stage import Stage


def measure(stage: Stage, arm: Arm) -> Record:
    """The calibration that the other suites of this run use, timed once."""
    made = guarded(lambda: stage.calibration)
    if isinstance(made, Failure):
        return failed(stage, "calibration", arm, made)
    if stage.calibration_s is None:
        return failed(stage, "calibration", arm, Failure("unsupported", "--calibration gave one that was made before"))
    return Record(
        **facts(stage, "calibration", arm),
        outcome="ok",
        block=made.provenance.block,
        prompts=made.provenance.prompts,
        samples_s=(stage.calibration_s,),
        calibration_cost_ratio=made.provenance.cost_ratio,
        mask_agreement=made.provenance.mask_agreement,
        plan_memory_bytes=made.bits.nbytes,
        density=made.density().mean().item(),
    )
