"""The attention suite: attention calls of one real generation, each phase apart, all arms in turns."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from functools import partial

from calibatt.bench.arms import Ready, failed, first_of_layers, passed, ready
from calibatt.bench.cells import DENSE, Arm
from calibatt.bench.meter import Meter, Probe
from calibatt.bench.record import Record
from calibatt.bench.rounds import in_turns
from calibatt.bench.stage import Stage
from calibatt.bench.timer import timed

# a layer's attention takes milliseconds: enough rounds for an interval of a few percent
ROUNDS = 20
# at a large model's size it takes a hundred times as long, and varies less
_RESAMPLED_ROUNDS = 10


def measure(stage: Stage, arms: Sequence[Arm]) -> dict[Arm, Record]:
    """Time one attention call, planning included, as the mean over the stage's probes; paired with dense."""
    records: dict[Arm, Record] = {}
    rounds = _RESAMPLED_ROUNDS if stage.workload.resampled else ROUNDS
    meters: dict[Arm, tuple[Ready, Meter]] = {}
    for arm in arms:
        stage.log(f"{stage.workload}: checking {arm}")
        one = ready(stage, arm)
        if isinstance(one, Ready):
            meters[arm] = (one, Meter(one.method, one.kernel, stage.workload.device))
        else:
            records[arm] = failed(stage, "attention", arm, one)
    stage.log(f"{stage.workload}: timing attention, {rounds} rounds of {len(meters)} arms")
    seconds: dict[Arm, list[float]] = {arm: [] for arm in meters}
    phases: dict[Arm, dict[str, list[float]]] = {arm: {} for arm in meters}
    calls = len(stage.probes)
    # the first round warms up
    for round_, arm in in_turns(list(meters), rounds + 1):
        meter = meters[arm][1]
        # what a method does at the first call of a video alone is not counted as every call's
        meter.reset()
        _calls(meter, first_of_layers(stage.probes))
        meter.timer.collect_s()
        total, _ = timed(stage.workload.device, partial(_calls, meter, stage.probes))
        parts = meter.timer.collect_s()
        if round_:
            seconds[arm].append(total / calls)
            for name, part in parts.items():
                phases[arm].setdefault(name, []).append(part / calls)
    for arm, (one, _) in meters.items():
        density = statistics.mean(plan.density().mean().item() for plan in one.plans)
        operations = stage.probes[0].site.geometry.operations * density
        records[arm] = Record(
            **passed(stage, "attention", one),
            samples_s=tuple(seconds[arm]),
            baseline_samples_s=None if arm == DENSE else tuple(seconds[DENSE]),
            phases_s={name: tuple(samples) for name, samples in phases[arm].items()},
            tflops=operations / statistics.median(phases[arm]["attend"]) / 1e12,
            plan_memory_bytes=max(plan.nbytes() for plan in one.plans),
            density=density,
        )
    return records


def _calls(meter: Meter, probes: Sequence[Probe]) -> None:
    for probe in probes:
        meter.attend(probe.q, probe.k, probe.v, meter.plan(probe.q[0], probe.k[0], probe.site))
