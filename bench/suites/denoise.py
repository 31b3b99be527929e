"""The denoise suite: whole generations, all arms in turns, and what became of the videos."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from calibatt.bench.arms import Ready, failed, passed, ready
from calibatt.bench.cells import DENSE, AnyArm, Arm, Cell
from calibatt.bench.context import Context
from calibatt.bench.failure import Failure, guarded
from calibatt.bench.meter import Meter
from calibatt.bench.observers import PlanSummary
from calibatt.bench.options import Options, method_cells
from calibatt.bench.record import Record, Suite
from calibatt.bench.rounds import take_turns
from calibatt.bench.suites.suite import Job
from calibatt.bench.telemetry import Reading, read
from calibatt.bench.timer import timed
from calibatt.bench.video_metrics import eight_bit, psnr_db, ssim

NAME: Suite = "denoise"

# videos that go into the report's pictures
_SHOWN_VIDEOS = 3

Frames = UInt8[Tensor, "3 frames height width"]


@dataclass(slots=True, kw_only=True, eq=False)
class _Course:
    """What an arm has done so far; of its videos, what was found out and the few that are shown."""

    one: Ready
    plans: PlanSummary = field(default_factory=PlanSummary)
    seconds: list[float] = field(default_factory=list)
    phases: dict[str, list[float]] = field(default_factory=dict)
    readings: list[tuple[Reading, Reading]] = field(default_factory=list)
    peak_memory_bytes: int | None = None
    alignment: list[float] = field(default_factory=list)
    psnr_db: list[float] = field(default_factory=list)
    ssim: list[float] = field(default_factory=list)
    shown: list[Frames] = field(default_factory=list)


def cells(options: Options) -> list[Cell]:
    """Every arm on every workload that has videos.

    Raises:
        ValueError: an option makes no sense.
    """
    return [] if options.resampled else method_cells(options)


def measure(job: Job, arms: Sequence[AnyArm]) -> Iterator[tuple[AnyArm, Record]]:
    """Generate one video a round with every arm and compare it with the dense one of the same prompt and seed."""
    # the baseline is measured even where nobody asked to see it
    wanted = dict.fromkeys([DENSE, *(arm for arm in arms if isinstance(arm, Arm))])
    yield from run(job.open(), list(wanted), rounds=job.rounds, artifacts=job.artifacts)


def run(context: Context, arms: Sequence[Arm], *, rounds: int, artifacts: Path | None) -> Iterator[tuple[Arm, Record]]:
    """Check arms, and let those that are right make videos.

    Args:
        context: what they share.
        arms: dense among them.
        rounds: videos an arm.
        artifacts: folder for the data of the report's pictures; None leaves them out.
    """
    courses: dict[Arm, _Course] = {}
    for arm in arms:
        context.log(f"checking {arm}")
        one = ready(context, arm)
        if isinstance(one, Failure):
            yield arm, failed(context, NAME, arm, one)
        else:
            courses[arm] = _Course(one=one)
    # videos of the round that is under way: each is gone once it has been compared with the dense one
    videos: dict[Arm, Frames] = {}
    lost: dict[Arm, Failure] = {}

    def turn(round_: int, arm: Arm) -> None:
        videos[arm] = _one_video(context, courses[arm], round_)
        context.log(f"video {round_ + 1} of {rounds}, {arm}: {courses[arm].seconds[-1]:.2f} s")

    def compare(round_: int) -> None:
        reference = videos.pop(DENSE, None)
        for arm, video in videos.items():
            if reference is not None and arm not in lost:
                failure = guarded(partial(_compare, courses[arm], video, reference))
                if failure is not None:
                    lost[arm] = failure
        videos.clear()

    failures = {**take_turns(list(courses), rounds, turn, after=compare), **lost}
    dense = None if DENSE in failures else courses.get(DENSE)
    for arm, course in courses.items():
        if arm in failures:
            yield arm, failed(context, NAME, arm, failures[arm])
            continue
        made = guarded(partial(_record, context, course, None if arm == DENSE else dense, artifacts))
        yield arm, failed(context, NAME, arm, made) if isinstance(made, Failure) else made


def _one_video(context: Context, course: _Course, round_: int) -> Frames:
    device = context.device
    # the plans of one video show the method's density
    observers = [course.plans] if round_ == 0 else []
    meter = Meter(course.one.method, course.one.kernel, device, observers=observers)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    before = read(device)
    seconds, video = timed(device, lambda: context.video(meter, round_))
    after = read(device)
    if device.type == "cuda":
        course.peak_memory_bytes = max(course.peak_memory_bytes or 0, torch.cuda.max_memory_allocated(device))
    if not video.isfinite().all():
        raise ValueError("the video has NaN or infinite values")
    phases = meter.timer.collect_s()
    # to look at the plans is no part of the arm
    course.seconds.append(seconds - phases.pop("observe", 0.0))
    for name, part in phases.items():
        course.phases.setdefault(name, []).append(part)
    if before is not None and after is not None:
        course.readings.append((before, after))
    if context.alignment is not None:
        course.alignment.append(context.alignment(video, context.prompts[round_]))
    frames = eight_bit(video)
    if len(course.shown) < _SHOWN_VIDEOS:
        course.shown.append(frames)
    return frames


def _compare(course: _Course, video: Frames, reference: Frames) -> None:
    course.psnr_db.append(psnr_db(video, reference))
    course.ssim.append(ssim(video, reference))


def _record(context: Context, course: _Course, dense: _Course | None, artifacts: Path | None) -> Record:
    more: dict[str, Any] = {}
    if course.readings:
        more["energy_j"] = tuple(after.energy_j - before.energy_j for before, after in course.readings)
        more["clocks_mhz"] = tuple(after.clock_mhz for _, after in course.readings)
        more["throttled"] = any(reading.throttled for pair in course.readings for reading in pair)
    if course.alignment:
        more["alignment"] = tuple(course.alignment)
    if dense is not None:
        more["baseline_samples_s"] = tuple(dense.seconds)
        more["psnr_db"] = tuple(course.psnr_db)
        more["ssim"] = tuple(course.ssim)
        if dense.alignment:
            more["alignment_dense"] = tuple(dense.alignment)
    if artifacts is not None:
        more["artifact"] = _save_artifact(context, course, artifacts)
    return Record(
        **passed(context, NAME, course.one),
        prompts=context.prompts[: len(course.seconds)],
        guidance=context.guidance,
        samples_s=tuple(course.seconds),
        phases_s={name: tuple(samples) for name, samples in course.phases.items()},
        peak_memory_bytes=course.peak_memory_bytes,
        plan_memory_bytes=course.plans.nbytes,
        density=course.plans.density(),
        **more,
    )


def _save_artifact(context: Context, course: _Course, folder: Path) -> str:
    """Data for the report's pictures; returns its path relative to the JSON file, beside which the folder lies."""
    arm, masks = course.one.arm, course.plans.masks()
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{context.name}-{arm}-{arm.kernel}".replace("/", "_").replace("=", "_")
    arrays: dict[str, Any] = {
        "density": course.plans.by_site().numpy().astype(np.float32),
        "frames": np.stack([video.permute(1, 2, 3, 0).numpy() for video in course.shown]),
        "captions": np.array(context.prompts[: len(course.shown)]),
    }
    if masks:
        arrays |= {"masks": np.stack([mask for _, mask in masks]), "mask_sites": np.array([site for site, _ in masks])}
        # in another order, tokens of a frame do not lie side by side
        if not course.plans.ordered:
            geometry = context.probes[0].site.geometry
            arrays["frame_starts"] = np.arange(geometry.grid[0]) * geometry.frame_tokens + geometry.video_start
    np.savez_compressed(folder / f"{name}.npz", **arrays)
    return f"{folder.name}/{name}.npz"
