"""The kernel suite: kernels by themselves, at a model's geometry, over densities, blocks and masks."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from calibatt.bench import permutation
from calibatt.bench.accuracy import spot_error
from calibatt.bench.baseline import fastest_dense
from calibatt.bench.cells import DENSE, AnyArm, Arm, BlockArm, Cell, PermutationArm, Workload
from calibatt.bench.console import Console
from calibatt.bench.failure import Failure, guarded
from calibatt.bench.masks import make_plan
from calibatt.bench.opening import probes_of
from calibatt.bench.options import Options
from calibatt.bench.record import Record, Suite
from calibatt.bench.rounds import take_turns
from calibatt.bench.suites.suite import Job
from calibatt.bench.telemetry import disturbance, load, read, throttled
from calibatt.bench.timer import PhaseTimer, timed
from calibatt.kernels.base import Kernel, Task
from calibatt.kernels.catalogue import KERNELS
from calibatt.kernels.default import ran_on
from calibatt.kernels.expand import block_lists
from calibatt.kernels.plan import Plan
from calibatt.methods.energy import block_energy
from calibatt.models.shapes.entry import SHAPES

NAME: Suite = "kernel"

# half of the attention suite's: at 720p a dense call takes as long as a hundred rounds of the embedded model
ROUNDS = 10
# side of the square matrices whose product is the roofline: large enough for a device's full rate
_GEMM = {"cuda": 8192, "cpu": 2048}
_GEMM_ROUNDS = 5
# of the video whose attention captured masks are made of: the embedded model's own number at its quick size
_CAPTURED_STEPS = SHAPES.steps_at("quick")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Ready:
    """An arm that was checked and may be timed."""

    kernel: Kernel
    plan: Plan
    first_call_s: float | None
    error: float
    budget: float


@dataclass(slots=True, kw_only=True, eq=False)
class _Course:
    """What an arm has done so far; `throttled` is None where nothing can tell."""

    one: _Ready
    seconds: list[float] = field(default_factory=list)
    phases: dict[str, list[float]] = field(default_factory=dict)
    throttled: bool | None = None


class _Bench:
    """Inputs, baseline and roofline that the arms of one geometry share."""

    def __init__(self, workload: Workload, console: Console) -> None:
        self.workload = workload
        self.geometry = workload.entry.geometry(workload.resolution)
        self._console = console
        generator = torch.Generator(workload.device).manual_seed(workload.seed)
        # tokens before heads in memory, as models hand them over
        shape = (1, self.geometry.tokens, self.geometry.heads, self.geometry.head_dim)
        self.q, self.k, self.v = (
            torch.randn(shape, generator=generator, device=workload.device, dtype=workload.dtype).transpose(1, 2)
            for _ in range(3)
        )
        self.dense = fastest_dense(self.q, self.k, self.v, self.geometry, log=self.log)
        self.gemm_tflops = _gemm_tflops(workload.device, workload.dtype)

    def log(self, line: str) -> None:
        self._console.line(f"{self.workload}: {line}")

    def ready(self, arm: Arm | BlockArm) -> _Ready | Failure:
        """Plan an arm and check its kernel."""
        self.log(f"checking {arm} on {arm.kernel}")
        return guarded(lambda: self._ready(arm))

    def _ready(self, arm: Arm | BlockArm) -> _Ready | Failure:
        kernel = self.dense if isinstance(arm, Arm) else KERNELS[arm.kernel]
        block = None if isinstance(arm, Arm) else arm.block
        device, dtype = self.workload.device, self.workload.dtype
        remainder = "none" if isinstance(arm, Arm) else arm.remainder
        task = Task(
            device=device, dtype=dtype, head_dim=self.geometry.head_dim, block=block, approximates=remainder != "none"
        )
        refusal = kernel.refusal(task)
        if refusal is not None:
            return Failure("unsupported", refusal.reason)
        plan = Plan.dense(self.geometry)
        if isinstance(arm, BlockArm) and arm.mask is not None:
            plan = make_plan(arm.mask, arm.density, self.geometry, arm.block, lambda: self._captured).to(device)
            plan = replace(plan, remainder=arm.remainder)
        first = None
        # the choice of a baseline has called dense kernels before
        if isinstance(arm, BlockArm) and arm.mask is not None:
            first, _ = timed(device, lambda: kernel.attend(self.q, self.k, self.v, plan))
        error, budget = spot_error(kernel, self.q, self.k, self.v, plan)
        if not error <= budget:
            return Failure("wrong", f"its largest error against fp64 is {error:.3g}, allowed {budget:.3g}")
        return _Ready(kernel=kernel, plan=plan, first_call_s=first, error=error, budget=budget)

    @functools.cached_property
    def _captured(self) -> Float[Tensor, "maps q_blocks k_blocks"]:
        """Attention mass a block, of every head at the probes of one video of the embedded model; on the CPU."""
        workload = Workload(
            model=SHAPES.name,
            resolution=next(iter(SHAPES.resolutions)),
            steps=_CAPTURED_STEPS,
            device=self.workload.device,
        )
        assert SHAPES.captions is not None
        probes = probes_of(workload, SHAPES.captions(1, 0)[0])
        block_q, block_k = SHAPES.block
        maps = [block_energy(probe.q[0], probe.k[0], block_q=block_q, block_k=block_k) for probe in probes]
        return torch.cat(maps).float().cpu()

    def permutations(self, arms: Sequence[PermutationArm]) -> dict[PermutationArm, Record]:
        """Time permutations."""
        # they are Triton's wherever they run
        task = Task(device=self.workload.device, dtype=self.workload.dtype, head_dim=self.geometry.head_dim)
        refusal = KERNELS["triton"].refusal(task)
        if refusal is not None:
            return {arm: self.failed(arm, Failure("unsupported", refusal.reason)) for arm in arms}
        self.log(f"timing {len(arms)} permutations")
        return permutation.measure(arms, (self.q, self.k, self.v), self.geometry, self.facts, ROUNDS)

    def facts(self, arm: AnyArm) -> dict[str, Any]:
        """The fields of a record that say what was run."""
        facts = {**self.workload.facts(), **arm.facts(), "suite": NAME}
        if isinstance(arm, Arm):
            # a mode is a method's own matter
            return {**facts, "kernel": self.dense.name, "mode": None}
        return {"baseline": self.dense.name, **facts}

    def failed(self, arm: AnyArm, failure: Failure) -> Record:
        """The record of an arm without times."""
        return Record(**self.facts(arm), outcome=failure.outcome, reason=failure.reason)


def cells(options: Options) -> list[Cell]:
    """Every mask on every kernel at every model's geometry, and permutations; nothing where inputs are a model's.

    Raises:
        ValueError: an option makes no sense.
    """
    found: list[Cell] = []
    if options.planted or not options.whole:
        return found
    # the same geometry at another number of steps is the same
    bare = [replace(one, steps=0, layers=0, guidance=None) for one in options.workloads()]
    for workload in dict.fromkeys(bare):
        # a kernel by itself has no blocks of its own
        given = [block for block in options.blocks or () if block != "native"]
        arms: list[AnyArm] = [DENSE, *(PermutationArm(order=order) for order in options.orders or ())]
        for kernel in options.kernels:
            for density in options.densities:
                arms += _block_arms(kernel, density, given or [workload.block], options)
        found += [Cell(workload=workload, arm=arm) for arm in arms]
    return found


def _block_arms(kernel: str, density: float, blocks: Sequence[tuple[int, int]], options: Options) -> list[BlockArm]:
    if density == 1:
        return [BlockArm(kernel=kernel, density=density, mask=None, block=None)]
    return [
        BlockArm(kernel=kernel, density=density, mask=mask, block=block, remainder=remainder)
        for mask in options.masks
        for block in ([None] if mask == "rows" else blocks)
        # without a mask no block is left out
        for remainder in (["none"] if mask == "rows" else options.remainders)
    ]


def measure(job: Job, arms: Sequence[AnyArm]) -> Iterator[tuple[AnyArm, Record]]:
    """Time kernels in turns with the fastest dense one, and permutations with a copy."""
    bench = _Bench(job.workload, job.console)
    if moved := [arm for arm in arms if isinstance(arm, PermutationArm)]:
        yield from bench.permutations(moved).items()
    attending = [arm for arm in arms if not isinstance(arm, PermutationArm)]
    courses: dict[Arm | BlockArm, _Course] = {}
    for arm in dict.fromkeys((DENSE, *attending)):
        one = bench.ready(arm)
        if isinstance(one, Failure):
            yield arm, bench.failed(arm, one)
        else:
            courses[arm] = _Course(one=one)
    bench.log(f"timing {len(courses)} arms, {ROUNDS} rounds")
    timer = PhaseTimer(job.workload.device)
    before = load(job.workload.device)
    failures = take_turns(list(courses), ROUNDS + 1, lambda round_, arm: _turn(bench, courses[arm], timer, round_))
    # they took turns: what disturbed one disturbed all
    disturbed = disturbance(before, load(job.workload.device))
    dense = None if DENSE in failures else courses.get(DENSE)
    for arm, course in courses.items():
        if arm in failures:
            yield arm, bench.failed(arm, failures[arm])
        else:
            yield arm, _record(bench, arm, course, None if arm == DENSE or dense is None else dense, disturbed)


def _turn(bench: _Bench, course: _Course, timer: PhaseTimer, round_: int) -> None:
    """Time one call; lists that a kernel makes of a mask's bits are a part of it, and taken again by themselves."""
    one, device = course.one, bench.workload.device
    # what an arm that failed left in the timer
    timer.collect_s()
    timer.lead()
    start = time.perf_counter()
    with timer.phase("attend"):
        one.kernel.attend(bench.q, bench.k, bench.v, one.plan)
    launch = time.perf_counter() - start
    if one.plan.mask is not None and device.type == "cuda":
        with timer.phase("lists"):
            block_lists(one.plan)
    taken, state = timer.collect_s(), read(device)
    # the first round warms up
    if not round_:
        return
    course.seconds.append(taken.pop("attend"))
    # elsewhere the host computes itself
    if device.type == "cuda":
        for name, part in (*taken.items(), ("launch", launch)):
            course.phases.setdefault(name, []).append(part)
    course.throttled = throttled(course.throttled, state)


