"""Which planted head attends to what, and how sharply, fitted to published figures of large models.

The figures are shares of keys that hold 0.95 of a head's attention (`models/shapes/concentration.py`): of each layer,
how they are distributed over its heads, and their mean at each step.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import Any

import numpy as np
from jaxtyping import Float

from calibatt.kernels.geometry import Geometry
from calibatt.kernels.names import look_up
from calibatt.models.planted.structure import KINDS, Kind, Shares
from calibatt.models.shapes.concentration import MASS, PUBLISHED
from calibatt.models.shapes.pipeline import WEIGHTS

# Nothing published says how many heads attend how: these odds are ours. CalibAtt at its own settings has a density of
# 0.332 at 720p and 0.295 at 480p with them, in its paper 0.375 and 0.319 for Wan 14B (docs/model-results.md).
_ODDS: Mapping[Kind, float] = MappingProxyType({"local": 2, "temporal": 2, "spatial": 1, "row": 1, "diffuse": 1})
# beyond this amplitude (of content, where a head is diffuse) a kind's share of keys hardly falls further
_SHARPEST: Mapping[Kind, float] = MappingProxyType(
    {"local": 5.0, "temporal": 5.0, "spatial": 3.5, "row": 3.5, "diffuse": 2.5}
)
# Standard deviation that content adds to the scores of structured heads at most. Attention over independent content is
# alike from row to row by exp(−content²): a head that reuses rows must stay above CalibAtt's γ of 0.87.
_CONTENT: Mapping[Kind, float] = MappingProxyType({"local": 1.0, "temporal": 1.0, "spatial": 1.0, "row": 0.3})
_AMPLITUDES = np.linspace(0, 5, 51)
# what the amplitudes of all heads are divided by at a step, from the last one to the first, in all published tables
_DIVISORS = np.linspace(0.9, 1.5, 5)
# shares of the steps at which the course is taken from the tables: most of it is over after a tenth of the steps
_KNOTS = (0.0, 0.02, 0.04, 0.06, 0.1, 0.16, 0.24, 0.4, 0.6, 0.98)
# smallest share that the published tables, of five digits, tell from 0
_SMALLEST = 1e-5


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """What one head attends to.

    Args:
        kind: along which axes its scores fall with the distance.
        amplitude: of the constant in its queries and keys.
        content: standard deviation of what content adds to a score.
    """

    kind: Kind
    amplitude: float
    content: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """What is planted in a model.

    Args:
        layers: the heads of each layer, as they are in the second half of the steps.
        course: what all amplitudes are divided by, as pairs of a share of the steps and the divisor there.
    """

    layers: tuple[tuple[Head, ...], ...]
    course: tuple[tuple[float, float], ...]

    def divisor(self, share: float) -> float:
        """What amplitudes are divided by when this share of the steps is over."""
        shares, divisors = zip(*self.course, strict=True)
        return float(np.interp(share, shares, divisors))


@cache
def fit(profile: str, geometry: Geometry, *, layers: int, seed: int) -> Fit:
    """Heads whose shares are distributed as those of a published model, layer by layer.

    Where the model has another number of layers than the published one, its layers are those at the same depth.

    Args:
        profile: name of a published model, as in `concentration-published.json`.
        geometry: at which shares are as published.
        layers: of the model.
        seed: of which head is of which kind.

    Raises:
        UnknownName: there is no such profile.
    """
    figures = published(profile)
    kinds = {kind: _Sharpness(kind, geometry) for kind in KINDS}
    generator = np.random.default_rng(seed)
    depths = np.linspace(0, figures["layers"] - 1, layers).round().astype(int)
    found = []
    for depth in depths:
        shares = generator.permutation(late_shares(figures, figures["late"][depth], geometry.heads))
        found.append(tuple(_head(share, kinds, generator) for share in shares))
    return Fit(layers=tuple(found), course=_course(found, figures["by_step"], kinds))


def late_shares(figures: Mapping[str, Any], layer: Sequence[float], heads: int) -> Float[np.ndarray, " heads"]:
    """Shares of so many heads, evenly spread over a published layer's distribution, from the sharpest on.

    Args:
        figures: of `published`.
        layer: one of its `late`.
        heads: how many.
    """
    levels = (np.arange(heads) + 0.5) / heads
    return np.exp(np.interp(levels, figures["head_levels"], np.log(np.maximum(layer, _SMALLEST))))


def expected(head: Head, geometry: Geometry, *, divisor: float = 1.0) -> float:
    """The share of keys that holds MASS of a head's attention, mean over queries.

    Args:
        head: as it is in the second half of the steps.
        geometry: of the call.
        divisor: of its amplitude at an earlier step.
    """
    amplitude, content = np.array([head.amplitude / divisor]), np.array([head.content])
    return float(Shares(head.kind, geometry, MASS).at(amplitude, content)[0])


class _Sharpness:
    """The shares of one kind's heads, from those that see all keys alike to the sharpest.

    Args:
        kind, geometry: of the heads.
    """

    def __init__(self, kind: Kind, geometry: Geometry) -> None:
        self._kind = kind
        self._shares = Shares(kind, geometry, MASS)
        self._strengths = _AMPLITUDES[_SHARPEST[kind] >= _AMPLITUDES]
        self._heads = [_of_strength(kind, float(strength)) for strength in self._strengths]
        self.late = self.at(1.0)

    def at(self, divisor: float) -> Float[np.ndarray, " heads"]:
        """The shares where amplitudes are divided by that, by strength."""
        amplitudes, contents = np.array([(head.amplitude / divisor, head.content) for head in self._heads]).T
        # sums in fp32 leave small rises
        falling: Float[np.ndarray, " heads"] = np.minimum.accumulate(self._shares.at(amplitudes, contents))
        return falling

    def shares(self, heads: Sequence[Head], divisor: float) -> Float[np.ndarray, " heads"]:
        """What these heads' shares become where amplitudes are divided by that."""
        strengths = [head.content if self._kind == "diffuse" else head.amplitude for head in heads]
        moved: Float[np.ndarray, " heads"] = np.interp(strengths, self._strengths, self.at(divisor))
        return moved

    def head(self, share: float) -> Head:
        """The head that has this share."""
        return _of_strength(self._kind, float(np.interp(-share, -self.late, self._strengths)))


