"""Looking a name up in a catalogue, with an error that names the nearest ones."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import TypeVar

_T = TypeVar("_T")


class UnknownName(ValueError):
    """A name that is in no catalogue; the message is one line that says what there is."""


def look_up(catalogue: Mapping[str, _T], name: str, kind: str) -> _T:
    """The entry of that name.

    Args:
        kind: what the catalogue holds, for the message: "method", "model", …

    Raises:
        UnknownName: there is no such entry.
    """
    if name in catalogue:
        return catalogue[name]
    near = difflib.get_close_matches(name, catalogue, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(catalogue)}"
    raise UnknownName(f"unknown {kind} {name!r}: {hint}")
