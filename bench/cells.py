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

Mode = Literal["native", "matched", "equal_density", "equal_fidelity"]
Order = Literal["tile", "token-major", "random"]
ORDERS: tuple[Order, ...] = ("tile", "token-major", "random")


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """A method on a kernel, as one thing to measure.

    Args:
        method, preset: names in the catalogue of methods.
        mode: the preset as it is; with the dense schedule of the run in place of its own; or with its knob turned for
            a density or a fidelity.
        density: the wanted density; None for CalibAtt's own, and in other modes.
        psnr_db: the wanted fidelity, PSNR against the dense video; None in other modes.
        dense_first: shares of the steps and of the layers that are dense, in place of the method's own schedule.
        block: tokens of a query and of a key block; `native` for the preset's own, None for the model's.
        kernel: name of the sparse kernel; dense itself runs on whichever is fastest.
    """

    method: str
    preset: str
    mode: Mode
    kernel: str
    density: float | None = None
    psnr_db: float | None = None
    dense_first: tuple[float, float] | None = None
    block: tuple[int, int] | Literal["native"] | None = None

    @classmethod
    def parse(cls, text: str, kernel: str, dense_first: tuple[float, float] | None = None) -> Arm:
        """Read `method[/preset][=density]`, e.g. `radial/no-warmup=density`, `sparge=0.35` or `sparge=30dB`.

        Args:
            text: the arm.
            kernel, dense_first: of all arms of the run.

        Raises:
            UnknownName: there is no such method, preset or kernel.
            ValueError: a density or a fidelity is none, or is asked of a method that has no knob.
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
        mode: Mode = "native" if dense_first is None else "matched"
        density = psnr_db = None
        if wanted.endswith("dB"):
            mode, psnr_db = "equal_fidelity", _number(text, wanted.removesuffix("dB"), below=math.inf)
        elif equal:
            mode, density = "equal_density", None if wanted in ("", "density") else _number(text, wanted, below=1)
        return cls(
            method=method, preset=preset, mode=mode, kernel=kernel, density=density, psnr_db=psnr_db,
            dense_first=dense_first,
        )  # fmt: skip

    def __str__(self) -> str:
        preset = "" if self.preset == "default" else f"/{self.preset}"
        wanted = {
            "equal_density": "=density" if self.density is None else f"={self.density:g}",
            "equal_fidelity": f"={self.psnr_db:g}dB" if self.psnr_db is not None else "",
        }.get(self.mode, "")
        first = "" if self.dense_first is None else f"-dense{self.dense_first[0]:g}x{self.dense_first[1]:g}"
        block = "" if self.block is None else f"-{self.block_choice}"
        return f"{self.method}{preset}{wanted}{first}{block}"

    @property
    def block_choice(self) -> str | None:
        """The choice of blocks in words: `native` or, say, `64x128`; None for the model's."""
        return "x".join(map(str, self.block)) if isinstance(self.block, tuple) else self.block


def _number(text: str, wanted: str, *, below: float) -> float:
    try:
        number = float(wanted)
    except ValueError:
        number = math.nan
    if not 0 < number <= below or math.isinf(number):
        raise ValueError(
            f"{text}: behind = stands `density`, for CalibAtt's, a density above 0 and up to 1, or a PSNR such as 30dB"
        )
    return number


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
class PermutationArm:
    """Queries, keys and values into another order, as one thing to measure; the baseline is a copy of them.

    Args:
        order: tiles of a video, the frames of one place after the other, or every head by lot.
    """

    order: Order
    kernel: str = "triton"

    def __str__(self) -> str:
        return f"permute-{self.order}"


AnyArm = Arm | BlockArm | PermutationArm


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What the arms that may be compared have in common.

    Args:
        model, resolution: names in the catalogue of models.
        steps: denoising steps; 0 where kernels are measured by themselves.
        device: where it runs.
        resampled: whether its attention calls have the embedded model's inputs, resampled to this model's size.
    """

    model: str
    resolution: str
    steps: int
    device: torch.device
    resampled: bool = False

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
        return f"{self.model}-{self.resolution}{steps}{'-resampled' if self.resampled else ''}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One benchmark: an arm on a workload."""

    workload: Workload
    arm: AnyArm

    def __str__(self) -> str:
        return f"{self.workload}-{self.arm}-{self.arm.kernel}"
