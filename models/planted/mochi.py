"""Attention structure planted in an unmodified Mochi transformer of any size: no download, and no fidelity.

Mochi's queries and keys have no biases, its gains are the same for all heads, and its norms are of each head by
itself. So the constants come through two channels of the hidden states that all layers leave alone, and projections
read. One is steady and fills a channel of each head that counts in the norm and has a gain of 0, so large that the norm
divides by it alone, which leaves all else as it was projected. The other is scaled by the timestep, and gives the
heads' constants. RoPE's frequencies are parameters, here the same for all heads, as Wan's are.

Text has content and no constants, as keys far away have: structured heads hardly see it, diffuse ones as much as video.
Queries of text see all keys by their content.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from calibatt.kernels.geometry import Geometry
from calibatt.models.planted.heads import Fit, Head, fit
from calibatt.models.planted.planting import ADDED, CLOCK, CLOCK_SCALE, OUTPUT, Channels, run_the_clock, start
from calibatt.models.planted.structure import frequencies
from calibatt.models.processor import rotated

# the two channels of the hidden states, first of all, and how many they are
_STEADY, _CONSTANT, _KEPT = 0, 1, 2
# times all else in a head, which so adds less than a thousandth to what the norm divides by
_BALLAST = 32.0
# at least, so that the norm's epsilon (1e-5) does not count
_FLOOR = 1.0
# the first tenth of the steps, where the course is steep, takes 5 of 1000 timesteps: ramps begin within a tenth of one
_SHARPNESS = 10.0
# share of noise that the linear half of the schedule takes away: `threshold_noise` of Diffusers' MochiPipeline
_LINEAR = 0.025
# steps between which the schedule is interpolated; it is the same function of the share of steps for any number
_STEPS = 1000


@torch.no_grad()
def plant(transformer: Any, geometry: Geometry, *, profile: str, seed: int = 0) -> Fit:
    """Fill a MochiTransformer3DModel in place, parameter by parameter, where it lies.

    Args:
        transformer: of any size; what is in it is overwritten.
        geometry: grid of tokens at which heads have the published shares of keys; text is left out. Videos of other
            heights and widths have these positions stretched, as Mochi does it.
        profile: name of the published model, as for `heads.fit`.
        seed: of all that is drawn. Which head does what is the same on all devices, projections only on like ones.

    Returns:
        What was planted.

    Raises:
        UnknownName: there is no such profile.
        ValueError: this is no Mochi transformer.
    """
    start(transformer, "MochiTransformer3DModel", seed)
    config, blocks, embedder = transformer.config, transformer.transformer_blocks, transformer.time_embed
    own = replace(geometry, heads=config.num_attention_heads, head_dim=config.attention_head_dim, text_tokens=0)
    planted = fit(profile, own, layers=len(blocks), seed=seed)
    transformer.pos_frequencies.copy_(_positions(own, transformer.rope.target_area))
    course = [(timestep(share), 1 / divisor) for share, divisor in planted.course]
    run_the_clock(embedder.timestep_embedder, course, sharpness=_SHARPNESS)
    # the modulation is the timestep's alone
    embedder.pooler.to_out.weight.zero_()
    for embedding, kept in ((transformer.patch_embed.proj, _KEPT), (embedder.caption_proj, _STEADY + 1)):
        embedding.weight[:_KEPT] = 0
        embedding.bias[:kept] = 1
    # of what a layer adds, attention and feed-forward are normed to 1, and gated by a tanh
    gate = math.atanh(math.sqrt(ADDED / (2 * len(blocks))))
    for block, heads, grown in zip(blocks, planted.layers, _grown(len(blocks)), strict=True):
        _plant_heads(block.attn1, heads, own, grown)
        _modulate(block.norm1.linear, gate)
        if block.context_pre_only:
            block.norm1_context.linear_1.weight.zero_()
        else:
            _modulate(block.norm1_context.linear, gate)
    transformer.norm_out.linear.weight.zero_()
    transformer.proj_out.weight.mul_(OUTPUT)
    transformer.proj_out.weight[:, :_KEPT] = 0
    return planted


def _positions(geometry: Geometry, target_area: int) -> Float[Tensor, "axes 1 pairs"]:
    """RoPE's frequencies: each pair turns along one axis, as in Wan, in the units of Mochi's positions.

    Args:
        geometry: at which neighbours are one token apart.
        target_area: of Mochi's RoPE: positions of every height and width are stretched to this area.
    """
    _, rows, columns = geometry.grid
    unit = math.sqrt(target_area / (rows * columns))
    axes = [omega / apart for omega, apart in zip(frequencies(geometry.head_dim), (1.0, unit, unit), strict=True)]
    found: Tensor = torch.block_diag(*(torch.from_numpy(axis)[None] for axis in axes))
    return found[:, None]


def _grown(layers: int) -> list[float]:
    """Standard deviation of the hidden states before each layer, by which nothing divides queries and keys."""
    return [math.sqrt(1 + ADDED * place / layers) for place in range(layers)]


def _plant_heads(attention: Any, heads: Sequence[Head], geometry: Geometry, grown: float) -> None:
    """Constants, content and ballast of one layer's queries and keys, and of those of text.

    Args:
        attention: of a block.
        heads, geometry: what is planted.
        grown: of `_grown`.
    """
    # the ballast lies in the last channel, whose pair turns too slowly to be structured or leaves it unused
    wanted = Channels.of(heads, geometry, kept_free=1)
    content = wanted.content * wanted.deviation[:, None]
    constant = wanted.constant * wanted.amplitude[:, None]
    ballast = _BALLAST * max(_FLOOR, (content**2 + constant**2).sum(1).max().sqrt().item())
    for project, norm in (
        (attention.to_q, attention.norm_q),
        (attention.to_k, attention.norm_k),
        (attention.add_q_proj, attention.norm_added_q),
        (attention.add_k_proj, attention.norm_added_k),
    ):
        project.weight.mul_(content.flatten()[:, None].to(project.weight) / grown)
        project.weight[:, :_KEPT] = 0
        project.weight[:, _CONSTANT] = constant.flatten()
        project.weight.unflatten(0, (len(heads), -1))[:, -1, _STEADY] = ballast
        norm.weight.fill_(ballast / math.sqrt(geometry.head_dim))
        norm.weight[-1] = 0
    for project in (attention.to_v, attention.add_v_proj):
        project.weight[:, :_KEPT] = 0


def _modulate(linear: nn.Linear, gate: float) -> None:
    """Let a layer add to all channels but those kept, show attention alone these, and the clock scale one of them."""
    linear.weight.zero_()
    scales, gates = linear.bias.unflatten(0, (2, 2, -1)).unbind(1)
    gates[:, _KEPT:] = gate
    # of the feed-forward; scales add to 1
    scales[1, :_KEPT] = -1
    scales[0, _CONSTANT] = -1
    linear.weight.unflatten(0, (4, -1))[0, _CONSTANT, CLOCK] = 1 / CLOCK_SCALE


@torch.no_grad()
def queries_and_keys(
    transformer: Any, latents: Float[Tensor, "1 channels frames rows columns"], share: float
) -> Iterator[tuple[Float[Tensor, "heads tokens head_dim"], Float[Tensor, "heads tokens head_dim"]]]:
    """Of one layer after the other, those of latents as they are before the first layer, but for their strength.

    Text has none.

    Args:
        transformer: planted, so that prompts do not count.
        latents: of one video.
        share: of the steps that is over.
    """
    embedder, patch = transformer.time_embed, transformer.config.patch_size
    features = embedder.time_proj(torch.tensor([timestep(share)], device=latents.device))
    conditioning = embedder.timestep_embedder(features.type_as(latents))
    hidden = transformer.patch_embed(latents[0].transpose(0, 1)).flatten(0, 1)[None]
    frames, rows, columns = (extent // by for extent, by in zip(latents.shape[2:], (1, patch, patch), strict=True))
    tables = transformer.rope(
        transformer.pos_frequencies, frames, rows, columns, device=latents.device, dtype=torch.float32
    )
    blocks = transformer.transformer_blocks
    for block, grown in zip(blocks, _grown(len(blocks)), strict=True):
        strong = torch.cat([hidden[..., :_KEPT], grown * hidden[..., _KEPT:]], dim=-1)
        attn, inputs = block.attn1, block.norm1(strong, conditioning)[0]
        q, k = (
            rotated(norm(project(inputs).unflatten(-1, (attn.heads, -1))), *tables)[0].transpose(0, 1)
            for project, norm in ((attn.to_q, attn.norm_q), (attn.to_k, attn.norm_k))
        )
        yield q, k


def timestep(share: float) -> float:
    """The timestep, 0 to 1000, which Mochi counts from noise to data, at which so much of the steps is over."""
    noise = _schedule()
    return 1000 * (1 - float(np.interp(share, np.linspace(0, 1, len(noise)), noise)))


@cache
def _schedule() -> tuple[float, ...]:
    """Share of noise from the first step to the end."""
    from diffusers.pipelines.mochi.pipeline_mochi import linear_quadratic_schedule

    return (*linear_quadratic_schedule(_STEPS, _LINEAR), 0.0)
