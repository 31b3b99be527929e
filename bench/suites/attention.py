"""The attention suite: attention calls of one real generation, each phase apart, all arms in turns."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from functools import partial

from calibatt.bench.arms import Ready, failed, first_of_layers, passed, ready
from calibatt.bench.cells import DENSE, AnyArm, Arm, Cell
from calibatt.bench.context import Context
from calibatt.bench.failure import Failure
from calibatt.bench.meter import Meter
from calibatt.bench.observers import Probe
from calibatt.bench.options import Options, method_cells
from calibatt.bench.record import Record, Suite
from calibatt.bench.sampling import Course, Goal, Sample, take_samples
from calibatt.bench.suites.suite import Job
from calibatt.bench.timer import timed

NAME: Suite = "attention"

# at least; a layer's attention takes milliseconds: enough rounds for an interval of a few percent
ROUNDS = 20
# at a large model's size it takes a hundred times as long, and varies less
_FEW_ROUNDS = 10


def cells(options: Options) -> list[Cell]:
    """Every arm on every workload that has attention inputs.

    Raises:
        ValueError: an option makes no sense.
    """
    return method_cells(options)


def measure(job: Job, arms: Sequence[AnyArm]) -> Iterator[tuple[AnyArm, Record]]:
    """Time one attention call, planning included, as the mean over the probes; paired with dense."""
    context = job.open()
    # the baseline is measured even where nobody asked to see it
    wanted = dict.fromkeys([DENSE, *(arm for arm in arms if isinstance(arm, Arm))])
    least = _FEW_ROUNDS if job.workload.large else ROUNDS
    yield from run(context, list(wanted), goal=job.goal(least))


def run(context: Context, arms: Sequence[Arm], *, goal: Goal) -> Iterator[tuple[Arm, Record]]:
    """Check arms, and time those that are right.

    Args:
        context: what they share.
        arms: dense among them.
        goal: when an arm has samples enough.
    """
    found: dict[Arm, Ready] = {}
    for arm in arms:
        context.log(f"checking {arm}")
        one = ready(context, arm)
        if isinstance(one, Failure):
            yield arm, failed(context, NAME, arm, one)
        else:
            found[arm] = one
    context.log(f"timing attention, {goal} of {len(found)} arms")
    meters = {arm: Meter(one.method, one.kernel, context.device) for arm, one in found.items()}
    taken = take_samples(list(found), lambda arm: _turn(context, meters[arm]), goal, context.device, partner=DENSE)
    for arm, course in taken.items():
        if isinstance(course, Failure):
            yield arm, failed(context, NAME, arm, course)
        else:
            yield arm, _record(context, found[arm], course)


def _turn(context: Context, meter: Meter) -> Sample:
    calls = len(context.probes)
    # what a method does at the first call of a video alone is not counted as every call's
    meter.start_video()
    _calls(meter, first_of_layers(context.probes))
    meter.timer.collect_s()
    total, _ = timed(context.device, partial(_calls, meter, context.probes))
    parts = meter.timer.collect_s()
    return Sample(seconds=total / calls, phases={name: part / calls for name, part in parts.items()})


def _calls(meter: Meter, probes: Sequence[Probe]) -> None:
    for probe in probes:
        meter(probe.q, probe.k, probe.v, probe.site)


def _record(context: Context, one: Ready, course: Course) -> Record:
    density = statistics.mean(plan.density().mean().item() for plan in one.plans)
    operations = context.probes[0].site.geometry.operations * density
    return Record(
        **passed(context, NAME, one),
        **course.facts(),
        tflops=operations / statistics.median(course.phases["attend"]) / 1e12,
        method_error=one.truth.method_error if context.faithful else None,
        error_calls=len(context.probes) if context.faithful else None,
        plan_memory_bytes=max(plan.nbytes() for plan in one.plans),
        density=density,
    )
