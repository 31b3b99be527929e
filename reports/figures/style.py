"""What all figures share: sizes, ink, how an arm is marked, and how many of them share a picture."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from calibatt.bench.record import Mode
from calibatt.reports.rows import DENSE, Row, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.transforms import Bbox


@dataclass(frozen=True, slots=True, kw_only=True)
class Sheet:
    """What a figure is to stand on.

    Args:
        width: of the figure, inches.
        type_scale: factor on the sizes of type below.
    """

    width: float
    type_scale: float

    def letters(self, points: float, share: float = 1.0) -> int:
        """How many letters of type so large, on a page, fill a share of the width."""
        return int(share * self.width * 72 / (_LETTER * points * self.type_scale))


# ACM's proceedings have columns of 3.33 inches, 0.33 apart (its template for Word); IEEE's, of 3.5 and 7.16, are wider
# (ieeeauthorcenter.ieee.org, "Size Requirements for Graphics"). On a page type stays readable when a phone shrinks it
# by half; in a column the finest has 5.6 points, and Nature's has 5 to 7 (research-figure-guide.nature.com)
SHEETS: Mapping[str, Sheet] = MappingProxyType(
    {"page": Sheet(width=7.0, type_scale=1.0), "column": Sheet(width=3.33, type_scale=0.8)}
)
_SHEET: ContextVar[Sheet] = ContextVar("sheet", default=SHEETS["page"])

# points, on a page; the last stands below every figure
FONT = 11
SMALL = 9.5
_FINE = 8.0
# width of a letter of DejaVu Sans on average, as a share of its size: what fills a line of prose
_LETTER = 0.535
INK = "#222222"
FAINT = "#BBBBBB"
# of the width, at most, for names of lines; longer ones are broken
_NAMES = 0.42

# a marker and its colour are a method's; how much of it is filled tells the mode without colour
_FILLS: Mapping[Mode | None, Literal["full", "left", "bottom", "top"]] = MappingProxyType(
    {None: "full", "native": "full", "matched": "left", "equal_density": "bottom", "equal_fidelity": "top"}
)
_MODES: Mapping[Mode, str] = MappingProxyType(
    {
        "native": "own settings", "matched": "the same dense schedule", "equal_density": "at a given density",
        "equal_fidelity": "at a given fidelity",
    }
)  # fmt: skip

# arms of one picture that has a line for each: no picture may have more than 2**16 pixels a side
_MOST_LINES = 100
# arms of one picture that has a row of pictures for each: sixty take minutes to lay out, and cannot be seen together
_MOST_ROWS = 8


@contextmanager
def drawn_on(sheet: Sheet) -> Iterator[None]:
    """Figures that are drawn inside are for this sheet."""
    import matplotlib

    before = _SHEET.set(sheet)
    try:
        # of what has no size of its own: matplotlib's 10 points, on a page
        with matplotlib.rc_context({"font.size": 10 * sheet.type_scale}):
            yield
    finally:
        _SHEET.reset(before)


def sheet() -> Sheet:
    """What figures are drawn on now."""
    return _SHEET.get()


def size(points: float) -> float:
    """Type so large on a page, or what grows with it, as it is on this sheet."""
    return points * sheet().type_scale


def beside(most: int) -> int:
    """How many things stand beside each other, of which a page has so many."""
    return max(1, round(most * sheet().width / SHEETS["page"].width))


def new_figure(height: float) -> Figure:
    """A figure so many inches high, that belongs to no window and no global state."""
    from matplotlib.figure import Figure

    return Figure(figsize=(sheet().width, height), layout="constrained", facecolor="white")


def sign(figure: Figure, text: str) -> Bbox:
    """Write below a figure what it is of, outside of its layout, which stays as it is.

    Returns:
        what to save: the figure and the text, in inches.
    """
    from matplotlib.transforms import Bbox

    # laid out once, so that all of its files are alike
    figure.draw_without_rendering()
    # not "none", which would lay it out again for each file
    figure.set_layout_engine(None)
    for one in figure.legends:
        # or it would go down with the lower edge
        one.set_bbox_to_anchor((0, 0, 1, 1), transform=figure.transFigure)
    lines = [line for part in text.splitlines() for line in textwrap.wrap(part, sheet().letters(_FINE))]
    # 1.3 of the size is a line of this font, and 72 points are an inch
    line = 1.3 * size(_FINE) / 72
    width, height = figure.get_size_inches()
    figure.text(
        0.01, -0.4 * line / height, "\n".join(lines), va="top", fontsize=size(_FINE), color=INK, linespacing=1.3
    )
    return Bbox.from_extents(0, -(len(lines) + 0.8) * line, width, height)


def marked(row: Row, *, size: float, hollow: bool = False) -> dict[str, Any]:
    """How `Axes.plot` marks an arm.

    Args:
        row: the arm.
        size: of the marker, in points.
        hollow: with an outline alone.
    """
    return {
        "marker": row.marker, "color": row.colour, "markersize": size, "markeredgewidth": 1.0,
        "fillstyle": "none" if hollow else _FILLS[row.record.mode], "markerfacecoloralt": "white", "linestyle": "none",
    }  # fmt: skip


def name_modes(axes: Axes, rows: Sequence[Row]) -> None:
    """Tell the legend what the filling of the markers means, where there are several modes."""
    there = [mode for mode in _MODES if any(row.record.mode == mode for row in rows)]
    if len(there) < 2:
        return
    for mode in there:
        axes.plot([], [], "o", color=INK, markersize=8, fillstyle=_FILLS[mode], markerfacecoloralt="white",
                  label=_MODES[mode])  # fmt: skip


def legend(axes: Axes, columns: int) -> None:
    """The legend, above the axes."""
    axes.legend(
        loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, frameon=False, fontsize=size(SMALL), borderaxespad=0.2
    )


def plain_axes(axes: Axes) -> None:
    """No frame, faint lines for reading along x."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", color=FAINT, linewidth=0.5, alpha=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=size(FONT - 1))
    axes.xaxis.label.set_fontsize(size(FONT))
    axes.yaxis.label.set_fontsize(size(FONT))


