"""Every model there is, and every family that pipelines are recognised by."""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

from calibatt.kernels.names import Catalogue
from calibatt.models.entry import Family, ModelEntry, Resolution
from calibatt.models.families import mochi, wan
from calibatt.models.shapes.entry import SHAPES

# Sizes, steps and guidance: the documentation of each one's pipeline in Diffusers, and its transformer's configuration.
_ATTENTION_ONLY = (
    ModelEntry(
        name="wan2.2-ti2v-5b", layers=30, heads=24, head_dim=128, patch=(1, 2, 2), latent_stride=(4, 16),
        latent_channels=48, block=(128, 128), steps=50, guidance=5.0, prompt_tokens=512,
        resolutions=MappingProxyType({"720p": Resolution(height=704, width=1280, frames=121)}),
    ),
    ModelEntry(
        name="hunyuanvideo", layers=60, heads=24, head_dim=128, patch=(1, 2, 2), latent_stride=(4, 8),
        latent_channels=16, block=(128, 128), steps=50, guidance=6.0, prompt_tokens=256, text_tokens=256,
        resolutions=MappingProxyType({"720p": Resolution(height=720, width=1280, frames=129)}),
    ),
    ModelEntry(
        name="cogvideox-5b", layers=42, heads=48, head_dim=64, patch=(1, 2, 2), latent_stride=(4, 8),
        latent_channels=16, block=(128, 128), steps=50, guidance=6.0, prompt_tokens=226, text_tokens=226,
        text_side="first",
        resolutions=MappingProxyType({"480p": Resolution(height=480, width=720, frames=49)}),
    ),
    ModelEntry(
        name="cogvideox1.5-5b", layers=42, heads=48, head_dim=64, patch=(2, 2, 2), latent_stride=(4, 8),
        latent_channels=16, block=(128, 128), steps=50, guidance=6.0, prompt_tokens=226, text_tokens=226,
        text_side="first",
        resolutions=MappingProxyType({"768p": Resolution(height=768, width=1360, frames=81)}),
    ),
    ModelEntry(
        name="ltx-video-2b", layers=28, heads=32, head_dim=64, patch=(1, 1, 1), latent_stride=(8, 32),
        latent_channels=128, block=(128, 128), steps=50, guidance=3.0, prompt_tokens=128,
        resolutions=MappingProxyType({"512p": Resolution(height=512, width=704, frames=161)}),
    ),
)  # fmt: skip

# one line a family, which is a file with its models
_FAMILIES = (
    (wan.FAMILY, wan.ENTRIES),
    (mochi.FAMILY, mochi.ENTRIES),
)

FAMILIES: tuple[Family, ...] = tuple(family for family, _ in _FAMILIES)


def _fault(found: Any) -> str | None:
    """Why something is no model."""
    return None if isinstance(found, ModelEntry) else "it is no calibatt.ModelEntry"


MODELS: Catalogue[ModelEntry] = Catalogue(
    "model", (SHAPES, *(entry for _, entries in _FAMILIES for entry in entries), *_ATTENTION_ONLY), fault=_fault
)
