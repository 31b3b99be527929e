"""Closeness to dense against speedup, one point an arm; bars reach over the interval and the videos."""

from __future__ import annotations

import itertools
import math
import statistics
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from calibatt.bench.record import plain
from calibatt.reports.figures.style import (
    INK,
    SMALL,
    beside,
    legend,
    marked,
    name_modes,
    new_figure,
    plain_axes,
    sheet,
    size,
)
from calibatt.reports.front import unbeaten
from calibatt.reports.rows import RANDOM, Row, shared_words, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.transforms import Bbox

# of floating point; beartype reads no more of it under the lowest numpy
_Floats: TypeAlias = NDArray[Any]

TITLE = "Fidelity against speedup"
CAPTION = (
    "Right is faster, up is better. The marker is the median (for alignment the mean); the bars are the interval of "
    "the speedup and the middle half of the videos. A full marker has a method's own settings, a half-filled one those "
    "that give it what was asked for. The stepped line is the front: its arms are those that neither another arm nor "
    "dense attention beats in both. Where there are more than a dozen arms, a dozen at most are named: six of the "
    "front, evenly along it, then the fastest and the closest, the slowest and the farthest, the closest random masks, "
    "the rest of the front, and the next closest. What has no name is told by the legend, by method, and is small and "
    "without bars off the front; the table has it."
)
KEY = (
    "Markers: medians of {samples} (of alignment the mean). Bars: 95 % interval of the "
    "speedup (sign test); middle half of the videos. Front: arms that neither another arm nor dense beats in both."
)

# what fidelity is read from, in this order, and whether more of it is better
_MEASURES: Mapping[str, tuple[str, bool]] = MappingProxyType(
    {
        "psnr_db": ("PSNR against dense (dB)", True),
        "alignment": ("alignment with the caption", True),
        "method_error": ("method error", False),
    }
)
# PSNR of a video and itself rounded to whole values, 10 log10(255² · 12): what is closer is the same video on a screen,
# and would press all others together
_SAME_VIDEO_DB = 10 * math.log10(255**2 * 12)
# names that can be read beside each other, and how many of them the front may take: six are left for the fastest and
# the closest, the slowest and the farthest, a control, and one that is close
_MOST_NAMES = 12
_MOST_FRONT = 6
# letters of a name, in up to three lines; and of a line of it, the share of the width
_LONGEST_NAME = 90
_LINE_OF_NAME = 0.34
# where a name may stand around its point: in so many directions, points away; farther it needs a line that leads there
_DIRECTIONS = 16
_DISTANCES = (7, 12, 18, 27, 38, 52, 70, 95)
_NO_LEADER = 12
# and anywhere else, on so many places across
_ACROSS = 9
# what is spoilt by a name is worth as many points of distance: a line that crosses another or a name, a marker that is
# covered, a bar
_CROSSING_COST = 60
_MARKER_COST = 60
_BAR_COST = 6
_LEGEND_COLUMNS = 4
# inches of a panel, and of one in which most marks have no name
_HEIGHT = 4.4
_CROWDED = 5.4


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Point:
    """An arm between speed (x) and fidelity (y).

    Args:
        row: the arm.
        x, y: where it is drawn.
        close: the fidelity itself, the higher the closer to dense.
        x_span, y_span: ends of its bars.
    """

    row: Row
    x: float
    y: float
    close: float
    x_span: tuple[float, float]
    y_span: tuple[float, float]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Panel:
    """One measure: its points, those on the front, and those that are named."""

    measure: str
    points: Sequence[_Point]
    front: Sequence[_Point]
    named: Sequence[_Point]


def draw(rows: Sequence[Row]) -> Iterator[tuple[str, Figure]]:
    """One figure, with a panel each for the first two measures that there are."""
    panels = []
    for measure in _MEASURES:
        if points := _points(rows, measure):
            front = _front(points, _dense(rows, measure))
            panels.append(_Panel(measure=measure, points=points, front=front, named=_named(points, front)))
    # attention outputs stand in where no videos were made
    panels = panels[:2]
    if panels:
        yield TITLE, _figure(panels, shared_words(rows))


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
        close = y if _MEASURES[measure][1] else -y
        if measure == "psnr_db":
            low, y, high = (min(value, _SAME_VIDEO_DB) for value in (low, y, high))
        x = interval.median
        span = (x if interval.low is None else interval.low, x if interval.high is None else interval.high)
        points.append(_Point(row=row, x=x, y=y, close=close, x_span=span, y_span=(low, high)))
    return points


def _dense(rows: Sequence[Row], measure: str) -> float:
    """How close dense attention is, on the scale of the points."""
    if measure == "alignment":
        return _dense_alignment(rows)
    return math.inf if measure == "psnr_db" else 0.0


