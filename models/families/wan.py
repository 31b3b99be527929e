"""Wan 2.1 and 2.2, text, image and video to video: text by cross-attention, guidance as two calls.

There is no text in self-attention, so nothing in it is dense on its account.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from types import MappingProxyType
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor

from calibatt.kernels.geometry import Geometry
from calibatt.models.entry import (
    Family,
    ForwardPass,
    Grid,
    ModelEntry,
    Resolution,
    branch_a_pass,
    video_extents,
    video_keywords,
    video_noise,
)
from calibatt.models.processor import AttentionProcessor, rotated
from calibatt.models.untrained import bare, drawn_on
from calibatt.models.weights import load

# length that Wan's pipelines pad the prompt to
_TEXT_TOKENS = 512


class WanSelfAttention(AttentionProcessor):
    """Wan's self-attention, but for the attention itself."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Float[Tensor, "batch tokens channels"],
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Float[Tensor, "batch tokens channels"]:
        """As `diffusers.models.transformers.transformer_wan.WanAttnProcessor` is called.

        Raises:
            ValueError: this is not Wan's self-attention, which has neither a mask nor text.
        """
        if encoder_hidden_states is not None or attention_mask is not None or rotary_emb is None:
            raise ValueError("this processor is for Wan's self-attention, without a mask and with rotary embeddings")
        if getattr(attn, "fused_projections", False):
            q, k, v = attn.to_qkv(hidden_states).chunk(3, dim=-1)
        else:
            q, k, v = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
        q, k = attn.norm_q(q), attn.norm_k(k)
        q, k, v = (x.unflatten(-1, (attn.heads, -1)) for x in (q, k, v))
        # Wan's tables hold each angle twice
        cosines, sines = (table[..., 0::2] for table in rotary_emb)
        q, k = rotated(q, cosines, sines), rotated(k, cosines, sines)
        out = self.attend(q, k, v).flatten(2).type_as(q)
        return cast(Tensor, attn.to_out[1](attn.to_out[0](out)))


def _attentions(transformer: Any) -> Sequence[Any]:
    return [block.attn1 for block in transformer.blocks]


def _patch(config: Any) -> Grid:
    return cast(Grid, tuple(config.patch_size))


FAMILY = Family(
    transformer="WanTransformer3DModel",
    attentions=_attentions,
    extents=video_extents,
    patch=_patch,
    processor=WanSelfAttention,
    branches=branch_a_pass,
    # WanVideoToVideoPipeline calls the transformer so in every step, and announces nothing
    passes=("cond", "uncond"),
    text_side=None,
    keywords=video_keywords,
    noise=video_noise,
    parallel=True,
)


def untrained(
    sizes: Mapping[str, Any], geometry: Geometry, layers: int, device: torch.device, dtype: torch.dtype
) -> ForwardPass:
    """A forward pass of Wan's transformer with random weights, the same at every call.

    Args:
        sizes: of `WanTransformer3DModel`, but for layers, heads and head dim.
        geometry: of its self-attention.
        layers: as many as are wanted.
        device, dtype: of weights and inputs.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel

    with drawn_on(device, dtype):
        transformer: Any = WanTransformer3DModel(
            num_layers=layers, num_attention_heads=geometry.heads, attention_head_dim=geometry.head_dim, **sizes
        )
        config = transformer.config
        shape = [extent * patch for extent, patch in zip(geometry.grid, config.patch_size, strict=True)]
        inputs = {
            "hidden_states": torch.randn(1, config.in_channels, *shape),
            "timestep": torch.tensor([500.0]),
            "encoder_hidden_states": torch.randn(1, _TEXT_TOKENS, config.text_dim),
        }
    pipe = bare(WanPipeline, transformer, FlowMatchEulerDiscreteScheduler())
    return ForwardPass(pipe=pipe, inputs=inputs, name="cond")


_480P = Resolution(height=480, width=832, frames=81)
_720P = Resolution(height=720, width=1280, frames=81)


def _entry(
    name: str,
    repository: str,
    *,
    layers: int,
    heads: int,
    ffn_dim: int,
    resolutions: Mapping[str, Resolution],
    steps: int = 50,
    guidance: float = 5.0,
    space: int = 8,
    channels: int = 16,
    options: Mapping[str, Any] = MappingProxyType({}),
) -> ModelEntry:
    """One of Wan's models.

    Args:
        space: pixels per latent.
        channels: of a latent.
    """
    return ModelEntry(
        name=name,
        layers=layers,
        heads=heads,
        head_dim=128,
        patch=(1, 2, 2),
        latent_stride=(4, space),
        latent_channels=channels,
        block=(128, 128),
        resolutions=MappingProxyType(resolutions),
        steps=steps,
        guidance=guidance,
        prompt_tokens=_TEXT_TOKENS,
        options=options,
        family=FAMILY,
        untrained=partial(untrained, {"ffn_dim": ffn_dim, "in_channels": channels, "out_channels": channels}),
        # the autoencoder's own precision is fp32: Wan's recipe in Diffusers
        loader=partial(load, "WanPipeline", repository, dtypes={"vae": torch.float32}),
    )


# layers, heads, channels: each one's config.json. Sizes, 50 steps, guidance 5 and flow shift 3 (480p) or 5 (720p) of
# Wan 2.1: Diffusers' documentation of WanPipeline. Wan 2.2, whose schedulers are taken as they are saved: the model
# cards, which have them from wan/configs of github.com/Wan-Video/Wan2.2
_WAN21 = {"480p": replace(_480P, flow_shift=3.0), "720p": replace(_720P, flow_shift=5.0)}
ENTRIES = (
    _entry(
        "wan2.1-1.3b", "Wan-AI/Wan2.1-T2V-1.3B-Diffusers", layers=30, heads=12, ffn_dim=8960, resolutions=_WAN21,
    ),
    _entry(
        "wan2.1-14b", "Wan-AI/Wan2.1-T2V-14B-Diffusers", layers=40, heads=40, ffn_dim=13824, resolutions=_WAN21,
    ),
    _entry(
        "wan2.2-ti2v-5b", "Wan-AI/Wan2.2-TI2V-5B-Diffusers", layers=30, heads=24, ffn_dim=14336, space=16, channels=48,
        resolutions={"720p": Resolution(height=704, width=1280, frames=121)},
    ),
    # of two transformers, one for the noisier steps; guidance is the first one's
    _entry(
        "wan2.2-a14b", "Wan-AI/Wan2.2-T2V-A14B-Diffusers", layers=40, heads=40, ffn_dim=13824, steps=40, guidance=4.0,
        options=MappingProxyType({"guidance_scale_2": 3.0}), resolutions={"720p": _720P, "480p": _480P},
    ),
)  # fmt: skip
