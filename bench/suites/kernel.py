"""The kernel suite: kernels by themselves, at a model's geometry, over densities, blocks and masks."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from calibatt.bench import permutation
from calibatt.bench.accuracy import spot_error
from calibatt.bench.arms import Failure, guarded
from calibatt.bench.baseline import fastest_dense
from calibatt.bench.cells import DENSE, AnyArm, Arm, BlockArm, PermutationArm, Workload
from calibatt.bench.console import Console
from calibatt.bench.masks import make_plan
from calibatt.bench.record import Record
from calibatt.bench.rounds import in_turns
from calibatt.bench.stage import Stage
from calibatt.bench.telemetry import read
from calibatt.bench.timer import PhaseTimer, timed
from calibatt.kernels.base import Kernel, Task, dtype_name
from calibatt.kernels.catalogue import KERNELS
from calibatt.kernels.default import ran_on
from calibatt.kernels.expand import block_lists
from calibatt.kernels.plan import Plan
from calibatt.methods.energy import block_energy
from calibatt.models.catalogue import SHAPES

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


class _Bench:
    """Inputs, baseline and roofline that the arms of one geometry share."""

    def __init__(self, workload: Workload, console: Console) -> None:
        self.workload = workload
        self.geometry = workload.entry.geometry(workload.resolution)
        self._console = console
        generator = torch.Generator(workload.device).manual_seed(0)
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
        refusal = kernel.refusal(Task(device=device, dtype=dtype, head_dim=self.geometry.head_dim, block=block))
        if refusal is not None:
            return Failure("unsupported", refusal.reason)
        plan = Plan.dense(self.geometry)
        if isinstance(arm, BlockArm) and arm.mask is not None:
            plan = make_plan(arm.mask, arm.density, self.geometry, arm.block, lambda: self._captured).to(device)
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
        prompts = SHAPES.captions(1, 0)
        stage = Stage(workload, prompts, calibration_prompts=0, calibration=None, console=self._console)
        block_q, block_k = SHAPES.block
        maps = [block_energy(probe.q[0], probe.k[0], block_q=block_q, block_k=block_k) for probe in stage.probes]
        return torch.cat(maps).float().cpu()

    def moves(self, arms: Sequence[PermutationArm]) -> dict[AnyArm, Record]:
        """Time permutations."""
        # they are Triton's wherever they run
        task = Task(device=self.workload.device, dtype=self.workload.dtype, head_dim=self.geometry.head_dim)
        refusal = KERNELS["triton"].refusal(task)
        if refusal is not None:
            return {arm: Record(**self.facts(arm), outcome="unsupported", reason=refusal.reason) for arm in arms}
        self.log(f"timing {len(arms)} permutations")
        return permutation.measure(arms, (self.q, self.k, self.v), self.geometry, self.facts, ROUNDS)

    def facts(self, arm: AnyArm) -> dict[str, Any]:
        """The fields of a record that say what was run."""
        what: dict[str, Any]
        if isinstance(arm, Arm):
            what = {"method": arm.method, "preset": arm.preset, "kernel": self.dense.name, "baseline": None}
        elif isinstance(arm, PermutationArm):
            what = {"method": "permute", "preset": arm.order, "kernel": arm.kernel, "baseline": "copy"}
        else:
            what = {
                "method": "blocks", "preset": f"{arm.density:g}", "kernel": arm.kernel, "baseline": self.dense.name,
                "block": arm.block, "mask": arm.mask,
            }  # fmt: skip
        return {
            "suite": "kernel",
            "model": self.workload.model,
            "resolution": self.workload.resolution,
            "tokens": self.geometry.tokens,
            "heads": self.geometry.heads,
            "head_dim": self.geometry.head_dim,
            "dtype": dtype_name(self.workload.dtype),
            **what,
        }


def measure(workload: Workload, arms: Sequence[AnyArm], console: Console) -> dict[AnyArm, Record]:
    """Time kernels in turns with the fastest dense one; lists that a kernel makes of a mask's bits are its own time."""
    bench = _Bench(workload, console)
    records: dict[AnyArm, Record] = {}
    if moved := [arm for arm in arms if isinstance(arm, PermutationArm)]:
        records.update(bench.moves(moved))
    attending = [arm for arm in arms if not isinstance(arm, PermutationArm)]
    readied = {arm: bench.ready(arm) for arm in dict.fromkeys((DENSE, *attending))}
    timed_arms = {arm: one for arm, one in readied.items() if isinstance(one, _Ready)}
    bench.log(f"timing {len(timed_arms)} arms, {ROUNDS} rounds")
    timer = PhaseTimer(workload.device)
    seconds: dict[Arm | BlockArm, list[float]] = {arm: [] for arm in timed_arms}
    phases: dict[Arm | BlockArm, dict[str, list[float]]] = {arm: {} for arm in timed_arms}
    throttled: dict[Arm | BlockArm, bool] = dict.fromkeys(timed_arms, False)
    # the first round warms up
    for round_, arm in in_turns(list(timed_arms), ROUNDS + 1):
        one = timed_arms[arm]
        timer.lead()
        start = time.perf_counter()
        with timer.phase("attend"):
            one.kernel.attend(bench.q, bench.k, bench.v, one.plan)
        launch = time.perf_counter() - start
        if one.plan.mask is not None and workload.device.type == "cuda":
            with timer.phase("lists"):
                block_lists(one.plan)
        taken = timer.collect_s()
        state = read(workload.device)
        if round_:
            seconds[arm].append(taken.pop("attend"))
            # elsewhere the host computes itself
            if workload.device.type == "cuda":
                for name, part in (*taken.items(), ("launch", launch)):
                    phases[arm].setdefault(name, []).append(part)
            throttled[arm] |= state is not None and state.throttled
    for arm, result in readied.items():
        if isinstance(result, Failure):
            records[arm] = Record(**bench.facts(arm), outcome=result.outcome, reason=result.reason)
            continue
        density = result.plan.density().mean().item()
        operations = bench.geometry.operations * density
        records[arm] = Record(
            **bench.facts(arm),
            outcome="ok",
            ran_on=ran_on(result.kernel, [Task.of(bench.q, result.plan)]),
            samples_s=tuple(seconds[arm]),
            baseline_samples_s=None if arm == DENSE else tuple(seconds[DENSE]),
            phases_s={name: tuple(parts) for name, parts in phases[arm].items()} or None,
            first_call_s=result.first_call_s,
            tflops=operations / statistics.median(seconds[arm]) / 1e12,
            gemm_tflops=bench.gemm_tflops,
            throttled=throttled[arm] if workload.device.type == "cuda" else None,
            density=density,
            kernel_error=result.error,
            kernel_error_budget=result.budget,
            plan_memory_bytes=result.plan.nbytes(),
        )
    return records


def _gemm_tflops(device: torch.device, dtype: torch.dtype) -> float:
    """Rate of a large matrix product on this device: what a kernel of matrix products can hope for."""
    side = _GEMM[device.type]
    a, b = torch.randn((2, side, side), device=device, dtype=dtype)
    samples = [timed(device, lambda: a @ b)[0] for _ in range(_GEMM_ROUNDS + 1)]
    return 2 * side**3 / statistics.median(samples[1:]) / 1e12
