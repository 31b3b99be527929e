"""Installing an attention into a pipeline, and taking it out."""

from __future__ import annotations

import contextlib
import gc
import itertools
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch

from calibatt.kernels.catalogue import KERNELS
from calibatt.methods.catalogue import build
from calibatt.models.adapter import attached, restore, sparsify
from calibatt.models.processor import AttentionProcessor
from calibatt.models.shapes.pipeline import assemble, new_transformer
from calibatt.models.shapes.text import TEXT_DIM, SceneTextEncoder, SceneTokenizer

SDPA = KERNELS["sdpa-flash"]
PROMPT = "a red circle moving left, over stripes"


def new_pipe(layers: int = 2) -> Any:
    torch.manual_seed(0)
    pipe = assemble(new_transformer(layers=layers, heads=2))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def pipe() -> Any:
    return new_pipe()


@torch.no_grad()
def run(pipe: Any, *, videos: int = 1, guidance: float = 3.0, steps: int = 3) -> torch.Tensor:
    noise = torch.randn(videos, 3, 2, 16, 32, generator=torch.Generator().manual_seed(0))
    frames: torch.Tensor = pipe(
        prompt=[PROMPT] * videos,
        negative_prompt=[""] * videos,
        height=16,
        width=32,
        num_frames=2,
        num_inference_steps=steps,
        guidance_scale=guidance,
        latents=noise,
        max_sequence_length=24,
        output_type="pt",
    ).frames
    return frames


def small_wan(**changes: Any) -> dict[str, Any]:
    """Components of a small Wan pipeline with an autoencoder of its own kind; 2 layers of 2 heads."""
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanTransformer3DModel

    torch.manual_seed(0)
    config = {
        "patch_size": (1, 2, 2), "num_attention_heads": 2, "attention_head_dim": 32, "in_channels": 16,
        "out_channels": 16, "text_dim": TEXT_DIM, "freq_dim": 32, "ffn_dim": 64, "num_layers": 2,
        "rope_max_seq_len": 32,
    }  # fmt: skip
    return {
        "tokenizer": SceneTokenizer(),
        "text_encoder": SceneTextEncoder(),
        "transformer": WanTransformer3DModel(**{**config, **changes}).eval(),
        "vae": AutoencoderKLWan(
            base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
        ),
        "scheduler": UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0, num_train_timesteps=1000
        ),
    }


def test_a_dense_method_gives_the_pipelines_own_video(pipe: Any) -> None:
    own = run(pipe)
    with attached(pipe, build("dense"), SDPA):
        ours = run(pipe)
    # both are fp32 on the same operations; rotary tables are applied in another order
    torch.testing.assert_close(ours, own, atol=1e-5, rtol=1e-4)


def test_fused_projections_give_the_same_video() -> None:
    pipe = new_pipe()
    own = run(pipe)
    pipe.transformer.fuse_qkv_projections()
    with attached(pipe, build("dense"), SDPA):
        # one product in place of three adds up in another order
        torch.testing.assert_close(run(pipe), own, atol=1e-4, rtol=1e-3)


def test_every_call_knows_its_step_branch_and_layer(pipe: Any, note: Any) -> None:
    with attached(pipe, note, SDPA):
        run(pipe)
    assert note.calls[0] is None
    assert [(s.step, s.branch, s.layer) for s in note.sites] == [
        (step, branch, layer) for step in range(3) for branch in ("cond", "uncond") for layer in range(2)
    ]
    assert {(s.steps, s.layers, s.geometry.grid) for s in note.sites} == {(3, 2, (2, 4, 8))}
    levels = [s.sigma for s in note.sites[::4]]
    # strictly: equal ones would say that nobody reads the schedule
    assert all(noisier > cleaner for noisier, cleaner in itertools.pairwise(levels))
    assert levels == pytest.approx(pipe.scheduler.sigmas[:3].tolist())
    assert levels[0] == pytest.approx(1.0, abs=1e-3)


def test_the_method_is_reset_at_the_start_of_every_video(pipe: Any, note: Any) -> None:
    with attached(pipe, note, SDPA):
        run(pipe)
        run(pipe, guidance=1.0)
    assert [index for index, site in enumerate(note.calls) if site is None] == [0, 13]


def test_videos_of_a_batch_are_planned_apart(pipe: Any, note: Any) -> None:
    with attached(pipe, note, SDPA):
        batch = run(pipe, videos=2)
    assert [site.sample for site in note.sites][:4] == [0, 1, 0, 1]
    assert batch.shape[0] == 2


def test_everything_is_as_before_afterwards_even_after_an_error(pipe: Any) -> None:
    transformer = pipe.transformer
    before = run(pipe)
    processors = [block.attn1.processor for block in transformer.blocks]

    def fail() -> None:
        with attached(pipe, build("dense"), SDPA):
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert [block.attn1.processor for block in transformer.blocks] == processors
    assert "cache_context" not in vars(transformer)
    assert not transformer._forward_pre_hooks
    assert torch.equal(run(pipe), before)


