"""Speedup and PSNR over all workloads of a suite: a line a workload, a column an arm."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from calibatt.bench.record import Record
from calibatt.reports.facts import parts_of_title
from calibatt.reports.figures.style import FAINT, FONT, INK, SMALL, beside, in_lines, new_figure, size
from calibatt.reports.rows import DENSE, Row, shared_words, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TITLE = "All workloads"
CAPTION = (
    "A line for each model, resolution and number of steps, a column for each arm. Of speedups blue is faster than "
    "dense, red slower, white the same. Grey was not measured."
)
KEY = "Medians: {samples}, no interval."

# so many can be read beside each other on a page column, and below each other
_MOST_COLUMNS = 24
_MOST_LINES = 40
# columns that are wide enough for a figure in each cell, and cells that are read one by one
_MOST_WRITTEN_COLUMNS = 20
_MOST_WRITTEN = 200
# the scale of speedups reaches at least as far from 1, or noise would be blue and red
_LEAST_RANGE = 1.25
# of the sum of a colour's red, green and blue, weighted as eyes see them: what is darker has white figures
_DARK = 0.5
_TINY = 7.0
# of the width, at most, for names of workloads
_NAMES = 0.35


def draw(rows: Sequence[Row]) -> Iterator[tuple[str, Figure]]:
    """For speedup and PSNR one figure for every forty workloads and two dozen arms, of the arms of one suite."""
    for name, (read, _) in _MEASURES.items():
        known = [row for row in rows if row.record.method != DENSE and read(row.record) is not None]
        cells = {(row.record.workload, row.label): row for row in known}
        workloads, arms = (list(dict.fromkeys(key[i] for key in cells)) for i in (0, 1))
        if len(workloads) < 2:
            continue
        # one scale, so that figures can be compared
        scale = _scale(name, [value for row in known if (value := read(row.record)) is not None])
        for lines in _portions(workloads, _MOST_LINES):
            for columns in _portions(arms, beside(_MOST_COLUMNS)):
                yield f"{name} over all workloads", _figure(cells, lines, columns, name, scale)


def _portions(values: Sequence[Any], most: int) -> list[Sequence[Any]]:
    return [values[first : first + most] for first in range(0, len(values), most)]


def _speedup(record: Record) -> float | None:
    return None if record.speedup is None else record.speedup.median


def _psnr(record: Record) -> float | None:
    return None if record.psnr_db is None else statistics.median(record.psnr_db)


# what is drawn: where it is read from, how a cell has it
_MEASURES: Mapping[str, tuple[Callable[[Record], float | None], str]] = MappingProxyType(
    {"Speedup": (_speedup, "{:.2f}"), "PSNR (dB)": (_psnr, "{:.0f}")}
)


def _figure(
    cells: Mapping[Any, Row], lines: Sequence[Any], columns: Sequence[str], name: str, scale: Mapping[str, Any]
) -> Figure:
    read, form = _MEASURES[name]
    values = np.array(
        [[read(cells[key].record) if (key := (line, column)) in cells else math.nan for column in columns]
         for line in lines], dtype=float,
    )  # fmt: skip
    looks = [next(row for row in cells.values() if row.label == column) for column in columns]
    shared = shared_words(looks)
    figure = new_figure(1.6 + 0.26 * len(lines) + 0.06 * max(map(len, columns)))
    axes = figure.add_subplot()
    axes.set_facecolor(FAINT)
    image = axes.imshow(values, aspect="auto", interpolation="nearest", **scale)
    if len(columns) <= beside(_MOST_WRITTEN_COLUMNS) and values.size <= _MOST_WRITTEN:
        _write(axes, image, values, form)
    records = [next(row.record for (line, _), row in cells.items() if line == wanted) for wanted in lines]
    axes.set_yticks(range(len(lines)), [in_lines(one, SMALL, _NAMES) for one in _names(records)], fontsize=size(SMALL))
    axes.set_xticks(range(len(columns)), [short(row, shared) for row in looks], rotation=60, ha="right",
                    rotation_mode="anchor", fontsize=size(SMALL))  # fmt: skip
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    bar = figure.colorbar(image, ax=axes, location="top", fraction=0.04, pad=0.02, aspect=50)
    bar.set_label("speedup over dense" if name == "Speedup" else name, fontsize=size(FONT))
    if name == "Speedup":
        _label_ratios(bar)
    return figure


def _scale(name: str, values: Sequence[float]) -> dict[str, Any]:
    """Colours for all values.

    Of speedups by their logarithm, as far on both sides of 1, so that twice as fast is as blue as half as fast is red.
    """
    from matplotlib.colors import LogNorm, Normalize

    if name != "Speedup":
        return {"cmap": "cividis", "norm": Normalize(min(values), max(values))}
    far = max(_LEAST_RANGE, *values, *(1 / value for value in values))
    return {"cmap": "RdBu", "norm": LogNorm(1 / far, far)}


def _label_ratios(bar: Any) -> None:
    low, high = bar.norm.vmin, bar.norm.vmax
    ticks = [low, math.sqrt(low), 1.0, math.sqrt(high), high]
    bar.set_ticks(ticks, labels=[f"{tick:.2f}" for tick in ticks])
    bar.minorticks_off()


def _write(axes: Axes, image: Any, values: Any, form: str) -> None:
    for (line, column), value in np.ndenumerate(values):
        if math.isfinite(value):
            red, green, blue, _ = image.cmap(image.norm(value))
            # weights of Rec. 601
            dark = 0.299 * red + 0.587 * green + 0.114 * blue < _DARK
            axes.text(column, line, form.format(value), ha="center", va="center", fontsize=size(_TINY),
                      color="white" if dark else INK)  # fmt: skip


def _names(records: Sequence[Record]) -> list[str]:
    """What names each workload, without the words that all share."""
    parts = [parts_of_title(record) for record in records]
    shared = set.intersection(*map(set, parts))
    return [" · ".join(part for part in own if part not in shared) for own in parts]
