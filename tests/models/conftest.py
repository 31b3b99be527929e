"""Small pipelines of every family, with random weights, in the hub's layout, and what plans dense and remembers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch

from calibatt.kernels import oracle
from calibatt.kernels.plan import Plan
from calibatt.methods.site import Site
from calibatt.models.catalogue import MODELS
from calibatt.models.entry import ModelEntry, Resolution

_WORDS = ["a", "red", "blue", "circle", "square", "moving", "left", "right", "over", "stripes", "and", "dots", "still"]
# five words and eleven; with the token that ends a text, 6 and 12
PROMPTS = ("a red circle moving left", "a blue square and a red circle moving right over stripes")
_TEXT_TOKENS = 16
_T5 = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((f"▁{word}", -1.0) for word in _WORDS)]


class Note:
    """Plans dense and remembers where it was asked; None stands for the start of a video."""

    def __init__(self) -> None:
        self.calls: list[Site | None] = []

    @property
    def sites(self) -> list[Site]:
        return [site for site in self.calls if site is not None]

    def reset(self) -> None:
        self.calls.append(None)

    def plan(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, site: Site) -> Plan:
        assert q.shape == k.shape == v.shape == (site.geometry.heads, site.geometry.tokens, site.geometry.head_dim)
        self.calls.append(site)
        return Plan.dense(site.geometry)


class Exact:
    """Computes what a plan says in fp64, since small sequences are not worth compiling a kernel for."""

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: Plan) -> torch.Tensor:
        return oracle.attend(q, k, v, plan).to(q.dtype)


@pytest.fixture
def note() -> Note:
    return Note()


@pytest.fixture
def exact() -> Exact:
    return Exact()


@dataclass
class Tiny:
    """A small model: its entry, and a folder with its weights."""

    entry: ModelEntry
    folder: Path
    prompts: tuple[str, ...] = PROMPTS
    pipe: Any = field(init=False)

    def __post_init__(self) -> None:
        self.pipe = self.load()

    def load(self, dtype: torch.dtype = torch.float32) -> Any:
        """Through the loader of the catalogue."""
        pipe = self.entry.load(resolution="tiny", device=torch.device("cpu"), dtype=dtype, weights=self.folder)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    @torch.no_grad()
    def run(self, pipe: Any | None = None, *, steps: int = 3, **keywords: Any) -> Any:
        """Latents, as the pipeline leaves them, of one video a prompt."""
        pipe, prompts = self.pipe if pipe is None else pipe, self.prompts
        family = self.entry.checked_family()
        shape = (len(prompts), *self.entry.latent_shape("tiny")[1:])
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(pipe.transformer.dtype)
        fixed = {**family.keywords(self.entry, self.entry.resolution("tiny")), "guidance_scale": self.entry.guidance}
        return pipe(
            prompt=list(prompts), num_inference_steps=steps, latents=family.noise(noise), output_type="latent",
            **{**fixed, **keywords},
        ).frames  # fmt: skip


def _t5() -> dict[str, Any]:
    from transformers import T5Config, T5EncoderModel, T5TokenizerFast

    config = T5Config(vocab_size=len(_T5), d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2)
    return {"tokenizer": T5TokenizerFast(vocab=_T5, extra_ids=0), "text_encoder": T5EncoderModel(config)}


def _umt5() -> dict[str, Any]:
    from transformers import T5TokenizerFast, UMT5Config, UMT5EncoderModel

    config = UMT5Config(vocab_size=len(_T5), d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2)
    return {"tokenizer": T5TokenizerFast(vocab=_T5, extra_ids=0), "text_encoder": UMT5EncoderModel(config)}


def _mochi() -> Any:
    from diffusers import AutoencoderKLMochi, FlowMatchEulerDiscreteScheduler, MochiPipeline, MochiTransformer3DModel

    transformer = MochiTransformer3DModel(
        num_attention_heads=2, attention_head_dim=64, num_layers=2, pooled_projection_dim=48, text_embed_dim=32,
        time_embed_dim=16, max_sequence_length=_TEXT_TOKENS,
    )  # fmt: skip
    # zeros would leave out rotary positions
    torch.nn.init.normal_(transformer.pos_frequencies, std=0.5)
    width = (32, 32, 32, 32)
    vae = AutoencoderKLMochi(
        encoder_block_out_channels=width, decoder_block_out_channels=width, layers_per_block=(1, 1, 1, 1, 1),
        add_attention_block=(False,) * 5,
    )  # fmt: skip
    # Mochi's own schedule counts from data to noise
    scheduler = FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
    return MochiPipeline(**_t5(), transformer=transformer, vae=vae, scheduler=scheduler)


def _cogvideox(frames_a_token: int | None = None) -> Any:
    from diffusers import (
        AutoencoderKLCogVideoX,
        CogVideoXDDIMScheduler,
        CogVideoXPipeline,
        CogVideoXTransformer3DModel,
    )

    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=32, num_layers=2, time_embed_dim=16, text_embed_dim=32,
        patch_size_t=frames_a_token, sample_width=12, sample_height=8, sample_frames=9,
        use_rotary_positional_embeddings=True, max_text_seq_length=_TEXT_TOKENS,
    )  # fmt: skip
    vae = AutoencoderKLCogVideoX(block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=2)
    # scheduler_config.json of CogVideoX-5b
    scheduler = CogVideoXDDIMScheduler(
        prediction_type="v_prediction", rescale_betas_zero_snr=True, snr_shift_scale=1.0, timestep_spacing="trailing",
        clip_sample=False,
    )  # fmt: skip
    return CogVideoXPipeline(**_t5(), transformer=transformer, vae=vae, scheduler=scheduler)


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: index for index, token in enumerate(("<pad>", "</s>", "<unk>", *_WORDS))}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def _hunyuan() -> Any:
    from diffusers import (
        AutoencoderKLHunyuanVideo,
        FlowMatchEulerDiscreteScheduler,
        HunyuanVideoPipeline,
        HunyuanVideoTransformer3DModel,
    )
    from transformers import CLIPTextConfig, CLIPTextModel, LlamaConfig, LlamaModel

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "vocab_size": 3 + len(_WORDS)}
    transformer = HunyuanVideoTransformer3DModel(
        num_attention_heads=2, attention_head_dim=32, num_layers=1, num_single_layers=2, num_refiner_layers=1,
        text_embed_dim=32, pooled_projection_dim=32, rope_axes_dim=(8, 12, 12),
    )  # fmt: skip
    down, up = ("HunyuanVideoDownBlock3D",) * 4, ("HunyuanVideoUpBlock3D",) * 4
    return HunyuanVideoPipeline(
        tokenizer=_tokenizer(),
        text_encoder=LlamaModel(LlamaConfig(**sizes, num_hidden_layers=3)),
        tokenizer_2=_tokenizer(),
        text_encoder_2=CLIPTextModel(CLIPTextConfig(**sizes, num_hidden_layers=1, eos_token_id=1, pad_token_id=0)),
        transformer=transformer,
        vae=AutoencoderKLHunyuanVideo(
            down_block_types=down, up_block_types=up, block_out_channels=(8, 8, 8, 8), layers_per_block=1,
            norm_num_groups=2,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
    )  # fmt: skip


def _ltx() -> Any:
    from diffusers import (
        AutoencoderKLLTXVideo,
        FlowMatchEulerDiscreteScheduler,
        LTXPipeline,
        LTXVideoTransformer3DModel,
    )

    transformer = LTXVideoTransformer3DModel(
        num_attention_heads=2, attention_head_dim=32, num_layers=2, cross_attention_dim=64, caption_channels=32
    )
    vae = AutoencoderKLLTXVideo(
        block_out_channels=(8, 8, 8, 8), decoder_block_out_channels=(8, 8, 8, 8), layers_per_block=(1,) * 5,
        decoder_layers_per_block=(1,) * 5,
    )  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05)
    return LTXPipeline(**_t5(), transformer=transformer, vae=vae, scheduler=scheduler)


def _wan(channels: int = 16, experts: int = 1, **settings: Any) -> Any:
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel

    transformers = [
        WanTransformer3DModel(
            num_attention_heads=2, attention_head_dim=32, num_layers=2, in_channels=channels, out_channels=channels,
            text_dim=32, freq_dim=32, ffn_dim=64, rope_max_seq_len=32,
        )
        for _ in range(experts)
    ]  # fmt: skip
    return WanPipeline(
        **_umt5(),
        transformer=transformers[0],
        transformer_2=transformers[1] if experts > 1 else None,
        vae=_wan22_vae() if channels == 48 else AutoencoderKLWan(base_dim=4, z_dim=channels, num_res_blocks=1),
        scheduler=UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0, num_train_timesteps=1000
        ),
        **settings,
    )


def _wan22_vae() -> Any:
    from diffusers import AutoencoderKLWan

    return AutoencoderKLWan(
        base_dim=4, decoder_base_dim=4, z_dim=48, num_res_blocks=1, is_residual=True, in_channels=12, out_channels=12,
        patch_size=2, scale_factor_spatial=16, latents_mean=[0.0] * 48, latents_std=[1.0] * 48,
    )  # fmt: skip


_SMALL = Resolution(height=64, width=96, frames=9)
_BUILDERS: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "wan2.1-1.3b": (_wan, {}),
    "wan2.2-ti2v-5b": (
        partial(_wan, channels=48, expand_timesteps=True),
        {"size": replace(_SMALL, height=128, width=192)},
    ),
    "wan2.2-a14b": (partial(_wan, experts=2, boundary_ratio=0.875), {}),
    "mochi-1": (_mochi, {"head_dim": 64, "size": replace(_SMALL, frames=13), "text_tokens": _TEXT_TOKENS}),
    "hunyuanvideo": (
        _hunyuan,
        {
            "layers": 3,
            "text_tokens": _TEXT_TOKENS,
            # its own template has 95 tokens
            "options": {"prompt_template": {"template": "{}", "crop_start": 0}},
        },
    ),
    "cogvideox-5b": (_cogvideox, {"text_tokens": _TEXT_TOKENS}),
    "cogvideox1.5-5b": (partial(_cogvideox, frames_a_token=2), {"text_tokens": _TEXT_TOKENS}),
    "ltx-video-2b": (_ltx, {"size": Resolution(height=96, width=128, frames=17)}),
}


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Tiny]:
    """From a model's name in the catalogue a small one, made once."""
    made: dict[str, Tiny] = {}

    def small(name: str) -> Tiny:
        if name not in made:
            build, changes = _BUILDERS[name]
            torch.manual_seed(0)
            folder = tmp_path_factory.mktemp(name)
            build().save_pretrained(folder)
            made[name] = Tiny(_entry(name, **changes), folder)
        return made[name]

    return small


def _entry(name: str, *, size: Resolution = _SMALL, **changes: Any) -> ModelEntry:
    sizes = {"layers": 2, "heads": 2, "head_dim": 32, "block": (16, 16), "steps": 3, "prompt_tokens": _TEXT_TOKENS}
    resolutions = MappingProxyType({"tiny": size})
    return replace(MODELS[name], **{**sizes, "resolutions": resolutions, **changes})


@pytest.fixture(params=list(_BUILDERS))
def model(request: pytest.FixtureRequest, tiny: Callable[[str], Tiny]) -> Tiny:
    """Every small model, in turn."""
    return tiny(request.param)
