"""Attention structure planted in an unmodified Wan transformer of any size: no download, and no fidelity."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from calibatt.kernels.geometry import Geometry
from calibatt.models.planted.heads import Fit, Head, fit
from calibatt.models.planted.structure import structured_pairs

# The constants are small beside the content of the other channels, and RMSNorm's gains make up for it: what the norm
# divides by is then the content's strength, which the modulation sets at each step.
_BIAS = 0.1
# What all layers add to the hidden states has together this share of what they are in the beginning, so that content is
# as independent from token to token in the last layer as in the first, and latents stay as they are drawn.
_ADDED = 0.25
_OUTPUT = 0.1
# channel of the timestep embedding that carries the course, as a multiple of it, which SiLU leaves alone
_CLOCK = 0
_CLOCK_SCALE = 16.0
# hidden units are ramps of the timestep, 0 to 1000, that begin within about a step of 50
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
    if type(transformer).__name__ != "WanTransformer3DModel":
        raise ValueError(f"weights can be planted in a WanTransformer3DModel: this is a {type(transformer).__name__}")
    config, blocks = transformer.config, transformer.blocks
    own = replace(
        geometry, heads=config.num_attention_heads, head_dim=config.attention_head_dim, text_tokens=0
    )  # fmt: skip
    planted = fit(profile, own, layers=len(blocks), seed=seed)
    for name, parameter in transformer.named_parameters():
        if any(kept in name for kept in transformer._keep_in_fp32_modules):
            parameter.data = parameter.data.float()
    _draw(transformer, seed)
    _run_the_clock(transformer, planted)
    gate = math.sqrt(_ADDED / (3 * len(blocks)))
    for block, heads in zip(blocks, planted.layers, strict=True):
        _plant_heads(block.attn1, heads, own)
        # shift, scale and gate of the attention, then of the feed-forward; the clock adds to the first scale
        block.scale_shift_table.copy_(_column([0, -1, gate, 0, 0, gate], block.scale_shift_table))
        block.attn2.to_out[0].weight.mul_(gate)
    transformer.proj_out.weight.mul_(_OUTPUT)
    # the output's modulation is the timestep embedding itself
    transformer.proj_out.weight[:, _CLOCK] = 0
    return planted


def _draw(transformer: Any, seed: int) -> None:
    """Projections that keep the variance of independent inputs, without biases; norms and tables that do nothing."""
    generators: dict[torch.device, torch.Generator] = {}
    for module in transformer.modules():
        projects = isinstance(module, nn.Linear | nn.Conv3d)
        for name, parameter in module.named_parameters(recurse=False):
            if projects and name == "weight":
                device = parameter.device
                generator = generators.setdefault(device, torch.Generator(device).manual_seed(seed))
                parameter.normal_(0, 1 / math.sqrt(parameter[0].numel()), generator=generator)
            else:
                # all that is left with the name of a weight are norms' gains
                parameter.fill_(1.0 if name == "weight" else 0.0)


def _plant_heads(attention: Any, heads: Sequence[Head], geometry: Geometry) -> None:
    """Constants, content and gains of one layer's queries and keys."""
    marked = torch.from_numpy(np.stack([structured_pairs(head.kind, geometry) for head in heads]))
    # content stays out of the structured pairs, where it would meet the constants of the other side
    content = (~marked).repeat_interleave(2, dim=1)
    constant = torch.zeros_like(content)
    constant[:, 0::2] = marked
    rms = math.sqrt((content.sum() + _BIAS**2 * constant.sum()).item() / content.numel())
    # n channels of queries and keys of standard deviation e make scores of e² √(n / head_dim)
    width = (content.sum(1) / geometry.head_dim).sqrt()
    strength = torch.tensor([head.content for head in heads])
    amplitude = torch.tensor([head.amplitude for head in heads])
    gains = content * (strength / width).sqrt()[:, None] * rms + constant * amplitude[:, None] * rms / _BIAS
    for project, norm in ((attention.to_q, attention.norm_q), (attention.to_k, attention.norm_k)):
        project.weight.mul_(content.flatten()[:, None].to(project.weight))
        project.bias.copy_(constant.flatten() * _BIAS)
        norm.weight.copy_(gains.flatten())


def _run_the_clock(transformer: Any, planted: Fit) -> None:
    """Let the timestep set the scale of attention's inputs: content grows by the divisor, and RMSNorm divides by it.

    Between the timesteps of the course the divisor is linear: each hidden unit is a ramp that begins at one of them.
    """
    embedder = transformer.condition_embedder
    first, second, modulate = embedder.time_embedder.linear_1, embedder.time_embedder.linear_2, embedder.time_proj
    times = [timestep(share) for share, _ in planted.course][::-1]
    divisors = [divisor for _, divisor in planted.course][::-1]
    # the slowest sine of the timestep's features is as good as the timestep itself
    half = first.in_features // 2
    slowest = 10_000.0 ** -((half - 1) / half)
    places = [math.sin(slowest * time) / slowest for time in times]
    slopes = [
        (later - sooner) / (further - nearer)
        for sooner, later, nearer, further in zip(divisors, divisors[1:], places, places[1:], strict=False)
    ]
    for part in (first.weight[: len(slopes)], second.weight, second.bias):
        part.zero_()
    for unit, (place, slope, before) in enumerate(zip(places, slopes, [0.0, *slopes], strict=False)):
        first.weight[unit, -1] = _SHARPNESS / slowest
        first.bias[unit] = -_SHARPNESS * place
        second.weight[_CLOCK, unit] = _CLOCK_SCALE * (slope - before) / _SHARPNESS
    second.bias[_CLOCK] = _CLOCK_SCALE * divisors[0]
    modulate.weight[:, _CLOCK] = 0
    modulate.weight.unflatten(0, (6, -1))[1, :, _CLOCK] = 1 / _CLOCK_SCALE


def timestep(share: float) -> float:
    """The timestep, 1000 to 0, at which so much of the steps is over in the published figures."""
    left = 1 - share
    return 1000 * _SHIFT * left / (1 + (_SHIFT - 1) * left)


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None]
