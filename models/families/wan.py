"""Wan 2.1 and 2.2, text, image and video to video: text by cross-attention, guidance as two calls."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor

from calibatt.methods.site import Branch
from calibatt.models.entry import Family, Grid, ModelEntry, Resolution, video_keywords
from calibatt.models.processor import AttentionProcessor, rotated


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


def _branches(pipe: Any, name: str) -> tuple[Branch, ...]:
    return (cast(Branch, name),) if name in ("cond", "uncond") else ()


FAMILY = Family(
    transformer="WanTransformer3DModel",
    attentions=_attentions,
    patch=_patch,
    processor=WanSelfAttention,
    branches=_branches,
    # WanVideoToVideoPipeline calls the transformer so in every step, and announces nothing
    passes=("cond", "uncond"),
    text_side=None,
    keywords=video_keywords,
)


def _load(repository: str, device: torch.device, dtype: torch.dtype, weights: Path | None) -> Any:
    from diffusers import AutoencoderKLWan, WanPipeline

    source = repository if weights is None else str(weights)
    # the autoencoder's own precision is fp32: Wan's recipe in Diffusers
    vae = AutoencoderKLWan.from_pretrained(source, subfolder="vae", dtype=torch.float32)
    return WanPipeline.from_pretrained(source, vae=vae, dtype=dtype).to(device)


# Wan's sizes, 50 steps, guidance 5 and flow shift 3 (480p) or 5 (720p): Diffusers' documentation of WanPipeline
_RESOLUTIONS = MappingProxyType(
    {
        "480p": Resolution(height=480, width=832, frames=81, flow_shift=3.0),
        "720p": Resolution(height=720, width=1280, frames=81, flow_shift=5.0),
    }
)


def _wan21(name: str, repository: str, *, layers: int, heads: int) -> ModelEntry:
    return ModelEntry(
        name=name,
        layers=layers,
        heads=heads,
        head_dim=128,
        patch=(1, 2, 2),
        latent_stride=(4, 8),
        latent_channels=16,
        block=(128, 128),
        resolutions=_RESOLUTIONS,
        steps=50,
        guidance=5.0,
        prompt_tokens=512,
        family=FAMILY,
        loader=partial(_load, repository),
    )


ENTRIES = (
    _wan21("wan2.1-1.3b", "Wan-AI/Wan2.1-T2V-1.3B-Diffusers", layers=30, heads=12),
    _wan21("wan2.1-14b", "Wan-AI/Wan2.1-T2V-14B-Diffusers", layers=40, heads=40),
)