def test_what_another_library_had_put_in_place_is_there_again(pipe: Any) -> None:
    transformer = pipe.transformer
    seen = []

    @contextlib.contextmanager
    def cache_context(name: str, **progress: Any) -> Any:
        seen.append(name)
        yield

    transformer.cache_context = cache_context
    try:
        with attached(pipe, build("dense"), SDPA):
            run(pipe)
        assert transformer.cache_context is cache_context
        # and it was asked meanwhile
        assert seen == ["cond", "uncond"] * 3
    finally:
        del transformer.cache_context


def test_a_pipeline_of_another_kind_is_refused_in_one_line() -> None:
    class Other:
        transformer = torch.nn.Linear(1, 1)

    with (
        pytest.raises(ValueError, match="has Linear: this adapter knows WanTransformer3DModel and Mochi"),
        attached(Other(), build("dense"), SDPA),
    ):
        pass


def test_a_second_method_in_one_pipeline_is_refused_and_the_first_goes_on(pipe: Any, note: Any) -> None:
    with attached(pipe, note, SDPA):
        with pytest.raises(ValueError, match=r"in this pipeline already: call restore\(pipe\)"):
            sparsify(pipe, build("dense"), kernel=SDPA)
        run(pipe)
    assert len(note.sites) == 12
    assert not any(isinstance(block.attn1.processor, AttentionProcessor) for block in pipe.transformer.blocks)


def test_a_sparsified_pipeline_is_restored_bit_by_bit(pipe: Any, note: Any) -> None:
    before = run(pipe)
    assert sparsify(pipe, note, kernel=SDPA) is pipe
    run(pipe)
    restore(pipe)
    assert len(note.sites) == 12
    assert torch.equal(run(pipe), before)
    assert len(note.sites) == 12
    with pytest.raises(ValueError, match="not sparsified"):
        restore(pipe)


def test_two_pipelines_do_not_know_of_each_other(note: Any) -> None:
    first, second = new_pipe(), new_pipe(layers=1)
    notes = note, type(note)()
    with attached(first, notes[0], SDPA), attached(second, notes[1], SDPA):
        run(second)
        run(first)
    assert [{site.layers for site in note.sites} for note in notes] == [{2}, {1}]


def test_a_sparsified_pipeline_is_not_kept_in_memory() -> None:
    pipe = sparsify(new_pipe(), build("dense"), kernel=SDPA)
    run(pipe)
    gone = weakref.ref(pipe.transformer)
    del pipe
    gc.collect()
    assert gone() is None


def test_a_processor_set_meanwhile_is_not_passed_over_in_silence(pipe: Any) -> None:
    from diffusers.models.transformers.transformer_wan import WanAttnProcessor

    with attached(pipe, build("dense"), SDPA):
        ours = pipe.transformer.blocks[1].attn1.processor
        pipe.transformer.blocks[1].attn1.processor = WanAttnProcessor()
        with pytest.raises(ValueError, match="another attention processor was set"):
            run(pipe)
        pipe.transformer.blocks[1].attn1.processor = ours


def test_a_backend_chosen_meanwhile_stays_with_the_pipeline() -> None:
    pipe = new_pipe()
    with attached(pipe, build("dense"), SDPA):
        pipe.transformer.set_attention_backend("native")
    backends = {str(block.attn1.processor._attention_backend) for block in pipe.transformer.blocks}
    assert backends == {str(block.attn2.processor._attention_backend) for block in pipe.transformer.blocks} != {"None"}
    pipe.transformer.reset_attention_backend()


def test_a_call_outside_of_any_pass_is_refused(pipe: Any) -> None:
    shape = (1, 3, 2, 16, 32)
    text = torch.zeros(1, 24, TEXT_DIM)
    with attached(pipe, build("dense"), SDPA):
        pipe.scheduler.set_timesteps(3)
        for _ in range(2):
            pipe.transformer(torch.zeros(shape), torch.zeros(1), text)
        # a third pass of one step is no branch of guidance
        with pytest.raises(ValueError, match="without saying for which branch"):
            pipe.transformer(torch.zeros(shape), torch.zeros(1), text)


def test_a_scheduler_with_two_calls_a_step_is_refused_by_name(pipe: Any) -> None:
    from diffusers import FlowMatchHeunDiscreteScheduler

    own = pipe.scheduler
    pipe.scheduler = FlowMatchHeunDiscreteScheduler()
    try:
        with (
            pytest.raises(ValueError, match=r"Heun.* calls the model 2 times a step"),
            attached(pipe, build("dense"), SDPA),
        ):
            pass
    finally:
        pipe.scheduler = own


