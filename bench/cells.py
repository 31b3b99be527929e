"""What can be asked for: arms, workloads, and the cells of the table that they span."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from calibatt.kernels.catalogue import KERNELS
from calibatt.kernels.names import look_up
from calibatt.methods.catalogue import METHODS
from calibatt.models.catalogue import MODELS, ModelEntry
from calibatt.models.device import working_dtype

Mode = Literal["native", "equal_density"]

_EQUAL_DENSITY = "=density"


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """A method on a kernel, as one thing to measure.

    Args:
        method, preset: names in the catalogue of methods.
        mode: the preset as it is, or with its knob turned to CalibAtt's density.
        kernel: name of the sparse kernel; dense itself runs on whichever is fastest.
    """

    method: str
    preset: str
    mode: Mode
    kernel: str

    @classmethod
    def parse(cls, text: str, kernel: str) -> Arm:
        """Read `method[/preset][=density]`, e.g. `radial/no-warmup=density`.

        Raises:
            UnknownName: there is no such method, preset or kernel.
            ValueError: the density of a method that has no knob is to be changed.
        """
        name, equal = text.removesuffix(_EQUAL_DENSITY), text.endswith(_EQUAL_DENSITY)
        method, _, preset = name.partition("/")
        preset = preset or "default"
        found = look_up(METHODS, method, "method")
        look_up(found.presets, preset, f"preset of {method}")
        look_up(KERNELS, kernel, "kernel")
        if equal and found.knob is None:
            raise ValueError(f"{method} has no knob that changes its density: leave out {_EQUAL_DENSITY}")
        if method == DENSE.method:
            return DENSE
        return cls(method=method, preset=preset, mode="equal_density" if equal else "native", kernel=kernel)

    def __str__(self) -> str:
        preset = "" if self.preset == "default" else f"/{self.preset}"
        return f"{self.method}{preset}{_EQUAL_DENSITY if self.mode == 'equal_density' else ''}"


DENSE = Arm(method="dense", preset="default", mode="native", kernel="fastest")


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What the arms that may be compared have in common.

    Args:
        model, resolution: names in the catalogue of models.
        steps: denoising steps.
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
        return f"{self.model}-{self.resolution}-{self.steps}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One benchmark: an arm on a workload."""

    workload: Workload
    arm: Arm

    def __str__(self) -> str:
        return f"{self.workload}-{self.arm}-{self.arm.kernel}"
