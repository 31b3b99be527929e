"""How far the masks of two methods that learn offline overlap."""

from __future__ import annotations

from itertools import product

import torch

from calibatt.calibration.artifact import Calibration
from calibatt.methods.base import Planner
from calibatt.methods.catalogue import build, settings_beside
from calibatt.methods.learning import Provenance
from calibatt.methods.site import Site


def overlap(one: Calibration, other: Calibration) -> float | None:
    """As `mask_iou`, of what two calibrations plan.

    Raises:
        ValueError: they are for videos of different sizes, steps or layers, or their blocks differ.
    """
    own, others = _what_for(one), _what_for(other)
    if own != others:
        raise ValueError(f"masks for {own} have nothing in common with masks for {others}")
    first, second = (
        build(made.method, preset=made.preset, calibration=made, **settings_beside(made)) for made in (one, other)
    )
    return mask_iou(first, second, one.provenance)


def _what_for(learnt: Calibration) -> str:
    own = learnt.provenance
    return f"{own.geometry}, {own.steps} steps, {own.layers} layers, blocks {learnt.settings.get('block')}"


def mask_iou(one: Planner, other: Planner, videos: Provenance) -> float | None:
    """Intersection over union of their masks, pooled over sites and heads that have both; None where none has.

    Args:
        one, other: planners that look at no values, since what they plan by was learnt.
        videos: what both plan for.
    """
    geometry, layers, common, either = videos.geometry, videos.layers, 0, 0
    nothing = torch.zeros(()).expand(geometry.heads, geometry.tokens, geometry.head_dim)
    for step, layer in product(range(videos.steps), range(layers)):
        site = Site(
            geometry=geometry, step=step, steps=videos.steps, sigma=0.0, branch="cond", layer=layer, layers=layers
        )
        first, second = (planner.plan(nothing, nothing, nothing, site) for planner in (one, other))
        heads = sorted({*first.heads_of("masked")} & {*second.heads_of("masked")})
        if heads and first.mask is not None and second.mask is not None:
            keep, kept = (mask.of_heads(heads).keep() for mask in (first.mask, second.mask))
            common += int((keep & kept).sum())
            either += int((keep | kept).sum())
    return common / either if either else None
