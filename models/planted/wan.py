"""Attention structure planted in an unmodified Wan transformer of any size: no download, and no fidelity."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from calibatt.kernels.geometry import Geometry
from calibatt.models.planted.heads import Fit, Head, fit
from calibatt.models.planted.planting import ADDED, CLOCK, CLOCK_SCALE, OUTPUT, Channels, run_the_clock, start
from calibatt.models.processor import rotated

# The constants are small beside the content of the other channels, and RMSNorm's gains make up for it: what the norm
# divides by is then the content's strength, which the modulation sets at each step.
_BIAS = 0.1
# ramps of the timestep, 1000 to 0, begin within less than a step of 50
_SHARPNESS = 2.0
# of the flow-matching schedule that the published figures' steps have: Wan's own at 720p
_SHIFT = 5.0


@torch.no_grad()
def plant(transformer: Any, geometry: Geometry, *, profile: str, seed: int = 0) -> Fit:
    """Fill a WanTransformer3DModel in place, parameter by parameter, where it lies.

    What Diffusers keeps in fp32 becomes fp32, as in a model that it loads.

    Args:
        transformer: of any size; what is in it is overwritten.
        geometry: grid of tokens at which heads have the published shares of keys.
        profile: name of the published model, as for `heads.fit`.
        seed: of all that is drawn. Which head does what is the same on all devices, projections only on like ones.

    Returns:
        What was planted.

    Raises:
        UnknownName: there is no such profile.
        ValueError: this is no Wan transformer.
    """
    start(transformer, "WanTransformer3DModel", seed)
    config, blocks = transformer.config, transformer.blocks
    own = replace(
        geometry, heads=config.num_attention_heads, head_dim=config.attention_head_dim, text_tokens=0
    )  # fmt: skip
    planted = fit(profile, own, layers=len(blocks), seed=seed)
    embedder = transformer.condition_embedder
    # content grows by the divisor, and RMSNorm divides by it
    run_the_clock(
        embedder.time_embedder,
        [(timestep(share), divisor) for share, divisor in planted.course],
        sharpness=_SHARPNESS,
    )
    embedder.time_proj.weight[:, CLOCK] = 0
    embedder.time_proj.weight.unflatten(0, (6, -1))[1, :, CLOCK] = 1 / CLOCK_SCALE
    gate = math.sqrt(ADDED / (3 * len(blocks)))
    for block, heads in zip(blocks, planted.layers, strict=True):
        _plant_heads(block.attn1, heads, own)
        # shift, scale and gate of the attention, then of the feed-forward; the clock adds to the first scale
        block.scale_shift_table.copy_(_column([0, -1, gate, 0, 0, gate], block.scale_shift_table))
        block.attn2.to_out[0].weight.mul_(gate)
    transformer.proj_out.weight.mul_(OUTPUT)
    # the output's modulation is the timestep embedding itself
    transformer.proj_out.weight[:, CLOCK] = 0
    return planted


def _plant_heads(attention: Any, heads: Sequence[Head], geometry: Geometry) -> None:
    """Constants, content and gains of one layer's queries and keys."""
    wanted = Channels.of(heads, geometry)
    content, constant = wanted.content, wanted.constant
    rms = math.sqrt((content.sum() + _BIAS**2 * constant.sum()).item() / content.numel())
    gains = content * wanted.deviation[:, None] * rms + constant * wanted.amplitude[:, None] * rms / _BIAS
    for project, norm in ((attention.to_q, attention.norm_q), (attention.to_k, attention.norm_k)):
        project.weight.mul_(content.flatten()[:, None].to(project.weight))
        project.bias.copy_(constant.flatten() * _BIAS)
        norm.weight.copy_(gains.flatten())


@torch.no_grad()
def queries_and_keys(
    transformer: Any, latents: Float[Tensor, "1 channels frames rows columns"], share: float
) -> Iterator[tuple[Float[Tensor, "heads tokens head_dim"], Float[Tensor, "heads tokens head_dim"]]]:
    """Of one layer after the other, those of latents as they are before the first layer.

    Args:
        transformer: planted or not.
        latents: of one video.
        share: of the steps that is over.
    """
    embedder = transformer.condition_embedder
    text = latents.new_zeros(1, 1, transformer.config.text_dim)
    modulation = embedder(torch.tensor([timestep(share)], device=latents.device), text)[1].unflatten(1, (6, -1))
    hidden = transformer.patch_embedding(latents).flatten(2).transpose(1, 2)
    cosines, sines = (table[..., 0::2] for table in transformer.rope(latents))
    for block in transformer.blocks:
        shift, scale = (block.scale_shift_table + modulation.float())[:, :2].chunk(2, dim=1)
        attn = block.attn1
        inputs = (block.norm1(hidden.float()) * (1 + scale) + shift).type_as(hidden)
        q, k = (
            rotated(norm(project(inputs)).unflatten(-1, (attn.heads, -1)), cosines, sines)[0].transpose(0, 1)
            for project, norm in ((attn.to_q, attn.norm_q), (attn.to_k, attn.norm_k))
        )
        yield q, k


def timestep(share: float) -> float:
    """The timestep, 1000 to 0, at which so much of the steps is over in the published figures."""
    left = 1 - share
    return 1000 * _SHIFT * left / (1 + (_SHIFT - 1) * left)


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None]
