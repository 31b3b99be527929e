"""What planting has in common in all transformers: what is drawn, what heads want of their channels, and the clock."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from calibatt.kernels.geometry import Geometry
from calibatt.models.planted.heads import Head
from calibatt.models.planted.structure import structured_pairs

# What all layers add to the hidden states has together this share of what they are in the beginning, so that content is
# as independent from token to token in the last layer as in the first, and latents stay as they are drawn.
ADDED = 0.25
OUTPUT = 0.1
# channel of the timestep embedding that carries the course, as a multiple of it, which SiLU leaves alone
CLOCK = 0
CLOCK_SCALE = 16.0


def start(transformer: Any, kind: str, seed: int) -> None:
    """Draw projections that keep the variance of independent inputs, without biases; norms and tables do nothing.

    What Diffusers keeps in fp32 becomes fp32, as in a model that it loads.

    Args:
        transformer: what is in it is overwritten, where it lies.
        kind: name of its class.
        seed: of all that is drawn; the same on like devices.

    Raises:
        ValueError: it is no such transformer.
    """
    if type(transformer).__name__ != kind:
        raise ValueError(f"weights can be planted in a {kind}: this is a {type(transformer).__name__}")
    for name, parameter in transformer.named_parameters():
        if any(kept in name for kept in transformer._keep_in_fp32_modules or ()):
            parameter.data = parameter.data.float()
    generators: dict[torch.device, torch.Generator] = {}
    for module in transformer.modules():
        projects = isinstance(module, nn.Linear | nn.Conv2d | nn.Conv3d)
        for name, parameter in module.named_parameters(recurse=False):
            if projects and name == "weight":
                device = parameter.device
                generator = generators.setdefault(device, torch.Generator(device).manual_seed(seed))
                parameter.normal_(0, 1 / math.sqrt(parameter[0].numel()), generator=generator)
            else:
                # all that is left with the name of a weight are norms' gains
                parameter.fill_(1.0 if name == "weight" else 0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Channels:
    """What the heads of one layer want of the channels of their queries and keys.

    Args:
        content: channels that hold content: none of the structured pairs, where it would meet the constants of the
            other side.
        constant: channels that hold a constant: the first of each structured pair.
        deviation: standard deviation of a head's content.
        amplitude: of a head's constants.
    """

    content: Bool[Tensor, "heads head_dim"]
    constant: Bool[Tensor, "heads head_dim"]
    deviation: Float[Tensor, " heads"]
    amplitude: Float[Tensor, " heads"]

    @classmethod
    def of(cls, heads: Sequence[Head], geometry: Geometry, *, kept_free: int = 0) -> Channels:
        """Those of a layer.

        Args:
            heads: of the layer.
            geometry: at which they are planted.
            kept_free: of the last channels, so many hold neither; at most one, the second of a pair.
        """
        marked = torch.from_numpy(np.stack([structured_pairs(head.kind, geometry) for head in heads]))
        content = (~marked).repeat_interleave(2, dim=1)
        constant = torch.zeros_like(content)
        constant[:, 0::2] = marked
        content[:, geometry.head_dim - kept_free :] = False
        # n channels of queries and keys of standard deviation e make scores of e² √(n / head_dim)
        width = (content.sum(1) / geometry.head_dim).sqrt()
        strength = torch.tensor([head.content for head in heads])
        return cls(
            content=content,
            constant=constant,
            deviation=(strength / width).sqrt(),
            amplitude=torch.tensor([head.amplitude for head in heads]),
        )


def run_the_clock(embedder: Any, course: Sequence[tuple[float, float]], *, sharpness: float) -> None:
    """Let CLOCK of the timestep embedding follow a course, times CLOCK_SCALE, and all its other channels be 0.

    Between the timesteps of the course it is linear: each hidden unit is a ramp that begins at one of them. Ramps begin
    at the end of the video, so that few large ones need not cancel where the course is steep.

    Args:
        embedder: Diffusers' `TimestepEmbedding`, of features whose last one is the slowest sine.
        course: timesteps and values there, from the first step of a video to the last.
        sharpness: ramps begin within about one timestep over this.
    """
    first, second = embedder.linear_1, embedder.linear_2
    times, values = zip(*reversed(course), strict=True)
    # the slowest sine of the timestep's features is as good as the timestep itself
    half = first.in_features // 2
    slowest = 10_000.0 ** -((half - 1) / half)
    way = math.copysign(1, times[-1] - times[0])
    places = [way * math.sin(slowest * time) / slowest for time in times]
    slopes = [
        (later - sooner) / (further - nearer)
        for sooner, later, nearer, further in zip(values, values[1:], places, places[1:], strict=False)
    ]
    for part in (first.weight[: len(slopes)], second.weight, second.bias):
        part.zero_()
    for unit, (place, slope, before) in enumerate(zip(places, slopes, [0.0, *slopes], strict=False)):
        first.weight[unit, -1] = way * sharpness / slowest
        first.bias[unit] = -sharpness * place
        second.weight[CLOCK, unit] = CLOCK_SCALE * (slope - before) / sharpness
    second.bias[CLOCK] = CLOCK_SCALE * values[0]
