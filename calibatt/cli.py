"""The command line. Each subcommand is one function that returns the exit code; an error is one line on stderr."""

from __future__ import annotations

import argparse
import contextlib
import inspect
import io
import os
import re
import sys
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields
from importlib.metadata import requires, version
from pathlib import Path
from typing import Any

# what argparse itself exits with on bad input; `gate` uses 1 and 3 for its verdicts
EXIT_BAD_INPUT = 2
# EX_SOFTWARE of sysexits.h; Python's own 1 would be the gate's regression
EXIT_INTERNAL = 70
# 128 + the signal, as shells count
EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141
# set to anything, it shows where an internal error was raised
TRACEBACK = "CALIBATT_TRACEBACK"
_LONGEST_LINE = 300
# letters of a kernel's name, which templates make long
_LONGEST_NAME = 70
# commands that read result files
_READERS = ("report", "gate", "compare", "merge")
# where a package is imported by quite another name than it is installed by
_DISTRIBUTIONS = {"skimage": "scikit-image", "pynvml": "nvidia-ml-py"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # a terminal or a pipe that knows no × is no reason to fail
            stream.reconfigure(errors="backslashreplace")
    arguments = _parser().parse_args(argv)
    try:
        code = int(arguments.run(arguments))
        # or else what is wrong with stdout would show after the exit code is decided
        print(end="", flush=True)
        return code
    except Exception as error:
        return _failed(arguments.command, error)
    except KeyboardInterrupt:
        _complain(f"calibatt {arguments.command}: stopped; nothing was written")
        return EXIT_INTERRUPTED


def _failed(command: str, error: Exception) -> int:
    """Say what went wrong, in one line; returns the exit code."""
    from calibatt.bench.record import plain

    if isinstance(error, BrokenPipeError):
        # nobody reads on, as with `| head`: what Python would still write at its exit is dropped
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE
    if isinstance(error, ModuleNotFoundError) and (extra := _extra_with(error, command)) is not None:
        _complain(f"calibatt {command}: {error.name} is not installed: pip install 'calibatt[{extra}]'")
        return EXIT_BAD_INPUT
    if isinstance(error, ValueError | OSError):
        _complain(plain(f"calibatt {command}: {error}", _LONGEST_LINE))
        return EXIT_BAD_INPUT
    if os.environ.get(TRACEBACK):
        _complain("".join(traceback.format_exception(error)).rstrip())
    what = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    hint = f"set {TRACEBACK}=1 to see where"
    _complain(plain(f"calibatt {command}: internal error: {what}", _LONGEST_LINE - len(hint)) + f" ({hint})")
    return EXIT_INTERNAL


def _extra_with(error: ModuleNotFoundError, command: str) -> str | None:
    """The extra that brings what a command lacks; None where none does."""
    module = (error.name or "").partition(".")[0]
    wanted = _DISTRIBUTIONS.get(module, module.replace("_", "-"))
    # such as: matplotlib>=3.9; extra == "report"
    brought = (re.match(r"""([\w-]+).*; extra == ['"](\w+)""", line) for line in requires("calibatt") or ())
    extras = [one[2] for one in brought if one and one[1] == wanted]
    # several may: the others make videos
    return "report" if command in _READERS and "report" in extras else next(iter(extras), None)


def _complain(text: str) -> None:
    # without a reader on stderr either, the exit code must do
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="calibatt", description="Sparse attention for video diffusion: generate, calibrate, report, gate."
    )
    parser.add_argument("--version", action="version", version=f"calibatt {version('calibatt')}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    command = commands.add_parser("generate", help="a prompt to a video file, dense or sped up")
    _add_video(command)
    command.add_argument("-o", "--out", type=Path, default=Path("video.mp4"), help=".mp4 or .gif; default: %(default)s")
    command.add_argument(
        "--compare", action="store_true", help="also make the dense video; print both times and the PSNR"
    )
    command.set_defaults(run=_generate)

    command = commands.add_parser("profile", help="what one step of a video spends its time on, kernel by kernel")
    _add_video(command)
    command.add_argument("--step", type=int, help="index of the step; default: the one in the middle")
    command.add_argument("--top", type=int, help="how many kernels to show; default: 20")
    command.add_argument(
        "--trace", type=Path, metavar="FILE", help="also write a Chrome trace, for chrome://tracing or Perfetto"
    )
    command.set_defaults(run=_profile)

    command = commands.add_parser(
        "capture", help="write queries, keys and values of some attention calls to files, for `pytest bench --inputs`"
    )
    _add_prompt(command)
    command.add_argument("-o", "--out", type=Path, required=True, metavar="FOLDER", help="new or empty")
    command.add_argument("--calls", type=int, help="how many, from the first step and layer to the last; default: 4")
    command.set_defaults(run=_capture)

    command = commands.add_parser(
        "calibrate", help="learn offline what a method needs, for one model, resolution and number of steps"
    )
    command.add_argument(
        "-o",
        "--out",
        type=Path,
        required=True,
        metavar="FILE",
        help="the calibration, e.g. shapes.safetensors; until it is written, FILE.units keeps finished videos",
    )
    _add_model(command)
    command.add_argument("--method", default="calibatt", help="see `calibatt methods`; default: %(default)s")
    command.add_argument("--preset", default="default", help="preset of the method; default: %(default)s")
    _add_settings(command)
    command.add_argument(
        "--prompts", type=Path, help="file of prompts, one per line; default: the model's own, or VBench's"
    )
    command.add_argument("--count", type=int, help="how many prompts; default: all in the file, or 16 of the others")
    command.add_argument(
        "--levels",
        action="store_true",
        help="calibatt only: also learn what masks of other densities need, one byte per block",
    )
    command.add_argument(
        "--fit",
        action="store_true",
        help="calibatt only: fit schedule, rho and gamma to the model, judged by videos of further prompts; what is "
        "found goes to FILE.front.json, notes and trials stay in FILE.fit",
    )
    command.add_argument("--trials", type=int, help="with --fit: how many settings to try; default: 50")
    command.add_argument("--tuning", type=int, help="with --fit: how many prompts, after the others, judge; default: 2")
    command.add_argument(
        "--density",
        type=float,
        help="with --fit: the most that is computed, 0 to 1; default: what is as near to dense attention as the "
        "paper's settings, and sparsest",
    )
    command.add_argument(
        "--seed", type=int, default=10_000, help="seed of the first prompt's noise; default: %(default)s"
    )
    command.set_defaults(run=_calibrate)

    command = commands.add_parser("calibration", help="say what a calibration is for, and check all of its file")
    command.add_argument("file", type=Path, metavar="FILE", help="of `calibatt calibrate`")
    command.add_argument(
        "--against",
        type=Path,
        metavar="OTHER",
        help="also say how far its masks overlap with those of this calibration",
    )
    command.set_defaults(run=_calibration)

    command = commands.add_parser(
        "transfer", help="a calibration made at another resolution or number of steps of the same model, without videos"
    )
    command.add_argument("file", type=Path, metavar="FILE", help="of `calibatt calibrate`")
    command.add_argument("-o", "--out", type=Path, required=True, metavar="FILE", help="the calibration to write")
    _add_model(command)
    command.set_defaults(run=_transfer)

    command = commands.add_parser(
        "bench",
        help="measure: pytest on the benchmarks that come with this package, with its options; see `calibatt bench -h`",
        # all that follows is pytest's, what begins with a dash too
        add_help=False,
        prefix_chars="\0",
    )
    command.add_argument("arguments", nargs="*")
    command.set_defaults(run=_bench)

    command = commands.add_parser(
        "matrix",
        help="models × resolutions × steps × seeds × methods, each in a process of its own: exit 1 where one failed",
    )
    command.add_argument("file", type=Path, metavar="FILE", help="what to measure, in TOML: see docs/matrix.md")
    command.add_argument(
        "-o", "--out", type=Path, required=True, metavar="FOLDER",
        help="for results.json, and the runs' own files; what is there is not measured again",
    )  # fmt: skip
    command.add_argument("--retry", action="store_true", help="make runs again that failed")
    command.set_defaults(run=_matrix)

    command = commands.add_parser("report", help="a page, figures and data of files of `pytest bench --benchmark-json`")
    command.add_argument("files", type=Path, nargs="+", metavar="FILE", help="result files")
    command.add_argument("-o", "--out", type=Path, required=True, help="folder of the report")
    command.add_argument(
        "--figures",
        type=int,
        # `FIGURES` of `reports/page.py`, which other commands need not load
        default=24,
        help="once there are so many, further workloads have none; default: %(default)s",
    )
    command.add_argument(
        "--figure-width",
        choices=("page", "column"),
        default="page",
        help="of the figures: both columns of a paper, 7 inches, or one, 3.33 inches, with type to match; "
        "default: %(default)s",
    )
    command.set_defaults(run=_report)

    command = commands.add_parser(
        "gate",
        help="compare with baseline files of a like machine: exit 0 pass, 1 regression, 2 unusable, 3 inconclusive",
    )
    command.add_argument(
        "files", type=Path, nargs="+", metavar="FILE", help="result files to judge: of one code, each a run of its own"
    )
    command.add_argument(
        "--baseline", type=Path, nargs="+", required=True, metavar="FILE",
        help="earlier result files of the same benchmarks: with three of these and three to judge, or with one against "
        "five, the spread between runs is theirs",
    )  # fmt: skip
    command.add_argument(
        "--on", metavar="METRIC[=ALLOWED],…",
        help="what is compared, and how much worse it may be: speedup, time, energy, calibration, memory, density, "
        "error (shares), psnr (dB), alignment, recall; default: all that the files have",
    )  # fmt: skip
    command.add_argument("--tolerance", metavar="SHARE", help="loss of speedup that is allowed; default: 1%%")
    command.add_argument(
        "--mde", metavar="SHARE",
        help="minimal detectable effect: a run that would not show this loss of speedup is inconclusive; default: 5%%",
    )  # fmt: skip
    command.add_argument(
        "--force", action="store_true", help="compare speedups even if machine or software differ; else that is exit 3"
    )
    for name, what in (("junit", "JUnit XML"), ("json", "JSON"), ("markdown", "Markdown, for a pull request")):
        command.add_argument(f"--{name}", type=Path, metavar="FILE", help=f"write the verdict as {what}")
    command.set_defaults(run=_gate)

    command = commands.add_parser("merge", help="one result file of several that were made on one kind of machine")
    command.add_argument("files", type=Path, nargs="+", metavar="FILE", help="result files, two or more")
    command.add_argument("-o", "--out", type=Path, required=True, metavar="FILE", help="the file to write")
    command.add_argument(
        "--replace", action="store_true", help="of an arm that several files have times of, keep that of the last file"
    )
    command.set_defaults(run=_merge)

    command = commands.add_parser(
        "compare", help="two result files side by side, and what differs about their machines"
    )
    command.add_argument("files", type=Path, nargs=2, metavar="FILE", help="result files")
    command.set_defaults(run=_compare)

    command = commands.add_parser("methods", help="list the methods, or show one with its settings and presets")
    command.add_argument("name", nargs="?", help="which one to show; package.module:Class for one of your own")
    command.set_defaults(run=_methods)
    commands.add_parser("models", help="list the models").set_defaults(run=_models)
    commands.add_parser("kernels", help="list the kernels, and which of them run here").set_defaults(run=_kernels)
    return parser


def _add_model(command: argparse.ArgumentParser) -> None:
    command.add_argument("--model", default="shapes", help="see `calibatt models`; default: %(default)s")
    command.add_argument("--resolution", help="default: the model's first")
    command.add_argument("--steps", type=int, help="denoising steps; default: the model's at that resolution")
    command.add_argument("--device", help="cpu or cuda; default: cuda where there is one")
    command.add_argument("--weights", type=Path, help="folder of other weights, in Diffusers' layout")


def _add_prompt(command: argparse.ArgumentParser) -> None:
    """What a video is of."""
    command.add_argument("prompt", help='e.g. "a red circle moving left and a blue square, still, over stripes"')
    _add_model(command)
    command.add_argument("--seed", type=int, default=0, help="seed of the starting noise; default: %(default)s")
    command.add_argument("--guidance", type=float, help="classifier-free guidance scale; default: the model's")


def _add_video(command: argparse.ArgumentParser) -> None:
    """What a video is of, and what computes its attention."""
    _add_prompt(command)
    command.add_argument("--method", default="dense", help="see `calibatt methods`; default: %(default)s")
    command.add_argument("--preset", default="default", help="preset of the method; default: %(default)s")
    _add_settings(command)
    command.add_argument(
        "--kernel",
        default="default",
        help="see `calibatt kernels`; default: for each call, the one measured to be fastest for its kind",
    )
    command.add_argument("--calibration", type=Path, help="file of `calibatt calibrate`, for methods that need one")


def _add_settings(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE",
        help="a setting of the method, in place of the preset's; may be given again",
    )  # fmt: skip


def _settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """What --set says."""
    from calibatt.methods.catalogue import settings_from

    return settings_from(arguments.method, arguments.preset, arguments.set)


def _generate(arguments: argparse.Namespace) -> int:
    from calibatt.bench.timer import timed
    from calibatt.calibration.artifact import check_output
    from calibatt.kernels.catalogue import DEFAULT
    from calibatt.methods.catalogue import build
    from calibatt.models.adapter import attached
    from calibatt.models.generate import check_video_path, generate, save_video
    from calibatt.models.video_metrics import eight_bit, psnr_db

    check_video_path(arguments.out)
    check_output(arguments.out)
    entry, resolution, steps, device, method, kernel, pipe = _ready(arguments)

    def one(method: Any, kernel: Any, *, stop_after: int | None = None) -> tuple[float, Any]:
        with attached(pipe, method, kernel):
            return timed(
                device,
                lambda: generate(
                    entry, pipe, prompt=arguments.prompt, resolution=resolution, seed=arguments.seed, steps=steps,
                    guidance=arguments.guidance, progress=stop_after is None, stop_after=stop_after,
                ),
            )  # fmt: skip

    # compiles and caches what a first use would otherwise count in, and finds a calibration of another model's weights
    print("warming up", file=sys.stderr)
    one(method, kernel, stop_after=1)
    dense = None
    if arguments.compare and arguments.method != "dense":
        one(build("dense"), DEFAULT, stop_after=1)
        dense = one(build("dense"), DEFAULT)
        print(f"dense: {dense[0]:.2f} s")
    seconds, video = one(method, kernel)
    print(f"{arguments.method}: {seconds:.2f} s")
    if dense is not None:
        psnr = psnr_db(eight_bit(video), eight_bit(dense[1]))
        print(f"{dense[0] / seconds:.2f} times as fast, PSNR {psnr:.1f} dB against dense")
    save_video(video, arguments.out)
    print(f"wrote {arguments.out}")
    return 0


def _ready(arguments: argparse.Namespace) -> tuple[Any, str, int, Any, Any, Any, Any]:
    """The model, the resolution, the steps, the device, the method, the kernel, and the pipeline."""
    from calibatt.kernels.catalogue import KERNELS
    from calibatt.kernels.names import look_up
    from calibatt.models.device import working_dtype

    # what can be wrong is looked at before the model is loaded
    entry, resolution, device = _model(arguments)
    entry.checked_loader()
    entry.check_prompt(arguments.prompt)
    steps = arguments.steps or entry.steps_at(resolution)
    if not 0 <= (getattr(arguments, "step", None) or 0) < steps:
        raise ValueError(f"--step {arguments.step}: there are steps 0 to {steps - 1}")
    kernel = look_up(KERNELS, arguments.kernel, "kernel")
    method = _method(arguments, entry, resolution, steps)
    geometry = entry.geometry(resolution)
    refusal = method.refusal(geometry) or kernel.refusal(_task(method, geometry, steps, entry.layers, device))
    if refusal is not None:
        raise ValueError(refusal.reason)
    pipe = entry.load(resolution=resolution, device=device, dtype=working_dtype(device), weights=arguments.weights)
    return entry, resolution, steps, device, method, kernel, pipe


def _profile(arguments: argparse.Namespace) -> int:
    from calibatt.bench.breakdown import StepProfiler, annotated
    from calibatt.calibration.artifact import check_output
    from calibatt.models.generate import generate

    if arguments.trace is not None:
        check_output(arguments.trace)
    top = _at_least_one(arguments, "top", 20)
    entry, resolution, steps, device, method, kernel, pipe = _ready(arguments)
    step = steps // 2 if arguments.step is None else arguments.step
    profiler = StepProfiler(device, step)

    def video(**how: Any) -> None:
        generate(
            entry, pipe, prompt=arguments.prompt, resolution=resolution, seed=arguments.seed, steps=steps,
            guidance=arguments.guidance, **how,
        )  # fmt: skip

    with annotated(pipe, method, kernel):
        # compiles what would otherwise be of the step, at which a method may do what it does at none before
        video(stop_after=step + 1)
        profiler.begin()
        video(stop_after=step + 1, after_step=profiler.after_step)
    _show(profiler.breakdown(), top)
    if arguments.trace is not None:
        profiler.save(arguments.trace)
        print(f"wrote {arguments.trace}")
    return 0


def _capture(arguments: argparse.Namespace) -> int:
    from calibatt.calibration.captures import CALLS, capturing
    from calibatt.models.device import working_dtype
    from calibatt.models.generate import generate

    calls = _at_least_one(arguments, "calls", CALLS)
    entry, resolution, device = _model(arguments)
    entry.checked_loader()
    entry.check_prompt(arguments.prompt)
    pipe = entry.load(resolution=resolution, device=device, dtype=working_dtype(device), weights=arguments.weights)
    with capturing(pipe, arguments.out, calls=calls, name=entry.name) as paths:
        generate(
            entry, pipe, prompt=arguments.prompt, resolution=resolution, seed=arguments.seed,
            steps=arguments.steps or entry.steps_at(resolution), guidance=arguments.guidance, progress=True,
        )  # fmt: skip
    size = sum(path.stat().st_size for path in paths) / 1e6
    print(f"wrote {len(paths)} calls to {arguments.out}, {size:,.0f} MB; measure them with")
    print(
        f"pytest bench --models {entry.name} --resolutions {resolution} --inputs captures={arguments.out} "
        f"--methods dense,sparge,xattention"
    )
    return 0


def _show(found: Any, top: int) -> None:
    """What a step was spent on: its parts, then the longest kernels."""
    from calibatt.bench.breakdown import PARTS
    from calibatt.reports.columns import seconds

    def line(*names: str, took: float, launches: int | str) -> Sequence[str]:
        return (*names, seconds(took), f"{took / found.seconds:.1%}", str(launches))

    print(f"the step took {seconds(found.seconds)} under the profiler, whose own cost is in it\n")
    parts = [line(part, took=took, launches=count) for part in PARTS for took, count in [found.of(part)] if count]
    _table(("PART", "TIME", "SHARE", "LAUNCHES"), [*parts, line("idle", took=found.idle_s, launches="")])
    print()
    works = [line(one.name[:_LONGEST_NAME], one.part, took=one.seconds, launches=one.launches) for one in found.works]
    _table(("KERNEL", "PART", "TIME", "SHARE", "LAUNCHES"), works[:top])


def _method(arguments: argparse.Namespace, entry: Any, resolution: str, steps: int) -> Any:
    """The method, with the calibration that it needs."""
    from calibatt.calibration.artifact import Calibration
    from calibatt.methods.catalogue import build, learns_from

    name, preset, calibration = arguments.method, arguments.preset, None
    settings = _settings(arguments)
    source = learns_from(name, preset, **settings)
    if arguments.calibration is not None:
        calibration = Calibration.load(arguments.calibration)
    elif source is not None:
        which = "" if source == "calibatt" else f"--method {source} "
        which += "" if source != name or preset == "default" else f"--preset {preset} "
        raise ValueError(
            f"{name} needs --calibration: make one by `calibatt calibrate {which}--model {entry.name} "
            f"--resolution {resolution} --steps {steps} -o FILE`"
        )
    return build(name, preset=preset, calibration=calibration, **{"block": entry.block_at(resolution), **settings})


def _task(method: Any, geometry: Any, steps: int, layers: int, device: Any) -> Any:
    """What the method will ask of a kernel, by a plan for random inputs at the last step and layer."""
    import torch

    from calibatt.kernels.base import Task
    from calibatt.methods.site import Site
    from calibatt.models.device import working_dtype

    # of a generator of its own: the global one is the video's
    shape = (3, geometry.heads, geometry.tokens, geometry.head_dim)
    generator = torch.Generator(device).manual_seed(0)
    q, k, v = torch.randn(shape, generator=generator, device=device, dtype=working_dtype(device))
    where = {"step": steps - 1, "steps": steps, "layer": layers - 1, "layers": layers}
    plan = method.plan(q, k, v, Site(geometry=geometry, sigma=0.0, branch="cond", **where))
    method.reset()
    return Task.of(q[None], plan)


def _calibrate(arguments: argparse.Namespace) -> int:
    from calibatt.calibration.artifact import check_output
    from calibatt.calibration.collect import Run, learner_for
    from calibatt.calibration.videos import DenseVideos
    from calibatt.methods.catalogue import build
    from calibatt.models.device import working_dtype

    if arguments.fit:
        return _fit(arguments)
    for name in ("trials", "tuning", "density"):
        if getattr(arguments, name) is not None:
            raise ValueError(f"--{name} goes with --fit only")
    entry, resolution, device = _model(arguments)
    method = arguments.method
    how = _learning(arguments, entry, resolution)
    # what can be wrong is looked at before the model is loaded
    learner_for(method, **how)
    prompts = _prompts(arguments, entry)
    check_output(arguments.out)
    rank, world = _rank(device)
    pipe = entry.load(resolution=resolution, device=device, dtype=working_dtype(device), weights=arguments.weights)
    videos = DenseVideos(entry, pipe, resolution=resolution, steps=arguments.steps)
    run = Run.of(videos, method=method, prompts=prompts, seed=arguments.seed, **how)
    units = run.units(arguments.out.with_name(f"{arguments.out.name}.units"))
    try:
        with _kept(units):
            run.note(units, rank=rank, world=world, progress=True)
        with units.alone():
            done, wanted = units.videos()
            if done < wanted:
                print(f"process {rank} has ended; the last of {world} to end writes {arguments.out}")
                return 0
            with _kept(units):
                calibration = run.merge(units, arguments.out, progress=True)
            units.remove()
    except KeyboardInterrupt:
        if not units.finished():
            raise
        done, wanted = units.videos()
        _complain(
            f"calibatt calibrate: stopped with {done} of {wanted} videos done, kept in "
            f"{units.folder}: run the same command again to resume"
        )
        return EXIT_INTERRUPTED
    _describe(calibration, build(method, calibration=calibration, **how))
    print(f"wrote {arguments.out}")
    return 0


def _calibration(arguments: argparse.Namespace) -> int:
    from calibatt.calibration.artifact import Calibration
    from calibatt.calibration.card import about
    from calibatt.calibration.overlap import overlap

    calibration = Calibration.load(arguments.file, verify=True)
    _table(("ABOUT", "WHAT IT SAYS"), about(calibration))
    print(f"{arguments.file} is as it was written")
    if arguments.against is not None:
        found = overlap(calibration, Calibration.load(arguments.against, verify=True))
        print("no head has a mask in both" if found is None else f"intersection over union of the masks: {found:.3f}")
    return 0


def _transfer(arguments: argparse.Namespace) -> int:
    from calibatt.calibration.artifact import Calibration, check_output
    from calibatt.calibration.videos import DenseVideos
    from calibatt.methods.base import Foreseen
    from calibatt.methods.catalogue import build, settings_beside
    from calibatt.models.device import working_dtype

    # what can be wrong is looked at before the model is loaded
    source = Calibration.load(arguments.file)
    entry, resolution, device = _model(arguments)
    check_output(arguments.out)
    pipe = entry.load(resolution=resolution, device=device, dtype=working_dtype(device), weights=arguments.weights)
    videos = DenseVideos(entry, pipe, resolution=resolution, steps=arguments.steps, guidance=source.provenance.guidance)
    source.transferred(videos, block=entry.block_at(resolution)).save(arguments.out)
    for path in (arguments.file, arguments.out):
        made = Calibration.load(path, verify=True)
        method = build(made.method, preset=made.preset, calibration=made, **settings_beside(made))
        print(f"{path}: {made.provenance.geometry}, {made.provenance.steps} steps", end="")
        print(f", density {method.mean_density():.3f}" if isinstance(method, Foreseen) else "")
    return 0


def _fit(arguments: argparse.Namespace) -> int:
    from calibatt.calibration.artifact import check_output
    from calibatt.calibration.fit import TRIALS, TUNING_PROMPTS, Fitting, check_optuna
    from calibatt.calibration.videos import DenseVideos
    from calibatt.methods.catalogue import build, fit_of
    from calibatt.models.device import working_dtype

    entry, resolution, device = _model(arguments)
    method = arguments.method
    how = _learning(arguments, entry, resolution)
    # what can be wrong is looked at before the model is loaded
    steps = arguments.steps or entry.steps_at(resolution)
    fit_of(method, geometry=entry.geometry(resolution), steps=steps, **how)
    check_optuna()
    trials, tuned = (
        _at_least_one(arguments, name, default) for name, default in (("trials", TRIALS), ("tuning", TUNING_PROMPTS))
    )
    # written so that NaN fails too
    if arguments.density is not None and not 0 < arguments.density <= 1:
        raise ValueError(f"--density {arguments.density:g}: give a share above 0 and up to 1")
    prompts = _prompts(arguments, entry, tuned)
    front_file = arguments.out.with_name(f"{arguments.out.name}.front.json")
    for path in (arguments.out, front_file):
        check_output(path)
    if _rank(device)[1] > 1:
        raise ValueError("--fit runs in one process: leave torchrun out")
    pipe = entry.load(resolution=resolution, device=device, dtype=working_dtype(device), weights=arguments.weights)
    videos = DenseVideos(entry, pipe, resolution=resolution, steps=steps)
    fitting = Fitting.of(
        videos, method=method, prompts=prompts[:-tuned], tuning=prompts[-tuned:], seed=arguments.seed, **how
    )
    units = fitting.run.units(arguments.out.with_name(f"{arguments.out.name}.fit"))
    try:
        with _kept(units):
            fitting.run.note(units, progress=True)
            front = fitting.front(units, trials=trials, progress=True)
    except KeyboardInterrupt:
        if not units.finished():
            raise
        _complain(
            f"calibatt calibrate: stopped; notes and trials are kept in {units.folder}: run the same command again to "
            "resume"
        )
        return EXIT_INTERRUPTED
    front.save(front_file, method=method, **asdict(fitting.run.origin), resolution=resolution, steps=steps,
               prompts=fitting.run.prompts, tuning=fitting.tuning, seed=arguments.seed, trials=trials)  # fmt: skip
    names = tuple(front.published.values)
    shown = [*(("front", point) for point in front.points), ("published", front.published)]
    _table(("", *names, "DENSITY", "PSNR"), [(what, *_cells(point, names)) for what, point in shown])
    print(f"wrote {front_file}")
    calibration = fitting.calibration(units, front.chosen(arguments.density).values)
    calibration.save(arguments.out)
    _describe(calibration, build(method, calibration=calibration, **how))
    print(f"wrote {arguments.out}; {units.folder} keeps notes and trials for another --density or more --trials")
    return 0


def _cells(point: Any, names: Sequence[str]) -> Sequence[str]:
    """A point of a front as a row of a table, its values in the order of these names."""
    return [*(f"{point.values[name]:.3f}" for name in names), f"{point.density:.3f}", f"{point.psnr_db:.1f}"]


def _at_least_one(arguments: argparse.Namespace, name: str, default: int) -> int:
    given = getattr(arguments, name)
    if given is not None and given < 1:
        raise ValueError(f"--{name} {given}: give a whole number from 1 up")
    return default if given is None else int(given)


def _learning(arguments: argparse.Namespace, entry: Any, resolution: str) -> dict[str, Any]:
    """By what a method is to learn: its preset, and settings in place of the preset's."""
    how = {"preset": arguments.preset, "block": entry.block_at(resolution), **_settings(arguments)}
    return {**how, "levels": True} if arguments.levels else how


@contextlib.contextmanager
def _kept(units: Any) -> Iterator[None]:
    """Where a disk is full, say that what is done is not lost."""
    try:
        yield
    except OSError as error:
        if not units.finished():
            raise
        raise OSError(
            f"{error}; what is done is kept in {units.folder}: make room and run the same command again"
        ) from None


def _describe(calibration: Any, method: Any) -> None:
    """Print what a calibration comes to, and what it makes of its method."""
    from calibatt.methods.base import Foreseen

    print(f"calibrating took {calibration.provenance.cost_ratio:.2f} times as long as the videos alone")
    if isinstance(method, Foreseen):
        print(f"density {method.mean_density():.3f}")
    if "agreement" in calibration.tables:
        print(f"the masks of single prompts overlap the common one by {calibration.tables['agreement'].mean():.0%}")


def _prompts(arguments: argparse.Namespace, entry: Any, tuned: int = 0) -> Sequence[str]:
    """The prompts to calibrate on, and behind them those to tune on: of a file, or the model's own."""
    from calibatt.models.generate import read_prompts
    from calibatt.models.vbench import choose, to_calibrate_on

    # 16 calibration prompts are nearly as good as 64: the paper's ablation
    count = _at_least_one(arguments, "count", 16)
    if arguments.prompts is not None:
        prompts = read_prompts(arguments.prompts)
        needed = tuned + (1 if arguments.count is None else count)
        if len(prompts) < needed:
            of_them = f", {tuned} of them to tune on" if tuned else ""
            raise ValueError(f"{arguments.prompts} has {len(prompts)} prompts: {needed} are needed{of_them}")
        chosen = prompts if arguments.count is None else prompts[:needed]
        for prompt in chosen:
            entry.check_prompt(prompt)
        return chosen
    if entry.captions is None:
        return choose(to_calibrate_on(), count + tuned, "to calibrate on")
    captions: list[str] = entry.captions(count + tuned, arguments.seed)
    return captions


def _rank(device: Any) -> tuple[int, int]:
    """Which of how many processes this is, as torchrun says it; each takes its own GPU."""
    import torch

    rank, world, local = (int(os.environ.get(name, of)) for name, of in
                          (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))  # fmt: skip
    if world > 1 and device.type == "cuda":
        torch.cuda.set_device(local)
    return rank, world


def _bench(arguments: argparse.Namespace) -> int:
    from calibatt.bench.launch import bench

    return bench(arguments.arguments)


def _matrix(arguments: argparse.Namespace) -> int:
    from filelock import FileLock

    from calibatt.bench import matrix
    from calibatt.reports.merge import merge_alike

    planned = matrix.read(arguments.file)
    runs = matrix.Runs(
        arguments.out / "runs", planned, command=matrix.bench_command, log=lambda line: print(line, flush=True)
    )  # fmt: skip
    if arguments.retry:
        runs.forget_failures()
    try:
        runs.make(matrix.devices(planned))
    except KeyboardInterrupt:
        _complain(
            f"calibatt matrix: stopped with {len(runs.results())} of {len(planned)} runs done, kept in "
            f"{arguments.out}: run the same command again to go on"
        )
        return EXIT_INTERRUPTED
    results, out = runs.results(), arguments.out / "results.json"
    if (done := len(results)) < len(planned):
        print(f"{done} of {len(planned)} runs are done, other processes make the rest: the last to end writes {out}")
        return 0
    with FileLock(arguments.out / "merge.lock"):
        merged = merge_alike(results, out)
    failures = runs.failures()
    for line in failures:
        print(f"failed: {line}")
    kinds = "" if len(merged) == 1 else ": one for each kind of machine"
    print(f"wrote {', '.join(str(one.path) for one in merged)}{kinds}")
    return 1 if failures else 0


def _report(arguments: argparse.Namespace) -> int:
    from calibatt.reports.figures.style import SHEETS
    from calibatt.reports.page import write_report

    sheet = SHEETS[arguments.figure_width]
    print(f"wrote {write_report(arguments.files, arguments.out, arguments.figures, sheet)}")
    return 0


def _gate(arguments: argparse.Namespace) -> int:
    from calibatt.bench.record import load_run
    from calibatt.reports.gate import judge
    from calibatt.reports.gate_files import WRITERS, check_outputs, write_whole
    from calibatt.reports.gate_metrics import choose

    metrics = choose(arguments.on, arguments.tolerance, arguments.mde)
    outputs = [(path, form) for name, form in WRITERS.items() if (path := getattr(arguments, name)) is not None]
    check_outputs([path for path, _ in outputs], [*arguments.files, *arguments.baseline])
    current, baseline = ([load_run(path) for path in paths] for paths in (arguments.files, arguments.baseline))
    verdict = judge(current, baseline, metrics=metrics, force=arguments.force)
    # whatever becomes of the files
    print("\n".join(verdict.lines))
    for path, form in outputs:
        write_whole(path, form(verdict, current, baseline))
    return verdict.exit_code


def _merge(arguments: argparse.Namespace) -> int:
    from calibatt.reports.merge import merge

    run = merge(arguments.files, arguments.out, replace=arguments.replace)
    print(f"wrote {run.path}: {len(run.records)} records of {len(arguments.files)} files")
    return 0


def _compare(arguments: argparse.Namespace) -> int:
    from calibatt.bench.record import load_run
    from calibatt.reports.compare import compared

    print(compared(*map(load_run, arguments.files)))
    return 0


def _methods(arguments: argparse.Namespace) -> int:
    from calibatt.kernels.names import look_up
    from calibatt.methods.catalogue import METHODS, learns_from

    if arguments.name is not None:
        return _method_shown(look_up(METHODS, arguments.name, "method"))
    rows = []
    for name, method in METHODS.items():
        sources = {preset: learns_from(name, preset) for preset in method.presets}
        needing = [preset for preset, source in sources.items() if source is not None]
        kind = ", ".join(
            dict.fromkeys("own" if sources[preset] == name else f"{sources[preset]}'s" for preset in needing)
        )
        if 0 < len(needing) < len(sources):
            kind += f": {', '.join(needing)}"
        summary = (method.__doc__ or "").strip().splitlines()[0]
        rows.append((name, ", ".join(method.presets), kind, summary))
    _table(("METHOD", "PRESETS", "CALIBRATION", "WHAT IT DOES"), rows)
    return 0


def _method_shown(method: Any) -> int:
    """What a method is and where it comes from, what each setting means, and each preset's settings."""
    config = next(iter(method.presets.values()))
    for text in (sys.modules[method.__module__].__doc__, type(config).__doc__):
        print(inspect.cleandoc(text or ""), end="\n\n")
    names = [field.name for field in fields(config)]
    rows = [(name, *(str(getattr(preset, name)) for preset in method.presets.values())) for name in names]
    _table(("SETTING", *method.presets), rows)
    if names:
        print(f"\nIn place of a preset's: --set NAME=VALUE; in a benchmark --methods '{method.name}[NAME=VALUE,…]'")
    return 0


def _models(arguments: argparse.Namespace) -> int:
    from calibatt.models.catalogue import MODELS

    rows = []
    for entry in MODELS.values():
        for name, size in entry.resolutions.items():
            rows.append(
                (entry.name, name, f"{size.width}×{size.height}, {size.frames} frames",
                 f"{entry.geometry(name)} in {entry.layers} layers",
                 f"{entry.steps_at(name)} steps" if entry.loader else "attention only")
            )  # fmt: skip
    _table(("MODEL", "RESOLUTION", "VIDEO", "ATTENTION", "DEFAULT"), rows)
    return 0


def _kernels(arguments: argparse.Namespace) -> int:
    from calibatt.kernels.base import Task
    from calibatt.kernels.catalogue import KERNELS
    from calibatt.models.device import pick_device, working_dtype

    device = pick_device(None)
    rows = []
    for name, kernel in KERNELS.items():
        answers = []
        for block in (None, (64, 64)):
            refusal = kernel.refusal(Task(device=device, dtype=working_dtype(device), head_dim=64, block=block))
            answers.append("yes" if refusal is None else f"no: {refusal.reason}")
        rows.append((name, *answers))
    _table(("KERNEL", f"DENSE ON {device.type.upper()}", f"BLOCK SPARSE ON {device.type.upper()}"), rows)
    return 0


def _model(arguments: argparse.Namespace) -> tuple[Any, str, Any]:
    """The model, the resolution and the device that the arguments name."""
    from calibatt.kernels.names import look_up
    from calibatt.models.catalogue import MODELS
    from calibatt.models.device import pick_device

    entry = look_up(MODELS, arguments.model, "model")
    resolution = next(iter(entry.resolutions)) if arguments.resolution is None else arguments.resolution
    entry.resolution(resolution)
    if arguments.steps is not None and arguments.steps < 1:
        raise ValueError(f"--steps {arguments.steps}: give a whole number from 1 up")
    return entry, resolution, pick_device(arguments.device)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from calibatt.reports.tables import aligned

    print("\n".join(aligned([head, *rows])))
