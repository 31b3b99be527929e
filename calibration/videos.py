"""Dense videos to learn from, and what watching them costs."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from calibatt.kernels.base import Attender
from calibatt.methods.base import Planner
from calibatt.models.adapter import attached
from calibatt.models.catalogue import ModelEntry
from calibatt.models.generate import generate


class Stopwatch:
    """Adds up the seconds of what happens inside; a GPU has finished before and after."""

    def __init__(self) -> None:
        self.seconds = 0.0

    @contextmanager
    def counting(self, device: torch.device) -> Iterator[None]:
        """Count what happens inside."""
        start = _now(device)
        yield
        self.seconds += _now(device) - start


def dense_videos(
    entry: ModelEntry,
    pipe: Any,
    planner: Planner,
    attender: Attender,
    *,
    resolution: str,
    prompts: Sequence[str],
    seed: int,
    steps: int | None,
    guidance: float | None,
    progress: bool,
) -> float:
    """Generate one video a prompt, whose attention calls planner and attender see; returns the seconds of all.

    Args:
        entry, pipe: the model and its loaded pipeline.
        planner, attender: take notes and compute dense attention.
        resolution: name of one of the model's resolutions.
        prompts: any number but none.
        seed: prompt i starts from noise of seed + i.
        steps, guidance: the model's defaults where None.
        progress: whether to show a progress bar over prompts × steps on stderr.

    Raises:
        ValueError: there is no prompt, or one is empty or not in the model's language; an option is out of range.
    """
    from tqdm import tqdm

    if not prompts or not all(map(str.strip, prompts)):
        raise ValueError("give at least one prompt to calibrate on, and no empty ones")
    steps = entry.steps_at(resolution) if steps is None else steps
    with tqdm(total=len(prompts) * steps, desc="calibrating", unit="step", disable=not progress) as bar:
        start = time.perf_counter()
        with attached(pipe, planner, attender):
            for number, prompt in enumerate(prompts):
                generate(
                    entry, pipe, prompt=prompt, resolution=resolution, seed=seed + number, steps=steps,
                    guidance=guidance, after_step=bar.update,
                )  # fmt: skip
        return time.perf_counter() - start


def _now(device: torch.device) -> float:
    """Seconds, once the device has done what it was asked to."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
