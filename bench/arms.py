"""Readies an arm: builds it, lets it plan the probes, and checks its output before anything is timed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from calibatt.bench.accuracy import Truth, judge
from calibatt.bench.cells import DENSE, Arm
from calibatt.bench.context import Context
from calibatt.bench.failure import Failure, guarded
from calibatt.bench.observers import Probe
from calibatt.bench.record import Record, Suite
from calibatt.kernels.base import Kernel, Task, Unsupported
from calibatt.kernels.default import ran_on
from calibatt.kernels.plan import Plan
from calibatt.methods.base import Planner


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Ready:
    """An arm that may be timed.

    Args:
        arm: which one.
        method, kernel: built.
        plans: the method's plans on the probes, after one call at the first of every layer.
        truth: how it did on them.
        preparation_s: seconds of its offline part; None where it has none, or was made before.
    """

    arm: Arm
    method: Planner
    kernel: Kernel
    plans: tuple[Plan, ...]
    truth: Truth
    preparation_s: float | None

    @property
    def block(self) -> tuple[int, int] | None:
        """Tokens of a query and of a key block, where the arm has blocks of one size."""
        return block_of(self.plans)


def ready(context: Context, arm: Arm) -> Ready | Failure:
    """Build an arm and check it on the probes."""
    return guarded(lambda: _ready(context, arm))


def _ready(context: Context, arm: Arm) -> Ready | Failure:
    method = context.method(arm)
    if isinstance(method, Unsupported):
        return Failure("unsupported", method.reason)
    kernel = context.kernel(arm)
    plans: list[Plan] = []

    def planned() -> Iterator[Plan]:
        # each after the kernel has run the one before: some methods go by what it found
        for probe in context.probes:
            plans.append(_accepted(method, kernel, probe))
            yield plans[-1]

    try:
        method.reset()
        for first in first_of_layers(context.probes):
            kernel.attend(first.q, first.k, first.v, _accepted(method, kernel, first))
        truth = judge(planned(), kernel, context.probes, context.truth, context.checked_heads)
    except _Refused as refused:
        return Failure("unsupported", str(refused))
    if arm.remainder != "none" and all(plan.remainder == "none" for plan in plans):
        return Failure("unsupported", "it leaves out no block of the probes for which a mean could stand: no +tail")
    if not truth.right:
        return Failure(
            "wrong",
            f"its largest error against fp64 is {truth.kernel_error:.3g}, allowed {truth.kernel_error_budget:.3g}",
        )
    return Ready(
        arm=arm, method=method, kernel=kernel, plans=tuple(plans), truth=truth,
        preparation_s=context.preparation_s(method),
    )  # fmt: skip


def first_of_layers(probes: Sequence[Probe]) -> list[Probe]:
    """The first probe of every layer: after a call at each, no later one is the first of a video."""
    layers: dict[int, Probe] = {}
    for probe in probes:
        layers.setdefault(probe.site.layer, probe)
    return list(layers.values())


class _Refused(Exception):
    """A kernel does not take a plan; the message is its reason."""


def _accepted(method: Planner, kernel: Kernel, probe: Probe) -> Plan:
    plan = method.plan(probe.q[0], probe.k[0], probe.v[0], probe.site)
    refusal = kernel.refusal(Task.of(probe.q, plan))
    if refusal is not None:
        raise _Refused(refusal.reason)
    return plan


def block_of(plans: tuple[Plan, ...]) -> tuple[int, int] | None:
    """Block size of the first plan that has a mask; None where its blocks differ in size."""
    return next((plan.mask.block for plan in plans if plan.mask is not None), None)


def facts(context: Context, suite: Suite, arm: Arm) -> dict[str, Any]:
    """The fields of a record that say what was run.

    Args:
        context: what the arms of the workload share.
        suite: that measures.
        arm: what is measured.
    """
    dense = context.dense.name
    own = {"kernel": dense, "baseline": None} if arm == DENSE else {"baseline": dense}
    return {**context.facts, **arm.facts(), "suite": suite, **own}


def failed(context: Context, suite: Suite, arm: Arm, failure: Failure) -> Record:
    """The record of an arm without times.

    Args:
        context: what the arms of the workload share.
        suite: that measures.
        arm: what is measured.
        failure: why there are no times.
    """
    return Record(**facts(context, suite, arm), outcome=failure.outcome, reason=failure.reason)


def passed(context: Context, suite: Suite, one: Ready) -> dict[str, Any]:
    """The fields of a record of an arm that was checked and timed, as far as all suites share them.

    Args:
        context: what the arms of the workload share.
        suite: that measures.
        one: the arm, checked.
    """
    tasks = [Task.of(probe.q, plan) for probe, plan in zip(context.probes, one.plans, strict=True)]
    return {
        **facts(context, suite, one.arm),
        "outcome": "ok",
        "ran_on": ran_on(one.kernel, tasks),
        "block": one.block,
        "recall": one.truth.recall,
        "kernel_error": one.truth.kernel_error,
        "kernel_error_budget": one.truth.kernel_error_budget,
        "preparation_s": one.preparation_s,
        "checked_heads": len(context.checked_heads),
    }
