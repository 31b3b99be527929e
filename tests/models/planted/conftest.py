"""Small models of Wan's and of Mochi's kind, planted."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from types import MappingProxyType
from typing import Any

import pytest
import torch

from calibatt.models.entry import ModelEntry, Resolution
from calibatt.models.families import mochi, wan
from calibatt.models.planted.pipeline import load_planted

# 5 × 8 × 10 tokens
SMALL = replace(
    wan.ENTRIES[0],
    layers=3,
    heads=8,
    resolutions=MappingProxyType({"tiny": Resolution(height=128, width=160, frames=17, flow_shift=5.0)}),
    steps=4,
    untrained=partial(wan.untrained, {"ffn_dim": 128, "text_dim": 32}),
)
# as many, and text
SMALL_MOCHI = replace(
    mochi.ENTRIES[0],
    layers=3,
    heads=8,
    resolutions=MappingProxyType({"tiny": Resolution(height=128, width=160, frames=25)}),
    steps=4,
    untrained=partial(mochi.untrained, {"pooled_projection_dim": 48, "text_embed_dim": 32}),
)


@pytest.fixture(scope="package", params=[SMALL, SMALL_MOCHI], ids=lambda entry: entry.name)
def entry(request: pytest.FixtureRequest) -> ModelEntry:
    """The model's place in a catalogue."""
    found: ModelEntry = request.param
    return found


@pytest.fixture(scope="package")
def pipe(entry: ModelEntry) -> Any:
    """Its pipeline."""
    return load_planted(entry, resolution="tiny", device=torch.device("cpu"), dtype=torch.float32)


@pytest.fixture(scope="package")
def small_mochi() -> ModelEntry:
    """The one of Mochi's kind alone."""
    return SMALL_MOCHI
