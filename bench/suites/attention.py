"""The attention suite: attention calls of one real generation, each phase apart, all arms in turns."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

from calibatt.bench.arms import Ready, failed, first_of_layers, passed, ready
from calibatt.bench.cells import DENSE, AnyArm, Arm, Cell
from calibatt.bench.context import Context
from calibatt.bench.failure import Failure
from calibatt.bench.meter import Meter
from calibatt.bench.observers import Probe
from calibatt.bench.options import Options, method_cells
from calibatt.bench.record import Record, Suite
from calibatt.bench.rounds import take_turns
from calibatt.bench.suites.suite import Job
from calibatt.bench.telemetry import disturbance, load, read, throttled
from calibatt.bench.timer import timed

NAME: Suite = "attention"

# a layer's attention takes milliseconds: enough rounds for an interval of a few percent
ROUNDS = 20
# at a large model's size it takes a hundred times as long, and varies less
_FEW_ROUNDS = 10


@dataclass(slots=True, kw_only=True, eq=False)
class _Course:
    """What an arm has done so far, seconds of one call."""

    one: Ready
    meter: Meter
    seconds: list[float] = field(default_factory=list)
    phases: dict[str, list[float]] = field(default_factory=dict)
    throttled: bool | None = None


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
    yield from run(context, list(wanted), rounds=_FEW_ROUNDS if job.workload.large else ROUNDS)


def run(context: Context, arms: Sequence[Arm], *, rounds: int) -> Iterator[tuple[Arm, Record]]:
    """Check arms, and time those that are right.

    Args:
        context: what they share.
        arms: dense among them.
        rounds: samples of an arm, after one round that warms up.
    """
    courses: dict[Arm, _Course] = {}
    for arm in arms:
        context.log(f"checking {arm}")
        one = ready(context, arm)
        if isinstance(one, Failure):
            yield arm, failed(context, NAME, arm, one)
        else:
            courses[arm] = _Course(one=one, meter=Meter(one.method, one.kernel, context.device))
    context.log(f"timing attention, {rounds} rounds of {len(courses)} arms")
    before = load(context.device)
    failures = take_turns(list(courses), rounds + 1, lambda round_, arm: _turn(context, courses[arm], round_))
    # they took turns: what disturbed one disturbed all
    disturbed = disturbance(before, load(context.device))
    dense = None if DENSE in failures else courses.get(DENSE)
    for arm, course in courses.items():
        if arm in failures:
            yield arm, failed(context, NAME, arm, failures[arm])
        else:
            yield arm, _record(context, course, None if arm == DENSE or dense is None else dense, disturbed)


def _turn(context: Context, course: _Course, round_: int) -> None:
    meter, calls = course.meter, len(context.probes)
    # what a method does at the first call of a video alone is not counted as every call's
    meter.start_video()
    _calls(meter, first_of_layers(context.probes))
    meter.timer.collect_s()
    total, _ = timed(context.device, partial(_calls, meter, context.probes))
    parts = meter.timer.collect_s()
    # the first round warms up
    if round_:
        course.throttled = throttled(course.throttled, read(context.device))
        course.seconds.append(total / calls)
        for name, part in parts.items():
            course.phases.setdefault(name, []).append(part / calls)


def _calls(meter: Meter, probes: Sequence[Probe]) -> None:
    for probe in probes:
        meter(probe.q, probe.k, probe.v, probe.site)


def _record(context: Context, course: _Course, dense: _Course | None, disturbed: float | None) -> Record:
    one = course.one
    density = statistics.mean(plan.density().mean().item() for plan in one.plans)
    operations = context.probes[0].site.geometry.operations * density
    return Record(
        **passed(context, NAME, one),
        samples_s=tuple(course.seconds),
        baseline_samples_s=None if dense is None else tuple(dense.seconds),
        phases_s={name: tuple(samples) for name, samples in course.phases.items()},
        tflops=operations / statistics.median(course.phases["attend"]) / 1e12,
        method_error=one.truth.method_error if context.faithful else None,
        error_calls=len(context.probes) if context.faithful else None,
        plan_memory_bytes=max(plan.nbytes() for plan in one.plans),
        density=density,
        throttled=throttled(course.throttled, dense.throttled if dense else None),
        disturbed=disturbed,
    )
