"""Calibrating a pipeline of Diffusers: small, untrained, and in states that would teach something false."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from calibatt.calibration.artifact import Calibration
from calibatt.calibration.collect import calibrate
from calibatt.calibration.videos import DenseVideos, Videos
from calibatt.kernels.catalogue import KERNELS
from calibatt.kernels.mask import unpacked
from calibatt.methods.calibatt.schedule import Schedule
from calibatt.methods.call import Call, SparseAttention
from calibatt.methods.catalogue import METHODS, build, learner
from calibatt.methods.energy import block_energy
from calibatt.methods.selection import top_p
from calibatt.models.catalogue import SHAPES
from calibatt.models.entry import Resolution
from calibatt.models.identity import origin_of
from calibatt.models.shapes.pipeline import assemble, new_transformer

SDPA = KERNELS["sdpa-flash"]
PROMPTS = ("a red circle moving left, over stripes", "a blue square moving right, over stripes")
SCHEDULE = Schedule(early=0.7, late=0.4, decay=2.0)
# 2 × 8 × 8 tokens
TINY = replace(
    SHAPES, name="tiny", layers=2, heads=2, block=(24, 16), steps=2,
    resolutions={"small": Resolution(height=32, width=32, frames=2)},
)  # fmt: skip


@pytest.fixture
def pipe() -> Any:
    torch.manual_seed(0)
    return assemble(new_transformer(layers=2, heads=2))


@pytest.fixture
def learn() -> Callable[..., Calibration]:
    def made(pipe: Any, **other: Any) -> Calibration:
        given: dict[str, Any] = {"prompts": PROMPTS[:1], "seed": 5, "kernel": SDPA, "schedule": SCHEDULE, "anchors": 2}
        return calibrate(TINY, pipe, resolution="small", **{**given, **other})

    return made


def test_dense_videos_are_videos(pipe: Any) -> None:
    assert isinstance(DenseVideos(TINY, pipe, resolution="small"), Videos)


def test_noise_levels_are_those_of_the_calls_and_no_layer_is_computed_for_them(pipe: Any) -> None:
    seen: dict[int, float] = {}

    class Watch:
        """Keeps the noise level of each step."""

        def saw(self, call: Call) -> None:
            seen[call.site.step] = call.site.sigma

    videos = DenseVideos(TINY, pipe, resolution="small", steps=5)
    finished: list[Any] = []
    handle = pipe.transformer.blocks[0].register_forward_hook(lambda *_: finished.append(1))
    levels = videos.sigmas(PROMPTS[0])
    assert finished == []
    handle.remove()
    videos.show(SparseAttention(build("dense"), SDPA, observers=[Watch()]), prompts=PROMPTS[:1], seed=5)
    assert levels == tuple(seen[step] for step in range(5))
    assert levels[0] == 1


def test_the_masks_are_those_of_the_pipelines_own_attention(pipe: Any, learn: Callable[..., Calibration]) -> None:
    made = learn(pipe)
    assert made.provenance.origin == origin_of(pipe, "tiny")
    assert (made.provenance.steps, made.provenance.layers, made.settings["block"]) == (2, 2, [24, 16])
    assert made.tables["agreement"].eq(1).all()
    compared = []

    class Compare:
        """Holds each mask against the attention that it should be made of."""

        def saw(self, call: Call) -> None:
            site = call.site
            if site.branch == "cond":
                energy = block_energy(call.q[0], call.k[0], block_q=24, block_k=16)
                bits = made.tables["bits"][site.step, site.layer]
                assert torch.equal(unpacked(bits, 8), top_p(energy, SCHEDULE.mass(site.step, site.steps)))
                compared.append((site.step, site.layer))

    attention = SparseAttention(build("dense"), SDPA, observers=[Compare()])
    DenseVideos(TINY, pipe, resolution="small").show(attention, prompts=PROMPTS[:1], seed=5)
    assert sorted(compared) == [(0, 0), (0, 1), (1, 0), (1, 1)]


def test_a_cache_that_skips_layers_is_refused_up_front(pipe: Any, learn: Callable[..., Calibration]) -> None:
    from diffusers import FirstBlockCacheConfig

    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.3))
    with pytest.raises(ValueError, match=r"skips layers by a cache of Diffusers.*disable_cache\(\) first"):
        learn(pipe)
    pipe.transformer.disable_cache()
    assert learn(pipe).provenance.steps == 2


def test_a_scheduler_of_two_calls_a_step_is_named_as_the_cause(pipe: Any, learn: Callable[..., Calibration]) -> None:
    from diffusers import FlowMatchHeunDiscreteScheduler

    pipe.scheduler = FlowMatchHeunDiscreteScheduler()
    with pytest.raises(ValueError, match="FlowMatchHeunDiscreteScheduler calls the model 2 times a step"):
        learn(pipe)


def test_weights_with_a_nan_are_refused_at_the_first_call(pipe: Any, learn: Callable[..., Calibration]) -> None:
    pipe.transformer.blocks[1].attn1.to_q.weight.data[:] = float("nan")
    with pytest.raises(ValueError, match="attention at step 0, layer 1 is not finite"):
        learn(pipe)


def test_a_pipeline_with_its_second_transformer_alone_is_calibrated(
    pipe: Any, learn: Callable[..., Calibration]
) -> None:
    from diffusers import WanPipeline

    parts = {name: getattr(pipe, name) for name in ("tokenizer", "text_encoder", "vae", "scheduler")}
    alone = WanPipeline(**parts, transformer=None, transformer_2=pipe.transformer, boundary_ratio=1.1)
    one, other = learn(pipe), learn(alone)
    assert all(torch.equal(one.tables[name], other.tables[name]) for name in one.tables)


def test_a_stopped_pipeline_teaches_nothing(
    pipe: Any, learn: Callable[..., Calibration], monkeypatch: pytest.MonkeyPatch
) -> None:
    from calibatt.calibration import videos
    from calibatt.models.generate import generate_all

    monkeypatch.setattr(videos, "generate_all", lambda *where, **how: generate_all(*where, **how, stop_after=1))
    with pytest.raises(ValueError, match=r"at step 1, layer 0, nor at 1 of 4 others: .* was it stopped"):
        learn(pipe)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "preset"),
    [
        (name, preset)
        for name, method in METHODS.items()
        for preset in method.presets
        if learner(name, preset=preset) is not None
    ],
)
def test_whatever_learns_is_calibrated_on_a_pipeline_and_its_file_can_be_used(
    pipe: Any, name: str, preset: str, tmp_path: Path
) -> None:
    anchors = {"anchors": 2} if name == "calibatt" else {}
    made = calibrate(
        TINY, pipe, resolution="small", prompts=PROMPTS, seed=0, kernel=SDPA, method=name, preset=preset,
        block=(16, 16), **anchors,
    )  # fmt: skip
    made.save(tmp_path / "x")
    back = Calibration.load(tmp_path / "x")
    assert build(name, preset=preset, calibration=back, block=(16, 16)).learnt is back
