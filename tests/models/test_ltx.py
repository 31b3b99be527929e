"""LTX-Video: latents that are packed into tokens, whose grid is told beside them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from calibatt.kernels.catalogue import KERNELS
from calibatt.models.adapter import attached

SDPA = KERNELS["sdpa-flash"]


@pytest.fixture
def ltx(tiny: Callable[[str], Any]) -> Any:
    return tiny("ltx-video-2b")


def test_both_branches_are_in_one_batch_and_no_text_is_in_the_sequence(ltx: Any, note: Any) -> None:
    with attached(ltx.pipe, note, SDPA):
        ltx.run()
    first = note.sites[:4]
    assert [(site.branch, site.sample) for site in first] == [("uncond", 0), ("uncond", 1), ("cond", 0), ("cond", 1)]
    assert {(site.geometry.grid, site.geometry.text_tokens) for site in note.sites} == {((3, 3, 4), 0)}


def test_without_guidance_all_rows_are_conditional(ltx: Any, note: Any) -> None:
    with attached(ltx.pipe, note, SDPA):
        ltx.run(guidance_scale=1.0)
    assert {(site.branch, site.sample) for site in note.sites} == {("cond", 0), ("cond", 1)}


def test_image_to_video_runs_on_the_same_grid(ltx: Any, note: Any) -> None:
    from diffusers import LTXImageToVideoPipeline
    from PIL import Image

    pipe = LTXImageToVideoPipeline(**ltx.pipe.components)
    pipe.set_progress_bar_config(disable=True)
    with attached(pipe, note, SDPA), torch.no_grad():
        pipe(
            image=Image.new("RGB", (128, 96)), prompt="a red circle", height=96, width=128, num_frames=17,
            num_inference_steps=2, max_sequence_length=16, output_type="latent",
        )  # fmt: skip
    assert [(site.step, site.branch) for site in note.sites[::2]] == [(step, "uncond") for step in (0, 0, 1, 1)]
    assert {site.geometry.grid for site in note.sites} == {(3, 3, 4)}


def test_tokens_without_a_grid_are_refused_in_one_line(ltx: Any, note: Any) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler, LTXConditionPipeline

    # it does not tell its scheduler how long the sequence is
    pipe = LTXConditionPipeline(**{**ltx.pipe.components, "scheduler": FlowMatchEulerDiscreteScheduler()})
    pipe.set_progress_bar_config(disable=True)
    with (
        attached(pipe, note, SDPA),
        torch.no_grad(),
        pytest.raises(ValueError, match=r"a place of its own \(video_coords\)") as refused,
    ):
        pipe(
            prompt="a red circle", height=96, width=128, num_frames=17, num_inference_steps=2, max_sequence_length=16,
            output_type="latent",
        )  # fmt: skip
    assert "\n" not in str(refused.value)
    assert not note.sites
