"""The forward suite: one forward pass of a transformer of a model's shape, its weights random or planted.

What sparse attention brings to a whole model at a density, eager or compiled, without the model's weights. Random
weights have no structure, so masks are drawn and no method is asked; it is for time and memory, never for fidelity.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from calibatt.bench.accuracy import spot_error
from calibatt.bench.baseline import fastest_dense
from calibatt.bench.cells import DENSE, AnyArm, Arm, BlockArm, Cell
from calibatt.bench.failure import Failure, guarded
from calibatt.bench.masks import make_plan
from calibatt.bench.options import Options
from calibatt.bench.record import Record, Suite
from calibatt.bench.sampling import Course, Sample, take_samples
from calibatt.bench.suites.suite import Job
from calibatt.bench.timer import timed
from calibatt.kernels.base import Kernel, Task
from calibatt.kernels.catalogue import KERNELS
from calibatt.kernels.default import ran_on
from calibatt.kernels.geometry import Geometry
from calibatt.kernels.plan import HeadKind, Plan, RowReuse, anchor_rows
from calibatt.methods.base import Planner
from calibatt.methods.catalogue import build
from calibatt.methods.site import Site
from calibatt.models.adapter import restore, sparsify
from calibatt.models.compiled import compile_blocks
from calibatt.models.entry import ForwardPass
from calibatt.models.planted.pipeline import plant

NAME: Suite = "forward"

# at least, as of the kernel suite: one pass takes as long as a hundred rounds of the embedded model
ROUNDS = 10
# anchor rows of a frame that a head computes which reuses rows: the paper's, arXiv 2603.05503
_ANCHORS = 5
# those that need neither a video nor another kind of head
_PATTERNS = ("random", "even", "banded")


def cells(options: Options) -> list[Cell]:
    """Every mask on every kernel, eager and compiled, at every model and resolution; nothing without `--layers`.

    Raises:
        ValueError: an option makes no sense here.
    """
    if options.layers is None or not options.whole:
        return []
    if unfit := [pattern for pattern in options.masks if pattern not in _PATTERNS]:
        raise ValueError(f"--masks {unfit[0]}: a forward pass (--layers) takes {', '.join(_PATTERNS)}")
    found = []
    bare = [replace(one, steps=0, layers=options.layers, guidance=None) for one in options.workloads()]
    for workload in dict.fromkeys(bare):
        if workload.entry.untrained is None:
            continue
        blocks = [one for one in options.blocks or () if isinstance(one, tuple)] or [workload.block]
        arms = [
            BlockArm(kernel=kernel, density=density, mask=pattern, block=block, reused=reused)
            for kernel in options.kernels
            for pattern in options.masks
            for density in options.densities
            for block in blocks
            for reused in options.reused_heads
            if density < 1
        ]
        for how in options.compile:
            at = replace(workload, compiled=how != "no")
            every: list[AnyArm] = [DENSE, *arms]
            found += [Cell(workload=at, arm=arm) for arm in every]
    return found


class Drawn:
    """Plans for every layer, drawn beforehand: masks of one density, and row reuse in the first heads.

    Args:
        arm: density, block and share of the heads that reuse rows.
        geometry, layers: of the forward pass.
        device: where it runs.
    """

    def __init__(self, arm: BlockArm, geometry: Geometry, layers: int, device: torch.device) -> None:
        assert arm.mask is not None
        drawn = make_plan(arm.mask, arm.density, geometry, arm.block, _no_energy)
        count = round(arm.reused * geometry.heads)
        kinds: tuple[HeadKind, ...] = tuple("reused" if head < count else "masked" for head in range(geometry.heads))
        rows = geometry.grid[1]
        reuse = RowReuse.of_anchor_rows(geometry, anchor_rows(rows, min(_ANCHORS, rows - 1))) if count else None
        # one mask for all layers: what is random in one is random in the next
        self.plans = [replace(drawn, kinds=kinds, reuse=reuse).to(device)] * layers

    def plan(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, site: Site) -> Plan:
        """The layer's."""
        return self.plans[site.layer]

    def reset(self) -> None:
        """There is no state."""


def _no_energy() -> Any:
    raise AssertionError("random masks need no attention")


@dataclass(slots=True, kw_only=True, eq=False)
class _Ready:
    """An arm that was checked, and the memory that it has taken."""

    planner: Planner
    kernel: Kernel
    plan: Plan
    error: float
    budget: float
    peak_memory_bytes: int | None = None


