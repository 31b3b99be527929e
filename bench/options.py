"""The options of `pytest bench`: each is one field of `Options`, with its name, default, reader and help."""

from __future__ import annotations

import math
import os
import re
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from calibatt.bench.captured import captured_steps
from calibatt.bench.cells import DENSE, ORDERS, Arm, Cell, Order, Workload, commas
from calibatt.bench.masks import PATTERNS
from calibatt.bench.record import Pattern
from calibatt.bench.resampled import check_resampled
from calibatt.kernels.catalogue import KERNELS
from calibatt.kernels.names import look_up
from calibatt.kernels.plan import Remainder
from calibatt.methods.catalogue import has_blocks
from calibatt.models.catalogue import MODELS
from calibatt.models.device import pick_device
from calibatt.models.generate import read_prompts
from calibatt.models.planted.pipeline import check_plantable

BlockChoice = Literal["native"] | tuple[int, int]
# of the quickest workload, more than a day: a larger number is a slip of the finger
_MOST_ROUNDS = 10_000
# as many as an interval needs
VIDEOS = 6
_DECIDING_NOTHING = ("--max-time", "--gate")


def _names(text: str) -> tuple[str, ...]:
    found = tuple(dict.fromkeys(name for name in commas(text) if name))
    if not found:
        raise ValueError("give at least one")
    return found


def _listed(read: Callable[[str], Any]) -> Callable[[str], tuple[Any, ...]]:
    """A reader of values separated by commas; what stands there twice is there once."""
    return lambda text: tuple(dict.fromkeys(read(name) for name in _names(text)))


def _one_of(*choices: str) -> Callable[[str], str]:
    return lambda text: look_up({choice: choice for choice in choices}, text, "choice")


def _whole(most: float = math.inf, least: int = 1) -> Callable[[str], int]:
    def read(text: str) -> int:
        # nine digits: longer ones are no number of anything here
        if not re.fullmatch(r"\d{1,9}", text) or not least <= int(text) <= most:
            raise ValueError(f"give a whole number from {least} {'up' if math.isinf(most) else f'to {most:,.0f}'}")
        return int(text)

    return read


def _number(low_open: bool, what: str) -> Callable[[str], float]:
    """A reader of numbers up to 1, from 0 or from above it."""

    def read(text: str) -> float:
        try:
            # what is shown is what runs: two cells of one name would be one
            number = float(f"{float(text):g}")
        except ValueError:
            number = math.nan
        if not 0 <= number <= 1 or (low_open and number == 0):
            raise ValueError(f"give {what}")
        return number

    return read


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    # written so that NaN fails too
    if not 0 < seconds < math.inf:
        raise ValueError("give seconds, more than 0")
    return seconds


def _percentage(text: str) -> float:
    match = re.fullmatch(r"(\d{1,2}(?:\.\d{1,6})?)\s*%", text)
    if match is None or float(match[1]) == 0:
        raise ValueError("give a percentage above 0 % and below 100 %, such as 1%")
    return float(match[1]) / 100


def _guidance(text: str) -> float:
    try:
        scale = float(f"{float(text):g}")
    except ValueError:
        scale = math.nan
    if not 1 <= scale < math.inf:
        raise ValueError("give a scale of at least 1")
    return scale


_density = _number(True, "a density above 0 and up to 1")
_share = _number(False, "a share, from 0 to 1")


def _block(text: str) -> BlockChoice:
    if text == "native":
        return "native"
    match = re.fullmatch(r"([1-9]\d{0,5})x([1-9]\d{0,5})", text)
    if match is None:
        raise ValueError("give QUERIESxKEYS in tokens, such as 128x128, or for methods native")
    return int(match[1]), int(match[2])


def _inputs(text: str) -> Literal["own", "resampled"] | Path:
    if text.startswith("captures="):
        return Path(text.removeprefix("captures="))
    _one_of("own", "resampled", "captures=FOLDER")(text)
    return "resampled" if text == "resampled" else "own"


def _file(text: str) -> Path:
    if not Path(text).is_file():
        raise ValueError("no such file")
    return Path(text)


