"""CogVideoX and CogVideoX 1.5: text before the video in one sequence; both branches of guidance in one batch.

The prompt is padded, and the model attends to the padding as to any text: nothing says which it is. So all of its
tokens are text, and blocks that hold any are dense, as queries and as keys.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from calibatt.methods.site import Branch
from calibatt.models.entry import Family, Grid, ModelEntry, Resolution, video_keywords
from calibatt.models.processor import AttentionProcessor, rotated
from calibatt.models.weights import load

# length that its pipelines pad the prompt to
_TEXT_TOKENS = 226


class CogVideoXSelfAttention(AttentionProcessor):
    """CogVideoX's joint attention of text and video, but for the attention itself."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Float[Tensor, "batch video_tokens channels"],
        encoder_hidden_states: Float[Tensor, "batch text_tokens channels"],
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Float[Tensor, "batch video_tokens channels"], Float[Tensor, "batch text_tokens channels"]]:
        """As `diffusers.models.attention_processor.CogVideoXAttnProcessor2_0` is called.

        Raises:
            ValueError: there is a mask, which its pipelines never have.
        """
        if attention_mask is not None:
            raise ValueError("this processor is for CogVideoX's self-attention, which has no mask")
        text_tokens = encoder_hidden_states.shape[1]
        joint = torch.cat((encoder_hidden_states, hidden_states), dim=1)
        if getattr(attn, "fused_projections", False):
            q, k, v = attn.to_qkv(joint).chunk(3, dim=-1)
        else:
            q, k, v = attn.to_q(joint), attn.to_k(joint), attn.to_v(joint)
        q, k, v = (x.unflatten(2, (attn.heads, -1)) for x in (q, k, v))
        # CogVideoX 2B has no norms, and learned positions in place of rotary ones
        if attn.norm_q is not None:
            q, k = attn.norm_q(q), attn.norm_k(k)
        if image_rotary_emb is not None:
            # its tables hold each angle twice, and lie on the video's tokens alone
            tables = [table[:, None, 0::2].to(q.device) for table in image_rotary_emb]
            q, k = (torch.cat((x[:, :text_tokens], rotated(x[:, text_tokens:], *tables)), dim=1) for x in (q, k))
        out = attn.to_out[1](attn.to_out[0](self.attend(q, k, v).flatten(2)))
        return out[:, text_tokens:], out[:, :text_tokens]


def _attentions(transformer: Any) -> Sequence[Any]:
    return [block.attn1 for block in transformer.transformer_blocks]


def _extents(arguments: Mapping[str, Any]) -> Grid:
    frames, _, rows, columns = arguments["hidden_states"].shape[1:]
    return frames, rows, columns


def _patch(config: Any) -> Grid:
    # 1.5 also joins frames
    return (config.patch_size_t or 1, config.patch_size, config.patch_size)


def _branches(pipe: Any, name: str) -> tuple[Branch, ...]:
    if name != "cond_uncond":
        return ()
    # the condition by which its pipelines double the batch
    return ("uncond", "cond") if pipe.guidance_scale > 1 else ("cond",)


def _noise(
    noise: Float[Tensor, "batch channels frames rows columns"],
) -> Float[Tensor, "batch frames channels rows columns"]:
    return noise.transpose(1, 2)


FAMILY = Family(
    transformer="CogVideoXTransformer3DModel",
    attentions=_attentions,
    extents=_extents,
    patch=_patch,
    processor=CogVideoXSelfAttention,
    branches=_branches,
    passes=(),
    text_side="first",
    keywords=video_keywords,
    noise=_noise,
)


def _entry(name: str, repository: str, *, frames_a_token: int, resolutions: Mapping[str, Resolution]) -> ModelEntry:
    return ModelEntry(
        name=name,
        layers=42,
        heads=48,
        head_dim=64,
        patch=(frames_a_token, 2, 2),
        latent_stride=(4, 8),
        latent_channels=16,
        block=(128, 128),
        resolutions=MappingProxyType(resolutions),
        steps=50,
        guidance=6.0,
        prompt_tokens=_TEXT_TOKENS,
        text_tokens=_TEXT_TOKENS,
        text_side="first",
        family=FAMILY,
        loader=partial(load, "CogVideoXPipeline", repository),
    )


# layers, heads and patches: each one's config.json; sizes, steps and guidance: their model cards
ENTRIES = (
    _entry(
        "cogvideox-5b", "zai-org/CogVideoX-5b", frames_a_token=1,
        resolutions={"480p": Resolution(height=480, width=720, frames=49)},
    ),
    _entry(
        "cogvideox1.5-5b", "zai-org/CogVideoX1.5-5B", frames_a_token=2,
        resolutions={"768p": Resolution(height=768, width=1360, frames=81)},
    ),
)  # fmt: skip
