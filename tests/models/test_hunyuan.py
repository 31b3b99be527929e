"""HunyuanVideo: two kinds of layers, text behind the video without its padding, and guidance inside the model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from calibatt.kernels.catalogue import KERNELS
from calibatt.models.adapter import attached

SDPA = KERNELS["sdpa-flash"]


@pytest.fixture
def hunyuan(tiny: Callable[[str], Any]) -> Any:
    return tiny("hunyuanvideo")


def test_every_sample_has_its_own_text_without_padding_in_layers_of_both_kinds(hunyuan: Any, note: Any) -> None:
    with attached(hunyuan.pipe, note, SDPA):
        hunyuan.run()
    # one layer with weights of its own for text, and two with one set; five words and eleven, and their ends
    assert [(site.layer, site.sample, site.geometry.text_tokens) for site in note.sites[:6]] == [
        (layer, sample, text) for layer in range(3) for sample, text in enumerate((6, 12))
    ]
    assert {(site.branch, site.geometry.grid, site.geometry.text_side) for site in note.sites} == {
        ("cond", (3, 4, 6), "last")
    }


def test_true_guidance_is_a_call_of_its_own(hunyuan: Any, note: Any) -> None:
    guided = {"negative_prompt": ["dots"] * 2, "true_cfg_scale": 2.0}
    own = hunyuan.run(**guided)
    with attached(hunyuan.pipe, note, SDPA):
        torch.testing.assert_close(hunyuan.run(**guided), own, atol=1e-5, rtol=1e-4)
    # of the first layer
    assert [(s.step, s.branch, s.geometry.text_tokens) for s in note.sites if s.layer == 0] == [
        (step, branch, text)
        for step in range(3)
        for branch, texts in (("cond", (6, 12)), ("uncond", (2, 2)))
        for text in texts
    ]


def test_embedded_guidance_is_read_by_the_model(hunyuan: Any, note: Any) -> None:
    with attached(hunyuan.pipe, note, SDPA):
        weak, strong = hunyuan.run(guidance_scale=1.0), hunyuan.run(guidance_scale=6.0)
    assert not torch.equal(weak, strong)
    assert {site.branch for site in note.sites} == {"cond"}
