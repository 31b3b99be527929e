"""Mochi 1: text after the video in one sequence, without its padding; both branches of guidance in one batch.

Text that is no padding is computed whole: blocks that hold any are dense, as queries and as keys.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from jaxtyping import Float, Num
from torch import Tensor

from calibatt.kernels.geometry import Geometry
from calibatt.models.entry import (
    Family,
    ForwardPass,
    Grid,
    ModelEntry,
    Resolution,
    branches_in_a_batch,
    video_extents,
    video_keywords,
    video_noise,
)
from calibatt.models.processor import AttentionProcessor, rotated
from calibatt.models.untrained import bare, drawn_on
from calibatt.models.weights import load


class MochiSelfAttention(AttentionProcessor):
    """Mochi's joint attention of video and text, but for the attention itself."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Float[Tensor, "batch video_tokens channels"],
        encoder_hidden_states: Float[Tensor, "batch text_tokens text_channels"],
        attention_mask: Num[Tensor, "batch text_tokens"],
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Float[Tensor, "batch video_tokens channels"], Float[Tensor, "batch text_tokens text_channels"]]:
        """As `diffusers.models.attention_processor.MochiAttnProcessor2_0` is called."""
        heads = attn.heads
        q, k, v = (project(hidden_states).unflatten(2, (heads, -1)) for project in (attn.to_q, attn.to_k, attn.to_v))
        q, k = attn.norm_q(q), attn.norm_k(k)
        text_q, text_k, text_v = (
            project(encoder_hidden_states).unflatten(2, (heads, -1))
            for project in (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
        )
        text_q, text_k = attn.norm_added_q(text_q), attn.norm_added_k(text_k)
        if image_rotary_emb is not None:
            # in fp32, as in Diffusers' processor
            q, k = (rotated(x.float(), *image_rotary_emb).type_as(x) for x in (q, k))
        q, k, v = (torch.cat(parts, dim=1) for parts in ((q, text_q), (k, text_k), (v, text_v)))
        out = self.attend(q, k, v, attention_mask.bool()).flatten(2)
        video, text = out.split_with_sizes((hidden_states.shape[1], encoder_hidden_states.shape[1]), dim=1)
        video = attn.to_out[1](attn.to_out[0](video))
        # the last layer has no use for text
        return video, attn.to_add_out(text) if hasattr(attn, "to_add_out") else text


def _attentions(transformer: Any) -> Sequence[Any]:
    return [block.attn1 for block in transformer.transformer_blocks]


def _patch(config: Any) -> Grid:
    return (1, config.patch_size, config.patch_size)


FAMILY = Family(
    transformer="MochiTransformer3DModel",
    attentions=_attentions,
    extents=video_extents,
    patch=_patch,
    processor=MochiSelfAttention,
    branches=branches_in_a_batch,
    passes=(),
    text_side="last",
    keywords=video_keywords,
    noise=video_noise,
)


def untrained(
    sizes: Mapping[str, Any], geometry: Geometry, layers: int, device: torch.device, dtype: torch.dtype
) -> ForwardPass:
    """A forward pass of Mochi's transformer with random weights, without guidance, the same at every call.

    Args:
        sizes: of `MochiTransformer3DModel`, but for layers, heads and head dim.
        geometry: of its self-attention; none of its text is padding.
        layers: as many as are wanted.
        device, dtype: of weights and inputs.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler, MochiPipeline, MochiTransformer3DModel

    with drawn_on(device, dtype):
        transformer: Any = MochiTransformer3DModel(
            num_layers=layers, num_attention_heads=geometry.heads, attention_head_dim=geometry.head_dim, **sizes
        )
        config = transformer.config
        shape = [extent * patch for extent, patch in zip(geometry.grid, _patch(config), strict=True)]
        inputs = {
            "hidden_states": torch.randn(1, config.in_channels, *shape),
            "timestep": torch.tensor([500.0]),
            "encoder_hidden_states": torch.randn(1, geometry.text_tokens, config.text_embed_dim),
            "encoder_attention_mask": torch.ones(1, geometry.text_tokens, dtype=torch.bool),
        }
    pipe = bare(MochiPipeline, transformer, FlowMatchEulerDiscreteScheduler(invert_sigmas=True))
    # a pipeline that was not called yet does not know
    pipe._guidance_scale = 1.0
    return ForwardPass(pipe=pipe, inputs=inputs, name="cond_uncond")


# sizes, steps and guidance: Diffusers' documentation of MochiPipeline, and the transformer's configuration
ENTRIES = (
    ModelEntry(
        name="mochi-1",
        layers=48,
        heads=24,
        head_dim=128,
        patch=(1, 2, 2),
        latent_stride=(6, 8),
        latent_channels=12,
        block=(128, 128),
        resolutions=MappingProxyType(
            {
                "85f": Resolution(height=480, width=848, frames=85),
                "163f": Resolution(height=480, width=848, frames=163),
            }
        ),
        steps=64,
        guidance=4.5,
        prompt_tokens=256,
        text_tokens=256,
        family=FAMILY,
        # the other sizes are what Diffusers takes unless it is told otherwise
        untrained=partial(untrained, {}),
        loader=partial(load, "MochiPipeline", "genmo/mochi-1-preview"),
    ),
)
