"""Measures weights on captions they were never trained on: python -m calibatt.models.shapes.evaluate --out DIR."""

from __future__ import annotations

import argparse
import io
import itertools
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from calibatt.models.entry import Resolution
from calibatt.models.shapes.entry import SHAPES, STUDENT
from calibatt.models.shapes.pipeline import SHIFT, STUDENT_WEIGHTS, WEIGHTS, load_pipeline, load_student
from calibatt.models.shapes.reader import attributes
from calibatt.models.shapes.scenes import held_out_captions

_CAPTIONS = 64
# guidances and shifts that are tried, and on how many captions, by size
_GUIDANCES, _SHIFTS = (1.0, 2.0, 3.0), (5.0, 8.0, 12.0)
_SCAN = {"standard": 32, "large": 16}
# sizes whose videos are drawn
_PICTURES = {"standard": "samples.png", "large": "samples-large.png"}
# videos a call; bounds the memory
_BATCH = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """A point of the curve of a training.

    Args:
        step, minutes: when.
        size: of the videos, a resolution's name.
        loss: mean over the steps with videos of that size since the last point.
    """

    step: int
    minutes: float
    size: str
    loss: float


def sample(
    pipe: Any, captions: Sequence[str], *, size: Resolution, steps: int, guidance: float, seed: int
) -> Float[Tensor, "videos 3 frames height width"]:
    """One video for each caption, on the CPU, values in [-1, 1]; the noise is drawn on the CPU.

    Args:
        pipe: of `load_pipeline`.
        captions: in the model's grammar.
        size: of the videos.
        steps, guidance: of the generation.
        seed: of the first caption's noise; the next one's is one more.
    """
    pipe.set_progress_bar_config(disable=True)
    videos = []
    for start in range(0, len(captions), _BATCH):
        some = list(captions[start : start + _BATCH])
        noise = [
            torch.randn(
                (3, size.frames, size.height, size.width),
                generator=torch.Generator().manual_seed(seed + start + number),
            )
            for number in range(len(some))
        ]
        shown = pipe(
            prompt=some,
            negative_prompt=[""] * len(some),
            height=size.height,
            width=size.width,
            num_frames=size.frames,
            num_inference_steps=steps,
            guidance_scale=guidance,
            latents=torch.stack(noise).to(pipe.device),
            max_sequence_length=24,
            output_type="pt",
        ).frames
        videos.append(shown.float().cpu().transpose(1, 2) * 2 - 1)
    return torch.cat(videos)


def score(videos: Float[Tensor, "videos 3 frames height width"], captions: Sequence[str]) -> dict[str, float]:
    """Mean alignment, and the fraction of each attribute that is right."""
    # a large video takes a core a quarter of a second
    with ThreadPoolExecutor() as pool:
        verdicts = list(pool.map(attributes, videos, captions))
    flat = [[ok for kind in verdict.values() for ok in kind] for verdict in verdicts]
    scores = {"alignment": sum(sum(oks) / len(oks) for oks in flat) / len(flat)}
    for kind in verdicts[0]:
        oks = [ok for verdict in verdicts for ok in verdict[kind]]
        scores[kind] = sum(oks) / len(oks)
    return scores


def evaluate_weights(weights: Path, *, out: Path, device: torch.device) -> None:
    """Write results.json and pictures: every size at the default setting.

    Args:
        weights: folder of the transformer.
        out: where the files go: results.json, and samples.png and samples-large.png.
        device: to generate on.
    """
    pipe = load_pipeline(device=device, dtype=torch.bfloat16, weights=weights)
    results = _of_every_size(pipe, steps=SHAPES.steps, guidance=SHAPES.guidance, pictures=out)
    facts = {"captions": _CAPTIONS, "steps": SHAPES.steps, "guidance": SHAPES.guidance, "shift": SHIFT}
    (out / "results.json").write_text(json.dumps({**facts, "results": results}, indent=1) + "\n")


def evaluate_student(weights: Path, *, out: Path, device: torch.device) -> None:
    """Write results.json and pictures of the 4-step student; beside it its teacher in as many steps.

    The teacher goes by the student's noise levels, without guidance and with, and without guidance by its own.

    Args:
        weights: folder of the student's adapter.
        out: where the files go, as of `evaluate_weights`.
        device: to generate on.
    """
    student = load_student(device=device, dtype=torch.bfloat16, weights=weights)
    teacher = load_pipeline(device=device, dtype=torch.bfloat16)
    own, levels = teacher.scheduler, student.scheduler
    taught = [(levels, STUDENT.guidance), (levels, SHAPES.guidance), (own, STUDENT.guidance)]
    arms = [("student", student, levels, STUDENT.guidance), *(("teacher", teacher, *one) for one in taught)]
    measured = []
    for name, pipe, scheduler, guidance in arms:
        pipe.scheduler = scheduler
        scheduler.set_timesteps(STUDENT.steps)
        arm = {"weights": name, "sigmas": [round(x, 4) for x in scheduler.sigmas.tolist()], "guidance": guidance}
        print(arm, flush=True)
        pictures = out if pipe is student else None
        scores = _of_every_size(pipe, steps=STUDENT.steps, guidance=guidance, pictures=pictures)
        measured.append({**arm, "results": scores})
    facts = {"captions": _CAPTIONS, "steps": STUDENT.steps, "measured": measured}
    (out / "results.json").write_text(json.dumps(facts, indent=1) + "\n")