def _record(
    bench: _Bench, arm: Arm | BlockArm, course: _Course, dense: _Course | None, disturbed: float | None
) -> Record:
    one = course.one
    density = one.plan.density().mean().item()
    operations = bench.geometry.operations * density
    return Record(
        **bench.facts(arm),
        outcome="ok",
        ran_on=ran_on(one.kernel, [Task.of(bench.q, one.plan)]),
        samples_s=tuple(course.seconds),
        baseline_samples_s=None if dense is None else tuple(dense.seconds),
        phases_s={name: tuple(parts) for name, parts in course.phases.items()} or None,
        first_call_s=one.first_call_s,
        tflops=operations / statistics.median(course.seconds) / 1e12,
        gemm_tflops=bench.gemm_tflops,
        throttled=throttled(course.throttled, dense.throttled if dense else None),
        disturbed=disturbed,
        density=density,
        kernel_error=one.error,
        kernel_error_budget=one.budget,
        plan_memory_bytes=one.plan.nbytes(),
    )


def _gemm_tflops(device: torch.device, dtype: torch.dtype) -> float:
    """Rate of a large matrix product on this device: what a kernel of matrix products can hope for."""
    side = _GEMM[device.type]
    a, b = torch.randn((2, side, side), device=device, dtype=dtype)
    samples = [timed(device, lambda: a @ b)[0] for _ in range(_GEMM_ROUNDS + 1)]
    return 2 * side**3 / statistics.median(samples[1:]) / 1e12
