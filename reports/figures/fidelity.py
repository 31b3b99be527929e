"""Closeness to dense against speedup, one point an arm; bars reach over the interval and the videos."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

from calibatt.bench.record import plain
from calibatt.reports.figures.style import FAINT, INK, SMALL, marked, name_modes, new_figure, plain_axes
from calibatt.reports.rows import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.transforms import Bbox

TITLE = "Fidelity against speedup"
CAPTION = (
    "Right is faster, up is better. The marker is the median (for alignment the mean); the bars are the interval of "
    "the speedup and the middle half of the videos. A full marker has a method's own settings, a half-filled one those "
    "that give it what was asked for. A point above and to the right of another is better in both. Where there are "
    "more than a dozen arms, those are named that no other beats in both, and the outermost; the table has the rest."
)

# what fidelity is read from, in this order, and whether more of it is better
_MEASURES: Mapping[str, tuple[str, bool]] = MappingProxyType(
    {
        "psnr_db": ("PSNR against dense (dB)", True),
        "alignment": ("alignment with the caption", True),
        "method_error": ("method error (up is better)", False),
    }
)
# names that can be read beside each other, and whose places are found in a second
_MOST_NAMES = 12
# where the name of a point may stand, nearest first: points away from it, and (right, up, alignment of the text)
_DISTANCES = (9, 18, 28, 40, 54, 70)
_Side = tuple[float, float, str, str]
_SIDES: tuple[_Side, ...] = (
    (1, 0, "left", "center"), (-1, 0, "right", "center"), (0, 1, "center", "bottom"), (0, -1, "center", "top"),
    (0.8, 0.8, "left", "bottom"), (0.8, -0.8, "left", "top"), (-0.8, 0.8, "right", "bottom"),
    (-0.8, -0.8, "right", "top"),
)  # fmt: skip
_LEGEND_COLUMNS = 4


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Point:
    """An arm between speed (x) and fidelity (y)."""

    row: Row
    x: float
    y: float
    x_span: tuple[float, float]
    y_span: tuple[float, float]


def draw(rows: Sequence[Row]) -> Iterator[tuple[str, Figure]]:
    """One figure, with a panel each for the first two measures that there are."""
    panels = [(measure, points) for measure in _MEASURES if (points := _points(rows, measure))]
    # attention outputs stand in where no videos were made
    panels = panels[:2]
    if panels:
        yield TITLE, _figure(panels)


def _points(rows: Sequence[Row], measure: str) -> list[_Point]:
    points = []
    for row in rows:
        interval, measured = row.record.speedup, getattr(row.record, measure)
        if interval is None or measured is None:
            continue
        values = measured if isinstance(measured, tuple) else (measured,)
        # quartiles need two values
        low, y, high = statistics.quantiles(values, method="inclusive") if len(values) > 1 else (*values,) * 3
        if measure == "alignment":
            # most videos may show all of their caption and some little of it, which a median would hide
            y = statistics.fmean(values)
        x = interval.median
        span = (x if interval.low is None else interval.low, x if interval.high is None else interval.high)
        points.append(_Point(row=row, x=x, y=y, x_span=span, y_span=(low, high)))
    return points


def _figure(panels: Sequence[tuple[str, Sequence[_Point]]]) -> Figure:
    named = [_named(points, better_high=_MEASURES[measure][1]) for measure, points in panels]
    unnamed = any(len(names) < len(points) for names, (_, points) in zip(named, panels, strict=True))
    looks = {point.row.record.method: point.row for _, points in panels for point in points} if unnamed else {}
    figure = new_figure(4.2 * len(panels) + 0.25 * -(-len(looks) // _LEGEND_COLUMNS))
    grid = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
    for axes, (measure, points) in zip(grid, panels, strict=True):
        _panel(axes, measure, points)
    if looks:
        _name_methods(figure, grid[0], list(looks.values()))
    for axes, names, (_, points) in zip(grid, named, panels, strict=True):
        _name_points(figure, axes, names, points)
    return figure


def _panel(axes: Axes, measure: str, points: Sequence[_Point]) -> None:
    title, better_high = _MEASURES[measure]
    rows = [point.row for point in points]
    for point in points:
        colour = point.row.colour
        axes.hlines(point.y, *point.x_span, color=colour, linewidth=1.2, alpha=0.6)
        axes.vlines(point.x, *point.y_span, color=colour, linewidth=1.2, alpha=0.6)
        axes.plot(point.x, point.y, zorder=4, **marked(point.row, size=9))
    axes.axvline(1, color=INK, linewidth=1, linestyle="--", zorder=1)
    if measure == "alignment":
        _dense_level(axes, rows)
    if not better_high:
        axes.invert_yaxis()
    axes.margins(x=0.18, y=0.15)
    axes.set_xlabel("speedup over dense")
    axes.set_ylabel(title)
    plain_axes(axes)
    name_modes(axes, rows)


def _dense_level(axes: Axes, rows: Sequence[Row]) -> None:
    """What dense videos reach themselves."""
    values = [value for row in rows for value in row.record.alignment_dense or ()]
    if values:
        level = statistics.fmean(values)
        axes.axhline(level, color=INK, linewidth=1, linestyle=":", zorder=1)
        axes.annotate(
            "dense videos", (0, level), xycoords=("axes fraction", "data"), xytext=(4, 3), textcoords="offset points",
            fontsize=SMALL, color=INK,
        )  # fmt: skip


def _name_methods(figure: Figure, axes: Axes, rows: Sequence[Row]) -> None:
    """A legend of the methods, below all panels."""
    handles = [
        axes.plot([], [], label=plain(row.record.method_label or row.record.method),
                  **(marked(row, size=8) | {"fillstyle": "full"}))[0]
        for row in rows
    ]  # fmt: skip
    figure.legend(handles=handles, loc="outside lower center", ncols=_LEGEND_COLUMNS, frameon=False, fontsize=SMALL)
    for handle in handles:
        # or the legend of the axes would have it too
        handle.remove()


def _named(points: Sequence[_Point], *, better_high: bool) -> list[_Point]:
    """The points that are named: all, or if there are too many the outermost ones and those that none beats in both."""
    if len(points) <= _MOST_NAMES:
        return list(points)
    outermost = [
        choose(points, key=key) for key in (lambda point: point.x, lambda point: point.y) for choose in (max, min)
    ]

    def closeness(point: _Point) -> float:
        return point.y if better_high else -point.y

    front: list[_Point] = []
    for point in sorted(points, key=lambda point: (-point.x, -closeness(point))):
        if not front or closeness(point) > closeness(front[-1]):
            front.append(point)
    # evenly along the front, where that is too long
    every = -(-len(front) // (_MOST_NAMES - len(outermost)))
    return list(dict.fromkeys([*outermost, *front[::every]]))


def _name_points(figure: Figure, axes: Axes, named: Sequence[_Point], points: Sequence[_Point]) -> None:
    """Write each name where it covers as little as can be: no other name, and then no point and no bar."""
    from matplotlib.patheffects import withStroke

    figure.draw_without_rendering()
    names = [text.get_window_extent() for text in axes.texts]
    drawn = [box for point in points for box in _boxes(figure, axes, point)]
    inside = axes.get_window_extent()

    def faults(box: Bbox) -> tuple[bool, int, int]:
        outside = not (inside.x0 <= box.x0 and box.x1 <= inside.x1 and inside.y0 <= box.y0 and box.y1 <= inside.y1)
        return outside, box.count_overlaps(names), box.count_overlaps(drawn)

    places = [(distance, side) for distance in _DISTANCES for side in _SIDES]
    for point in named:
        text = axes.annotate(
            point.row.label, (point.x, point.y), xytext=(0, 0), textcoords="offset points", ha="left", va="bottom",
            fontsize=SMALL, color=INK, zorder=5, path_effects=[withStroke(linewidth=3, foreground="white")],
        )  # fmt: skip
        origin = text.get_window_extent()
        # the layout is done: a name must not move it
        text.set_in_layout(False)
        boxes = [_moved(origin, place, figure.dpi / 72) for place in places]
        # of equally good places, the nearest
        best = min(range(len(places)), key=lambda place: faults(boxes[place]))
        names.append(boxes[best])
        distance, (right, up, across, down) = places[best]
        text.set(position=(right * distance, up * distance), ha=across, va=down)
        if distance > _DISTANCES[0]:
            axes.annotate(
                "", (point.x, point.y), xytext=(right * distance, up * distance), textcoords="offset points",
                arrowprops={"arrowstyle": "-", "color": FAINT, "shrinkA": 0}, zorder=3,
            ).set_in_layout(False)  # fmt: skip


def _moved(origin: Bbox, place: tuple[float, _Side], scale: float) -> Bbox:
    """Where a text stands at a place, which at its point, to the right and up, would stand at `origin`; in pixels."""
    distance, (right, up, across, down) = place
    left = {"left": 0.0, "center": 0.5, "right": 1.0}[across] * origin.width
    below = {"bottom": 0.0, "center": 0.5, "top": 1.0}[down] * origin.height
    return origin.translated(right * distance * scale - left, up * distance * scale - below)


def _boxes(figure: Figure, axes: Axes, point: _Point) -> Iterator[Bbox]:
    """What a point and its bars cover, in pixels."""
    from matplotlib.transforms import Bbox

    # half a marker on every side, and a hair's breadth around the bars
    for x_span, y_span, pad in (
        ((point.x, point.x), (point.y, point.y), 5),
        (point.x_span, (point.y, point.y), 1),
        ((point.x, point.x), point.y_span, 1),
    ):
        corners = axes.transData.transform([(x_span[0], y_span[0]), (x_span[1], y_span[1])])
        yield Bbox.from_extents(*corners.min(axis=0), *corners.max(axis=0)).padded(pad * figure.dpi / 72)