def name_lines(axes: Axes, rows: Sequence[Row], shared: Sequence[str]) -> None:
    """One line an arm, from the top down, with its name, which is without the words that all share."""
    axes.set_yticks(range(len(rows)), [in_lines(short(row, shared), FONT - 1, _NAMES) for row in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)


def in_lines(text: str, points: float, share: float) -> str:
    """A text broken so that it takes at most this share of the width, in type so large on a page."""
    return textwrap.fill(text, sheet().letters(points, share))


def mark_lines(axes: Axes, rows: Sequence[Row]) -> None:
    """The marker of each line's method, between its name and the axis."""
    from matplotlib.transforms import ScaledTranslation

    # in place of the ticks, a marker's width to the left of the axis: 72 points are an inch
    beside = ScaledTranslation(-8 / 72, 0, axes.figure.dpi_scale_trans)
    for y, row in enumerate(rows):
        axes.plot(0, y, transform=axes.get_yaxis_transform() + beside, clip_on=False, **marked(row, size=7))
    axes.tick_params(axis="y", length=0, pad=16)


def parts(figure: Figure, count: int) -> list[Any]:
    """The figure cut into so many parts, one below the other."""
    return list(figure.subfigures(count, 1, squeeze=False)[:, 0])


def lines(rows: Sequence[Row]) -> Iterator[Sequence[Row]]:
    """The arms in portions of one picture that has a line for each."""
    return _portions(rows, _MOST_LINES)


def sparse_portions(rows: Sequence[Row]) -> Iterator[Sequence[Row]]:
    """The arms other than dense, in portions of one picture that has a row of pictures for each."""
    return _portions([row for row in rows if row.record.method != DENSE], _MOST_ROWS)


def _portions(rows: Sequence[Row], most: int) -> Iterator[Sequence[Row]]:
    return (rows[first : first + most] for first in range(0, len(rows), most))