def _option(read: Callable[[str], Any], help: str, *, default: str | None = None) -> dict[str, Any]:
    """What makes a field an option.

    Args:
        read: makes its value of the text; None stands for an option that is not given and has no default.
        help: of `pytest bench --help`.
        default: the text where the option is not given.
    """
    return {"read": read, "help": help, "default": default}


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What is measured, and how: the options' values, in the order of `pytest bench --help`."""

    models: tuple[str, ...] = field(
        metadata=_option(
            _listed(lambda name: look_up(MODELS, name, "model").name), "see `calibatt models`", default="shapes"
        )
    )
    methods: tuple[str, ...] = field(
        metadata=_option(
            _names,
            "METHOD, then what is wanted of /PRESET, [SETTING=VALUE,…], +tail and =TARGET, see `calibatt methods`: "
            "'sparge/cdf[cdf=0.9]+tail'; with +tail, means stand for blocks that are left out; a target turns the "
            "method's knob: `density` is CalibAtt's density, 0.35 that density, 30dB that PSNR against dense videos",
            default="dense,calibatt,radial,sparge,random",
        )
    )
    resolutions: tuple[str, ...] | None = field(
        metadata=_option(_names, "see `calibatt models`; default: each model's first")
    )
    steps: tuple[int, ...] | None = field(
        metadata=_option(_listed(_whole()), "denoising steps; default: the model's at that resolution")
    )
    guidance: float | None = field(
        metadata=_option(
            _guidance,
            "classifier-free guidance scale of the videos; 1 makes them without, as few-step distilled models do; "
            "default: the model's",
        )
    )
    seeds: tuple[int, ...] = field(
        metadata=_option(
            _listed(_whole(least=0)),
            "of the noise of the videos that are measured, and of drawn inputs; prompts, masks and what is learnt stay "
            "the same",
            default="0",
        )
    )
    kernels: tuple[str, ...] = field(
        metadata=_option(
            _listed(lambda name: look_up(KERNELS, name, "kernel").name), "see `calibatt kernels`", default="default"
        )
    )
    densities: tuple[float, ...] = field(
        metadata=_option(
            _listed(_density), "densities of the masks in the kernel and forward suites; 1 is dense", default="0.25"
        )
    )
    blocks: tuple[BlockChoice, ...] | None = field(
        metadata=_option(
            _listed(_block),
            "block sizes, QUERIESxKEYS in tokens, or `native` for each preset's own; default: the model's",
        )
    )
    dense_steps: float | None = field(
        metadata=_option(
            _share,
            "share of the first steps that are dense in every arm, in place of each method's own steps and layers",
        )
    )
    dense_layers: float | None = field(
        metadata=_option(
            _share,
            "the same for the first layers; where only one of the two is given, the other is 0; default: each "
            "method's own",
        )
    )
    inputs: Literal["own", "resampled"] | Path = field(
        metadata=_option(
            _inputs,
            "inputs of attention calls: the model's `own`; `resampled`: the embedded model's at this model's size, "
            "without dense steps; or captures=FOLDER: those that `calibatt capture` has written. The last two need no "
            "weights and run the attention suite alone",
            default="own",
        )
    )
    weights: Literal["own", "planted"] = field(
        metadata=_option(
            _one_of("own", "planted"),
            "of the attention, calibration, forward and denoise suites: the model's `own` (a forward pass has random "
            "ones), or `planted`: a full-size model without a download, attention structure built in; for time and "
            "memory, never for fidelity",
            default="own",
        )
    )
    masks: tuple[Pattern, ...] = field(
        metadata=_option(
            _listed(_one_of(*PATTERNS)),
            "of the kernel and forward suites: random, even (random, with equally many blocks in every row), banded; "
            "in the kernel suite also captured (from the embedded model), rows (row reuse, no mask), mixed (both)",
            default="random",
        )
    )
    remainders: tuple[Remainder, ...] = field(
        metadata=_option(
            _listed(_one_of(*get_args(Remainder))),
            "of the kernel suite: what stands for the blocks that a mask leaves out: none, or zeroth for their means",
            default="none",
        )
    )
    layers: int | None = field(
        metadata=_option(
            _whole(),
            "run the forward suite: one forward pass of a transformer of the model's shape with this many layers and "
            "random weights, or planted ones, under masks of --densities; whole videos of planted weights have as many "
            "layers; default: no forward suite, and the model's layers",
        )
    )
    reused_heads: tuple[float, ...] = field(
        metadata=_option(_listed(_share), "of the forward suite: share of the heads that reuse rows", default="0")
    )
    compile: tuple[str, ...] = field(
        metadata=_option(
            _listed(_one_of("no", "blocks")),
            "of the forward and denoise suites: `blocks` compiles each of the transformer's blocks",
            default="no",
        )
    )
    orders: tuple[Order, ...] | None = field(
        metadata=_option(
            _listed(_one_of(*ORDERS)),
            "of the kernel suite: permutations to time against a copy: tile, token-major, random; default: none",
        )
    )
    device: torch.device | None = field(metadata=_option(pick_device, "cpu or cuda; default: cuda where there is one"))
    rounds: int | None = field(
        metadata=_option(
            _whole(_MOST_ROUNDS),
            f"videos per arm, of which an interval needs at least 6; default: {VIDEOS}. In the other suites the most "
            "samples an arm, where that is more than the least (20; 10 of kernels and at large models' sizes); there "
            "the default is five times the least, as far as two minutes suffice",
        )
    )
    interval: float | None = field(
        metadata=_option(
            _percentage,
            "in the suites without videos an arm stops when half of the 95 % interval of its speedup is at most this "
            "share of it, which is looked at every five rounds from the least on; default: 1% on a GPU, 3% on a CPU",
        )
    )
    max_time: float | None = field(
        metadata=_option(
            _seconds,
            "seconds after which no further round of videos begins; repeating the command goes on from there. In the "
            "other suites no arm has more than the least samples then",
        )
    )
    calibration_prompts: int = field(
        metadata=_option(_whole(_MOST_ROUNDS), "number of prompts to calibrate on", default="4")
    )
    query_strides: tuple[int, ...] = field(
        metadata=_option(
            _listed(_whole()),
            "of the calibration suite: of so many queries, what is learnt looks at one; 1 is all, which the masks of "
            "others are compared with",
            default="1",
        )
    )
    calibration: Path | None = field(
        metadata=_option(_file, "a file of `calibatt calibrate`, to use in place of calibrating")
    )
    prompts: tuple[str, ...] | None = field(
        metadata=_option(
            lambda name: read_prompts(Path(name)),
            "file of prompts, one per line; the first ones are calibrated on; default: the model's own, or VBench's",
        )
    )
    gate: tuple[Path, ...] | None = field(
        metadata=_option(
            _listed(_file),
            "earlier result files, as of `calibatt gate --baseline`, to compare this run's file with: a regression "
            "ends with 1, what is inconclusive with 3",
        )
    )

    @classmethod
    def read(cls, given: Namespace) -> Options:
        """The values of what was given on the command line.

        Raises:
            ValueError: one makes no sense; the message is one line that names it and says what to do.
        """
        values: dict[str, Any] = {}
        for one in fields(cls):
            text = getattr(given, one.name)
            try:
                values[one.name] = None if text is None else one.metadata["read"](text)
            except (ValueError, OSError) as error:
                raise ValueError(f"{flag(one.name)} {text}: {error}".replace("\n", " ")) from None
        return cls(**values)

    @property
    def resampled(self) -> bool:
        """Whether attention calls have the embedded model's inputs, resampled."""
        return self.inputs == "resampled"

    @property
    def captures(self) -> Path | None:
        """The folder of captured calls that are measured."""
        return self.inputs if isinstance(self.inputs, Path) else None

    @property
    def whole(self) -> bool:
        """Whether there are models to run, and not only inputs of their attention."""
        return self.inputs == "own"

    @property
    def planted(self) -> bool:
        """Whether models have planted weights."""
        return self.weights == "planted"

    @property
    def dense_first(self) -> tuple[float, float] | None:
        """Shares of the steps and of the layers that are dense in every arm; None for each method's own."""
        if (self.dense_steps, self.dense_layers) == (None, None):
            # resampled inputs have one layer, which is neither first nor last
            return (0.0, 0.0) if self.resampled else None
        return self.dense_steps or 0.0, self.dense_layers or 0.0

    def workloads(self) -> list[Workload]:
        """Every model at every resolution, number of steps and seed.

        Raises:
            ValueError: a model has no such resolution, none that inputs can be resampled to or were captured at, or
                nothing to plant.
        """
        if self.planted and not self.whole:
            raise ValueError("--weights planted: its inputs are its own; leave out --inputs")
        device = self.device or pick_device(None)
        found = []
        for model in self.models:
            entry = MODELS[model]
            if self.planted:
                check_plantable(entry)
            for resolution in self.resolutions or list(entry.resolutions)[:1]:
                every = self.steps or [entry.steps_at(resolution)]
                if self.resampled:
                    check_resampled(entry.geometry(resolution))
                if self.captures is not None:
                    every = [captured_steps(self.captures, entry.geometry(resolution), self.steps)]
                found += [
                    Workload(
                        model=model, resolution=resolution, steps=steps, device=device, resampled=self.resampled,
                        captures=self.captures, planted=self.planted,
                        layers=self.layers or 0 if self.planted else 0, seed=seed, guidance=self.guidance,
                    )
                    for steps in every
                    for seed in self.seeds
                ]  # fmt: skip
        return found


