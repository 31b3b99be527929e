"""Every model there is, and every family that pipelines are recognised by."""

from __future__ import annotations

from typing import Any

from calibatt.kernels.names import Catalogue
from calibatt.models.entry import Family, ModelEntry
from calibatt.models.families import cogvideox, hunyuan, ltx, mochi, wan
from calibatt.models.shapes.entry import SHAPES, STUDENT

# one line a family, which is a file with its models
_FAMILIES = (
    (wan.FAMILY, wan.ENTRIES),
    (mochi.FAMILY, mochi.ENTRIES),
    (hunyuan.FAMILY, hunyuan.ENTRIES),
    (cogvideox.FAMILY, cogvideox.ENTRIES),
    (ltx.FAMILY, ltx.ENTRIES),
)

FAMILIES: tuple[Family, ...] = tuple(family for family, _ in _FAMILIES)


def _fault(found: Any) -> str | None:
    """Why something is no model."""
    return None if isinstance(found, ModelEntry) else "it is no calibatt.ModelEntry"


MODELS: Catalogue[ModelEntry] = Catalogue(
    "model", (SHAPES, STUDENT, *(entry for _, entries in _FAMILIES for entry in entries)), fault=_fault
)
