"""Dense videos to learn from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from calibatt.kernels.geometry import Geometry
from calibatt.methods.call import Attention
from calibatt.methods.learning import Origin
from calibatt.methods.site import Site
from calibatt.models.adapter import installed
from calibatt.models.entry import ModelEntry
from calibatt.models.generate import generate_all
from calibatt.models.identity import origin_of, transformers_of
from calibatt.models.steps import noise_level


@runtime_checkable
class Videos(Protocol):
    """Videos whose attention calls can be watched.

    Attributes:
        resolution: name of the model's resolution.
        geometry: layout of the tokens of every call, with the most text tokens that a prompt can have.
        steps, layers: of every video.
        guidance: classifier-free guidance scale.
    """

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

    def origin(self) -> Origin:
        """Whose videos these are."""
        ...

    def sigmas(self, prompt: str) -> tuple[float, ...]:
        """Noise level of each step, 1 is pure noise.

        Args:
            prompt: any that a video can be made of.

        Raises:
            ValueError: as `show`.
        """
        ...

    def show(
        self,
        attention: Attention,
        *,
        prompts: Sequence[str],
        seed: int,
        after_step: Callable[[], object] = lambda: None,
    ) -> Float[Tensor, "prompts 3 frames height width"] | None:
        """Make videos side by side, all of whose self-attention calls go to `attention`.

        Args:
            attention: called at every step and layer, for one video after the other.
            prompts: what to show.
            seed: prompt i starts from noise of seed + i.
            after_step: called when a step of all is done.

        Returns:
            The videos, values in [-1, 1]; None where what the attention computes does not enter them.

        Raises:
            ValueError: a prompt is empty or not in the model's language, or the pipeline cannot be watched.
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
        self.resolution = resolution
        self.geometry = entry.geometry(resolution)
        self.steps = entry.steps_at(resolution) if steps is None else steps
        self.layers = entry.layers
        self.guidance = entry.guidance if guidance is None else guidance
        self._entry = entry
        self._pipe = pipe

    def origin(self) -> Origin:
        """The pipeline's identity."""
        return origin_of(self._pipe, self._entry.name)

    def sigmas(self, prompt: str) -> tuple[float, ...]:
        """What the scheduler says once the pipeline has set it, which each does in its own way: a video is begun."""
        with suppress(_Begun):
            self.show(_AtFirstCall(), prompts=(prompt,), seed=0)
        return tuple(noise_level(self._pipe.scheduler, step) for step in range(self.steps))

    def show(
        self,
        attention: Attention,
        *,
        prompts: Sequence[str],
        seed: int,
        after_step: Callable[[], object] = lambda: None,
    ) -> Float[Tensor, "prompts 3 frames height width"]:
        """Videos by `generate_all`; the arguments are those of `Videos.show`.

        Raises:
            ValueError: a prompt is empty or not in the model's language, the pipeline is of an unknown family, or a
                cache of Diffusers is on.
        """
        if any(getattr(transformer, "is_cache_enabled", False) for transformer in transformers_of(self._pipe)):
            raise ValueError(
                "the pipeline skips layers by a cache of Diffusers, so there is nothing to learn at them: "
                "call pipe.transformer.disable_cache() first"
            )
        with installed(self._pipe, attention):
            return generate_all(
                self._entry, self._pipe, prompts=prompts, resolution=self.resolution, seed=seed, steps=self.steps,
                guidance=self.guidance, after_step=after_step,
            )  # fmt: skip


class _Begun(Exception):
    """A video has begun."""


class _AtFirstCall:
    """Ends a video at its first attention call."""

    def start_video(self) -> None:
        """A new video."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, site: Site) -> Tensor:
        raise _Begun
