"""The denoise suite: whole generations, all arms in turns, and what became of the videos."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from calibatt.bench.accuracy import PooledError, Shadow
from calibatt.bench.arms import Ready, failed, passed, ready
from calibatt.bench.cells import DENSE, AnyArm, Arm, Cell
from calibatt.bench.context import Context
from calibatt.bench.failure import Failure, guarded
from calibatt.bench.meter import Meter
from calibatt.bench.observers import PlanSummary
from calibatt.bench.options import Options, method_cells
from calibatt.bench.parts import without_attention
from calibatt.bench.record import Record, Suite
from calibatt.bench.rounds import SHOWN_ROUNDS, take_turns
from calibatt.bench.suites.suite import Job, Kept
from calibatt.bench.telemetry import Watch, Watched, circumstances
from calibatt.bench.timer import timed
from calibatt.bench.video import Round, Rounds, Video
from calibatt.methods.call import SparseAttention
from calibatt.methods.catalogue import build
from calibatt.models.video_metrics import eight_bit, psnr_db, ssim

NAME: Suite = "denoise"
# parts are timed, and plans looked at for their density, in the first of so many rounds
_ROUNDS_A_LOOK = 8

Frames = UInt8[Tensor, "3 frames height width"]


@dataclass(slots=True, kw_only=True, eq=False)
class _Course:
    """What an arm has done so far: its videos, of this run's what is shown, and whether it has made one at all."""

    one: Ready
    warm: bool = False
    videos: list[Video] = field(default_factory=list)
    plans: PlanSummary | None = None
    shown: list[Frames] = field(default_factory=list)


def cells(options: Options) -> list[Cell]:
    """Every arm on every workload that has videos, eager and compiled.

    Raises:
        ValueError: an option makes no sense.
    """
    found = method_cells(options) if options.whole else []
    return [
        replace(cell, workload=replace(cell.workload, compiled=how != "no"))
        for how in options.compile
        for cell in found
    ]


def measure(job: Job, arms: Sequence[AnyArm]) -> Iterator[tuple[AnyArm, Record]]:
    """Generate one video a round with every arm and compare it with the dense one of the same prompt and seed."""
    # the baseline is measured even where nobody asked to see it
    wanted = dict.fromkeys([DENSE, *(arm for arm in arms if isinstance(arm, Arm))])
    yield from run(
        job.open(), list(wanted), rounds=job.rounds, artifacts=job.artifacts, kept=job.kept, more=job.more
    )  # fmt: skip


def run(
    context: Context,
    arms: Sequence[Arm],
    *,
    rounds: int,
    artifacts: Path | None,
    kept: Kept | None = None,
    more: Callable[[int], bool] = lambda round_: True,
) -> Iterator[tuple[Arm, Record]]:
    """Check arms, and let those that are right make videos.

    An arm's first video in a process is not timed. In a run from the beginning that is the dense video of the first
    round's prompt and seed, beside which the arm's every call is computed too, for its method error, which is kept with
    that round; else it is one of the arm's own. A round is kept when all its videos have been compared, so that an arm
    and its baseline are always of one run. One that failed has no more turns, in a run that goes on either.

    Args:
        context: what they share.
        arms: dense among them.
        rounds: videos an arm.
        artifacts: folder for the data of the report's pictures; None leaves them out.
        kept: rounds that need not be repeated, and where others go.
        more: whether there is time for a round, by its number.
    """
    kept = kept or Kept()
    courses: dict[Arm, _Course] = {}
    failures: dict[Arm, Failure] = {}
    for arm in arms:
        before = _before(kept.found, arm)
        if isinstance(before, Failure):
            failures[arm] = before
        else:
            context.log(f"checking {arm}")
            one = ready(context, arm)
            if isinstance(one, Failure):
                failures[arm] = one
            else:
                courses[arm] = _Course(one=one, videos=before)
        if arm in failures:
            yield arm, failed(context, NAME, arm, failures[arm])
    told = set(failures)
    _take_turns(context, courses, rounds, artifacts, kept, more, failures)
    dense = None if DENSE in failures else courses.get(DENSE)
    for arm in dict.fromkeys((*courses, *failures)):
        if arm in failures:
            if arm not in told:
                yield arm, failed(context, NAME, arm, failures[arm])
            continue
        made = guarded(partial(_record, context, courses[arm], None if arm == DENSE else dense, artifacts))
        yield arm, failed(context, NAME, arm, made) if isinstance(made, Failure) else made


