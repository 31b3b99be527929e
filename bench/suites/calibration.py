"""The calibration suite: what it costs to prepare methods that learn offline, and how far prompts agree."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache, partial

from calibatt.bench.arms import facts, failed
from calibatt.bench.cells import AnyArm, Arm, Cell, Workload
from calibatt.bench.context import Context
from calibatt.bench.failure import Failure, guarded
from calibatt.bench.offline import CALIBRATION_SEED, Lesson, Prepared, lesson_of
from calibatt.bench.options import Options, method_cells
from calibatt.bench.record import Record, Suite
from calibatt.bench.suites.suite import Job
from calibatt.bench.timer import timed
from calibatt.calibration.collect import rehearse
from calibatt.calibration.overlap import mask_iou
from calibatt.kernels.base import Unsupported
from calibatt.methods.base import Foreseen, Planner
from calibatt.methods.call import SparseAttention
from calibatt.methods.catalogue import build
from calibatt.methods.learning import settings_of

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
        for arm in _strided(cell.arm.untuned, cell.workload, options.query_strides):
            lesson = lesson_of(arm, cell.workload.block)
            # what another method learns has its own place
            if lesson is None or lesson.method != arm.method or (cell.workload, lesson) in known:
                continue
            known.append((cell.workload, lesson))
            found.append(Cell(workload=cell.workload, arm=arm))
    return found


def _strided(arm: Arm, workload: Workload, strides: Sequence[int]) -> list[Arm]:
    """The arm at every stride; as it is where nothing that it learns has one.

    Raises:
        ValueError: it has a stride among its settings, and the run others.
    """
    lesson = lesson_of(arm, workload.block)
    if lesson is None or "query_stride" not in settings_of(lesson.learner):
        return [arm]
    if "query_stride" in arm.set_values and set(strides) != {1}:
        raise ValueError(f"{arm}: --query-strides gives query_stride: leave out one of both")
    return [replace(arm, query_stride=stride) for stride in strides]


def measure(job: Job, arms: Sequence[AnyArm]) -> Iterator[tuple[AnyArm, Record]]:
    """What the presets learn that the other suites of this run use; timed once."""
    context = job.open()
    dense_s = cache(partial(_dense_s, context))
    for arm in arms:
        assert isinstance(arm, Arm)
        lesson = lesson_of(arm, job.workload.block)
        yield arm, one(context, arm, lesson, dense_s)


def one(context: Context, arm: Arm, lesson: Lesson | None, dense_s: Callable[[tuple[str, ...]], float]) -> Record:
    """The record of what one arm learns.

    Args:
        context: what the arms of the workload share.
        arm: what is measured.
        lesson: what it learns.
        dense_s: seconds of the plain dense videos of these prompts.
    """
    prepared = guarded(lambda: _prepared(context, arm, lesson))
    if isinstance(prepared, Failure):
        return failed(context, NAME, arm, prepared)
    if prepared is None or prepared.seconds is None:
        reason = "it learns nothing" if prepared is None else "--calibration gave a calibration that was made earlier"
        return failed(context, NAME, arm, Failure("unsupported", reason))
    made = guarded(partial(_measured, context, arm, prepared, prepared.seconds, dense_s))
    return failed(context, NAME, arm, made) if isinstance(made, Failure) else made


def _prepared(context: Context, arm: Arm, lesson: Lesson | None) -> Prepared | None:
    """What the arm learns, once the code that it learns by is compiled, which is no part of its time."""
    if lesson is not None:
        probe = context.probes[-1]
        rehearse(lesson.learner, probe.q, probe.k, probe.v, probe.site)
    return context.prepared(arm)


def _dense_s(context: Context, prompts: tuple[str, ...]) -> float:
    """Seconds of the videos that calibrating makes, by themselves."""
    attention = SparseAttention(build("dense"), context.dense)

    def generate() -> None:
        for number, prompt in enumerate(prompts):
            context.film(attention, prompt, CALIBRATION_SEED + number)

    seconds, _ = timed(context.device, generate)
    return seconds


def _from_all_queries(context: Context, arm: Arm) -> Planner:
    """What the arm would plan by, had it looked at all queries."""
    exact = context.method(replace(arm, query_stride=1))
    assert not isinstance(exact, Unsupported)
    return exact


def _measured(
    context: Context, arm: Arm, prepared: Prepared, seconds: float, dense_s: Callable[[tuple[str, ...]], float]
) -> Record:
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
        calibration_cost_ratio=seconds / dense_s(learnt.provenance.prompts),
        # of masks, where the method's learner takes a vote on them
        mask_agreement=agreement,
        mask_iou=None
        if arm.query_stride == 1
        else mask_iou(method, _from_all_queries(context, arm), learnt.provenance),
        plan_memory_bytes=learnt.nbytes(),
        density=method.mean_density() if isinstance(method, Foreseen) else None,
    )
