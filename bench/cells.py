"""What can be asked for: arms, workloads, and the cells of the table that they span."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

from calibatt.bench.masks import Pattern
from calibatt.kernels.catalogue import KERNELS
from calibatt.kernels.names import look_up
from calibatt.methods.catalogue import METHODS
from calibatt.models.catalogue import MODELS, ModelEntry
from calibatt.models.device import working_dtype

Mode = Literal["native", "equal_density"]
Order = Literal["tile", "token-major", "random"]
ORDERS: tuple[Order, ...] = ("tile", "token-major", "random")


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """A method on a kernel, as one thing to measure.

    Args:
        method, preset: names in the catalogue of methods.
        mode: the preset as it is, or with its knob turned for a density.
        density: the wanted density; None for CalibAtt's own, and in native mode.
        kernel: name of the sparse kernel; dense itself runs on whichever is fastest.
    """

    method: str
    preset: str
    mode: Mode
    kernel: str
    density: float | None = None

    @classmethod
    def parse(cls, text: str, kernel: str) -> Arm:
        """Read `method[/preset][=density]`, e.g. `radial/no-warmup=density` or `sparge=0.35`.

        Raises:
            UnknownName: there is no such method, preset or kernel.
            ValueError: a density is none, or is asked of a method that has no knob.
        """
        name, equal, wanted = text.partition("=")
        method, _, preset = name.partition("/")
        preset = preset or "default"
        found = look_up(METHODS, method, "method")
        look_up(found.presets, preset, f"preset of {method}")
        look_up(KERNELS, kernel, "kernel")
        if equal and found.knob is None:
            raise ValueError(f"{method} has no knob that changes its density: leave out {equal}{wanted}")
        if method == DENSE.method:
            return DENSE
        mode: Mode = "equal_density" if equal else "native"
        return cls(method=method, preset=preset, mode=mode, kernel=kernel, density=_density(text, wanted))

    def __str__(self) -> str:
        preset = "" if self.preset == "default" else f"/{self.preset}"
        density = "density" if self.density is None else f"{self.density:g}"
        return f"{self.method}{preset}{f'={density}' if self.mode == 'equal_density' else ''}"


def _density(text: str, wanted: str) -> float | None:
    if wanted in ("", "density"):
        return None
    try:
        density = float(wanted)
    except ValueError:
        density = math.nan
    if not 0 < density <= 1:
        raise ValueError(f"{text}: behind = stands `density`, for CalibAtt's, or a number above 0 and up to 1")
    return density


DENSE = Arm(method="dense", preset="default", mode="native", kernel="fastest")


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockArm:
    """A mask on a kernel, without a method, as one thing to measure.

    Args:
        kernel: name in the catalogue of kernels.
        density: share of the blocks to keep; 1 is the kernel's own dense path, which has no mask.
        mask: what the heads do; None at density 1.
        block: tokens of a query and of a key block; None at density 1, and where rows are reused in place of a mask.

    Raises:
        ValueError: the fields contradict each other.
    """

    kernel: str
    density: float
    mask: Pattern | None
    block: tuple[int, int] | None

    def __post_init__(self) -> None:
        whole = self.density == 1
        blockless = whole or self.mask == "rows"
        if not 0 < self.density <= 1 or (self.mask is None) != whole or (self.block is None) != blockless:
            raise ValueError(f"a density is above 0 and up to 1, and has mask and blocks below 1: got {self}")

    def __str__(self) -> str:
        if self.mask is None:
            return "all"
        block = "" if self.block is None else f"-{self.block[0]}x{self.block[1]}"
        return f"{self.mask}-{self.density:g}{block}"


@dataclass(frozen=True, slots=True, kw_only=True)
class MoveArm:
    """Queries, keys and values into another order, as one thing to measure; the baseline is a copy of them.

    Args:
        order: tiles of a video, the frames of one place after the other, or every head by lot.
    """

    order: Order
    kernel: str = "triton"

    def __str__(self) -> str:
        return f"permute-{self.order}"


AnyArm = Arm | BlockArm | MoveArm


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What the arms that may be compared have in common.

    Args:
        model, resolution: names in the catalogue of models.
        steps: denoising steps; 0 where kernels are measured by themselves.
        device: where it runs.
    """

    model: str
    resolution: str
    steps: int
    device: torch.device

    @property
    def entry(self) -> ModelEntry:
        """The model."""
        return MODELS[self.model]

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the model on that device."""
        return working_dtype(self.device)

    def __str__(self) -> str:
        steps = f"-{self.steps}" if self.steps else ""
        return f"{self.model}-{self.resolution}{steps}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One benchmark: an arm on a workload."""

    workload: Workload
    arm: AnyArm

    def __str__(self) -> str:
        return f"{self.workload}-{self.arm}-{self.arm.kernel}"