def _before(found: Sequence[Round], arm: Arm) -> list[Video] | Failure:
    """An arm's videos in the rounds of a run that was stopped, or why it had no more of them."""
    videos: list[Video] = []
    for round_ in found:
        entry = round_.get(_key(arm), Failure("failed", "it took no part in the run that was stopped"))
        if isinstance(entry, Failure):
            return entry
        videos.append(entry)
    return videos


def _key(arm: Arm) -> str:
    return f"{arm} on {arm.kernel}"


def _take_turns(
    context: Context, courses: Mapping[Arm, _Course], rounds: int, artifacts: Path | None, kept: Kept,
    more: Callable[[int], bool], failures: dict[Arm, Failure],
) -> None:  # fmt: skip
    """Make the videos that are missing; arms that fail are added to the failures."""
    # videos of the round that is under way: each is gone once it has been compared with the dense one
    videos: dict[Arm, Frames] = {}
    # pictures are of the first rounds together, so these are kept together too
    pictured = min(rounds, SHOWN_ROUNDS)
    waiting: list[dict[str, Video | Failure]] = []

    def turn(round_: int, arm: Arm) -> None:
        videos[arm] = _one_video(context, courses[arm], round_, watch)
        context.log(f"video {round_ + 1} of {rounds}, {arm}: {courses[arm].videos[-1].seconds:.2f} s")

    def of_all(work: Callable[[Arm], None]) -> None:
        """For every arm that has not failed; one for which it goes wrong has."""
        for arm in courses:
            if arm not in failures:
                failure = guarded(partial(work, arm))
                if failure is not None:
                    failures[arm] = failure

    def over(round_: int) -> None:
        reference = None if DENSE in failures else videos.get(DENSE)
        if reference is not None and context.faithful:
            of_all(lambda arm: None if arm == DENSE else _compare(courses[arm].videos[-1], videos[arm], reference))
        videos.clear()
        if round_ + 1 == pictured and artifacts is not None:
            of_all(lambda arm: _save_artifact(context, courses[arm], artifacts))
        # those that failed before this run too
        made = {_key(arm): course.videos[-1] for arm, course in courses.items() if arm not in failures}
        waiting.append({**made, **{_key(arm): failure for arm, failure in failures.items()}})
        if round_ + 1 >= pictured:
            kept.keep(Rounds(first=round_ + 1 - len(waiting), rounds=list(waiting)))
            waiting.clear()

    with Watch(context.device) as watch:
        take_turns(list(courses), rounds, turn, first=len(kept.found), more=more, after=over, failures=failures)


def _one_video(context: Context, course: _Course, round_: int, watch: Watch) -> Frames:
    device = context.device
    error = _warm_up(context, course, round_)
    plans = PlanSummary() if round_ % _ROUNDS_A_LOOK == 0 else None
    if round_ == 0:
        course.plans = plans
    method, kernel = course.one.method, course.one.kernel
    meter = None if plans is None else Meter(method, kernel, device, observers=[plans])
    apart = _looks_apart(context)
    if meter is not None and apart:
        context.video(meter, round_)
    attention = SparseAttention(method, kernel) if meter is None or apart else meter
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    watch.read()
    energy, start = watch.energy_j(), perf_counter()
    seconds, video = timed(device, lambda: context.video(attention, round_))
    end, used = perf_counter(), watch.energy_j()
    watch.read()
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    if not video.isfinite().all():
        raise ValueError("the video has NaN or infinite values")
    phases = {} if meter is None else without_attention(meter.timer.collect_s())
    # to look at the plans is no part of the arm
    observed = phases.pop("observe", 0.0)
    made = Video(seconds=seconds - (0.0 if apart else observed), phases=phases, peak_memory_bytes=peak)
    if energy is not None and used is not None:
        made.energy_j = used - energy
    made.telemetry = watch.during(start, end)
    if context.alignment is not None:
        made.alignment = context.alignment(video, context.prompts[round_])
    if plans is not None:
        made.density, made.plan_memory_bytes = plans.density(), plans.nbytes
    if error is not None:
        made.method_error, made.error_calls = error.value(), error.calls
    frames = eight_bit(video)
    if len(course.shown) < SHOWN_ROUNDS:
        course.shown.append(frames)
    course.videos.append(made)
    return frames


