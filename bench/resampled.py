"""Attention inputs of one model at another one's size: the heads of the first, resampled to the grid of the second.

Kernels and estimates take the same time on any input, but which blocks a method keeps, how unevenly, and whether its
queries and keys can be pooled, depends on structure, which noise does not have. Where a large model cannot be had, the
structure of a small one's heads stands in for it; a record of such inputs says so.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from calibatt.calibration.videos import Videos
from calibatt.kernels.base import Attender
from calibatt.kernels.geometry import Geometry
from calibatt.methods.call import Attention, Call, SparseAttention
from calibatt.methods.catalogue import build
from calibatt.methods.learning import Origin
from calibatt.models.shapes.entry import SHAPES


def resample(
    x: Float[Tensor, "maps tokens channels"], grid: tuple[int, int, int], geometry: Geometry
) -> Float[Tensor, "1 heads other_tokens head_dim"]:
    """Channels of every head, read between the tokens of one grid at the places of another (trilinear).

    Heads are the given maps in turns. Channels are repeated up to the head dim; `product_scale` keeps the scores.

    Args:
        x: queries, keys or values.
        grid: (frames, rows, columns) of the given tokens.
        geometry: of the call to make.
    """
    channels = x.shape[-1]
    volume = x.transpose(1, 2).unflatten(-1, grid)
    between = torch.nn.functional.interpolate(volume.float(), geometry.grid, mode="trilinear").to(x.dtype)
    maps = between.flatten(2).transpose(1, 2)
    heads = maps[torch.arange(geometry.heads, device=x.device) % len(maps)]
    repeated = heads.repeat(1, 1, geometry.head_dim // channels)
    # tokens before heads in memory, as models hand them over
    return repeated.transpose(0, 1).contiguous().transpose(0, 1)[None]


def product_scale(channels: int, head_dim: int) -> float:
    """Factor of queries and of keys whose channels were repeated, with which attention's scores stay what they were.

    Repeating channels r times makes a product r times as large, the scale 1/√head_dim only √r times as small.
    """
    return math.sqrt(math.sqrt(channels / head_dim))


def check_resampled(geometry: Geometry) -> None:
    """Refuse a geometry that the embedded model's heads cannot be resampled to.

    Raises:
        ValueError: the head dim is no multiple of theirs, or there is text, which no grid has.
    """
    if geometry.head_dim % SHAPES.head_dim or geometry.text_tokens:
        raise ValueError(
            f"--inputs resampled: heads of {SHAPES.head_dim} channels and no text tokens can be resampled to multiples "
            f"of {SHAPES.head_dim} channels without text, not to {geometry}"
        )


class ResampledVideos:
    """Dense videos of a small model, of each step of which one attention call at another model's size is shown.

    The heads of all layers of the conditional pass make one call, as that of the only layer.

    Args:
        videos: of the small model.
        kernel: computes their attention.
        model: name of the model whose size is taken.
        resolution: name of its resolution.
        geometry: of its calls.
    """

    layers = 1

    def __init__(self, videos: Videos, kernel: Attender, *, model: str, resolution: str, geometry: Geometry) -> None:
        self.resolution = resolution
        self.geometry = geometry
        self.steps = videos.steps
        self.guidance = videos.guidance
        self._model = model
        self._videos = videos
        self._kernel = kernel

    def origin(self) -> Origin:
        """The small model's pipeline, under the name of the model whose size is taken."""
        return replace(self._videos.origin(), model=self._model)

    def sigmas(self, prompt: str) -> tuple[float, ...]:
        """Those of the small model's videos."""
        return self._videos.sigmas(prompt)

    @property
    def inputs(self) -> str:
        """Where the inputs come from, for the record."""
        return f"resampled from {self._videos.origin().model}, {self._videos.geometry}"

    def show(
        self,
        attention: Attention,
        *,
        prompts: Sequence[str],
        seed: int,
        after_step: Callable[[], object] = lambda: None,
    ) -> None:
        """Make videos of the small model; the attention is shown one call of each step of each.

        Args:
            attention: what is shown the calls; what it computes does not enter the videos.
            prompts, seed: of the videos.
            after_step: called when a step is done.

        Raises:
            ValueError: a prompt is empty or not in the small model's language.
        """
        attention.start_video()
        gatherer = _Gatherer(self.geometry, attention)
        dense = SparseAttention(build("dense"), self._kernel, observers=[gatherer])
        self._videos.show(dense, prompts=prompts, seed=seed, after_step=after_step)


class _Gatherer:
    """Collects the heads of a step's layers of each video, and shows them as one call."""

    def __init__(self, geometry: Geometry, attention: Attention) -> None:
        self._geometry = geometry
        self._attention = attention
        self._layers: dict[int, list[tuple[Tensor, ...]]] = defaultdict(list)

    def saw(self, call: Call) -> None:
        """Take one layer's heads; after the last layer of a step, show them all."""
        site = call.site
        if site.branch != "cond":
            return
        layers = self._layers[site.sample]
        layers.append((call.q[0], call.k[0], call.v[0]))
        if site.layer < site.layers - 1:
            return
        scale = product_scale(site.geometry.head_dim, self._geometry.head_dim)
        q, k, v = (
            resample(torch.cat(parts), site.geometry.grid, self._geometry) for parts in zip(*layers, strict=True)
        )
        layers.clear()
        self._attention(q * scale, k * scale, v, replace(site, geometry=self._geometry, layer=0, layers=1))
