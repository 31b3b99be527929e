"""From a prompt to a video, the same way for every model, and from a video to a file."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from calibatt.models.entry import ModelEntry

# formats that imageio writes here without further packages
VIDEO_SUFFIXES = (".mp4", ".gif")
# smaller videos are enlarged by whole pixels, so that a player shows more than a stamp
_SHOWN_HEIGHT = 256


def generate(
    entry: ModelEntry,
    pipe: Any,
    *,
    prompt: str,
    resolution: str,
    seed: int,
    steps: int | None = None,
    guidance: float | None = None,
    progress: bool = False,
    stop_after: int | None = None,
    after_step: Callable[[], object] = lambda: None,
) -> Float[Tensor, "3 frames height width"]:
    """One video, values in [-1, 1], on the CPU; as `generate_all`."""
    # callers without a type checker pass other things than texts
    entry.check_prompt(prompt)
    return generate_all(
        entry, pipe, prompts=(prompt,), resolution=resolution, seed=seed, steps=steps, guidance=guidance,
        progress=progress, stop_after=stop_after, after_step=after_step,
    )[0]  # fmt: skip


def generate_all(
    entry: ModelEntry,
    pipe: Any,
    *,
    prompts: Sequence[str],
    resolution: str,
    seed: int,
    steps: int | None = None,
    guidance: float | None = None,
    progress: bool = False,
    stop_after: int | None = None,
    after_step: Callable[[], object] = lambda: None,
) -> Float[Tensor, "prompts 3 frames height width"]:
    """Videos that are made side by side, as one batch; values in [-1, 1], on the CPU.

    The starting noise is drawn on the CPU, so that a seed means the same video on every device.

    Args:
        entry, pipe: the model and its loaded pipeline.
        prompts: what to show.
        resolution: name of one of the model's resolutions.
        seed: prompt i starts from noise of seed + i.
        steps, guidance: the model's defaults where None.
        progress: whether to show Diffusers' progress bar over the steps.
        stop_after: do only this many of the steps, which is enough to compile and to warm up.
        after_step: called when a step is done.

    Raises:
        ValueError: a prompt is empty or not in the model's language, there is less than one step, guidance is no
            finite number, or the model cannot generate.
    """
    for prompt in prompts:
        entry.check_prompt(prompt)
    steps = entry.steps_at(resolution) if steps is None else steps
    if steps < 1:
        raise ValueError(f"a generation needs at least one step: got {steps}")
    guidance = entry.guidance if guidance is None else guidance
    if not math.isfinite(guidance):
        raise ValueError(f"guidance is a finite number: got {guidance}")
    family, size = entry.checked_family(), entry.resolution(resolution)
    shape = entry.latent_shape(resolution)
    noise = [torch.randn(shape, generator=torch.Generator().manual_seed(seed + i)) for i in range(len(prompts))]
    pipe.set_progress_bar_config(disable=not progress)

    def interrupt(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        # Diffusers' documented way to stop a pipeline; only ever set, for others may set it too
        if stop_after is not None and step + 1 >= stop_after:
            pipe._interrupt = True
        after_step()
        return tensors

    frames = pipe(
        prompt=list(prompts),
        num_inference_steps=steps,
        guidance_scale=guidance,
        latents=family.noise(torch.cat(noise)).to(pipe.device),
        output_type="pt",
        callback_on_step_end=interrupt,
        **family.keywords(entry, size),
    ).frames
    videos: Tensor = frames.float().cpu().permute(0, 2, 1, 3, 4).mul(2).sub(1)
    return videos


def save_video(video: Float[Tensor, "3 frames height width"], path: Path, *, fps: int = 8) -> None:
    """Write a playable file, whole or not at all.

    Args:
        video: values in [-1, 1].
        path: ends in .mp4 or .gif.
        fps: frames a second.

    Raises:
        ValueError: another ending.
    """
    import imageio.v3 as imageio

    check_video_path(path)
    scale = max(1, -(-_SHOWN_HEIGHT // video.shape[2]))
    pixels = video.clamp(-1, 1).add(1).mul(127.5).round().byte().permute(1, 2, 3, 0)
    pixels = pixels.repeat_interleave(scale, 1).repeat_interleave(scale, 2)
    aside = path.with_name(f".{path.stem}.partial{path.suffix}")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        if path.suffix == ".gif":
            # a GIF's clock ticks in milliseconds here; loop 0 is for ever
            imageio.imwrite(aside, pixels.numpy(), duration=1000 / fps, loop=0)
        else:
            imageio.imwrite(aside, pixels.numpy(), fps=fps, codec="libx264", macro_block_size=2)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def check_video_path(path: Path) -> None:
    """Refuse an ending that cannot be written, before the work is done.

    Raises:
        ValueError: the ending is not one of VIDEO_SUFFIXES.
    """
    if path.suffix not in VIDEO_SUFFIXES:
        raise ValueError(f"{path}: a video file ends in {' or '.join(VIDEO_SUFFIXES)}")


def read_prompts(path: Path) -> tuple[str, ...]:
    """Prompts of a text file, one a line; empty lines do not count.

    Raises:
        ValueError: there is none, or the file is no text.
        OSError: the file cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{path}: this is no text in UTF-8; write one prompt a line") from None
    prompts = tuple(line.strip() for line in text.splitlines() if line.strip())
    if not prompts:
        raise ValueError(f"{path}: the list of prompts is empty; write one prompt per line")
    return prompts
