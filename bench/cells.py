"""What can be asked for: arms, workloads, and the cells of the table that they span."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from calibatt.bench.record import PLANTED, SUITES, Mode, Pattern
from calibatt.kernels.base import dtype_name
from calibatt.kernels.catalogue import KERNELS
from calibatt.kernels.names import look_up
from calibatt.kernels.plan import Remainder
from calibatt.methods.catalogue import METHODS, setting_text, settings_from
from calibatt.methods.remainder import own_remainder
from calibatt.models.catalogue import MODELS
from calibatt.models.device import working_dtype
from calibatt.models.entry import ModelEntry
from calibatt.models.video_metrics import PSNR_CAP_DB

Order = Literal["tile", "token-major", "random"]
ORDERS: tuple[Order, ...] = get_args(Order)
# `pytest -k SUITE` finds every name that contains the word: a method's name must not
_SHORT: Mapping[str, str] = {"attention": "attn"}
# what +tail stands for
TAIL: Remainder = "zeroth"
# of two runs' noise: more than there are rounds, and than the seeds of videos that are learnt from or tuned on
_SEEDS_APART = 100_000
# letters in an arm's name, which is part of a file's: that may have 255 bytes
_LONGEST_SETTINGS = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """A method on a kernel, as one thing to measure; its fields are those of the record.

    Args:
        method, preset: names in the catalogue of methods.
        mode: the preset as it is; with the dense schedule of the run in place of its own; or with its knob turned for
            a density or a fidelity.
        target_density: the wanted density; None for CalibAtt's own, and in other modes.
        target_psnr_db: the wanted fidelity, PSNR against the dense video; None in other modes.
        dense_steps, dense_layers: shares of the steps and of the layers that are dense, in place of the method's own
            schedule; None for that one.
        block: tokens of a query and of a key block; `native` for the preset's own, None for the model's.
        kernel: name of the sparse kernel; dense itself runs on whichever is fastest.
        remainder: what stands for the blocks that the method leaves out; none where it is the method's own, if any.
        query_stride: of the calibration suite: of so many queries, what is learnt looks at one.
        settings: of the method, in place of the preset's: `NAME=VALUE`, with commas between them, by name; only those
            that are others than the preset's.
    """

    method: str
    preset: str
    mode: Mode
    kernel: str
    target_density: float | None = None
    target_psnr_db: float | None = None
    dense_steps: float | None = None
    dense_layers: float | None = None
    block: tuple[int, int] | Literal["native"] | None = None
    remainder: Remainder = "none"
    query_stride: int = 1
    settings: str = ""

    @classmethod
    def parse(cls, text: str, kernel: str, dense_first: tuple[float, float] | None = None) -> Arm:
        """Read a method, then `/preset`, `[name=value,…]`, `+tail` and `=target`, each of which may be left out.

        So `radial/no-warmup=density`, `sparge+tail=0.35`, `sparge=30dB`, `sparge/cdf[cdf=0.9,sink=true]`.

        Args:
            text: the arm.
            kernel: of all arms of the run.
            dense_first: shares of the steps and of the layers that are dense in all arms of the run.

        Raises:
            UnknownName: there is no such method, preset or kernel.
            ValueError: a preset is missing after /, what follows + is no tail, or is asked of dense or of a method that
                has its own, a density or a fidelity is none, or is asked of a method that has no knob; a setting does
                not exist, makes no sense, or is one that the run gives.
        """
        plain, settings = _without_settings(text)
        name, equal, wanted = plain.partition("=")
        name, plus, tail = name.partition("+")
        method, slash, preset = name.partition("/")
        if slash and not preset:
            raise ValueError(f"{text}: after '/' give a preset, or leave out '/'")
        preset = preset or "default"
        found = look_up(METHODS, method, "method")
        # a class's own name, where it was given by its module's
        method = found.name
        look_up(found.presets, preset, f"preset of {method}")
        look_up(KERNELS, kernel, "kernel")
        if plus and tail != "tail":
            raise ValueError(f"{text}: after '+' give 'tail', or leave out '+'")
        if plus and method == DENSE.method:
            raise ValueError(f"{method} leaves no block out: leave out +tail")
        if plus and found.remainder != "none":
            raise ValueError(f"{text}: {own_remainder(found.remainder, TAIL)}")
        if equal and found.knob is None:
            raise ValueError(f"{method} has no knob that changes its density: leave out {equal}{wanted}")
        taken = {"block": "the choice of blocks (--blocks)"}
        if equal and found.knob is not None:
            taken.update(dict.fromkeys((found.knob.field, *found.knob.learnt_with), f"{equal}{wanted}"))
        if dense_first is not None:
            taken.update(dict.fromkeys(found.without_dense, "what the run keeps dense in all arms"))
        own = _own_settings(text, method, preset, settings, taken)
        if method == DENSE.method:
            return DENSE
        arm = cls(
            method=method, preset=preset, mode="native" if dense_first is None else "matched", kernel=kernel,
            dense_steps=dense_first and dense_first[0], dense_layers=dense_first and dense_first[1],
            remainder=TAIL if plus else "none", settings=own,
        )  # fmt: skip
        if wanted.endswith("dB"):
            psnr = _number(text, wanted.removesuffix("dB"), most=PSNR_CAP_DB)
            return replace(arm, mode="equal_fidelity", target_psnr_db=psnr)
        if equal:
            density = None if wanted == "density" else _number(text, wanted, most=1)
            return replace(arm, mode="equal_density", target_density=density)
        return arm

    def __str__(self) -> str:
        """As it is asked for on the command line, then what the run's other options say of it."""
        preset = "" if self.preset == "default" else f"/{self.preset}"
        wanted = {
            "equal_density": "=density" if self.target_density is None else f"={self.target_density:g}",
            "equal_fidelity": "" if self.target_psnr_db is None else f"={self.target_psnr_db:g}dB",
        }.get(self.mode, "")
        first = "" if self.dense_steps is None else f"-dense{self.dense_steps:g}x{self.dense_layers:g}"
        block = "" if self.block is None else f"-{self.block_choice}"
        tail = "" if self.remainder == "none" else "+tail"
        stride = "" if self.query_stride == 1 else f"-stride{self.query_stride}"
        settings = f"[{self.settings}]" if self.settings else ""
        return f"{self.method}{preset}{settings}{tail}{wanted}{first}{block}{stride}"

    @property
    def block_choice(self) -> str | None:
        """The choice of blocks in words: `native` or, say, `64x128`; None for the model's."""
        return "x".join(map(str, self.block)) if isinstance(self.block, tuple) else self.block

    @property
    def set_values(self) -> dict[str, Any]:
        """The settings by name."""
        return settings_from(self.method, self.preset, commas(self.settings) if self.settings else ())

    @property
    def untuned(self) -> Arm:
        """The same arm with no density, fidelity or remainder asked of it: what it learns does not depend on that."""
        mode: Mode = "native" if self.dense_steps is None else "matched"
        return replace(self, mode=mode, target_density=None, target_psnr_db=None, remainder="none")

    def facts(self) -> dict[str, Any]:
        """The fields of a record that say what the arm is."""
        method = METHODS[self.method]
        own = method.remainder != "none"
        remainder = method.remainder if own else self.remainder
        return {
            "method": self.method,
            "method_label": method.label,
            "method_colour": method.colour,
            "method_marker": method.marker,
            "preset": self.preset,
            "settings": self.settings or None,
            "mode": self.mode,
            "target_density": self.target_density,
            "target_psnr_db": self.target_psnr_db,
            "dense_steps": self.dense_steps,
            "dense_layers": self.dense_layers,
            "block_choice": self.block_choice,
            "kernel": self.kernel,
            "remainder": None if remainder == "none" else remainder,
            "own_remainder": own or None,
            "query_stride": None if self.query_stride == 1 else self.query_stride,
        }


