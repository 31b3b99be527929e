"""Which step of its denoising a pipeline is at, and how noisy it is, by what its scheduler says or does."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any


def step_index(pipe: Any, taken: int) -> int:
    """Index of the step that is under way, among all of the scheduler's.

    Args:
        pipe: a Diffusers pipeline.
        taken: steps of this video that its scheduler has taken; for schedulers that do not say where they are.
    """
    scheduler = pipe.scheduler
    for index in ("step_index", "begin_index"):
        if getattr(scheduler, index, None) is not None:
            return int(getattr(scheduler, index))
    # where a part of the steps is left out (video to video), these are the last ones
    all_steps = len(scheduler.timesteps)
    return all_steps - int(getattr(pipe, "num_timesteps", None) or all_steps) + taken


def noise_level(scheduler: Any, step: int) -> float:
    """Share of noise in the latents of a step, as flow matching counts it: 1 is pure noise."""
    if hasattr(scheduler, "sigmas"):
        sigma = float(scheduler.sigmas[step])
        if scheduler.config.get("use_flow_sigmas") or not hasattr(scheduler, "alphas_cumprod"):
            # Mochi's schedule counts from data to noise
            return 1 - sigma if scheduler.config.get("invert_sigmas") else sigma
        # noise beside data of weight 1, whatever the weights are scaled by
        return sigma / (1 + sigma)
    kept = float(scheduler.alphas_cumprod[int(scheduler.timesteps[step])])
    noise, data = math.sqrt(1 - kept), math.sqrt(kept)
    return noise / (noise + data)


def counting(step: Callable[..., Any], count: Callable[[], object]) -> Callable[..., Any]:
    """A scheduler's `step` that also counts; with the same signature, which pipelines look at."""

    @functools.wraps(step)
    def counted(*arguments: Any, **keywords: Any) -> Any:
        count()
        return step(*arguments, **keywords)

    return counted
