"""The calibration suite: what it costs to prepare an offline method, and how far prompts agree on CalibAtt's masks."""

from __future__ import annotations

from calibatt.bench.arms import Failure, facts, failed, guarded
from calibatt.bench.cells import Arm
from calibatt.bench.record import Record
from calibatt.bench.stage import Stage
from calibatt.methods.learning import Learnt


def measure(stage: Stage, arm: Arm) -> Record:
    """The calibration, or what a preset learns, that the other suites of this run use; timed once."""
    prepared = guarded(lambda: stage.learnt(arm))
    if isinstance(prepared, Failure):
        return failed(stage, "calibration", arm, prepared)
    return _calibration(stage, arm) if prepared is None else _learning(stage, arm, prepared)


def _learning(stage: Stage, arm: Arm, learnt: Learnt) -> Record:
    seconds = stage.preparation_s(arm)
    assert seconds is not None
    return Record(
        **facts(stage, "calibration", arm),
        outcome="ok",
        prompts=learnt.prompts,
        samples_s=(seconds,),
        calibration_cost_ratio=learnt.cost_ratio,
        plan_memory_bytes=learnt.nbytes(),
    )


def _calibration(stage: Stage, arm: Arm) -> Record:
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
        plan_memory_bytes=made.bits.nbytes + (0 if made.levels is None else made.levels.nbytes),
        density=made.density().mean().item(),
    )
