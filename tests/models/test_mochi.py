"""Mochi: one sequence of video and text without padding, and both branches of guidance in one batch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch

from calibatt.kernels.catalogue import KERNELS
from calibatt.kernels.plan import Plan
from calibatt.methods.site import Site
from calibatt.models.adapter import attached, restore, sparsify
from calibatt.models.catalogue import MODELS
from calibatt.models.entry import Resolution

SDPA = KERNELS["sdpa-flash"]
# five words and eleven; each has an end
PROMPTS = ["a red circle moving left", "a blue square and a red circle still moving right over stripes"]


class Note:
    """Plans dense and remembers where it was asked."""

    def __init__(self) -> None:
        self.sites: list[Site] = []
        self.videos = 0

    def reset(self) -> None:
        self.videos += 1

    def plan(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, site: Site) -> Plan:
        assert q.shape == k.shape == v.shape == (2, site.geometry.tokens, 64)
        self.sites.append(site)
        return Plan.dense(site.geometry)


@pytest.fixture(scope="module")
def pipe(mochi_folder: Path) -> Any:
    # the catalogue's own loader, on a folder in the hub's layout
    pipe = MODELS["mochi-1"].checked_loader()(torch.device("cpu"), torch.float32, mochi_folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def run(pipe: Any, prompts: list[str] = PROMPTS, *, guidance: float = 4.5, steps: int = 3) -> torch.Tensor:
    noise = torch.randn(len(prompts), 12, 3, 8, 12, generator=torch.Generator().manual_seed(0))
    latents: torch.Tensor = pipe(
        prompt=prompts, negative_prompt=[""] * len(prompts), height=64, width=96, num_frames=13,
        num_inference_steps=steps, guidance_scale=guidance, latents=noise, max_sequence_length=32, output_type="latent",
    ).frames  # fmt: skip
    return latents


def test_prompts_of_different_lengths_in_one_batch_give_the_pipelines_own_video(pipe: Any) -> None:
    own, note = run(pipe), Note()
    with attached(pipe, note, SDPA):
        torch.testing.assert_close(run(pipe), own, atol=1e-5, rtol=1e-4)
    assert torch.equal(run(pipe), own)


def test_rows_of_the_batch_are_samples_of_both_branches_without_their_padding(pipe: Any) -> None:
    note = Note()
    with attached(pipe, note, SDPA):
        run(pipe)
    assert note.videos == 1
    first = note.sites[:4]
    assert [(site.branch, site.sample) for site in first] == [("uncond", 0), ("uncond", 1), ("cond", 0), ("cond", 1)]
    # an empty prompt is its end alone
    assert [site.geometry.text_tokens for site in first] == [1, 1, 6, 13]
    assert {(site.geometry.grid, site.geometry.text_side) for site in note.sites} == {((3, 4, 6), "last")}
    assert [(site.step, site.layer) for site in note.sites[::4]] == [(s, layer) for s in range(3) for layer in range(2)]


def test_without_guidance_all_rows_are_conditional(pipe: Any) -> None:
    note = Note()
    with attached(pipe, note, SDPA):
        run(pipe, guidance=1.0)
    assert {site.branch for site in note.sites} == {"cond"}


def test_noise_falls_from_one_though_the_schedule_counts_the_other_way(pipe: Any) -> None:
    note = Note()
    with attached(pipe, note, SDPA):
        run(pipe)
    levels = [site.sigma for site in note.sites[::8]]
    assert levels[0] == pytest.approx(1.0)
    assert levels == sorted(set(levels), reverse=True)


def test_a_sparsified_pipeline_is_restored_bit_by_bit(pipe: Any) -> None:
    own, note = run(pipe), Note()
    run(sparsify(pipe, note, kernel=SDPA))
    restore(pipe)
    assert note.sites
    assert torch.equal(run(pipe), own)


def test_a_compiled_block_computes_the_same(pipe: Any) -> None:
    torch._dynamo.reset()
    own = run(pipe, steps=2)
    with attached(pipe, Note(), SDPA):
        for block in pipe.transformer.transformer_blocks:
            block.compile(backend="eager")
        torch.testing.assert_close(run(pipe, steps=2), own, atol=1e-5, rtol=1e-4)
        for block in pipe.transformer.transformer_blocks:
            block._compiled_call_impl = None


@pytest.mark.slow
def test_it_is_calibrated_run_and_restored_whatever_the_prompts_lengths(pipe: Any) -> None:
    from calibatt.calibration.collect import calibrate

    entry = replace(
        MODELS["mochi-1"], layers=2, heads=2, head_dim=64, block=(16, 16), prompt_tokens=32, text_tokens=32, steps=3,
        resolutions=MappingProxyType({"tiny": Resolution(height=64, width=96, frames=13)}),
    )  # fmt: skip
    own = run(pipe)
    learnt = calibrate(entry, pipe, resolution="tiny", prompts=PROMPTS, seed=0, anchors=2)
    sparsify(pipe, "calibatt", calibration=learnt)
    sparse = run(pipe)
    restore(pipe)
    assert sparse.isfinite().all()
    assert not torch.equal(sparse, own)
    assert torch.equal(run(pipe), own)
