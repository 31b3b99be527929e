"""The denoise suite: whole generations, all arms in turns, and what became of the videos."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from calibatt.bench.accuracy import eight_bit, psnr_db, ssim
from calibatt.bench.arms import Failure, Ready, failed, guarded, passed, ready
from calibatt.bench.cells import DENSE, Arm
from calibatt.bench.meter import Meter
from calibatt.bench.record import Record
from calibatt.bench.rounds import in_turns
from calibatt.bench.stage import Stage
from calibatt.bench.telemetry import Reading, read
from calibatt.kernels.plan import Plan
from calibatt.methods.site import Site

# videos and masks that go into the report's pictures
_SHOWN_VIDEOS = 3
_SHOWN_MASKS = 4
# tokens of a cell of a picture where blocks differ in size: the sizes that methods take otherwise
_CELL = (64, 64)


@dataclass(slots=True, kw_only=True)
class _Course:
    """What an arm has done so far."""

    one: Ready
    meter: Meter
    seconds: list[float] = field(default_factory=list)
    phases: dict[str, list[float]] = field(default_factory=dict)
    videos: list[Float[Tensor, "3 frames height width"]] = field(default_factory=list)
    readings: list[tuple[Reading, Reading]] = field(default_factory=list)
    peak_memory_bytes: int | None = None


def measure(stage: Stage, arms: Sequence[Arm], *, rounds: int, artifacts: Path | None) -> dict[Arm, Record]:
    """Generate one video a round with every arm and compare it with the dense one of the same prompt and seed.

    Args:
        arms: what to measure, dense among them.
        rounds: videos an arm.
        artifacts: folder for the data of the report's pictures; None leaves them out.

    Returns:
        A record for every arm, also for those that could not be timed.
    """
    records: dict[Arm, Record] = {}
    courses: dict[Arm, _Course] = {}
    for arm in arms:
        stage.log(f"{stage.workload}: checking {arm}")
        one = ready(stage, arm)
        if isinstance(one, Failure):
            records[arm] = failed(stage, "denoise", arm, one)
        else:
            courses[arm] = _Course(one=one, meter=Meter(one.method, one.kernel, stage.workload.device))
    for round_, arm in in_turns(list(courses), rounds):
        if arm not in courses:
            continue
        failure = guarded(partial(_one_video, stage, courses[arm], round_))
        if failure is not None:
            records[arm] = failed(stage, "denoise", arm, failure)
            del courses[arm]
            continue
        stage.log(f"{stage.workload}: video {round_ + 1} of {rounds}, {arm}: {courses[arm].seconds[-1]:.2f} s")
    for arm, course in courses.items():
        records[arm] = _record(stage, course, courses.get(DENSE), artifacts)
    return records


def _one_video(stage: Stage, course: _Course, round_: int) -> None:
    device = stage.workload.device
    # the plans of one video show the method's density; keeping them all would fill the memory
    course.meter.keep_plans = round_ == 0
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    before = read(device)
    seconds, video = stage.generate(course.meter, round_)
    after = read(device)
    if device.type == "cuda":
        course.peak_memory_bytes = max(course.peak_memory_bytes or 0, torch.cuda.max_memory_allocated(device))
    if not video.isfinite().all():
        raise ValueError("the video has NaN or infinite values")
    course.seconds.append(seconds)
    course.videos.append(video)
    if before is not None and after is not None:
        course.readings.append((before, after))
    for name, part in course.meter.timer.collect_s().items():
        course.phases.setdefault(name, []).append(part)


def _record(stage: Stage, course: _Course, dense: _Course | None, artifacts: Path | None) -> Record:
    arm = course.one.arm
    prompts = stage.prompts[: len(course.seconds)]
    more: dict[str, Any] = {}
    if course.readings:
        more["energy_j"] = tuple(after.energy_j - before.energy_j for before, after in course.readings)
        more["clocks_mhz"] = tuple(after.clock_mhz for _, after in course.readings)
        more["throttled"] = any(reading.throttled for pair in course.readings for reading in pair)
    align = stage.entry.alignment
    if align is not None:
        more["alignment"] = tuple(align(video, prompt) for video, prompt in zip(course.videos, prompts, strict=True))
    if dense is not None and arm != DENSE:
        pairs = list(zip(course.videos, dense.videos, strict=True))
        more["baseline_samples_s"] = tuple(dense.seconds)
        more["psnr_db"] = tuple(psnr_db(video, reference) for video, reference in pairs)
        more["ssim"] = tuple(ssim(video, reference) for video, reference in pairs)
        if align is not None:
            more["alignment_dense"] = tuple(
                align(video, prompt) for video, prompt in zip(dense.videos, prompts, strict=True)
            )
    if artifacts is not None:
        more["artifact"] = _save_artifact(stage, course, prompts, artifacts)
    plans = [plan for _, plan in course.meter.plans]
    return Record(
        **passed(stage, "denoise", course.one),
        prompts=prompts,
        guidance=stage.entry.guidance,
        samples_s=tuple(course.seconds),
        phases_s={name: tuple(samples) for name, samples in course.phases.items()},
        peak_memory_bytes=course.peak_memory_bytes,
        plan_memory_bytes=max(plan.nbytes() for plan in plans),
        density=statistics.mean(plan.density().mean().item() for plan in plans),
        **more,
    )


def _save_artifact(stage: Stage, course: _Course, prompts: Sequence[str], folder: Path) -> str:
    """Data for the report's pictures; returns its path relative to the JSON file, beside which the folder lies."""
    conditional = {(site.step, site.layer): plan for site, plan in course.meter.plans if site.branch == "cond"}
    steps, layers = stage.workload.steps, stage.entry.layers
    density = np.stack(
        [np.stack([conditional[step, layer].density().numpy() for layer in range(layers)]) for step in range(steps)]
    )
    sites, masks = _some_masks(course.meter.plans)
    videos = [eight_bit(video).permute(1, 2, 3, 0).numpy() for video in course.videos[:_SHOWN_VIDEOS]]
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{stage.workload}-{course.one.arm}-{course.one.arm.kernel}".replace("/", "_").replace("=", "_")
    arrays: dict[str, Any] = {
        "density": density.astype(np.float32),
        "frames": np.stack(videos),
        "captions": np.array(prompts[:_SHOWN_VIDEOS]),
    }
    if masks:
        arrays |= {"masks": np.stack(masks), "mask_sites": np.array(sites)}
        # in another order, tokens of a frame do not lie side by side
        if all(plan.order is None for _, plan in course.meter.plans):
            geometry = stage.probes[0].site.geometry
            arrays["frame_starts"] = np.arange(geometry.grid[0]) * geometry.frame_tokens + geometry.video_start
    np.savez_compressed(folder / f"{name}.npz", **arrays)
    return f"{folder.name}/{name}.npz"


def _some_masks(plans: Sequence[tuple[Site, Plan]]) -> tuple[list[tuple[int, int, int]], list[NDArray[np.bool_]]]:
    """A few masked heads, spread evenly over all of them: where each stands (step, layer, head), and its picture.

    A cell of it is what the tokens in the middle of a block see. Where blocks differ in size, cells are of one size all
    the same: a picture to scale, whose mean is near the density.
    """
    heads = [
        (site, plan, head)
        for site, plan in plans
        if site.branch == "cond" and plan.mask is not None
        for head in plan.heads_of("masked")
    ]
    # from the middle of each part: the very first and last steps are seldom typical
    chosen = [heads[(2 * i + 1) * len(heads) // (2 * _SHOWN_MASKS)] for i in range(_SHOWN_MASKS)] if heads else []
    masks = []
    for _, plan, head in chosen:
        assert plan.mask is not None
        tokens = torch.arange(plan.tokens, device=plan.mask.bits.device)
        queries, keys = (
            torch.stack([part[len(part) // 2] for part in tokens.split(size)]) for size in plan.mask.block or _CELL
        )
        masks.append(plan.mask.seen(head, queries)[:, keys].cpu().numpy())
    return [(site.step, site.layer, head) for site, _, head in chosen], masks