def flag(name: str) -> str:
    """How a field is written on the command line."""
    return "--" + name.replace("_", "-")


def add_options(add: Callable[..., object]) -> None:
    """Declare every option.

    Args:
        add: a group's `addoption`, or a parser's `add_argument`.
    """
    for one in fields(Options):
        default = one.metadata["default"]
        shown = "" if default is None else "; default: %(default)s"
        # to argparse, a percent sign begins a name of its own
        add(flag(one.name), default=default, help=one.metadata["help"].replace("%", "%%") + shown)


def method_cells(options: Options) -> list[Cell]:
    """Every method on every kernel and workload that can be loaded; what cannot has its place in the kernel suite.

    Raises:
        ValueError: an option makes no sense; the message is one line that says what to do.
    """
    arms = dict.fromkeys(
        arm
        for kernel in options.kernels
        for method in options.methods
        for arm in _in_blocks(Arm.parse(method, kernel, options.dense_first), options.blocks)
    )
    workloads = [one for one in options.workloads() if one.large or one.entry.loader is not None]
    return [Cell(workload=workload, arm=arm) for workload in workloads for arm in arms]


def _in_blocks(arm: Arm, choices: Sequence[BlockChoice] | None) -> list[Arm]:
    """The arm in every choice of blocks; once where it has none to choose."""
    if choices is None or arm == DENSE or not has_blocks(arm.method, preset=arm.preset):
        return [arm]
    return [replace(arm, block=block) for block in choices]


