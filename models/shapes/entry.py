"""The embedded model's place in the catalogue."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from calibatt.kernels.geometry import Geometry
from calibatt.models.entry import ForwardPass, ModelEntry, Resolution
from calibatt.models.families import wan


def _load(device: torch.device, dtype: torch.dtype, weights: Path | None) -> Any:
    from calibatt.models.shapes.pipeline import load_pipeline

    return load_pipeline(device=device, dtype=dtype, weights=weights)


def _load_student(device: torch.device, dtype: torch.dtype, weights: Path | None) -> Any:
    from calibatt.models.shapes.pipeline import load_student

    return load_student(device=device, dtype=dtype, weights=weights)


def _untrained(geometry: Geometry, layers: int, device: torch.device, dtype: torch.dtype) -> ForwardPass:
    from calibatt.models.shapes.pipeline import SIZES

    return wan.untrained(SIZES, geometry, layers, device, dtype)


def _align(video: Float[Tensor, "3 frames height width"], caption: str) -> float:
    from calibatt.models.shapes.reader import alignment

    return alignment(video, caption)


def _read(prompt: str) -> None:
    from calibatt.models.shapes.scenes import parse_caption

    parse_caption(prompt)


def _captions(count: int, seed: int) -> list[str]:
    from calibatt.models.shapes.scenes import held_out_captions

    return held_out_captions(count, seed=seed)


SHAPES = ModelEntry(
    name="shapes",
    layers=8,
    heads=4,
    head_dim=64,
    patch=(1, 4, 4),
    latent_stride=(1, 1),
    latent_channels=3,
    block=(64, 64),
    resolutions=MappingProxyType(
        {
            "quick": Resolution(height=64, width=96, frames=8, steps=6),
            "standard": Resolution(height=64, width=96, frames=16),
            # as many tokens as Wan has at 480p, in the same grid
            "large": Resolution(height=120, width=208, frames=21, block=(128, 128)),
        }
    ),
    steps=20,
    # as good as any that is not 1, at which there would be no second branch to plan for (weights/scan.json, of the
    # weights before these)
    guidance=2.0,
    prompt_tokens=24,
    family=wan.FAMILY,
    untrained=_untrained,
    loader=_load,
    alignment=_align,
    captions=_captions,
    read=_read,
)

# Distilled to need no more steps and no guidance (distil.py). At the large size it is worse than its teacher in as many
# steps (MODEL_CARD.md), so that is not offered.
STUDENT = replace(
    SHAPES,
    name="shapes-4step",
    steps=4,
    guidance=1.0,
    resolutions=MappingProxyType({name: replace(SHAPES.resolution(name), steps=4) for name in ("quick", "standard")}),
    loader=_load_student,
)