def _of_strength(kind: Kind, strength: float) -> Head:
    """A head by one number: a diffuse one has content alone, in others content grows with the amplitude to a bound."""
    if kind == "diffuse":
        return Head(kind=kind, amplitude=0.0, content=strength)
    return Head(kind=kind, amplitude=strength, content=min(strength, _CONTENT[kind]))


def _head(share: float, kinds: Mapping[Kind, _Sharpness], generator: np.random.Generator) -> Head:
    """A head of one of the kinds that can have this share; the sharpest kind there is where none can."""
    able = [kind for kind in KINDS if share >= kinds[kind].late[-1]] or ["local"]
    odds = np.array([_ODDS[kind] for kind in able])
    return kinds[able[generator.choice(len(able), p=odds / odds.sum())]].head(share)


def _course(
    layers: Sequence[Sequence[Head]], by_step: Sequence[float], kinds: Mapping[Kind, _Sharpness]
) -> tuple[tuple[float, float], ...]:
    """The divisors with which the mean share moves over the steps as published."""
    alike = {kind: [head for layer in layers for head in layer if head.kind == kind] for kind in kinds}
    means = np.array(
        [np.mean(np.concatenate([kinds[kind].shares(alike[kind], at) for kind in kinds])) for at in _DIVISORS]
    )
    steps = np.arange(len(by_step)) / len(by_step)
    late = np.mean(by_step[len(by_step) // 2 :])
    now = np.interp(1.0, _DIVISORS, means)
    wanted = np.interp(_KNOTS, steps, by_step) - late + now
    return tuple(zip(_KNOTS, np.interp(wanted, means, _DIVISORS).tolist(), strict=True))


def published(profile: str) -> Mapping[str, Any]:
    """The figures of one model in `concentration-published.json`, with the levels of its heads' quantiles.

    Raises:
        UnknownName: there is no such model.
    """
    facts = json.loads((WEIGHTS / PUBLISHED).read_text(encoding="utf-8"))
    return {**look_up(facts["models"], profile, "profile"), "head_levels": facts["head_levels"]}