class _Model:
    """The forward pass that the arms of one workload share, and the fastest dense kernel at its geometry."""

    def __init__(self, job: Job) -> None:
        workload = job.workload
        assert workload.entry.untrained is not None
        self.workload = workload
        self._console = job.console
        self.geometry = workload.entry.geometry(workload.resolution)
        self.log(f"making {workload.layers} layers with {workload.facts()['weights']} weights")
        self.one: ForwardPass = workload.entry.untrained(
            self.geometry, workload.layers, workload.device, workload.dtype
        )
        if workload.planted:
            plant(workload.entry, self.one.pipe.transformer)
        if workload.compiled:
            compile_blocks(self.one.pipe.transformer)
        shape = (1, self.geometry.tokens, self.geometry.heads, self.geometry.head_dim)
        generator = torch.Generator(workload.device).manual_seed(workload.seed)
        # tokens before heads in memory, as models hand them over
        self.q, self.k, self.v = (
            torch.randn(shape, generator=generator, device=workload.device, dtype=workload.dtype).transpose(1, 2)
            for _ in range(3)
        )
        self.dense = fastest_dense(self.q, self.k, self.v, self.geometry, log=self.log)

    def log(self, line: str) -> None:
        """Show a line."""
        self._console.line(f"{self.workload}: {line}")

    def ready(self, arm: Arm | BlockArm) -> _Ready | Failure:
        """Draw an arm's plans, check its kernel on one call, and run it once, which compiles what there is."""
        device = self.workload.device
        if isinstance(arm, Arm):
            planner: Planner = build("dense")
            kernel, plan = self.dense, Plan.dense(self.geometry)
        else:
            drawn = Drawn(arm, self.geometry, self.workload.layers, device)
            planner, kernel, plan = drawn, KERNELS[arm.kernel], drawn.plans[0]
        refusal = kernel.refusal(Task.of(self.q, plan))
        if refusal is not None:
            return Failure("unsupported", refusal.reason)
        error, budget = spot_error(kernel, self.q, self.k, self.v, plan)
        if not error <= budget:
            return Failure("wrong", f"its largest error against fp64 is {error:.3g}, allowed {budget:.3g}")
        one = _Ready(planner=planner, kernel=kernel, plan=plan, error=error, budget=budget)
        self.turn(one)
        return one

    def turn(self, one: _Ready) -> Sample:
        """One forward pass."""
        device = self.workload.device
        sparsify(self.one.pipe, one.planner, kernel=one.kernel)
        try:
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            seconds, out = timed(device, self.one.run)
            if not out.isfinite().all():
                raise ValueError("the output has NaN or infinite values")
            if device.type == "cuda":
                one.peak_memory_bytes = max(one.peak_memory_bytes or 0, torch.cuda.max_memory_allocated(device))
        finally:
            restore(self.one.pipe)
        return Sample(seconds=seconds)


def measure(job: Job, arms: Sequence[AnyArm]) -> Iterator[tuple[AnyArm, Record]]:
    """Time one forward pass with every arm, in turns; paired with dense."""
    model = _Model(job)
    found: dict[Arm | BlockArm, _Ready] = {}
    # the baseline is measured even where nobody asked to see it
    wanted: list[Arm | BlockArm] = [DENSE, *(one for one in arms if isinstance(one, BlockArm))]
    for arm in dict.fromkeys(wanted):
        model.log(f"checking {arm} on {arm.kernel}")
        one = guarded(partial(model.ready, arm))
        if isinstance(one, Failure):
            yield arm, Record(**_facts(model, arm), outcome=one.outcome, reason=one.reason)
        else:
            found[arm] = one
    goal = job.goal(ROUNDS)
    model.log(f"timing forward passes, {goal} of {len(found)} arms")
    taken = take_samples(list(found), lambda arm: model.turn(found[arm]), goal, job.workload.device, partner=DENSE)
    for arm, course in taken.items():
        if isinstance(course, Failure):
            yield arm, Record(**_facts(model, arm), outcome=course.outcome, reason=course.reason)
        else:
            yield arm, _record(model, arm, found[arm], course)


def _record(model: _Model, arm: Arm | BlockArm, one: _Ready, course: Course) -> Record:
    return Record(
        **_facts(model, arm),
        outcome="ok",
        ran_on=ran_on(one.kernel, [Task.of(model.q, one.plan)]),
        **course.facts(),
        kernel_error=one.error,
        kernel_error_budget=one.budget,
        density=statistics.mean(one.plan.density().tolist()),
        plan_memory_bytes=one.plan.nbytes(),
        peak_memory_bytes=one.peak_memory_bytes,
    )


def _facts(model: _Model, arm: Arm | BlockArm) -> dict[str, Any]:
    """The fields of a record that say what was run."""
    facts = {**model.workload.facts(), **arm.facts(), "suite": NAME}
    if isinstance(arm, Arm):
        return {**facts, "kernel": model.dense.name, "mode": None}
    return {"baseline": model.dense.name, **facts}
