"""The calibration suite: what it costs to prepare methods that learn offline, and how far prompts agree."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

from calibatt.bench.arms import facts, failed
from calibatt.bench.cells import AnyArm, Arm, Cell, Workload
from calibatt.bench.context import Context
from calibatt.bench.failure import Failure, guarded
from calibatt.bench.offline import Lesson, Prepared, lesson_of
from calibatt.bench.options import Options, method_cells
from calibatt.bench.record import Record, Suite
from calibatt.bench.suites.suite import Job
from calibatt.kernels.base import Unsupported
from calibatt.methods.base import Foreseen

NAME: Suite = "calibration"


def cells(options: Options) -> list[Cell]:
    """One arm for all that learn the same, on every workload that has videos.

    Raises:
        ValueError: an option makes no sense.
    """
    found: list[Cell] = []
    if not options.whole:
        return found
    known: list[tuple[Workload, Lesson]] = []
    for cell in method_cells(options):
        assert isinstance(cell.arm, Arm)
        lesson = lesson_of(cell.arm.untuned, cell.workload.block)
        # what another method learns has its own place
        if lesson is None or lesson.method != cell.arm.method or (cell.workload, lesson) in known:
            continue
        known.append((cell.workload, lesson))
        found.append(Cell(workload=cell.workload, arm=cell.arm.untuned))
    return found


def measure(job: Job, arms: Sequence[AnyArm]) -> Iterator[tuple[AnyArm, Record]]:
    """What the presets learn that the other suites of this run use; timed once."""
    context = job.open()
    for arm in arms:
        assert isinstance(arm, Arm)
        yield arm, one(context, arm)


def one(context: Context, arm: Arm) -> Record:
    """The record of what one arm learns."""
    prepared = guarded(lambda: context.prepared(arm))
    if isinstance(prepared, Failure):
        return failed(context, NAME, arm, prepared)
    if prepared is None or prepared.seconds is None:
        reason = "it learns nothing" if prepared is None else "--calibration gave a calibration that was made earlier"
        return failed(context, NAME, arm, Failure("unsupported", reason))
    made = guarded(partial(_measured, context, arm, prepared, prepared.seconds))
    return failed(context, NAME, arm, made) if isinstance(made, Failure) else made


def _measured(context: Context, arm: Arm, prepared: Prepared, seconds: float) -> Record:
    learnt, method = prepared.calibration, context.method(arm)
    if isinstance(method, Unsupported):
        return failed(context, NAME, arm, Failure("unsupported", method.reason))
    block = learnt.settings.get("block")
    agreement = learnt.tables["agreement"].mean().item() if "agreement" in learnt.tables else None
    return Record(
        **facts(context, NAME, arm),
        outcome="ok",
        block=None if block is None else tuple(block),
        prompts=learnt.provenance.prompts,
        samples_s=(seconds,),
        calibration_cost_ratio=learnt.provenance.cost_ratio,
        # of masks, where the method's learner takes a vote on them
        mask_agreement=agreement,
        plan_memory_bytes=learnt.nbytes(),
        density=method.mean_density() if isinstance(method, Foreseen) else None,
    )
