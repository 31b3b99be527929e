"""HunyuanVideo: text after the video in one sequence, without its padding; guidance is an input of the model.

Its first layers have weights of their own for text (dual stream), the others share one set (single stream); attention
is joint in both. Text that is no padding is computed whole: blocks that hold any are dense, as queries and as keys. The
unconditional branch is a call of its own, made where `true_cfg_scale` and a negative prompt are given.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from calibatt.models.entry import Family, Grid, ModelEntry, Resolution, branch_a_pass, video_extents, video_noise
from calibatt.models.processor import AttentionProcessor, rotated
from calibatt.models.weights import load

# length that its pipelines pad the prompt to, after the tokens of the template are cut off
_TEXT_TOKENS = 256


class HunyuanVideoSelfAttention(AttentionProcessor):
    """HunyuanVideo's joint attention of video and text, of either kind of layer, but for the attention itself."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Float[Tensor, "batch video_tokens channels"],
        encoder_hidden_states: Float[Tensor, "batch text_tokens channels"],
        attention_mask: Bool[Tensor, "batch 1 1 tokens"],
        image_rotary_emb: tuple[Tensor, Tensor],
    ) -> tuple[Float[Tensor, "batch video_tokens channels"], Float[Tensor, "batch text_tokens channels"]]:
        """As `diffusers.models.transformers.transformer_hunyuan_video.HunyuanVideoAttnProcessor2_0` is called."""
        dual = attn.add_q_proj is not None
        video_projections = (attn.to_q, attn.to_k, attn.to_v)
        text_projections = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj) if dual else video_projections
        q, k, v = (project(hidden_states).unflatten(2, (attn.heads, -1)) for project in video_projections)
        text_q, text_k, text_v = (
            project(encoder_hidden_states).unflatten(2, (attn.heads, -1)) for project in text_projections
        )
        # its tables hold each angle twice
        tables = [table[:, None, 0::2] for table in image_rotary_emb]
        q, k = rotated(attn.norm_q(q), *tables), rotated(attn.norm_k(k), *tables)
        norm_text_q, norm_text_k = (attn.norm_added_q, attn.norm_added_k) if dual else (attn.norm_q, attn.norm_k)
        text_q, text_k = norm_text_q(text_q), norm_text_k(text_k)
        q, k, v = (torch.cat(parts, dim=1) for parts in ((q, text_q), (k, text_k), (v, text_v)))
        text_tokens = encoder_hidden_states.shape[1]
        out = self.attend(q, k, v, attention_mask[:, 0, 0, -text_tokens:]).flatten(2)
        video, text = out[:, :-text_tokens], out[:, -text_tokens:]
        # a layer of the second kind projects both together, after attention
        return (attn.to_out[1](attn.to_out[0](video)), attn.to_add_out(text)) if dual else (video, text)


def _attentions(transformer: Any) -> Sequence[Any]:
    return [block.attn for block in (*transformer.transformer_blocks, *transformer.single_transformer_blocks)]


def _patch(config: Any) -> Grid:
    return (config.patch_size_t, config.patch_size, config.patch_size)


def _keywords(entry: ModelEntry, size: Resolution) -> Mapping[str, Any]:
    # a negative prompt would go unused without true_cfg_scale
    return {
        "height": size.height,
        "width": size.width,
        "num_frames": size.frames,
        "max_sequence_length": entry.prompt_tokens,
        **entry.options,
    }


FAMILY = Family(
    transformer="HunyuanVideoTransformer3DModel",
    attentions=_attentions,
    extents=video_extents,
    patch=_patch,
    processor=HunyuanVideoSelfAttention,
    branches=branch_a_pass,
    # HunyuanVideoImageToVideoPipeline calls the transformer so in every step, and announces nothing
    passes=("cond", "uncond"),
    text_side="last",
    keywords=_keywords,
    noise=video_noise,
)


# 20 layers of the first kind and 40 of the second, heads and patches: the transformer's config.json; size, steps and
# guidance: the defaults of HunyuanVideoPipeline, which are those of github.com/Tencent/HunyuanVideo
ENTRIES = (
    ModelEntry(
        name="hunyuanvideo",
        layers=60,
        heads=24,
        head_dim=128,
        patch=(1, 2, 2),
        latent_stride=(4, 8),
        latent_channels=16,
        block=(128, 128),
        resolutions=MappingProxyType({"720p": Resolution(height=720, width=1280, frames=129)}),
        steps=50,
        guidance=6.0,
        prompt_tokens=_TEXT_TOKENS,
        text_tokens=_TEXT_TOKENS,
        family=FAMILY,
        loader=partial(load, "HunyuanVideoPipeline", "hunyuanvideo-community/HunyuanVideo"),
    ),
)
