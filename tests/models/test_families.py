"""What holds for every family of models, on small pipelines with random weights."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch

from calibatt.calibration.collect import calibrate
from calibatt.kernels.catalogue import KERNELS
from calibatt.methods.catalogue import build
from calibatt.models.adapter import attached, restore, sparsify
from calibatt.models.generate import generate

SDPA = KERNELS["sdpa-flash"]


def blocks(model: Any) -> list[Any]:
    """The layers whose attention the adapter computes, of all transformers."""
    transformers = [part for part in (model.pipe.transformer, getattr(model.pipe, "transformer_2", None)) if part]
    attentions = {id(module) for part in transformers for module in model.entry.family.attentions(part)}
    return [
        module for part in transformers for module in part.modules()
        if any(id(child) in attentions for child in module.children())
    ]  # fmt: skip


def budget(model: Any, own: torch.Tensor) -> float:
    """Twice what the pipeline's own arithmetic in fp32 loses against fp64, plus one rounding of the largest value."""
    exact = model.run(model.load(torch.float64)).double()
    return 2 * float((own - exact).abs().max()) + torch.finfo(torch.float32).eps * float(exact.abs().max())


def test_a_dense_plan_gives_the_pipelines_own_latents_and_a_sparse_one_others(
    model: Any, note: Any, exact: Any
) -> None:
    own = model.run()
    allowed = budget(model, own)
    with attached(model.pipe, note, SDPA):
        ours = model.run()
    assert note.sites
    assert float((ours - own).abs().max()) <= allowed
    with attached(model.pipe, build("random", density=0.5, block=(16, 16)), exact):
        sparse = model.run()
    # so that the budget means something
    assert float((sparse - own).abs().max()) > 100 * allowed


def test_every_layer_of_every_step_is_told_in_order_and_noise_falls_from_one(model: Any, note: Any) -> None:
    with attached(model.pipe, note, SDPA):
        model.run()
    layers = model.entry.layers
    assert note.calls[0] is None
    assert None not in note.calls[1:]
    told = list(dict.fromkeys((site.step, site.layer) for site in note.sites))
    assert told == [(step, layer) for step in range(3) for layer in range(layers)]
    assert {(site.steps, site.layers) for site in note.sites} == {(3, layers)}
    size = model.entry.geometry("tiny")
    assert {(site.geometry.grid, site.geometry.heads, site.geometry.head_dim) for site in note.sites} == {
        (size.grid, size.heads, size.head_dim)
    }
    levels = list(dict.fromkeys(site.sigma for site in note.sites))
    assert levels[0] == pytest.approx(1.0, abs=1e-3)
    assert len(levels) == 3
    assert levels == sorted(levels, reverse=True)


def test_a_sparsified_pipeline_is_restored_bit_by_bit(model: Any, note: Any) -> None:
    own, scheduler = model.run(), dict(vars(model.pipe.scheduler))
    sparsify(model.pipe, note, kernel=SDPA)
    model.run()
    restore(model.pipe)
    assert note.sites
    assert vars(model.pipe.scheduler).keys() == scheduler.keys()
    assert torch.equal(model.run(), own)


def test_it_is_calibrated_on_prompts_of_different_lengths_and_makes_videos(model: Any, exact: Any) -> None:
    entry, pipe, prompts = model.entry, model.pipe, model.prompts
    learnt = calibrate(entry, pipe, resolution="tiny", prompts=prompts, seed=0, anchors=2, kernel=exact)
    own = model.run()
    sparsify(pipe, "calibatt", calibration=learnt, kernel=exact)
    sparse = model.run()
    video = generate(entry, pipe, prompt=prompts[0], resolution="tiny", seed=0)
    restore(pipe)
    size = entry.resolution("tiny")
    assert video.shape == (3, size.frames, size.height, size.width)
    assert video.isfinite().all()
    assert not torch.equal(sparse, own)


# one with two calls a step, and one whose branches are a batch with text among the keys
@pytest.mark.parametrize("model", ["wan2.1-1.3b", "mochi-1"], indirect=True)
def test_ten_more_videos_leave_no_tensor_behind(model: Any, exact: Any) -> None:
    learnt = calibrate(
        model.entry, model.pipe, resolution="tiny", prompts=model.prompts[:1], seed=0, anchors=2, kernel=exact
    )
    for method, calibration in (("calibatt", learnt), ("dfs", None)):
        sparsify(model.pipe, method, calibration=calibration, kernel=exact)
        model.run()
        before = tensors_alive()
        for _ in range(10):
            model.run()
        assert tensors_alive() == before
        restore(model.pipe)


def tensors_alive() -> int:
    gc.collect()
    return sum(issubclass(type(one), torch.Tensor) for one in gc.get_objects())


@pytest.mark.slow
@pytest.mark.parametrize("whole", [False, True], ids=["blocks", "transformer"])
def test_compiled_it_computes_the_same(model: Any, note: Any, whole: bool) -> None:
    torch._dynamo.reset()
    own = model.run(steps=2)
    parts = [model.pipe.transformer] if whole else blocks(model)
    with attached(model.pipe, note, SDPA):
        eager = model.run(steps=2)
        for part in parts:
            part.compile(backend="eager", fullgraph=not whole)
        try:
            compiled = model.run(steps=2)
        finally:
            for part in parts:
                part._compiled_call_impl = None
    torch.testing.assert_close(compiled, eager, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model.run(steps=2), own, atol=0, rtol=0)
