"""Dense videos to learn from, and what watching them costs."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import torch

from calibatt.kernels.base import Attender
from calibatt.kernels.geometry import Geometry
from calibatt.methods.base import Planner
from calibatt.models.adapter import attached
from calibatt.models.catalogue import ModelEntry, weights_digest
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


@runtime_checkable
class Videos(Protocol):
    """Dense videos whose attention calls can be watched.

    Attributes:
        model: name in the catalogue.
        resolution: name of the model's resolution.
        geometry: layout of the tokens of every call.
        steps, layers: of every video.
        guidance: of the generations.
    """

    @property
    def model(self) -> str: ...
    @property
    def resolution(self) -> str: ...
    @property
    def geometry(self) -> Geometry: ...
    @property
    def steps(self) -> int: ...
    @property
    def layers(self) -> int: ...
    @property
    def guidance(self) -> float: ...

    def weights(self) -> str:
        """Digest of the model's weights."""
        ...

    def show(
        self, planner: Planner, attender: Attender, *, prompts: Sequence[str], seed: int, progress: bool = False
    ) -> float:
        """Make one video a prompt, whose attention calls planner and attender see; returns the seconds of all.

        Args:
            planner, attender: take notes and compute dense attention.
            prompts: any number but none.
            seed: prompt i starts from noise of seed + i.
            progress: whether to show a progress bar over prompts × steps on stderr.

        Raises:
            ValueError: there is no prompt, or one is empty or not in the model's language.
        """
        ...


class DenseVideos:
    """Videos of a model's own pipeline.

    Args:
        entry, pipe: the model and its loaded pipeline.
        resolution: name of one of the model's resolutions.
        steps, guidance: the model's defaults where None.
    """

    def __init__(
        self,
        entry: ModelEntry,
        pipe: Any,
        *,
        resolution: str,
        steps: int | None = None,
        guidance: float | None = None,
    ) -> None:
        self.model = entry.name
        self.resolution = resolution
        self.geometry = entry.geometry(resolution)
        self.steps = entry.steps_at(resolution) if steps is None else steps
        self.layers = entry.layers
        self.guidance = entry.guidance if guidance is None else guidance
        self._entry = entry
        self._pipe = pipe

    def weights(self) -> str:
        """Digest of the pipeline's weights."""
        return weights_digest(self._pipe)

    def show(
        self, planner: Planner, attender: Attender, *, prompts: Sequence[str], seed: int, progress: bool = False
    ) -> float:
        """As `Videos` has it."""
        from tqdm import tqdm

        if not prompts or not all(map(str.strip, prompts)):
            raise ValueError("give at least one prompt to calibrate on, and no empty ones")
        with tqdm(total=len(prompts) * self.steps, desc="calibrating", unit="step", disable=not progress) as bar:
            start = time.perf_counter()
            with attached(self._pipe, planner, attender):
                for number, prompt in enumerate(prompts):
                    generate(
                        self._entry, self._pipe, prompt=prompt, resolution=self.resolution, seed=seed + number,
                        steps=self.steps, guidance=self.guidance, after_step=bar.update,
                    )  # fmt: skip
            return time.perf_counter() - start


def _now(device: torch.device) -> float:
    """Seconds, once the device has done what it was asked to."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
