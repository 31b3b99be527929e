"""Readies an arm: builds it, lets it plan the probes, and checks its output before anything is timed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from calibatt.bench.accuracy import Truth, judge
from calibatt.bench.cells import DENSE, Arm
from calibatt.bench.meter import Probe
from calibatt.bench.record import Outcome, Record, Suite
from calibatt.bench.stage import Stage
from calibatt.kernels.base import Kernel, Task, Unsupported
from calibatt.kernels.catalogue import KERNELS
from calibatt.kernels.default import ran_on
from calibatt.kernels.plan import Plan
from calibatt.methods.base import Planner

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Ready:
    """An arm that may be timed.

    Args:
        arm: which one.
        method, kernel: built.
        plans: the method's plans on the stage's probes, after one call at the first of every layer.
        truth: how it did on them.
    """

    arm: Arm
    method: Planner
    kernel: Kernel
    plans: tuple[Plan, ...]
    truth: Truth

    @property
    def block(self) -> tuple[int, int] | None:
        """Tokens of a query and of a key block, where the arm has blocks of one size."""
        return block_of(self.plans)


@dataclass(frozen=True, slots=True)
class Failure:
    """Why something has no times."""

    outcome: Outcome
    reason: str


def ready(stage: Stage, arm: Arm) -> Ready | Failure:
    """Build an arm and check it on the probes."""
    return guarded(lambda: _ready(stage, arm))


def _ready(stage: Stage, arm: Arm) -> Ready | Failure:
    method = stage.method(arm)
    if isinstance(method, Unsupported):
        return Failure("unsupported", method.reason)
    kernel = stage.dense if arm == DENSE else KERNELS[arm.kernel]
    plans: list[Plan] = []

    def planned() -> Iterator[Plan]:
        # each after the kernel has run the one before: some methods go by what it found
        for probe in stage.probes:
            plans.append(_accepted(method, kernel, probe))
            yield plans[-1]

    try:
        method.reset()
        for first in first_of_layers(stage.probes):
            kernel.attend(first.q, first.k, first.v, _accepted(method, kernel, first))
        truth = judge(planned(), kernel, stage.probes, stage.dense_truth, stage.checked_heads)
    except _Refused as refused:
        return Failure("unsupported", str(refused))
    if not truth.right:
        return Failure(
            "wrong",
            f"its largest error against fp64 is {truth.kernel_error:.3g}, allowed {truth.kernel_error_budget:.3g}",
        )
    return Ready(arm=arm, method=method, kernel=kernel, plans=tuple(plans), truth=truth)


def first_of_layers(probes: Sequence[Probe]) -> list[Probe]:
    """The first probe of every layer: after a call at each, no later one is the first of a video."""
    layers: dict[int, Probe] = {}
    for probe in probes:
        layers.setdefault(probe.site.layer, probe)
    return list(layers.values())


class _Refused(Exception):
    """A kernel does not take a plan; the message is its reason."""


def _accepted(method: Planner, kernel: Kernel, probe: Probe) -> Plan:
    plan = method.plan(probe.q[0], probe.k[0], probe.site)
    refusal = kernel.refusal(Task.of(probe.q, plan))
    if refusal is not None:
        raise _Refused(refusal.reason)
    return plan


def guarded(work: Callable[[], _T]) -> _T | Failure:
    """The work's result; running out of memory or raising is a failure with its reason, so that other arms go on."""
    try:
        return work()
    except torch.OutOfMemoryError as error:
        return Failure("out_of_memory", str(error).splitlines()[0])
    except Exception as error:
        return Failure("failed", f"{type(error).__name__}: {error}")


def block_of(plans: tuple[Plan, ...]) -> tuple[int, int] | None:
    """Block size of the first plan that has a mask; None where its blocks differ in size."""
    return next((plan.mask.block for plan in plans if plan.mask is not None), None)


def facts(stage: Stage, suite: Suite, arm: Arm) -> dict[str, Any]:
    """The fields of a record that say what was run."""
    return {
        **stage.facts(),
        "suite": suite,
        "method": arm.method,
        "preset": arm.preset,
        "mode": arm.mode,
        "target_density": arm.density,
        "target_psnr_db": arm.psnr_db,
        "dense_steps": None if arm.dense_first is None else arm.dense_first[0],
        "dense_layers": None if arm.dense_first is None else arm.dense_first[1],
        "block_choice": arm.block_choice,
        "kernel": stage.dense.name if arm == DENSE else arm.kernel,
        "baseline": None if arm == DENSE else stage.dense.name,
    }


def failed(stage: Stage, suite: Suite, arm: Arm, failure: Failure) -> Record:
    """The record of an arm without times."""
    return Record(**facts(stage, suite, arm), outcome=failure.outcome, reason=failure.reason)


def passed(stage: Stage, suite: Suite, one: Ready) -> dict[str, Any]:
    """The fields of a record of an arm that was checked and timed, as far as all suites share them."""
    tasks = [Task.of(probe.q, plan) for probe, plan in zip(stage.probes, one.plans, strict=True)]
    return {
        **facts(stage, suite, one.arm),
        "outcome": "ok",
        "ran_on": ran_on(one.kernel, tasks),
        "block": one.block,
        "recall": one.truth.recall,
        "kernel_error": one.truth.kernel_error,
        "kernel_error_budget": one.truth.kernel_error_budget,
        "method_error": one.truth.method_error,
        "preparation_s": stage.preparation_s(one.arm),
        "checked_heads": len(stage.checked_heads),
    }
