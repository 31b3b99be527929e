"""Attention inputs that were captured from a real model, in place of a model that is run."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import torch

from calibatt.bench.observers import Probe
from calibatt.calibration.captures import captures_in
from calibatt.kernels.geometry import Geometry
from calibatt.methods.call import Attention
from calibatt.methods.learning import Origin

_NO_VIDEOS = "captured calls are no whole videos"


def captured_steps(folder: Path, geometry: Geometry, steps: Collection[int] | None) -> int:
    """Denoising steps of the video that calls were captured from.

    Args:
        folder: of the captured calls.
        geometry: of the model that is asked for.
        steps: that are asked for; None for whatever they are of.

    Raises:
        ValueError: the folder has no usable calls, or they are of another size or number of steps.
    """
    site = captures_in(folder)[0].site
    theirs = site.geometry
    # text is as long as the prompt was
    if (theirs.grid, theirs.heads, theirs.head_dim) != (geometry.grid, geometry.heads, geometry.head_dim):
        raise ValueError(
            f"--inputs captures={folder}: its calls are of {theirs}, not of {geometry}: give --models and "
            f"--resolutions of the model that they were captured from"
        )
    if steps is not None and tuple(steps) != (site.steps,):
        raise ValueError(
            f"--inputs captures={folder}: its calls are of a video of {site.steps} steps; leave out --steps"
        )
    return site.steps


class CapturedVideos:
    """Stands where videos do, and has a few calls of one.

    Args:
        folder: of the captured calls.
        resolution: name of the model's resolution.
        guidance: of the model.

    Raises:
        ValueError: the folder has no usable calls.
    """

    def __init__(self, folder: Path, *, resolution: str, guidance: float) -> None:
        self._calls = captures_in(folder)
        first = self._calls[0].site
        self.resolution = resolution
        self.geometry = first.geometry
        self.steps, self.layers = first.steps, first.layers
        self.guidance = guidance

    def origin(self) -> Origin:
        """The pipeline that they were captured from."""
        return self._calls[0].origin

    def sigmas(self, prompt: str) -> tuple[float, ...]:
        """Calls are of a few steps, and the others' noise levels are unknown.

        Raises:
            ValueError: always.
        """
        raise ValueError(_NO_VIDEOS)

    @property
    def inputs(self) -> str:
        """Where the inputs come from, for the record."""
        return f"captured from {self.origin().model}, {len(self._calls)} calls"

    def probes(self, device: torch.device, dtype: torch.dtype) -> tuple[Probe, ...]:
        """The calls.

        Args:
            device, dtype: of their tensors.

        Raises:
            ValueError: a file is gone or damaged.
        """
        found = []
        for one in self._calls:
            q, k, v = one.load(device, dtype)
            found.append(Probe(site=one.site, q=q, k=k, v=v))
        return tuple(found)

    def show(
        self,
        attention: Attention,
        *,
        prompts: Sequence[str],
        seed: int,
        after_step: Callable[[], object] = lambda: None,
    ) -> None:
        """There is no video.

        Raises:
            ValueError: always.
        """
        raise ValueError(_NO_VIDEOS)