def commas(text: str) -> list[str]:
    """What stands between the commas of a text, but for those within brackets."""
    depth, pieces = 0, [""]
    for letter in text:
        depth += (letter in "[{") - (letter in "]}")
        if letter == "," and depth <= 0:
            pieces.append("")
        else:
            pieces[-1] += letter
    return [piece.strip() for piece in pieces]


def _without_settings(text: str) -> tuple[str, list[str]]:
    """An arm's text without what stands in brackets, and that.

    Raises:
        ValueError: there is nothing in them, one is missing, or they stand elsewhere than behind method and preset.
    """
    before, opened, rest = text.partition("[")
    if not opened:
        return text, []
    given, _, after = rest.rpartition("]")
    if not given.strip() or "+" in before or "=" in before or after[:1] not in ("", "+", "="):
        raise ValueError(f"{text}: give settings as METHOD[NAME=VALUE,…], before + and = of the arm")
    return before + after, commas(given)


def _own_settings(text: str, method: str, preset: str, given: Sequence[str], taken: Mapping[str, str]) -> str:
    """What is set in place of the preset's, in the one way to write it.

    Args:
        text: the arm, for messages.
        method, preset: names in the catalogue.
        given: settings, each `NAME=VALUE`.
        taken: names of settings that something else of the run gives, with that.

    Raises:
        ValueError: a setting does not exist, makes no sense or is taken, or there are too many.
    """
    try:
        settings = settings_from(method, preset, given)
    except ValueError as error:
        raise ValueError(f"{text}: {error}") from None
    for name in sorted(settings.keys() & taken.keys()):
        raise ValueError(f"{text}: {taken[name]} gives {name}: leave out one of both")
    config = METHODS[method].presets[preset]
    # what is named runs: two arms that do the same are one
    others = {name: value for name, value in settings.items() if value != getattr(config, name)}
    written = ",".join(setting_text(name, others[name]) for name in sorted(others))
    if len(written) > _LONGEST_SETTINGS:
        raise ValueError(f"{text}: its settings have more than {_LONGEST_SETTINGS} letters: make it a preset")
    return written