def _looks_apart(context: Context) -> bool:
    """Whether parts are timed in a video of its own, of which no time is kept.

    Events around every call of the embedded model take its host longer than sparse arms keep a GPU busy (see the first
    round in bench/results/h200/videos-0.15.json). Calls of a large model take so long that the host is ahead anyway.
    """
    return context.device.type == "cuda" and context.faithful


def _warm_up(context: Context, course: _Course, round_: int) -> PooledError | None:
    """The arm's first video in this process, of which no time is kept; its method error, where it is taken."""
    if course.warm:
        return None
    course.warm = True
    if round_ == 0 and context.faithful:
        return _method_error(context, course.one)
    context.video(SparseAttention(course.one.method, course.one.kernel), round_)
    context.log(f"one video of {course.one.arm} that is not timed")
    return None


def _method_error(context: Context, one: Ready) -> PooledError:
    """Over all calls of the first round's dense video, which no arm has learnt from or turned its knob on."""
    shadow = Shadow(SparseAttention(one.method, one.kernel), SparseAttention(build("dense"), context.dense))
    context.video(shadow, 0)
    context.log(f"one dense video, {one.arm} beside it: method error {shadow.error.value():.3g}")
    return shadow.error


def _compare(made: Video, video: Frames, reference: Frames) -> None:
    made.psnr_db = psnr_db(video, reference)
    made.ssim = ssim(video, reference)


def _record(context: Context, course: _Course, dense: _Course | None, artifacts: Path | None) -> Record:
    videos = course.videos
    peaks = _all(videos, "peak_memory_bytes")
    more: dict[str, Any] = {
        "energy_j": _all(videos, "energy_j"),
        "alignment": _all(videos, "alignment"),
        "peak_memory_bytes": None if peaks is None else max(peaks),
    }
    more |= circumstances(_watched(videos), None if dense is None else _watched(dense.videos))
    if dense is not None:
        more["baseline_samples_s"] = _all(dense.videos, "seconds")
        more["psnr_db"] = _all(videos, "psnr_db")
        more["ssim"] = _all(videos, "ssim")
        more["alignment_dense"] = _all(dense.videos, "alignment")
    if artifacts is not None:
        more["artifact"] = f"{artifacts.name}/{_artifact_name(context, course.one.arm)}"
    return Record(
        **passed(context, NAME, course.one),
        prompts=context.prompts[: len(videos)],
        guidance=context.guidance,
        samples_s=_all(videos, "seconds"),
        phases_s={name: tuple(video.phases[name] for video in videos if video.phases) for name in videos[0].phases},
        plan_memory_bytes=max(video.plan_memory_bytes for video in videos if video.plan_memory_bytes is not None),
        density=statistics.fmean(video.density for video in videos if video.density is not None),
        method_error=videos[0].method_error,
        error_calls=videos[0].error_calls,
        **more,
    )


def _watched(videos: Sequence[Video]) -> list[Watched]:
    return [(video.seconds, video.telemetry) for video in videos]


def _all(videos: Sequence[Video], name: str) -> tuple[Any, ...] | None:
    """What was found out about every video; None where it was not."""
    values = tuple(getattr(video, name) for video in videos)
    return None if None in values else values


def _artifact_name(context: Context, arm: Arm) -> str:
    return re.sub(r"[^\w.+-]", "_", f"{context.name}-{arm}-{arm.kernel}") + ".npz"


def _save_artifact(context: Context, course: _Course, folder: Path) -> None:
    """Data for the report's pictures, in a folder beside the JSON file."""
    plans = course.plans
    assert plans is not None, "pictures are of the first rounds, all of this run"
    masks = plans.masks()
    folder.mkdir(parents=True, exist_ok=True)
    arrays: dict[str, Any] = {
        "density": plans.by_site().numpy().astype(np.float32),
    }
    if context.faithful:
        arrays["frames"] = np.stack([video.permute(1, 2, 3, 0).numpy() for video in course.shown])
        arrays["captions"] = np.array(context.prompts[: len(course.shown)])
    if masks:
        arrays |= {"masks": np.stack([mask for _, mask in masks]), "mask_sites": np.array([site for site, _ in masks])}
        # in another order, tokens of a frame do not lie side by side
        if not plans.ordered:
            geometry = context.probes[0].site.geometry
            arrays["frame_starts"] = np.arange(geometry.grid[0]) * geometry.frame_tokens + geometry.video_start
    np.savez_compressed(folder / _artifact_name(context, course.one.arm), **arrays)
