"""LTX-Video: text by cross-attention, as many latents as tokens; both branches of guidance in one batch.

There is no text in self-attention, so nothing in it is dense on its account.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any, cast

from jaxtyping import Float
from torch import Tensor

from calibatt.models.entry import Family, Grid, ModelEntry, Resolution, branches_in_a_batch, video_keywords
from calibatt.models.processor import AttentionProcessor, rotated
from calibatt.models.weights import load


class LTXSelfAttention(AttentionProcessor):
    """LTX-Video's self-attention, but for the attention itself."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Float[Tensor, "batch tokens channels"],
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Float[Tensor, "batch tokens channels"]:
        """As `diffusers.models.transformers.transformer_ltx.LTXVideoAttnProcessor` is called.

        Raises:
            ValueError: this is not LTX-Video's self-attention, which has neither a mask nor text.
        """
        if encoder_hidden_states is not None or attention_mask is not None or image_rotary_emb is None:
            raise ValueError(
                "this processor is for LTX-Video's self-attention, without a mask and with rotary positions"
            )
        q, k = attn.norm_q(attn.to_q(hidden_states)), attn.norm_k(attn.to_k(hidden_states))
        # its tables hold each angle twice, and one after another for all heads
        tables = [table[..., 0::2] for table in image_rotary_emb]
        q, k = rotated(q, *tables), rotated(k, *tables)
        q, k, v = (x.unflatten(2, (attn.heads, -1)) for x in (q, k, attn.to_v(hidden_states)))
        return cast(Tensor, attn.to_out[1](attn.to_out[0](self.attend(q, k, v).flatten(2))))


def _attentions(transformer: Any) -> Sequence[Any]:
    return [block.attn1 for block in transformer.transformer_blocks]


def _extents(arguments: Mapping[str, Any]) -> Grid:
    frames, rows, columns = (arguments.get(name) for name in ("num_frames", "height", "width"))
    if frames is None or rows is None or columns is None:
        raise ValueError(
            "this pipeline gives every token a place of its own (video_coords): calibatt needs a grid of them, as "
            "LTXPipeline and LTXImageToVideoPipeline have it"
        )
    return frames, rows, columns


def _patch(config: Any) -> Grid:
    # its latents come in patches already
    return (1, 1, 1)


def _noise(noise: Float[Tensor, "batch channels frames rows columns"]) -> Float[Tensor, "batch tokens channels"]:
    return noise.flatten(2).transpose(1, 2)


FAMILY = Family(
    transformer="LTXVideoTransformer3DModel",
    attentions=_attentions,
    extents=_extents,
    patch=_patch,
    processor=LTXSelfAttention,
    branches=branches_in_a_batch,
    passes=(),
    text_side=None,
    keywords=video_keywords,
    noise=_noise,
)


# layers, heads and channels: the transformer's config.json; size, steps and guidance: the defaults of LTXPipeline, and
# the negative prompt of its documentation
ENTRIES = (
    ModelEntry(
        name="ltx-video-2b",
        layers=28,
        heads=32,
        head_dim=64,
        patch=(1, 1, 1),
        latent_stride=(8, 32),
        latent_channels=128,
        block=(128, 128),
        resolutions=MappingProxyType({"512p": Resolution(height=512, width=704, frames=161)}),
        steps=50,
        guidance=3.0,
        prompt_tokens=128,
        negative_prompt="worst quality, inconsistent motion, blurry, jittery, distorted",
        family=FAMILY,
        loader=partial(load, "LTXPipeline", "Lightricks/LTX-Video"),
    ),
)