def _of_every_size(pipe: Any, *, steps: int, guidance: float, pictures: Path | None) -> dict[str, dict[str, float]]:
    """Scores by size, and pictures in a folder where there is one."""
    texts = held_out_captions(_CAPTIONS, seed=0)
    results = {}
    for name, size in SHAPES.resolutions.items():
        videos = sample(pipe, texts, size=size, steps=steps, guidance=guidance, seed=0)
        results[name] = score(videos, texts)
        print(name, results[name], flush=True)
        if pictures is not None and name in _PICTURES:
            draw_samples(videos, texts, pictures / _PICTURES[name])
    return results


def scan_settings(weights: Path, *, out: Path, device: torch.device) -> None:
    """Write scan.json: guidances and shifts, on other captions than those of results.json.

    So a choice between them is not made on what is reported.

    Args:
        weights: folder of the transformer.
        out: where the file goes.
        device: to generate on.
    """
    pipe = load_pipeline(device=device, dtype=torch.bfloat16, weights=weights)
    scan = []
    for (name, count), guidance, shift in itertools.product(_SCAN.items(), _GUIDANCES, _SHIFTS):
        texts = held_out_captions(count, seed=1)
        pipe.scheduler = type(pipe.scheduler)(shift=shift)
        videos = sample(pipe, texts, size=SHAPES.resolution(name), steps=SHAPES.steps, guidance=guidance, seed=1000)
        setting = {"size": name, "captions": count, "guidance": guidance, "shift": shift}
        scan.append({**setting, **score(videos, texts)})
        print(scan[-1], flush=True)
    (out / "scan.json").write_text(json.dumps({"steps": SHAPES.steps, "scan": scan}, indent=1) + "\n")


def draw_samples(
    videos: Float[Tensor, "videos 3 frames height width"], captions: Sequence[str], path: Path, *, rows: int = 6
) -> None:
    """A sheet of videos: a row for each of the first captions, eight frames of each in columns."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = [number * videos.shape[2] // 8 for number in range(8)]
    figure, axes = plt.subplots(rows, len(columns), figsize=(1.6 * len(columns), 1.35 * rows), squeeze=False)
    for row, video, text in zip(axes, videos, captions, strict=False):
        row[0].set_title(text, fontsize=9, loc="left")
        for axis, frame in zip(row, columns, strict=True):
            axis.imshow((video[:, frame].permute(1, 2, 0).clamp(-1, 1) + 1) / 2, interpolation="nearest")
            axis.set_axis_off()
    figure.subplots_adjust(left=0.01, right=0.99, top=0.98, bottom=0.005, wspace=0.04, hspace=0.28)
    _save(figure, path)


def draw_curve(curve: Sequence[Point], path: Path) -> None:
    """The loss over time, a line for each size of video."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for size in sorted({point.size for point in curve}):
        points = [point for point in curve if point.size == size]
        axis.plot([p.minutes for p in points], [p.loss for p in points], label=size, lw=1)
    axis.set(yscale="log", xlabel="minutes of training", ylabel="mean squared error of the velocity")
    axis.grid(visible=True, which="both", alpha=0.3)
    axis.legend()
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    """As a PNG of a few colours, a third as large as one of all, since the package carries it."""
    import matplotlib.pyplot as plt
    from PIL import Image

    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=100)
    plt.close(figure)
    with Image.open(drawn) as picture:
        # without rounds of k-means, red and magenta come out as one
        picture.convert("RGB").quantize(64, kmeans=3).save(path, optimize=True)


def main() -> None:
    """Measure the shipped weights, or those of a folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for results.json and pictures, or scan.json")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--scan", action="store_true", help="try guidances and shifts in place of the default ones")
    kind.add_argument("--student", action="store_true", help="the 4-step student, and its teacher in as many steps")
    parser.add_argument("--weights", type=Path, help="folder of the transformer, or of the student's adapter")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    measure = scan_settings if args.scan else evaluate_student if args.student else evaluate_weights
    weights = args.weights or (STUDENT_WEIGHTS if args.student else WEIGHTS)
    try:
        measure(weights, out=args.out, device=torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    except OSError as problem:
        parser.error(str(problem))


if __name__ == "__main__":
    main()
