"""A small model of Wan's kind, planted."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from types import MappingProxyType
from typing import Any

import pytest
import torch

from calibatt.models.entry import ModelEntry, Resolution
from calibatt.models.families import wan
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


@pytest.fixture(scope="package")
def entry() -> ModelEntry:
    """The model's place in a catalogue."""
    return SMALL


@pytest.fixture(scope="package")
def pipe() -> Any:
    """Its pipeline."""
    return load_planted(SMALL, resolution="tiny", device=torch.device("cpu"), dtype=torch.float32)
