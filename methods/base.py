"""What a method is, and where it is asked."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from calibatt.kernels.base import Unsupported
from calibatt.kernels.geometry import Geometry
from calibatt.kernels.plan import Plan

Branch = Literal["cond", "uncond"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """Where one attention call happens.

    Args:
        geometry: layout of its tokens.
        step, steps: index of the denoising step (0 is the noisiest) and their number.
        sigma: noise level of the step, 1 is pure noise.
        branch: conditional or unconditional pass of classifier-free guidance.
        layer, layers: index of the transformer layer and their number.
        sample: which video of a batch; a method's state belongs to one sample of one branch.

    Raises:
        ValueError: step or layer lies outside its range.
    """

    geometry: Geometry
    step: int
    steps: int
    sigma: float
    branch: Branch
    layer: int
    layers: int
    sample: int = 0

    def __post_init__(self) -> None:
        if not (0 <= self.step < self.steps and 0 <= self.layer < self.layers):
            raise ValueError(f"step {self.step} of {self.steps} or layer {self.layer} of {self.layers} does not exist")

    def in_warmup(self, steps: float, layers: float = 0.0, *, whole: Callable[[float], int] = round) -> bool:
        """Whether it is in the first share of the steps, or of the layers: where many methods stay dense.

        Args:
            steps, layers: the shares.
            whole: makes them whole steps and layers, as the original does.
        """
        return self.step < whole(steps * self.steps) or self.layer < whole(layers * self.layers)

    def generator(self, seed: int, device: torch.device) -> torch.Generator:
        """What a method draws from here: the same for both branches and all samples, another at every step and layer.

        Nothing is kept between calls, and the global generator, which the video is made with, is not touched.
        """
        return torch.Generator(device).manual_seed((seed * self.steps + self.step) * self.layers + self.layer)


@runtime_checkable
class PlanSource(Protocol):
    """Something learnt offline that has a plan for every site; the calibration store is one."""

    def at(self, loss: float) -> PlanSource:
        """The same with masks that lose a multiple of the attention mass that those of 1 lose.

        Raises:
            ValueError: it has no masks for that loss.
        """
        ...

    def density(self, *, repetition: bool = True) -> Float[Tensor, "steps layers heads"]:
        """Computed fraction of the query-key products of every head at every site."""
        ...

    def plan(self, site: Site, *, repetition: bool = True) -> Plan:
        """The plan for a site; without repetition, a block mask for every head.

        Raises:
            ValueError: it was learnt for another model, geometry or number of steps.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Knob:
    """The one field of a method's config that trades density for fidelity, and the range to search it in.

    Args:
        field: name of the field.
        low, high: the range; density rises or falls monotonically along it.
        over_videos: whether the density of a call depends on the calls before, and shows in whole videos only.
    """

    field: str
    low: float
    high: float
    over_videos: bool = False


@runtime_checkable
class Planner(Protocol):
    """Anything that makes plans, site after site."""

    def plan(
        self,
        q: Float[Tensor, "heads tokens head_dim"],
        k: Float[Tensor, "heads tokens head_dim"],
        site: Site,
    ) -> Plan:
        """Decide what is computed at this site, for one sample; q and k are those that attention will see."""
        ...

    def reset(self) -> None:
        """Forget everything about the last video. Called at the start of each."""
        ...


@runtime_checkable
class Foreseen(Protocol):
    """A planner whose plans are known before any call."""

    def mean_density(self) -> float:
        """Of all plans of a video."""
        ...


@runtime_checkable
class Method(Planner, Protocol):
    """A published way to decide plans. Built as `cls(config)`, or `cls(config, source)` where offline.

    Class attributes:
        name: as in the catalogue.
        presets: named configs, each with its source; "default" is always one of them.
        offline: whether it is built with a PlanSource.
        knob: what to turn for a given density; None where there is nothing to turn.
        without_dense: settings with which the method itself keeps no step and no layer dense.
    """

    name: ClassVar[str]
    presets: ClassVar[Mapping[str, Any]]
    offline: ClassVar[bool]
    knob: ClassVar[Knob | None]
    without_dense: ClassVar[Mapping[str, Any]]

    def refusal(self, geometry: Geometry) -> Unsupported | None:
        """Why the method does not apply to a geometry, or None when it does."""
        ...
