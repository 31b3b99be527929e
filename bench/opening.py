"""Opens a workload: loads its pipeline, takes probes, finds the fastest dense kernel, and ties it all together."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

from calibatt.bench.baseline import dense_kernels, fastest_dense
from calibatt.bench.captured import CapturedVideos
from calibatt.bench.cells import DENSE, Workload
from calibatt.bench.console import Console
from calibatt.bench.context import Context, spread, take_probes
from calibatt.bench.meter import Meter
from calibatt.bench.observers import Probe
from calibatt.bench.offline import Lesson, Offline, learn
from calibatt.bench.parts import components_timed
from calibatt.bench.preparation import Preparation
from calibatt.bench.record import PLANTED
from calibatt.bench.resampled import ResampledVideos
from calibatt.bench.tuning import TUNING_SEED, Film, Tuner
from calibatt.calibration.artifact import Calibration
from calibatt.calibration.videos import DenseVideos, Videos
from calibatt.kernels.base import Kernel
from calibatt.kernels.catalogue import KERNELS
from calibatt.kernels.names import look_up
from calibatt.methods.call import Attention
from calibatt.methods.learning import Learnt
from calibatt.models.adapter import installed
from calibatt.models.compiled import compile_blocks
from calibatt.models.generate import generate
from calibatt.models.identity import transformers_of
from calibatt.models.planted.pipeline import load_planted
from calibatt.models.shapes.entry import SHAPES

# attention calls at which arms are checked: from the first step and layer to the last, evenly
_PROBES = (0, 1 / 3, 2 / 3, 1)
# at a large model's size, where fp64 takes minutes for all: two calls within the video, and a few heads of each
_FEW_PROBES = (1 / 3, 2 / 3)
_FEW_HEADS = 4
# the embedded model's larger size, whose number of frames is nearest to those of large models
_RESAMPLED_FROM = "standard"


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompts:
    """Prompts of a workload, all different.

    Args:
        calibration: those to learn from.
        rounds: those that are measured, one a round.
        tuning: those on whose videos knobs are turned; none where no arm has a target.
    """

    calibration: tuple[str, ...]
    rounds: tuple[str, ...]
    tuning: tuple[str, ...] = ()


def open_workload(
    workload: Workload, prompts: Prompts, *, preparation: Preparation, stored: Path | None, turned: Collection[str],
    filmed: bool, console: Console,
) -> Context:  # fmt: skip
    """What the arms of a workload share.

    Args:
        workload: what runs.
        prompts: of its videos.
        preparation: what a stopped run has learnt and turned, and keeps what this one does.
        stored: a file of `calibatt calibrate`, to use in place of learning the same method here.
        turned: methods whose knob an arm of the workload turns.
        filmed: whether whole videos are measured, so that densities are theirs; else they are those of the probes.
        console: shows how far the work is.

    Raises:
        RuntimeError: no dense kernel is right here.
        OSError: the weights, or the stored calibration, cannot be read.
        ValueError: the stored calibration is for another pipeline.
    """

    def log(line: str) -> None:
        console.line(f"{workload}: {line}")

    log("loading")
    film, videos = _videos(workload)
    shares = _FEW_PROBES if workload.large else _PROBES
    if isinstance(videos, CapturedVideos):
        probes = videos.probes(workload.device, workload.dtype)
    else:
        log("one dense video to take attention inputs from")
        kernel = dense_kernels(workload.device, workload.dtype, workload.entry.head_dim)[0]
        probes = take_probes(videos, kernel, prompts.rounds[0], shares, seed=workload.noise)
    first, heads = probes[0], probes[0].site.geometry.heads
    dense = _baseline(first, preparation, log=log)
    learn = partial(_learn, workload, videos, prompts.calibration, dense, console)
    offline = Offline(
        None if workload.captures else learn, preparation=preparation,
        stored=None if stored is None else partial(_stored, stored, videos),
        log=log, block=workload.block, turned=turned,
    )  # fmt: skip
    tuner = Tuner(
        workload, offline=offline, preparation=preparation, probe=probes[-1],
        # where there are no other calls, those that are measured
        tuning_probes=lambda: (
            probes if workload.captures else take_probes(videos, dense, prompts.tuning[0], shares, seed=TUNING_SEED)
        ),
        film=film,
        dense=dense, prompts=prompts.tuning,
        # a video of a large model takes minutes
        filmed=filmed and not workload.planted, log=log,
    )  # fmt: skip
    return Context(
        name=str(workload), device=workload.device, prompts=prompts.rounds, probes=probes,
        checked_heads=spread(heads, _FEW_HEADS if workload.large else heads), dense=dense,
        kernel=lambda arm: dense if arm == DENSE else KERNELS[arm.kernel], method=tuner.method,
        prepared=offline.prepared,
        # videos of the model whose size is taken would take longer
        preparation_s=(lambda method: None) if workload.resampled else offline.seconds,
        film=film, alignment=workload.entry.alignment, guidance=workload.entry.guidance,
        facts=_facts(workload, videos), log=log, seed=workload.noise, faithful=not workload.planted,
    )  # fmt: skip


def _baseline(probe: Probe, preparation: Preparation, *, log: Callable[[str], None]) -> Kernel:
    """The fastest dense kernel, or the one that a stopped run chose: where two are as fast, chance decides."""
    kept = preparation.baseline()
    if kept is not None:
        return look_up(KERNELS, kept, "kernel")
    dense = fastest_dense(probe.q, probe.k, probe.v, probe.site.geometry, log=log)
    preparation.keep_baseline(dense.name)
    return dense


def probes_of(workload: Workload, prompt: str) -> tuple[Probe, ...]:
    """Inputs of some attention calls of one dense video of a workload, which is needed for nothing else."""
    kernel = dense_kernels(workload.device, workload.dtype, workload.entry.head_dim)[0]
    return take_probes(_videos(workload)[1], kernel, prompt, _PROBES, seed=workload.noise)


def _videos(workload: Workload) -> tuple[Film, Videos]:
    """What makes the workload's videos, and dense ones whose attention calls can be watched."""
    if workload.captures is not None:
        return _unmade, CapturedVideos(
            workload.captures, resolution=workload.resolution, guidance=workload.entry.guidance
        )
    own = SHAPES if workload.resampled else workload.entry
    resolution = _RESAMPLED_FROM if workload.resampled else workload.resolution
    load = partial(load_planted, own) if workload.planted else own.load
    pipe = load(resolution=resolution, device=workload.device, dtype=workload.dtype)
    if workload.compiled:
        for transformer in transformers_of(pipe):
            # the video for the probes compiles the graph that serves all arms
            compile_blocks(transformer)

    def film(attention: Attention, prompt: str, seed: int) -> Float[Tensor, "3 frames height width"]:
        parts = components_timed(pipe, attention.timer.phase) if isinstance(attention, Meter) else nullcontext()
        with installed(pipe, attention), parts:
            return generate(own, pipe, prompt=prompt, resolution=resolution, seed=seed, steps=workload.steps)

    videos = DenseVideos(own, pipe, resolution=resolution, steps=workload.steps)
    if not workload.resampled:
        return film, videos
    kernel = dense_kernels(workload.device, workload.dtype, own.head_dim)[0]
    return film, ResampledVideos(
        videos, kernel, model=workload.model, resolution=workload.resolution,
        geometry=workload.entry.geometry(workload.resolution),
    )  # fmt: skip


def _unmade(attention: Attention, prompt: str, seed: int) -> Float[Tensor, "3 frames height width"]:
    raise AssertionError("captured calls are no whole videos, and no suite asks for one")


def _learn(
    workload: Workload, videos: Videos, prompts: Sequence[str], kernel: Kernel, console: Console, lesson: Lesson,
    folder: Path | None,
) -> tuple[float, Calibration]:  # fmt: skip
    with console.open():
        return learn(
            lesson, videos, prompts=prompts, kernel=kernel, device=workload.device, folder=folder, progress=True
        )


def _stored(path: Path, videos: Videos) -> Learnt:
    stored = Calibration.load(path)
    stored.check_origin(videos.origin())
    return stored


def _facts(workload: Workload, videos: Videos) -> dict[str, Any]:
    """The fields of a record that all arms of this workload share."""
    inputs = videos.inputs if isinstance(videos, ResampledVideos | CapturedVideos) else None
    digest = videos.origin().weights
    return {
        **workload.facts(), "weights": f"{PLANTED} {digest}" if workload.planted else digest, "inputs": inputs,
    }  # fmt: skip