def _number(text: str, wanted: str, *, most: float) -> float:
    try:
        # what is shown is what runs: two arms of one name would be one
        number = float(f"{float(wanted):g}")
    except ValueError:
        number = math.nan
    if not 0 < number <= most:
        raise ValueError(
            f"{text}: after '=' give 'density' (CalibAtt's), a density in (0, 1], or a PSNR such as 30dB, "
            f"at most {PSNR_CAP_DB:g}dB"
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
        reused: share of the heads that reuse rows while the others have the mask, in a forward pass.
        remainder: what stands for the blocks that the mask leaves out.

    Raises:
        ValueError: the fields contradict each other.
    """

    kernel: str
    density: float
    mask: Pattern | None
    block: tuple[int, int] | None
    reused: float = 0.0
    remainder: Remainder = "none"

    def __post_init__(self) -> None:
        whole = self.density == 1
        blockless = whole or self.mask == "rows"
        if not 0 < self.density <= 1 or (self.mask is None) != whole or (self.block is None) != blockless:
            raise ValueError(f"a density lies in (0, 1], and has mask and blocks below 1: got {self!r}")

    def __str__(self) -> str:
        if self.mask is None:
            return "all"
        block = "" if self.block is None else f"-{self.block[0]}x{self.block[1]}"
        reused = f"-reused{self.reused:g}" if self.reused else ""
        tail = "" if self.remainder == "none" else "+tail"
        return f"{self.mask}{tail}-{self.density:g}{block}{reused}"

    def facts(self) -> dict[str, Any]:
        """The fields of a record that say what the arm is."""
        return {
            "method": "blocks", "kernel": self.kernel, "block": self.block, "mask": self.mask,
            "preset": f"{self.density:g}" + (f" + {self.reused:.0%} rows" if self.reused else ""),
            "remainder": None if self.remainder == "none" else self.remainder,
        }  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class PermutationArm:
    """Queries, keys and values into another order, as one thing to measure; the baseline is a copy of them.

    Args:
        order: tiles of a video, the frames of one place after the other, or every head at random.
    """

    order: Order
    kernel: str = "triton"

    def __str__(self) -> str:
        return f"permute-{self.order}"

    def facts(self) -> dict[str, Any]:
        """The fields of a record that say what the arm is."""
        return {"method": "permute", "preset": self.order, "kernel": self.kernel, "baseline": "copy"}


AnyArm = Arm | BlockArm | PermutationArm


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What the arms that may be compared have in common.

    Args:
        model, resolution: names in the catalogue of models.
        steps: denoising steps; 0 where kernels are measured by themselves.
        device: where it runs.
        resampled: whether its attention calls have the embedded model's inputs, resampled to this model's size.
        captures: folder of calls that were captured from the model, which are measured in place of its own; None
            elsewhere.
        layers: of a transformer without weights of its own, of which one forward pass is measured, or whose weights are
            planted; 0 for the model's.
        compiled: whether the transformer's blocks are compiled there.
        planted: whether weights are planted in the model, in place of its own.
        seed: of the noise of the videos that are measured, and of drawn inputs.
        guidance: classifier-free guidance scale of its videos; None for the model's.
    """

    model: str
    resolution: str
    steps: int
    device: torch.device
    resampled: bool = False
    captures: Path | None = None
    layers: int = 0
    compiled: bool = False
    planted: bool = False
    seed: int = 0
    guidance: float | None = None

    @property
    def noise(self) -> int:
        """Seed of the first round's noise; later rounds have those that follow."""
        return self.seed * _SEEDS_APART

    @property
    def entry(self) -> ModelEntry:
        """The model, with the layers and the guidance that whole videos are made with."""
        own = MODELS[self.model]
        own = own if self.guidance is None else replace(own, guidance=self.guidance)
        return replace(own, layers=self.layers) if self.layers and self.steps else own

    @property
    def block(self) -> tuple[int, int]:
        """Tokens of a query and of a key block that the model's masks use at that resolution."""
        return self.entry.block_at(self.resolution)

    @property
    def filmed(self) -> bool:
        """Whether there are whole videos of it, and not only attention calls."""
        return not (self.resampled or self.captures)

    @property
    def large(self) -> bool:
        """Whether its calls may be of a large model's size, whoever's they are: fewer of them are looked at."""
        return self.resampled or self.planted or self.captures is not None

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the model on that device."""
        return working_dtype(self.device)

    def __str__(self) -> str:
        steps = f"-{self.steps}" if self.steps else ""
        layers = f"-{self.layers}layers" if self.layers else ""
        guidance = "" if self.guidance is None else f"-guidance{self.guidance:g}"
        compiled = "-compiled" if self.compiled else ""
        inputs = (
            "-resampled" if self.resampled else "-captured" if self.captures else "-planted" if self.planted else ""
        )
        seed = f"-seed{self.seed}" if self.seed else ""
        return f"{self.model}-{self.resolution}{steps}{guidance}{layers}{compiled}{inputs}{seed}"

    def facts(self) -> dict[str, Any]:
        """The fields of a record that say what the workload is, as far as they are known without its weights."""
        geometry = self.entry.geometry(self.resolution)
        size = {
            "model": self.model, "resolution": self.resolution, "tokens": geometry.tokens, "heads": geometry.heads,
            "head_dim": geometry.head_dim, "dtype": dtype_name(self.dtype), "seed": self.seed,
        }  # fmt: skip
        weights = PLANTED if self.planted else None
        layers = {"layers": self.layers, "compiled": self.compiled} if self.layers else {}
        if not self.steps:
            return {**size, "weights": weights or "random", **layers} if layers else size
        frames = self.entry.resolution(self.resolution).frames
        return {**size, "weights": weights, "frames": frames, "steps": self.steps, "compiled": self.compiled, **layers}


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One benchmark: an arm on a workload."""

    workload: Workload
    arm: AnyArm

    def __str__(self) -> str:
        arm = str(self.arm)
        for suite in SUITES:
            arm = arm.replace(suite, _SHORT.get(suite, suite))
        return f"{self.workload}-{arm}-{self.arm.kernel}"