def _dense_alignment(rows: Sequence[Row]) -> float:
    """What dense videos reach themselves; less than anything where that was not measured."""
    values = [value for row in rows for value in row.record.alignment_dense or ()]
    return statistics.fmean(values) if values else -math.inf


def _front(points: Sequence[_Point], dense: float) -> list[_Point]:
    """Those that neither another point nor dense attention, at a speedup of 1, beats."""
    found = unbeaten(points, lambda point: (point.x, point.close))
    return [point for point in found if point.x > 1 or point.close > dense]


def _named(points: Sequence[_Point], front: Sequence[_Point]) -> list[_Point]:
    """The points that are named, as the caption says."""
    if len(points) <= _MOST_NAMES:
        return list(points)
    along = np.linspace(0, len(front) - 1, min(_MOST_FRONT, len(front))).round().astype(int)
    keys = (lambda point: point.x, lambda point: point.close)
    outermost = [choose(points, key=key) for choose in (max, min) for key in keys]
    controls = [point for point in points if point.row.record.method == RANDOM]
    others = [point for point in points if point.row.record.method != RANDOM]
    # several draws of random masks are one control
    control = [max(controls, key=keys[1])] if controls else []
    closest = sorted(others, key=keys[1], reverse=True)
    return list(dict.fromkeys([*(front[i] for i in along), *outermost, *control, *front, *closest]))[:_MOST_NAMES]


