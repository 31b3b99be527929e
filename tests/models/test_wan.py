"""Wan 2.2: noise by token, and two transformers for one count of steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from calibatt.kernels.catalogue import KERNELS
from calibatt.models.adapter import attached

SDPA = KERNELS["sdpa-flash"]


def test_one_model_makes_videos_of_texts_and_of_images(tiny: Callable[[str], Any], note: Any) -> None:
    from diffusers import WanImageToVideoPipeline
    from PIL import Image

    model = tiny("wan2.2-ti2v-5b")
    assert model.pipe.config.expand_timesteps
    parts = {name: part for name, part in model.pipe.components.items() if part is not None}
    pipe = WanImageToVideoPipeline(**parts, image_encoder=None, image_processor=None, expand_timesteps=True)
    pipe.set_progress_bar_config(disable=True)
    with attached(pipe, note, SDPA), torch.no_grad():
        pipe(
            image=Image.new("RGB", (192, 128)), prompt="a red circle", negative_prompt="", height=128, width=192,
            num_frames=9, num_inference_steps=2, max_sequence_length=16, output_type="latent",
        )  # fmt: skip
    assert [(s.step, s.branch) for s in note.sites[::2]] == [
        (step, branch) for step in range(2) for branch in ("cond", "uncond")
    ]
    assert {s.geometry.grid for s in note.sites} == {(3, 4, 6)}


def test_two_transformers_have_a_guidance_each_and_one_count_of_steps(tiny: Callable[[str], Any], note: Any) -> None:
    model = tiny("wan2.2-a14b")
    called: list[str] = []
    hooks = [
        getattr(model.pipe, name).register_forward_pre_hook(lambda *_, name=name: called.append(name))
        for name in ("transformer", "transformer_2")
    ]
    with attached(model.pipe, note, SDPA):
        model.run()
    for hook in hooks:
        hook.remove()
    # the boundary lies at 0.875, the noise of the steps at 1, 0.91 and 0.71; each has two passes
    assert called == ["transformer"] * 4 + ["transformer_2"] * 2
    assert [(s.step, s.steps, s.layer) for s in note.sites[::4]] == [
        (step, 3, 0) for step in range(3) for _ in ("cond", "uncond")
    ]
    weak, strong = model.run(guidance_scale_2=1.5), model.run()
    assert not torch.equal(weak, strong)
