"""The arms of a workload as a report shows them: name, look, and the data of their pictures."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from calibatt.bench.record import MARKERS, Marker, Record, Run, plain
from calibatt.reports.artifact import Pictures, load_pictures

DENSE = "dense"
RANDOM = "random"

# Okabe and Ito, "Color Universal Design" (2008), without the yellow that white paper swallows
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
# the markers as text has them, for the page and for titles
GLYPHS: Mapping[Marker, str] = MappingProxyType(
    {"o": "●", "s": "■", "^": "▲", "v": "▼", "<": "◀", ">": "▶", "D": "◆", "P": "✚", "X": "✖", "*": "★"}
)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Row:
    """One arm in a report.

    Args:
        record: what was measured.
        label: name that no other arm of the workload has.
        colour, marker: of its method, the same in every figure and in any company.
        pictures: data of its pictures, where that is loaded and there is any.
    """

    record: Record
    label: str
    colour: str
    marker: Marker
    pictures: Pictures | None = None

    @property
    def glyph(self) -> str:
        """The marker, as text."""
        return GLYPHS[self.marker]

    @property
    def heading(self) -> str:
        """The label with the marker before it."""
        return f"{self.glyph} {self.label}"


def rows(records: Sequence[Record]) -> tuple[Row, ...]:
    """The arms of one workload, dense first, without pictures."""
    ordered = sorted(records, key=lambda record: record.method != DENSE)
    found = []
    for record, label in zip(ordered, labels(ordered), strict=True):
        colour, marker = look(record)
        found.append(Row(record=record, label=label, colour=colour, marker=marker))
    return tuple(found)


def illustrated(run: Run, arms: Sequence[Row]) -> tuple[Row, ...]:
    """The arms with what their artifacts hold.

    Raises:
        UnusableFile: an artifact is not what it should be.
    """
    return tuple(replace(arm, pictures=load_pictures(run.artifact(arm.record))) for arm in arms)


def labels(records: Sequence[Record]) -> list[str]:
    """A name for each record; kernel, block and mask are added where the name alone would stand for several."""
    names = [record.title for record in records]
    for field in ("kernel", "block", "mask"):
        count = Counter(names)
        names = [
            name if count[name] == 1 or getattr(record, field) is None else f"{name}, {_shown(getattr(record, field))}"
            for name, record in zip(names, records, strict=True)
        ]
    return [plain(name) for name in names]


def shared_words(rows: Sequence[Row]) -> tuple[str, ...]:
    """What stands behind the first comma in the labels of all sparse arms alike, to be said once."""
    words = [row.label.split(", ")[1:] for row in rows if row.record.method != DENSE]
    return tuple(word for word in words[0] if all(word in others for others in words)) if len(words) > 1 else ()


def short(row: Row, shared: Sequence[str]) -> str:
    """The label without the words that all share."""
    return ", ".join(word for word in row.label.split(", ") if word not in shared)


def look(record: Record) -> tuple[str, Marker]:
    """Colour and marker of a record's method: its own, or else ones that its name alone decides."""
    chance = int.from_bytes(hashlib.sha256(record.method.encode()).digest()[:8], "big")
    marker_number, colour_number = divmod(chance, len(COLOURS))
    colour = COLOURS[colour_number] if record.method_colour is None else record.method_colour
    marker = MARKERS[marker_number % len(MARKERS)] if record.method_marker is None else record.method_marker
    return colour, marker


def _shown(value: Any) -> str:
    return "×".join(map(str, value)) if isinstance(value, tuple) else str(value)
