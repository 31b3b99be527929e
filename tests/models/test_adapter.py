"""Installing a method into a pipeline, and taking it out."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from calibatt.kernels.catalogue import KERNELS
from calibatt.kernels.plan import Plan
from calibatt.methods.site import Site
from calibatt.models.adapter import attached
from calibatt.models.shapes.pipeline import assemble, new_transformer

SDPA = KERNELS["sdpa-flash"]


class Note:
    """Plans dense and remembers where it was asked."""

    def __init__(self) -> None:
        self.sites: list[Site | None] = []

    def reset(self) -> None:
        self.sites.append(None)

    def plan(self, q: torch.Tensor, k: torch.Tensor, site: Site) -> Plan:
        assert q.shape == k.shape == (site.geometry.heads, site.geometry.tokens, site.geometry.head_dim)
        self.sites.append(site)
        return Plan.dense(site.geometry)


@pytest.fixture(scope="module")
def pipe() -> Any:
    torch.manual_seed(0)
    pipe = assemble(new_transformer(layers=2, heads=2))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(pipe: Any, *, videos: int = 1, guidance: float = 3.0) -> torch.Tensor:
    noise = torch.randn(videos, 3, 2, 16, 32, generator=torch.Generator().manual_seed(0))
    frames: torch.Tensor = pipe(
        prompt=["a red circle moving left, over stripes"] * videos,
        negative_prompt=[""] * videos,
        height=16,
        width=32,
        num_frames=2,
        num_inference_steps=3,
        guidance_scale=guidance,
        latents=noise,
        max_sequence_length=24,
        output_type="pt",
    ).frames
    return frames


def test_a_dense_method_gives_the_pipelines_own_video(pipe: Any) -> None:
    own = run(pipe)
    with attached(pipe, Note(), SDPA):
        ours = run(pipe)
    # both are fp32 on the same operations; rotary tables are applied in another order
    torch.testing.assert_close(ours, own, atol=1e-5, rtol=1e-4)


def test_every_call_knows_its_step_branch_and_layer(pipe: Any) -> None:
    note = Note()
    with attached(pipe, note, SDPA):
        run(pipe)
    assert note.sites[0] is None
    sites = [site for site in note.sites if site is not None]
    assert [(s.step, s.branch, s.layer) for s in sites] == [
        (step, branch, layer) for step in range(3) for branch in ("cond", "uncond") for layer in range(2)
    ]
    assert {(s.steps, s.layers, s.geometry.grid) for s in sites} == {(3, 2, (2, 4, 8))}
    sigmas = [s.sigma for s in sites]
    assert sigmas == sorted(sigmas, reverse=True)
    assert sigmas[0] == pytest.approx(1.0, abs=1e-3)


def test_the_method_is_reset_at_the_start_of_every_video(pipe: Any) -> None:
    note = Note()
    with attached(pipe, note, SDPA):
        run(pipe)
        run(pipe, guidance=1.0)
    assert [index for index, site in enumerate(note.sites) if site is None] == [0, 13]


def test_videos_of_a_batch_are_planned_apart(pipe: Any) -> None:
    note = Note()
    with attached(pipe, note, SDPA):
        batch = run(pipe, videos=2)
    assert [site.sample for site in note.sites if site is not None][:4] == [0, 1, 0, 1]
    assert batch.shape[0] == 2


def test_everything_is_as_before_afterwards_even_after_an_error(pipe: Any) -> None:
    transformer = pipe.transformer
    before = run(pipe)
    processors = [block.attn1.processor for block in transformer.blocks]

    def fail() -> None:
        with attached(pipe, Note(), SDPA):
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert [block.attn1.processor for block in transformer.blocks] == processors
    assert "cache_context" not in vars(transformer)
    assert not transformer._forward_pre_hooks
    assert torch.equal(run(pipe), before)


def test_a_pipeline_of_another_kind_is_refused_in_one_line() -> None:
    class Other:
        transformer = torch.nn.Linear(1, 1)

    with pytest.raises(ValueError, match="has Linear: this adapter knows WanTransformer3DModel"):  # noqa: SIM117
        with attached(Other(), Note(), SDPA):
            pass