def _figure(panels: Sequence[_Panel], shared: Sequence[str]) -> Figure:
    unnamed = any(len(panel.named) < len(panel.points) for panel in panels)
    looks = {point.row.record.method: point.row for panel in panels for point in panel.points} if unnamed else {}
    legend_lines = -(-len(looks) // beside(_LEGEND_COLUMNS))
    figure = new_figure(size(_CROWDED if unnamed else _HEIGHT) * len(panels) + 0.25 * legend_lines)
    grid = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
    for axes, panel in zip(grid, panels, strict=True):
        _draw_panel(axes, panel)
    if looks:
        _name_methods(figure, grid[0], list(looks.values()))
    for axes, panel in zip(grid, panels, strict=True):
        _name_points(figure, axes, panel, shared)
    return figure


def _draw_panel(axes: Axes, panel: _Panel) -> None:
    title, better_high = _MEASURES[panel.measure]
    rows = [point.row for point in panel.points]
    for point in panel.points:
        colour = point.row.colour
        if point in panel.named or point in panel.front:
            axes.hlines(point.y, *point.x_span, color=colour, linewidth=1.2, alpha=0.6)
            axes.vlines(point.x, *point.y_span, color=colour, linewidth=1.2, alpha=0.6)
            axes.plot(point.x, point.y, zorder=4, **marked(point.row, size=9))
        else:
            axes.plot(point.x, point.y, zorder=3, alpha=0.7, **marked(point.row, size=6))
    axes.axvline(1, color=INK, linewidth=1, linestyle="--", zorder=1)
    if panel.measure == "alignment":
        _dense_level(axes, rows)
    if not better_high:
        axes.invert_yaxis()
    axes.margins(x=0.18, y=0.15)
    if panel.front:
        _draw_front(axes, panel.front)
    axes.set_xlabel("speedup over dense")
    if any(point.close > _SAME_VIDEO_DB for point in panel.points):
        title += f"\n{_SAME_VIDEO_DB:.0f} and more: drawn at {_SAME_VIDEO_DB:.0f}"
    if panel.measure == "method_error":
        title += f" {_of_calls(rows)}\n(up is better)"
    axes.set_ylabel(title)
    plain_axes(axes)
    name_modes(axes, rows)
    if labelled := len(axes.get_legend_handles_labels()[1]):
        legend(axes, min(labelled, beside(_LEGEND_COLUMNS)))


def _of_calls(rows: Sequence[Row]) -> str:
    """What calls the method error is of; files that do not say have the mean of a few (`Record.error_calls`)."""
    counts = {row.record.error_calls for row in rows}
    known = sorted(count for count in counts if count is not None)
    if len(known) < len(counts):
        return "of some calls"
    return f"of {known[0]:,} calls" if len(known) == 1 else f"of {known[0]:,} to {known[-1]:,} calls"


def _draw_front(axes: Axes, front: Sequence[_Point]) -> None:
    """Steps from dense attention's speed on: what is below and to the left of them, an arm of the front beats."""
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    x = [min(1.0, front[0].x), *(point.x for point in front), front[-1].x]
    y = [front[0].y, *(point.y for point in front), bottom]
    axes.plot(x, y, drawstyle="steps-pre", color=INK, linewidth=1.2, alpha=0.5, zorder=2, label="front")
    axes.set(xlim=(left, right), ylim=(bottom, top))


def _dense_level(axes: Axes, rows: Sequence[Row]) -> None:
    """A line at what dense videos reach themselves."""
    level = _dense_alignment(rows)
    if math.isfinite(level):
        axes.axhline(level, color=INK, linewidth=1, linestyle=":", zorder=1)
        axes.annotate(
            "dense videos", (0, level), xycoords=("axes fraction", "data"), xytext=(4, 3), textcoords="offset points",
            fontsize=size(SMALL), color=INK,
        )  # fmt: skip


def _name_methods(figure: Figure, axes: Axes, rows: Sequence[Row]) -> None:
    """A legend of the methods, below all panels."""
    handles = [
        axes.plot([], [], label=plain(row.record.method_label or row.record.method),
                  **(marked(row, size=8) | {"fillstyle": "full"}))[0]
        for row in rows
    ]  # fmt: skip
    figure.legend(
        handles=handles, loc="outside lower center", ncols=beside(_LEGEND_COLUMNS), frameon=False, fontsize=size(SMALL)
    )
    for handle in handles:
        # or the legend of the axes would have it too
        handle.remove()


def _name_points(figure: Figure, axes: Axes, panel: _Panel, shared: Sequence[str]) -> None:
    """Write each name, without the words that all share, near its point, where it covers no other and little else.

    A name for which there is no such place is left to the table.
    """
    from matplotlib.patheffects import withStroke

    figure.draw_without_rendering()
    scale = figure.dpi / 72
    crowd = _Crowd(
        inside=axes.get_window_extent(),
        scale=scale,
        names=[np.array(text.get_window_extent().extents) for text in axes.texts],
        leaders=[],
        markers=np.array([_box(axes, (point.x, point.x), (point.y, point.y), 5 * scale) for point in panel.points]),
        bars=np.array(
            [
                _box(axes, *spans, scale)
                for point in panel.named
                for spans in ((point.x_span, (point.y, point.y)), ((point.x, point.x), point.y_span))
            ]
        ),
    )
    for point in panel.named:
        name = short(point.row, shared)
        beyond = f": {point.close:.0f} dB" if panel.measure == "psnr_db" and point.close > _SAME_VIDEO_DB else ""
        text = axes.annotate(
            _in_lines(plain(name, _LONGEST_NAME) + beyond), (point.x, point.y), xytext=(0, 0),
            textcoords="offset points", ha="left", va="bottom", fontsize=size(SMALL), color=INK, zorder=6,
            linespacing=1.0, path_effects=[withStroke(linewidth=2.5, foreground="white")],
        )  # fmt: skip
        # the layout is done: a name must not move it
        text.set_in_layout(False)
        at = axes.transData.transform((point.x, point.y))
        box = crowd.place(at, text.get_window_extent())
        if box is None:
            text.remove()
            continue
        text.set_position((box[:2] - at) / scale)
        near = _nearest(at, box)
        middles = (crowd.markers[:, :2] + crowd.markers[:, 2:]) / 2
        nearer = (_apart(middles, _nearest(middles, box)) <= _apart(at, near)).sum()
        # its own marker is one of them
        if _apart(at, near) > _NO_LEADER * scale or nearer > 1:
            axes.annotate(
                "", (point.x, point.y), xytext=(near - at) / scale, textcoords="offset points", zorder=5,
                arrowprops={"arrowstyle": "-", "color": point.row.colour, "linewidth": 0.9, "shrinkA": 0, "shrinkB": 4},
            ).set_in_layout(False)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Crowd:
    """What names stand among, in pixels; `scale` of them are a point. A box is its left, bottom, right and top.

    Args:
        inside: the axes.
        names, leaders: boxes of what was written, and both ends of the lines that lead to it.
        markers, bars: boxes [count, 4] of what should not be covered.
    """

    inside: Bbox
    scale: float
    names: list[_Floats]
    leaders: list[_Floats]
    markers: _Floats
    bars: _Floats

    def place(self, at: _Floats, size: Bbox) -> _Floats | None:
        """The best place for a name of a point; it is taken. None where every place covers another name."""
        boxes = self._places(at, np.array([size.width, size.height]) / 2)
        names = np.reshape(self.names, (-1, 4))
        boxes = boxes[~_overlaps(boxes, names).any(axis=1)]
        if not len(boxes):
            return None
        best: _Floats = boxes[np.argmin(self._costs(at, boxes, names))]
        self.names.append(best)
        self.leaders.append(np.concatenate([at, _nearest(at, best)]))
        return best

    def _places(self, at: _Floats, half: _Floats) -> _Floats:
        """Boxes of that half width and height that are inside, around the point and all over the axes."""
        # not on the axes' lines
        rim = half + 3 * self.scale
        low, high = self.inside.p0 + rim, self.inside.p1 - rim
        angles = np.arange(_DIRECTIONS) * (2 * math.pi / _DIRECTIONS)
        rays = np.stack([np.cos(angles), np.sin(angles)], axis=1)
        around = [at + (self.scale * distance + half) * rays for distance in _DISTANCES]
        down = np.arange(low[1], high[1], 2.4 * half[1])
        over = np.array(list(itertools.product(np.linspace(low[0], high[0], _ACROSS), down))).reshape(-1, 2)
        centres = np.concatenate([*around, over])
        centres = centres[((low <= centres) & (centres <= high)).all(axis=1)]
        return np.concatenate([centres - half, centres + half], axis=1)

    def _costs(self, at: _Floats, boxes: _Floats, names: _Floats) -> _Floats:
        """Of each box, how far the name would be away, and what it would spoil."""
        ends = np.concatenate([np.broadcast_to(at, (len(boxes), 2)), _nearest(at, boxes)], axis=1)
        leaders = np.reshape(self.leaders, (-1, 4))
        crossed = _hits(ends, names).sum(axis=1)
        crossed += (_hits(leaders, boxes).T | _cross(ends, leaders)).sum(axis=1)
        costs: _Floats = (
            _apart(ends[:, :2], ends[:, 2:]) / self.scale
            + _CROSSING_COST * crossed
            + _MARKER_COST * _overlaps(boxes, self.markers).sum(axis=1)
            + _BAR_COST * _overlaps(boxes, self.bars).sum(axis=1)
        )
        return costs


def _in_lines(name: str) -> str:
    """A name as a narrow block, for which there is more room than for a line."""
    parts = name.replace(" at ", "\nat ").replace(", ", ",\n").splitlines()
    return "\n".join(line for part in parts for line in textwrap.wrap(part, sheet().letters(SMALL, _LINE_OF_NAME)))


def _apart(ones: _Floats, others: _Floats) -> Any:
    """Distances of points [..., 2] from others."""
    return np.hypot(*np.moveaxis(others - ones, -1, 0))


def _nearest(at: _Floats, box: _Floats) -> _Floats:
    """The point of a box, or of each of some boxes [..., 4], that is nearest to another."""
    return np.clip(at, box[..., :2], box[..., 2:])


def _overlaps(ones: _Floats, others: _Floats) -> NDArray[np.bool_]:
    """Which boxes [count, 4] overlap which others, bool [ones, others]."""
    low = np.maximum(ones[:, None, :2], others[None, :, :2])
    high = np.minimum(ones[:, None, 2:], others[None, :, 2:])
    overlapping: NDArray[np.bool_] = np.all(low < high, axis=2)
    return overlapping


def _hits(lines: _Floats, boxes: _Floats) -> NDArray[np.bool_]:
    """Which lines, by their ends [count, 4], touch which boxes [count, 4], bool [lines, boxes]."""
    start, way = lines[:, None, :2], lines[:, None, 2:] - lines[:, None, :2]
    # what runs along an axis, but for a hair
    way = np.where(way == 0, 1e-9, way)
    one, other = (boxes[None, :, :2] - start) / way, (boxes[None, :, 2:] - start) / way
    # shares of the way at which a line is between both sides of the box
    enters, leaves = np.minimum(one, other).max(axis=2), np.maximum(one, other).min(axis=2)
    touching: NDArray[np.bool_] = (enters <= leaves) & (leaves >= 0) & (enters <= 1)
    return touching


def _cross(ones: _Floats, others: _Floats) -> NDArray[np.bool_]:
    """Which lines, by their ends [count, 4], cross which others, bool [ones, others]."""

    def sides(lines: _Floats, points: _Floats) -> _Floats:
        """On which side of each line each point is, float [lines, points]."""
        way, to = lines[:, None, 2:] - lines[:, None, :2], points[None] - lines[:, None, :2]
        turns: _Floats = np.sign(way[..., 0] * to[..., 1] - way[..., 1] * to[..., 0])
        return turns

    parted = sides(ones, others[:, :2]) * sides(ones, others[:, 2:]) <= 0
    crossing: NDArray[np.bool_] = parted & (sides(others, ones[:, :2]) * sides(others, ones[:, 2:]) <= 0).T
    return crossing


def _box(axes: Axes, x_span: tuple[float, float], y_span: tuple[float, float], pad: float) -> _Floats:
    """What lies between two corners, in pixels, and a rim."""
    corners = axes.transData.transform(list(zip(x_span, y_span, strict=True)))
    return np.concatenate([corners.min(axis=0) - pad, corners.max(axis=0) + pad])