def test_video_to_video_runs_its_last_steps_on_both_branches(note: Any) -> None:
    from diffusers import WanVideoToVideoPipeline
    from PIL import Image

    pipe = WanVideoToVideoPipeline(**small_wan())
    pipe.set_progress_bar_config(disable=True)
    with attached(pipe, note, SDPA), torch.no_grad():
        for _ in range(2):
            pipe(
                video=[Image.new("RGB", (64, 64))] * 9, prompt=PROMPT, negative_prompt="", height=64, width=64,
                num_inference_steps=4, strength=0.75, max_sequence_length=24, output_type="latent",
            )  # fmt: skip
    assert [index for index, site in enumerate(note.calls) if site is None] == [0, 13]
    assert [(s.step, s.branch) for s in note.sites[::2]] == [
        (step, branch) for step in (1, 2, 3) for branch in ("cond", "uncond")
    ] * 2
    assert {s.steps for s in note.sites} == {4}
    assert note.sites[0].sigma < 1


def test_image_to_video_is_announced_without_steps_and_runs_all_the_same(note: Any) -> None:
    from diffusers import WanImageToVideoPipeline
    from PIL import Image

    pipe = WanImageToVideoPipeline(**small_wan(in_channels=36), image_encoder=None, image_processor=None)
    pipe.set_progress_bar_config(disable=True)
    with attached(pipe, note, SDPA), torch.no_grad():
        pipe(
            image=Image.new("RGB", (64, 64)), prompt=PROMPT, negative_prompt="", height=64, width=64, num_frames=9,
            num_inference_steps=2, max_sequence_length=24, output_type="latent",
        )  # fmt: skip
    assert [(s.step, s.branch) for s in note.sites[::2]] == [
        (step, branch) for step in range(2) for branch in ("cond", "uncond")
    ]


def _two_experts(high: bool) -> Any:
    from diffusers import WanPipeline, WanTransformer3DModel

    parts = small_wan()
    second = WanTransformer3DModel.from_config(parts["transformer"].config).eval()
    experts = {"transformer": parts.pop("transformer") if high else None, "transformer_2": second}
    if not high:
        parts.pop("transformer", None)
    pipe = WanPipeline(**parts, **experts, boundary_ratio=0.9 if high else 1.1)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("high", [True, False], ids=["both", "low noise alone"])
def test_two_transformers_share_the_steps_and_one_reset(high: bool, note: Any) -> None:
    pipe = _two_experts(high)
    called: list[str] = []
    for name in ("transformer", "transformer_2"):
        if getattr(pipe, name) is not None:
            getattr(pipe, name).register_forward_pre_hook(lambda *_, name=name: called.append(name))
    with attached(pipe, note, SDPA), torch.no_grad():
        pipe(
            prompt=PROMPT, negative_prompt="", height=64, width=64, num_frames=9, num_inference_steps=4,
            max_sequence_length=24, output_type="latent",
        )  # fmt: skip
    assert set(called) == ({"transformer", "transformer_2"} if high else {"transformer_2"})
    # the second transformer's attention is ours as well
    assert len(note.sites) == 2 * len(called)
    assert [index for index, site in enumerate(note.calls) if site is None] == [0]
    assert [site.step for site in note.sites[::4]] == [0, 1, 2, 3]


COMPILED: dict[str, Callable[[Any, Any], None]] = {
    "blocks": lambda pipe, backend: pipe.transformer.compile_repeated_blocks(fullgraph=True, backend=backend),
    "transformer": lambda pipe, backend: setattr(
        pipe, "transformer", torch.compile(pipe.transformer, fullgraph=True, backend=backend)
    ),
    "in place": lambda pipe, backend: pipe.transformer.compile(fullgraph=True, backend=backend),
}


@pytest.mark.parametrize("how", COMPILED)
def test_a_compiled_model_has_as_many_graphs_as_without(how: str) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    def graphs(attach: bool) -> int:
        torch._dynamo.reset()
        pipe, counter = new_pipe(layers=3), CompileCounterWithBackend("eager")
        expected = run(pipe, steps=6)
        COMPILED[how](pipe, counter)
        with attached(pipe, build("dense"), SDPA) if attach else contextlib.nullcontext():
            torch.testing.assert_close(run(pipe, steps=6), expected, atol=1e-5, rtol=1e-4)
        # without it, the compiled model is the pipeline's own again
        torch.testing.assert_close(run(pipe, steps=6), expected, atol=0, rtol=0)
        return int(counter.frame_count)

    # the one with ours, and the one without
    assert (graphs(attach=False), graphs(attach=True)) == (1, 2)


def test_the_operator_is_one_as_torch_wants_them(pipe: Any) -> None:
    with attached(pipe, build("dense"), SDPA):
        # where a video begins, no step has been taken
        pipe.scheduler.set_timesteps(3)
        place = pipe.transformer.blocks[1].attn1.processor._place
        q, k, v = torch.randn(3, 1, 64, 2, 64).unbind()
        with pipe.transformer.cache_context("cond"):
            torch.library.opcheck(torch.ops.calibatt.self_attention, (q, k, v, None, place, 2, 4, 8))
