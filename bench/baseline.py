"""The baseline of every speedup: the fastest dense kernel that is right, by measurement."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from calibatt.bench.accuracy import spot_error
from calibatt.bench.timer import timed
from calibatt.kernels.base import Kernel, Task
from calibatt.kernels.catalogue import KERNELS
from calibatt.kernels.geometry import Geometry
from calibatt.kernels.plan import Plan

# timings of each dense kernel from which the fastest is chosen
_ROUNDS = 5
# `default` is one of the others, and `flex` gives a plan that keeps everything to torch's own choice: no kernels of
# their own. The math backend holds all scores at once and serves as a reference only.
_NO_BASELINE = ("default", "flex", "sdpa-math")


def dense_kernels(device: torch.device, dtype: torch.dtype, head_dim: int) -> list[Kernel]:
    """The kernels that may be a baseline on this machine.

    Args:
        device, dtype, head_dim: of the inputs.
    """
    task = Task(device=device, dtype=dtype, head_dim=head_dim)
    return [kernel for name, kernel in KERNELS.items() if name not in _NO_BASELINE and kernel.refusal(task) is None]


def fastest_dense(
    q: Float[Tensor, "1 heads tokens head_dim"],
    k: Float[Tensor, "1 heads tokens head_dim"],
    v: Float[Tensor, "1 heads tokens head_dim"],
    geometry: Geometry,
    *,
    log: Callable[[str], None],
) -> Kernel:
    """The fastest dense kernel on these inputs; one that is wrong or fails is left out, which a line says.

    Args:
        q, k, v: of one call.
        geometry: of the call.
        log: shows a line.

    Raises:
        RuntimeError: none is right.
    """
    plan = Plan.dense(geometry)
    there = dense_kernels(q.device, q.dtype, q.shape[-1])
    right = [kernel for kernel in there if _is_right(kernel, q, k, v, plan, log)]
    if not right:
        raise RuntimeError("no dense kernel gives correct results here, so there is no baseline")
    times: dict[str, list[float]] = {kernel.name: [] for kernel in right}
    for round_ in range(_ROUNDS + 1):
        for kernel in right:
            seconds, _ = timed(q.device, partial(kernel.attend, q, k, v, plan))
            # the first round warms up
            if round_:
                times[kernel.name].append(seconds)
    medians = {name: statistics.median(samples) for name, samples in times.items()}
    log(
        "dense attention of one layer takes "
        + ", ".join(f"{seconds * 1e3:.2f} ms ({name})" for name, seconds in medians.items())
    )
    return min(right, key=lambda kernel: medians[kernel.name])


def _is_right(kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, plan: Plan, log: Callable[[str], None]) -> bool:
    try:
        error, budget = spot_error(kernel, q, k, v, plan)
    except Exception as problem:
        log(f"{kernel.name} is left out as a baseline: {type(problem).__name__}: {problem}")
        return False
    if error > budget:
        figures = f"its largest error against fp64 is {error:.3g}, allowed {budget:.3g}"
        log(f"{kernel.name} is left out as a baseline: {figures}")
    return error <= budget
