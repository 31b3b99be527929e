"""Speedup times density over density, one line a kernel, block and mask."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from calibatt.reports.figures.style import INK, beside, legend, new_figure, plain_axes, size
from calibatt.reports.rows import COLOURS, Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TITLE = "Speedup against the ideal"
CAPTION = (
    "Speedup times density: at 1 a kernel takes the density's share of the fastest dense kernel's time, which is "
    "all that leaving blocks out can give. What is below is lost to lists, uneven rows and small blocks."
)
KEY = "Medians: {samples}, no interval."

# further lines are dashed, then dotted
_LINES = (*COLOURS, "#333333")
# share of the axis that the label of a tick takes
_TICK = 0.07


def draw(rows: Sequence[Row]) -> Iterator[tuple[str, Figure]]:
    """One figure, where there are densities to compare."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        record = row.record
        # no logarithm of 0
        if record.suite == "kernel" and record.of_ideal is not None and record.density and record.block:
            tail = "" if record.remainder is None else " + tail"
            name = f"{record.computed_by}, {record.block[0]}×{record.block[1]}, {record.mask}{tail}"
            lines.setdefault(name, []).append((record.density, record.of_ideal))
    if max(map(len, lines.values()), default=0) < 2:
        return
    figure = new_figure(size(4.4) + 0.2 * -(-len(lines) // beside(2)))
    axes = figure.add_subplot()
    for number, (name, points) in enumerate(sorted(lines.items())):
        x, y = zip(*sorted(points), strict=True)
        axes.plot(x, y, marker="o", markersize=4, color=_LINES[number % len(_LINES)],
                  linestyle=("-", "--", ":")[number // len(_LINES) % 3], label=name)  # fmt: skip
    axes.axhline(1, color=INK, linewidth=1, linestyle="--", zorder=1)
    axes.set_xscale("log")
    axes.set_ylim(bottom=0)
    ticks = _apart([x for points in lines.values() for x, _ in points])
    axes.set_xticks(ticks, [f"{tick:.3g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("density: share of the blocks computed")
    axes.set_ylabel("speedup × density")
    plain_axes(axes)
    legend(axes, beside(2))
    yield TITLE, figure


def _apart(values: Sequence[float]) -> list[float]:
    """Those of the values, from the smallest on, whose labels do not touch on a logarithmic axis."""
    gap = _TICK * math.log(max(values) / min(values))
    chosen: list[float] = []
    for value in sorted(set(values)):
        if not chosen or math.log(value / chosen[-1]) > gap:
            chosen.append(value)
    return chosen
