"""What a planted head attends to, and how few keys hold most of that, without running a model.

A constant that is added to the first channel of some RoPE pairs of queries and keys, with amplitude a, gives the score
Σ_f a² cos(ω_f Δ) / √head_dim to a key Δ away along the pair's axis, whatever the content. Over pairs whose frequencies
are spread evenly on a logarithmic scale, as RoPE's are, this falls with the logarithm of the distance, so that the
attention falls as a power of it. Content in the other pairs adds a normal variable to each score.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal, get_args

import numpy as np
from jaxtyping import Bool, Float

from calibatt.kernels.geometry import Geometry

Kind = Literal["local", "temporal", "spatial", "row", "diffuse"]
KINDS: tuple[Kind, ...] = get_args(Kind)
# axes along which a head's score falls: 0 is time, 1 height, 2 width
AXES: Mapping[Kind, tuple[int, ...]] = MappingProxyType(
    {"local": (0, 1, 2), "temporal": (1, 2), "spatial": (0,), "row": (2,), "diffuse": ()}
)
# RoPE's base in Wan
_THETA = 10_000.0
# the expected share is a mean over this many queries, drawn once
_QUERIES = 8
# keys whose scores agree to a 256th of their range count as one sort, with their mean score
_LEVELS = 256
# of the range of scores: the threshold is then right to a thousandth
_HALVINGS = 18


def frequencies(
    head_dim: int,
) -> tuple[Float[np.ndarray, " time"], Float[np.ndarray, " height"], Float[np.ndarray, " width"]]:
    """Angular frequencies of RoPE pairs as Wan has them, radians a token, axis by axis in the order of the channels."""
    space = 2 * (head_dim // 6)
    widths = (head_dim - 2 * space, space, space)
    time, height, width = (_THETA ** -(np.arange(0, width, 2) / width) for width in widths)
    return time, height, width


def structured_pairs(kind: Kind, geometry: Geometry) -> Bool[np.ndarray, " pairs"]:
    """The pairs that carry a kind: those of its axes that turn by a radian or more over the video's extent."""
    axes = enumerate(zip(frequencies(geometry.head_dim), geometry.grid, strict=True))
    return np.concatenate([(omega * extent >= 1) & (axis in AXES[kind]) for axis, (omega, extent) in axes])


def scores(kind: Kind, geometry: Geometry, query: tuple[int, int, int]) -> Float[np.ndarray, "frames rows columns"]:
    """Score of every key for a query at amplitude 1, without content."""
    found = np.zeros(geometry.grid)
    for axis, (omega, extent) in enumerate(zip(frequencies(geometry.head_dim), geometry.grid, strict=True)):
        if axis in AXES[kind]:
            offsets = np.arange(extent)[:, None] - query[axis]
            along = np.cos(offsets * omega[omega * extent >= 1]).sum(-1) / math.sqrt(geometry.head_dim)
            found += along.reshape([-1 if other == axis else 1 for other in range(3)])
    return found


class Shares:
    """Share of keys that holds a part of a query's attention, mean over queries, for heads of one kind.

    Args:
        kind, geometry: of the heads.
        mass: the part of the attention.
    """

    def __init__(self, kind: Kind, geometry: Geometry, mass: float) -> None:
        self._mass = mass
        drawn = np.random.default_rng(0).integers(0, geometry.grid, size=(_QUERIES, 3)).tolist()
        sorts = [_sorts(scores(kind, geometry, (time, row, column)).ravel()) for time, row, column in drawn]
        # none, where a query has fewer sorts of keys than another
        shape = (_QUERIES, max(len(counts) for _, counts in sorts))
        self._levels, self._counts = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
        for place, (levels, counts) in enumerate(sorts):
            self._levels[place, : len(levels)], self._counts[place, : len(counts)] = levels, counts

    def at(
        self, amplitude: Float[np.ndarray, " heads"], content: Float[np.ndarray, " heads"]
    ) -> Float[np.ndarray, " heads"]:
        """The shares of heads of these amplitudes, whose content adds N(0, content²) to each score."""
        from scipy.special import ndtr

        spread = np.maximum(content, 1e-3).astype(np.float32)[:, None, None]
        structure = (amplitude.astype(np.float32) ** 2)[:, None, None] * self._levels
        highest = structure.max(-1, keepdims=True)
        weights = self._counts * np.exp(structure - highest)
        weights /= weights.sum(-1, keepdims=True)
        low = structure.min(-1, keepdims=True) - 6 * spread
        high = highest + (6 + spread) * spread
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            # under weights of exp(content), content is the same normal variable, higher by its variance
            above = ndtr((structure - middle) / spread + spread)
            enough = (weights * above).sum(-1, keepdims=True) >= self._mass
            low, high = np.where(enough, middle, low), np.where(enough, high, middle)
        kept = (self._counts * ndtr((structure - low) / spread)).sum(-1) / self._counts.sum(-1)
        shares: Float[np.ndarray, " heads"] = kept.mean(-1).astype(np.float64)
        return shares


def _sorts(values: Float[np.ndarray, " keys"]) -> tuple[Float[np.ndarray, " sorts"], Float[np.ndarray, " sorts"]]:
    """Mean scores of keys whose scores nearly agree, and how many keys each sort has."""
    low, high = values.min(), values.max()
    place = ((values - low) / max(high - low, 1e-9) * (_LEVELS - 1)).round().astype(int)
    counts = np.bincount(place, minlength=_LEVELS)
    there = counts > 0
    return np.bincount(place, values, minlength=_LEVELS)[there] / counts[there], counts[there].astype(float)
