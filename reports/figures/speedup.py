"""Median speedup over dense and its 95 % interval, one line an arm."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from calibatt.reports.figures.style import INK, SMALL, in_lines, lines, marked, name_lines, new_figure, plain_axes, size
from calibatt.reports.rows import Row, shared_words

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TITLE = "Speedup"
CAPTION = (
    "How many times faster each arm is than dense attention in the same rounds. Faint dots are rounds, the marker "
    "their median, the bar its 95 % interval. A bar that touches the dashed line is no evidence of a difference. A "
    "hollow marker has too few rounds for an interval."
)
KEY = "Dots: {samples}. Marker: their median. Bar: its 95 % interval (sign test)."
# of the width, for the figures beside each line
_FIGURES = 0.25


def draw(rows: Sequence[Row]) -> Iterator[tuple[str, Figure]]:
    """One figure for every hundred arms that have a speedup."""
    shared = shared_words(rows)
    for some in lines([row for row in rows if row.record.speedup is not None]):
        yield TITLE, _figure(some, shared)


def _figure(rows: Sequence[Row], shared: Sequence[str]) -> Figure:
    figure = new_figure(0.9 + 0.42 * len(rows))
    axes = figure.add_subplot()
    for y, row in enumerate(rows):
        _line(axes, y, row)
    axes.axvline(1, color=INK, linewidth=1, linestyle="--", zorder=1)
    baselines = sorted({row.record.baseline for row in rows if row.record.baseline})
    axes.annotate(
        f"dense ({', '.join(baselines)})" if baselines else "dense", (1, 1.0), xycoords=("data", "axes fraction"),
        xytext=(0, 4), textcoords="offset points", ha="center", va="bottom", fontsize=size(SMALL), color=INK,
    )  # fmt: skip
    name_lines(axes, rows, shared)
    axes.margins(x=0.08)
    axes.set_xlabel("speedup over dense")
    plain_axes(axes)
    return figure


def _line(axes: Axes, y: int, row: Row) -> None:
    record, interval = row.record, row.record.speedup
    assert interval is not None
    pairs = zip(record.baseline_samples_s or (), record.samples_s or (), strict=True)
    ratios = [dense / sample for dense, sample in pairs]
    axes.scatter(ratios, [y] * len(ratios), s=14, color=row.colour, alpha=0.25, linewidths=0, zorder=2)
    known, shown = False, "no interval"
    if interval.low is not None and interval.high is not None:
        known, shown = True, f"{interval.low:.2f}–{interval.high:.2f}"
        axes.hlines(y, interval.low, interval.high, color=row.colour, linewidth=2.5, zorder=3)
    axes.plot(interval.median, y, zorder=4, **marked(row, size=8, hollow=not known))
    figures = in_lines(f"{interval.median:.2f}×  ({shown})", SMALL, _FIGURES)
    axes.annotate(figures, (1.01, y), xycoords=("axes fraction", "data"), va="center", fontsize=size(SMALL), color=INK)