def refuse_pytest_options(given: Namespace) -> None:
    """Refuse options of pytest and its plugins that would spoil a run.

    Raises:
        ValueError: one line that names the option and says what to do.
    """
    workers = getattr(given, "numprocesses", None) or getattr(given, "tx", None)
    if workers or getattr(given, "dist", "no") != "no":
        raise ValueError("-n (pytest-xdist): benchmarks that run side by side slow each other down; leave it out")
    if "PYTEST_XDIST_WORKER" in os.environ:
        raise ValueError("PYTEST_XDIST_WORKER is set, so that pytest-benchmark measures nothing: unset it")
    if given.benchmark_disable and not given.benchmark_enable:
        raise ValueError("--benchmark-disable: nothing would be measured; leave it out")
    if given.benchmark_skip:
        raise ValueError("--benchmark-skip: nothing would be measured; leave it out")


def deciding(arguments: Sequence[str]) -> list[str]:
    """Arguments of the command, without how long it may take and what it is compared with: these decide no figure."""
    kept: list[str] = []
    others = iter(arguments)
    for one in others:
        if one in _DECIDING_NOTHING:
            next(others, None)
        elif not one.startswith(tuple(f"{name}=" for name in _DECIDING_NOTHING)):
            kept.append(one)
    return kept


def check_gate(gate: Sequence[Path], out: Path | None) -> None:
    """Refuse a gate over a run that leaves no file, or over the file that the run is to replace.

    Raises:
        ValueError: one line that says what to do.
    """
    if out is None:
        raise ValueError("--gate: give --benchmark-json=FILE too, the file that is compared")
    if out.resolve() in {path.resolve() for path in gate}:
        raise ValueError(f"--gate {out}: is the file that --benchmark-json replaces; name another one")


def check_output(path: Path | None) -> None:
    """Refuse a JSON file that could not be written when everything is measured.

    Raises:
        ValueError: one line that names the file and says what to do.
    """
    if path is None:
        return
    if path.is_dir() or (path.exists() and not path.is_file()):
        raise ValueError(f"--benchmark-json={path}: is not a regular file and will not be replaced; name a file")
    trial = partial_of(path).with_suffix(".trial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        trial.write_bytes(b"")
        trial.unlink()
        if path.exists():
            # opens for writing and changes nothing
            path.open("r+b").close()
    except OSError as error:
        raise ValueError(f"--benchmark-json={path}: cannot be written ({error.strerror}); name another file") from None


def partial_of(path: Path) -> Path:
    """Where a run's records are kept until its JSON file is written."""
    return path.with_name(path.name + ".partial.jsonl")


def artifacts_folder(path: Path | None) -> Path | None:
    """Where the data of the report's pictures goes: beside the JSON file."""
    return None if path is None else path.with_suffix(".artifacts")
