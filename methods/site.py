"""Where an attention call happens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from calibatt.kernels.geometry import Geometry

Branch = Literal["cond", "uncond"]
BRANCHES: tuple[Branch, ...] = get_args(Branch)


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
        ValueError: step or layer lies outside its range, or there is no such branch.
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
        if self.branch not in BRANCHES:
            raise ValueError(f"branch {self.branch!r} is none of {', '.join(BRANCHES)}")

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
