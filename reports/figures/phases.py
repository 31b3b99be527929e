"""Where the time goes: medians of the phases end to end, one bar an arm."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from calibatt.bench.record import OUTSIDE_PHASES, Record
from calibatt.reports.figures.style import (
    INK,
    SMALL,
    beside,
    lines,
    mark_lines,
    name_lines,
    new_figure,
    plain_axes,
    size,
)
from calibatt.reports.rows import Row, shared_words

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TITLE = "Where the time goes"
CAPTION = (
    "Where the time goes: choosing blocks (plan), computing them (attend), the rest of the transformer, what is beside "
    "it, and what is none of these (other). Medians; of whole videos, of those whose parts were timed, one in eight, "
    "which may take longer than the others."
)
KEY = "Medians: {samples}, no interval."

# Okabe and Ito's colours, each with its own hatch; what is left, and any other
_LOOKS = {
    "plan": ("#E69F00", "////"), "attend": ("#56B4E9", ""), "transformer": ("#009E73", "xx"), "text": ("#F0E442", "++"),
    "vae": ("#D55E00", "\\\\"), "scheduler": ("#0072B2", "--"), "other": ("#DDDDDD", ""),
}  # fmt: skip
_MORE = ("#CC79A7", "....")
# a phase smaller than this share of the whole cannot be seen in a bar
_VISIBLE = 0.005


def draw(rows: Sequence[Row]) -> Iterator[tuple[str, Figure]]:
    """One figure for every hundred arms whose phases are known."""
    shared = shared_words(rows)
    for some in lines([row for row in rows if row.record.samples_s and _inside(row.record)]):
        yield TITLE, _figure(some, shared)


def _inside(record: Record) -> dict[str, float]:
    """Median of each phase that is a part of the samples, in seconds."""
    phases: Mapping[str, Sequence[float]] = record.phases_s or {}
    return {name: statistics.median(samples) for name, samples in phases.items() if name not in OUTSIDE_PHASES}


def _bars(rows: Sequence[Row]) -> dict[str, list[float]]:
    """Seconds of each phase in each arm; `other` is what no phase takes."""
    medians = [_inside(row.record) for row in rows]
    names = [name for name in _LOOKS if name != "other"]
    names += sorted({name for parts in medians for name in parts} - set(_LOOKS))
    bars = {name: [parts.get(name, 0.0) for parts in medians] for name in names}
    totals = [statistics.median(row.record.samples_s or ()) for row in rows]
    rests = [total - sum(parts.values()) for total, parts in zip(totals, medians, strict=True)]
    bars["other"] = [rest if rest > _VISIBLE * total else 0.0 for rest, total in zip(rests, totals, strict=True)]
    return bars


def _figure(rows: Sequence[Row], shared: Sequence[str]) -> Figure:
    unit, scale = _unit(max(statistics.median(row.record.samples_s or ()) for row in rows))
    figure = new_figure(1.3 + 0.42 * len(rows))
    axes = figure.add_subplot()
    left = np.zeros(len(rows))
    for name, seconds in _bars(rows).items():
        if any(seconds):
            widths = np.array(seconds) * scale
            colour, hatch = _LOOKS.get(name, _MORE)
            axes.barh(
                range(len(rows)), widths, left=left, height=0.62, color=colour, hatch=hatch, edgecolor=INK,
                linewidth=0.6, label=name,
            )  # fmt: skip
            left = left + widths
    for y, end in enumerate(left):
        axes.annotate(
            f"{end:.3g} {unit}", (end, y), xytext=(5, 0), textcoords="offset points", va="center", fontsize=size(SMALL),
            color=INK,
        )  # fmt: skip
    name_lines(axes, rows, shared)
    axes.set_xlim(0, float(left.max()) * 1.16)
    axes.set_xlabel(f"median time ({unit})")
    plain_axes(axes)
    mark_lines(axes, rows)
    # the axes are narrower where names are long
    figure.legend(loc="outside upper left", ncols=beside(4), frameon=False, fontsize=size(SMALL))
    return figure


def _unit(seconds: float) -> tuple[str, float]:
    """A unit in which the figure has few zeros, and how many of it make a second."""
    if seconds >= 1:
        return "s", 1.0
    return ("ms", 1e3) if seconds >= 1e-3 else ("µs", 1e6)
