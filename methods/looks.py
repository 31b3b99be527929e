"""How figures may show a method: what its class and every record of it are held to. Imports no torch."""

from __future__ import annotations

import re
from typing import Literal, get_args

# of matplotlib: those that have a glyph in text too
Marker = Literal["o", "s", "^", "v", "<", ">", "D", "P", "X", "*"]
MARKERS: tuple[Marker, ...] = get_args(Marker)


def look_fault(colour: str | None, marker: str | None) -> str | None:
    """Why figures cannot show something so; None where they can, as where nothing is said.

    Args:
        colour: should be of the form #RRGGBB.
        marker: should be one of `MARKERS`.
    """
    if colour is not None and not re.fullmatch("#[0-9a-fA-F]{6}", colour):
        return f"colour {colour!r} is not of the form #RRGGBB"
    if marker is not None and marker not in MARKERS:
        return f"marker {marker!r} is none of {' '.join(MARKERS)}"
    return None
