"""From the command line's options to the cells of a run."""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from calibatt.bench.cells import DENSE, ORDERS, AnyArm, Arm, BlockArm, Cell, Order, PermutationArm, Workload
from calibatt.bench.console import Console
from calibatt.bench.masks import PATTERNS, Pattern
from calibatt.bench.record import Suite
from calibatt.bench.resampled import check_resampled
from calibatt.bench.session import BenchSession, Settings
from calibatt.kernels.catalogue import KERNELS
from calibatt.kernels.names import look_up
from calibatt.methods.catalogue import has_blocks, learner
from calibatt.models.catalogue import MODELS
from calibatt.models.device import pick_device
from calibatt.models.generate import read_prompts


def open_session(options: Namespace, console: Console) -> BenchSession:
    """The session that the options describe.

    Raises:
        ValueError: an option makes no sense; the message is one line that says what to do.
        OSError: the file of prompts cannot be read.
    """
    if options.rounds < 1 or options.calibration_prompts < 1:
        raise ValueError("--rounds and --calibration-prompts must be at least 1")
    if options.calibration is not None and not options.calibration.is_file():
        raise ValueError(f"--calibration {options.calibration}: no such file; `calibatt calibrate` makes one")
    settings = Settings(
        rounds=options.rounds,
        calibration_prompts=options.calibration_prompts,
        calibration=options.calibration,
        prompts=None if options.prompts is None else read_prompts(options.prompts),
        artifacts=artifacts_folder(options.benchmark_json),
    )
    return BenchSession(settings, console)


def cells(options: Namespace, suite: Suite) -> list[Cell]:
    """The cells of a suite, in the order they will run.

    Raises:
        ValueError: an option makes no sense; the message is one line that says what to do.
    """
    if suite == "kernel":
        return _kernel_cells(options)
    dense_first = _dense_first(options)
    arms = dict.fromkeys(
        arm
        for kernel in _names(options.kernels)
        for method in _names(options.methods)
        for arm in _in_blocks(Arm.parse(method, kernel, dense_first), options.blocks)
    )
    if suite == "calibration":
        # one calibration serves every preset and kernel, and what a preset learns in some blocks every mode and kernel
        calibrated = [arm for arm in arms if arm.method == "calibatt"][:1]
        learning = [arm for arm in arms if learner(arm.method, preset=arm.preset) is not None]
        arms = dict.fromkeys([*calibrated, *{(arm.method, arm.preset, arm.block): arm for arm in learning}.values()])
    if options.inputs == "resampled":
        # there are calls, but no videos
        workloads = _workloads(options) if suite == "attention" else []
    else:
        # what cannot be loaded has its place in the kernel suite alone
        workloads = [workload for workload in _workloads(options) if workload.entry.loader is not None]
    return [Cell(workload=workload, arm=arm) for workload in workloads for arm in arms]


def _in_blocks(arm: Arm, choices: str) -> Sequence[Arm]:
    """The arm in every choice of blocks; once where it has none to choose."""
    if arm == DENSE or not has_blocks(arm.method, preset=arm.preset):
        return [arm]
    chosen: list[Literal["native"] | tuple[int, int]] = []
    for choice in _names(choices):
        chosen += ["native"] if choice == "native" else _blocks(choice)
    return [replace(arm, block=block) for block in chosen] or [arm]


def _dense_first(options: Namespace) -> tuple[float, float] | None:
    """Shares of the steps and of the layers that are dense in every arm; None for each method's own."""
    given = (options.dense_steps, options.dense_layers)
    if given == (None, None):
        # resampled inputs have one layer, which is neither first nor last
        return (0.0, 0.0) if options.inputs == "resampled" else None
    steps, layers = (0.0 if share is None else share for share in given)
    if not (0 <= steps <= 1 and 0 <= layers <= 1):
        raise ValueError("--dense-steps and --dense-layers are shares, from 0 to 1")
    return steps, layers


def _kernel_cells(options: Namespace) -> list[Cell]:
    if options.inputs == "resampled":
        return []
    kernels = _names(options.kernels)
    for kernel in kernels:
        look_up(KERNELS, kernel, "kernel")
    catalogue: dict[str, Pattern] = {pattern: pattern for pattern in PATTERNS}
    patterns = [look_up(catalogue, name, "mask") for name in _names(options.masks)]
    orders: dict[str, Order] = {order: order for order in ORDERS}
    moves = [PermutationArm(order=look_up(orders, name, "order")) for name in _names(options.orders)]
    found: list[Cell] = []
    # the same geometry at another number of steps is the same
    for workload in dict.fromkeys(replace(workload, steps=0) for workload in _workloads(options)):
        # a kernel by itself has no blocks of its own
        blocks = _blocks(options.blocks, but="native") or [workload.entry.block]
        arms: list[AnyArm] = [DENSE, *moves]
        for kernel in kernels:
            for density in _densities(options.densities):
                if density == 1:
                    arms.append(BlockArm(kernel=kernel, density=density, mask=None, block=None))
                else:
                    arms += [
                        BlockArm(kernel=kernel, density=density, mask=pattern, block=block)
                        for pattern in patterns
                        for block in ([None] if pattern == "rows" else blocks)
                    ]
        found += [Cell(workload=workload, arm=arm) for arm in arms]
    return found


def artifacts_folder(json_file: str | None) -> Path | None:
    """Where the data of the report's pictures goes: beside the JSON file."""
    return None if json_file is None else Path(json_file).with_suffix(".artifacts")


def _workloads(options: Namespace) -> list[Workload]:
    device = pick_device(options.device)
    workloads = []
    for model in _names(options.models):
        entry = look_up(MODELS, model, "model")
        for resolution in _names(options.resolutions) or list(entry.resolutions)[:1]:
            for steps in _steps(options.steps) or [entry.steps_at(resolution)]:
                workloads.append(
                    Workload(
                        model=model, resolution=resolution, steps=steps, device=device,
                        resampled=options.inputs == "resampled",
                    )
                )  # fmt: skip
                if options.inputs == "resampled":
                    check_resampled(entry.geometry(resolution))
    return workloads


def _names(text: str) -> Sequence[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _steps(text: str) -> list[int]:
    try:
        steps = [int(name) for name in _names(text)]
    except ValueError:
        steps = [0]
    if any(number < 1 for number in steps):
        raise ValueError(f"--steps {text}: give whole numbers from 1 up, separated by commas")
    return steps


def _densities(text: str) -> list[float]:
    try:
        densities = [float(name) for name in _names(text)]
    except ValueError:
        densities = [0.0]
    if not all(0 < density <= 1 for density in densities):
        raise ValueError(f"--densities {text}: give numbers above 0 and up to 1, separated by commas")
    return densities


def _blocks(text: str, *, but: str = "") -> list[tuple[int, int]]:
    found = [re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", name) for name in _names(text) if name != but]
    if not all(found):
        raise ValueError(
            f"--blocks {text}: give QUERIESxKEYS in tokens, such as 128x128,64x64; for methods also native"
        )
    return [(int(match[1]), int(match[2])) for match in found if match]
