"""CogVideoX: text before the video, frames before channels, and a scheduler that does not say where it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from calibatt.kernels.catalogue import KERNELS
from calibatt.models.adapter import attached, restore, sparsify

SDPA = KERNELS["sdpa-flash"]


@pytest.fixture(params=["cogvideox-5b", "cogvideox1.5-5b"])
def cog(request: pytest.FixtureRequest, tiny: Callable[[str], Any]) -> Any:
    return tiny(request.param)


def test_all_tokens_of_the_prompt_stand_first_in_both_branches_of_the_batch(cog: Any, note: Any) -> None:
    with attached(cog.pipe, note, SDPA):
        cog.run()
    first = note.sites[:4]
    assert [(site.branch, site.sample) for site in first] == [("uncond", 0), ("uncond", 1), ("cond", 0), ("cond", 1)]
    # 3 frames of latents, which 1.5 fills up to 4 to join them in twos
    grid = (2, 4, 6) if "1.5" in cog.entry.name else (3, 4, 6)
    assert {(site.geometry.grid, site.geometry.text_tokens, site.geometry.text_side) for site in note.sites} == {
        (grid, 16, "first")
    }


def test_without_guidance_all_rows_are_conditional(cog: Any, note: Any) -> None:
    with attached(cog.pipe, note, SDPA):
        cog.run(guidance_scale=1.0)
    assert {(site.branch, site.sample) for site in note.sites} == {("cond", 0), ("cond", 1)}


@pytest.mark.parametrize(
    "scheduler", ["CogVideoXDDIMScheduler", "CogVideoXDPMScheduler", "DPMSolverMultistepScheduler"]
)
def test_steps_and_noise_are_the_same_whoever_steps(tiny: Callable[[str], Any], note: Any, scheduler: str) -> None:
    import diffusers

    model = tiny("cogvideox-5b")
    own = model.pipe.scheduler
    # the third keeps count itself, and its noise beside data of weight 1; it has no zero signal-to-noise ratio
    changes = {"rescale_betas_zero_snr": False, "snr_shift_scale": 1.0}
    model.pipe.scheduler = getattr(diffusers, scheduler).from_config(own.config, **changes)
    try:
        with attached(model.pipe, note, SDPA):
            for _ in range(2):
                model.run()
    finally:
        model.pipe.scheduler = own
    assert [index for index, site in enumerate(note.calls) if site is None] == [0, 25]
    assert [site.step for site in note.sites[::8]] == [0, 1, 2] * 2
    kept = own.from_config(own.config, **changes).alphas_cumprod[[999, 666, 333]]
    expected = (1 - kept).sqrt() / ((1 - kept).sqrt() + kept.sqrt())
    assert [site.sigma for site in note.sites[::8]] == pytest.approx(expected.tolist() * 2, rel=1e-2)


def test_a_scheduler_that_is_exchanged_meanwhile_is_counted_from_the_next_video_on(cog: Any, note: Any) -> None:
    own = cog.pipe.scheduler
    sparsify(cog.pipe, note, kernel=SDPA)
    cog.run()
    assert "step" in vars(own)
    cog.pipe.scheduler = type(own).from_config(own.config)
    try:
        cog.run()
        assert "step" not in vars(own)
        restore(cog.pipe)
        assert "step" not in vars(cog.pipe.scheduler)
    finally:
        cog.pipe.scheduler = own
    assert [site.step for site in note.sites[::8]] == [0, 1, 2] * 2


def test_a_video_that_is_broken_off_does_not_move_the_next_ones_steps(cog: Any, note: Any) -> None:
    def fail(*_: Any) -> Any:
        raise KeyboardInterrupt

    with attached(cog.pipe, note, SDPA):
        with pytest.raises(KeyboardInterrupt):
            cog.run(callback_on_step_end=fail)
        cog.run()
    assert [site.step for site in note.sites[::8]] == [0, 0, 1, 2]


def test_video_to_video_runs_its_last_steps(tiny: Callable[[str], Any], note: Any) -> None:
    from diffusers import CogVideoXVideoToVideoPipeline
    from PIL import Image

    pipe = CogVideoXVideoToVideoPipeline(**tiny("cogvideox-5b").pipe.components)
    pipe.set_progress_bar_config(disable=True)
    with attached(pipe, note, SDPA), torch.no_grad():
        pipe(
            video=[Image.new("RGB", (96, 64))] * 9, prompt="a red circle", height=64, width=96, num_inference_steps=4,
            strength=0.75, max_sequence_length=16, output_type="latent",
        )  # fmt: skip
    assert [site.step for site in note.sites[::4]] == [1, 2, 3]
    assert {site.steps for site in note.sites} == {4}
    assert note.sites[0].sigma < 1


def test_fused_projections_give_the_same_latents(tiny: Callable[[str], Any], note: Any) -> None:
    model = tiny("cogvideox-5b")
    pipe, own = model.load(), model.run()
    pipe.fuse_qkv_projections()
    with attached(pipe, note, SDPA):
        # one product in place of three adds up in another order
        torch.testing.assert_close(model.run(pipe), own, atol=1e-4, rtol=1e-3)
    assert note.sites
