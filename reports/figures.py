"""Figures from records and the data of their pictures. Each returns None where there is nothing to draw."""

from __future__ import annotations

import statistics
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from calibatt.reports.entries import DENSE, Entry, Pictures

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# inches: a page column; at this width the type below stays readable when a phone shrinks it by half
_WIDTH = 7.0
_FONT = 11
_SMALL = 9.5
_INK = "#222222"
_FAINT = "#BBBBBB"
# one marker a mode, so that it can be told without colour
_MARKERS = {"native": "o", "matched": "s", "equal_density": "D", "equal_fidelity": "^", None: "o"}
_MODES = {
    "native": "own settings", "matched": "the same dense schedule", "equal_density": "at a given density",
    "equal_fidelity": "at a given fidelity",
}  # fmt: skip
# plan, attend, what is left, any other: Okabe and Ito's colours, each with its own hatch
_PHASES = {"plan": ("#E69F00", "////"), "attend": ("#56B4E9", ""), "other": ("#DDDDDD", "")}
_MORE_PHASE = ("#CC79A7", "....")
# Okabe and Ito's, without the yellow; further lines are dashed, then dotted
_LINES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#333333")
# at most so many pictures in a row: more are too small to see
_COLUMNS = 4
_FRAMES = 5
# letters of the font that fill the width
_CAPTION_CHARACTERS = 85
# what fidelity is read from, in this order
_FIDELITY = {
    "psnr_db": "PSNR against dense (dB)",
    "alignment": "alignment with the caption",
    "method_error": "method error (up is better)",
}
# where the name of a point may stand, nearest first: points away from it, and (right, up, alignment of the text)
_DISTANCES = (9, 18, 28, 40, 54, 70)
_SIDES = (
    (1, 0, "left", "center"), (-1, 0, "right", "center"), (0, 1, "center", "bottom"), (0, -1, "center", "top"),
    (0.8, 0.8, "left", "bottom"), (0.8, -0.8, "left", "top"), (-0.8, 0.8, "right", "bottom"),
    (-0.8, -0.8, "right", "top"),
)  # fmt: skip
# a phase smaller than this share of the whole cannot be seen in a bar
_VISIBLE = 0.005


@dataclass(frozen=True, slots=True, kw_only=True)
class _Point:
    """An arm between speed (x) and fidelity (y)."""

    entry: Entry
    x: float
    y: float
    x_span: tuple[float, float]
    y_span: tuple[float, float]


def speedup(entries: Sequence[Entry]) -> Figure | None:
    """Median speedup over dense and its 95 % interval, one row an arm; faint dots are the rounds."""
    rows = [(entry, interval) for entry in entries if (interval := entry.record.speedup) is not None]
    if not rows:
        return None
    figure = _figure(0.9 + 0.42 * len(rows))
    axes = figure.add_subplot()
    for y, (entry, interval) in enumerate(rows):
        record = entry.record
        pairs = zip(record.baseline_samples_s or (), record.samples_s or (), strict=True)
        ratios = [dense / sample for dense, sample in pairs]
        axes.scatter(ratios, [y] * len(ratios), s=14, color=entry.colour, alpha=0.25, linewidths=0, zorder=2)
        known, shown = False, "no interval"
        if interval.low is not None and interval.high is not None:
            known, shown = True, f"{interval.low:.2f}–{interval.high:.2f}"
            axes.hlines(y, interval.low, interval.high, color=entry.colour, linewidth=2.5, zorder=3)
        axes.plot(
            interval.median, y, _MARKERS[record.mode], color=entry.colour, markersize=8, zorder=4,
            markerfacecolor=entry.colour if known else "white", markeredgewidth=1.5,
        )  # fmt: skip
        axes.annotate(
            f"{interval.median:.2f}×  ({shown})", (1.01, y), xycoords=("axes fraction", "data"), va="center",
            fontsize=_SMALL, color=_INK,
        )  # fmt: skip
    axes.axvline(1, color=_INK, linewidth=1, linestyle="--", zorder=1)
    baselines = sorted({entry.record.baseline for entry, _ in rows if entry.record.baseline})
    axes.annotate(
        f"dense ({', '.join(baselines)})" if baselines else "dense", (1, 1.0), xycoords=("data", "axes fraction"),
        xytext=(0, 4), textcoords="offset points", ha="center", va="bottom", fontsize=_SMALL, color=_INK,
    )  # fmt: skip
    axes.set_yticks(range(len(rows)), [entry.label for entry, _ in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.margins(x=0.08)
    axes.set_xlabel("speedup over dense")
    _plain(axes)
    return figure


def fidelity(entries: Sequence[Entry]) -> Figure | None:
    """Closeness to dense against speedup, one named point an arm; bars reach over the interval and the videos."""
    panels = [(title, points) for name, title in _FIDELITY.items() if (points := _points(entries, name))]
    if not panels:
        return None
    # attention outputs stand in where no videos were made
    panels = panels[:2]
    figure = _figure(4.2 * len(panels))
    grid = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
    for axes, (title, points) in zip(grid, panels, strict=True):
        for point in points:
            colour = point.entry.colour
            axes.hlines(point.y, *point.x_span, color=colour, linewidth=1.2, alpha=0.6)
            axes.vlines(point.x, *point.y_span, color=colour, linewidth=1.2, alpha=0.6)
            axes.plot(point.x, point.y, _MARKERS[point.entry.record.mode], color=colour, markersize=9, zorder=4)
        axes.axvline(1, color=_INK, linewidth=1, linestyle="--", zorder=1)
        if title == _FIDELITY["alignment"]:
            _dense_level(axes, [point.entry for point in points])
        if title == _FIDELITY["method_error"]:
            axes.invert_yaxis()
        axes.margins(x=0.18, y=0.15)
        axes.set_xlabel("speedup over dense")
        axes.set_ylabel(title)
        _plain(axes)
        _modes(axes, [point.entry for point in points])
    for axes, (_, points) in zip(grid, panels, strict=True):
        _name_points(figure, axes, points)
    return figure


def density(entries: Sequence[Entry]) -> Figure | None:
    """Kept fraction of the block products by step (across) and layer and head (down), one map an arm."""
    maps = [
        (entry, entry.pictures.density)
        for entry in entries
        if entry.record.method != DENSE and entry.pictures is not None and entry.pictures.density is not None
    ]
    if not maps:
        return None
    columns = min(2, len(maps))
    rows = -(-len(maps) // columns)
    figure = _figure(3.0 * rows + 0.3)
    grid = figure.subplots(rows, columns, squeeze=False)
    image = None
    for axes, (entry, values) in zip(grid.flat, maps, strict=False):
        steps, layers, heads = values.shape
        image = axes.imshow(
            values.reshape(steps, layers * heads).T, aspect="auto", interpolation="nearest", cmap="cividis", vmin=0,
            vmax=1, extent=(-0.5, steps - 0.5, layers * heads, 0),
        )  # fmt: skip
        # lines between layers, unless there are so many that they would hide the map
        if heads > 1 and layers <= 16:
            axes.hlines(np.arange(1, layers) * heads, -0.5, steps - 0.5, color="white", linewidth=0.6)
        every = -(-layers // 8)
        axes.set_yticks([(layer + 0.5) * heads for layer in range(0, layers, every)], range(0, layers, every))
        axes.set_xticks(range(0, steps, -(-steps // 8)))
        axes.set_title(f"{entry.label}\nmean {values.mean():.2f}", fontsize=_FONT, color=entry.colour, loc="left")
        axes.set_xlabel("step")
        axes.set_ylabel(f"layer ({heads} heads each)" if heads > 1 else "layer")
        axes.tick_params(labelsize=_SMALL)
    for axes in grid.flat[len(maps) :]:
        axes.remove()
    assert image is not None
    bar = figure.colorbar(image, ax=list(grid.flat[: len(maps)]), fraction=0.04, pad=0.02)
    bar.set_label("density: share of the blocks computed")
    return figure


def masks(entries: Sequence[Entry]) -> Figure | None:
    """A few masks, one row an arm: a dark cell is a block of queries (down) and keys (across) that is computed."""
    rows: list[tuple[Entry, Pictures, NDArray[np.bool_], NDArray[np.integer]]] = []
    for entry in entries:
        pictures = entry.pictures
        if pictures is not None and pictures.masks is not None and pictures.mask_sites is not None:
            rows.append((entry, pictures, pictures.masks[:_COLUMNS], pictures.mask_sites[:_COLUMNS]))
    rows = [row for row in rows if len(row[2])]
    if not rows:
        return None
    columns = max(len(shown) for _, _, shown, _ in rows)
    figure = _figure(len(rows) * (_WIDTH / max(columns, 3) + 0.6))
    for part, (entry, pictures, shown, sites) in zip(_parts(figure, len(rows)), rows, strict=True):
        part.suptitle(entry.label, fontsize=_FONT, color=entry.colour, fontweight="bold", x=0.02, ha="left")
        grid = part.subplots(1, columns, squeeze=False)[0]
        for axes, mask, (step, layer, head) in zip(grid, shown, sites, strict=False):
            axes.imshow(
                mask, cmap="Greys", vmin=0, vmax=1.15, interpolation="nearest", aspect="auto",
                extent=(0, mask.shape[1], mask.shape[0], 0),
            )  # fmt: skip
            _frame_boundaries(axes, entry, pictures, mask)
            axes.set_title(f"step {step}, layer {layer}\nhead {head}, density {mask.mean():.2f}", fontsize=_SMALL)
            axes.set_box_aspect(1)
            axes.tick_params(labelsize=_SMALL - 2)
            axes.locator_params(nbins=4, integer=True)
            axes.set_xlabel("key block", fontsize=_SMALL - 1, labelpad=1)
        grid[0].set_ylabel("query block", fontsize=_SMALL - 1, labelpad=1)
        for axes in grid[len(shown) :]:
            axes.remove()
    return figure


def videos(entries: Sequence[Entry]) -> list[tuple[str, Figure]]:
    """For each video its caption, and its frames: one row an arm, dense first, time from left to right."""
    shown = [
        (entry, entry.pictures) for entry in entries if entry.pictures is not None and entry.pictures.frames is not None
    ]
    drawn = []
    for number in range(max((_count(pictures) for _, pictures in shown), default=0)):
        rows = [(entry, pictures) for entry, pictures in shown if number < _count(pictures)]
        captions = [
            str(pictures.captions[number])
            for _, pictures in rows
            if pictures.captions is not None and number < len(pictures.captions)
        ]
        caption = captions[0] if captions else ""
        drawn.append((caption, _frames(rows, number, caption)))
    return drawn


def phases(entries: Sequence[Entry]) -> Figure | None:
    """Where the time goes: medians of the phases end to end, one bar an arm."""
    rows = [
        (entry, entry.record.phases_s, statistics.median(entry.record.samples_s))
        for entry in entries
        if entry.record.phases_s and entry.record.samples_s
    ]
    if not rows:
        return None
    unit, scale = _unit(max(total for _, _, total in rows))
    order = [name for name in _PHASES if name != "other"]
    order += sorted({name for _, parts, _ in rows for name in parts} - set(order))
    bars: dict[str, list[float]] = {name: [] for name in [*order, "other"]}
    for _, parts, total in rows:
        medians = {name: statistics.median(parts[name]) for name in order if parts.get(name)}
        for name in order:
            bars[name].append(medians.get(name, 0.0) * scale)
        rest = total - sum(medians.values())
        bars["other"].append(rest * scale if rest > _VISIBLE * total else 0.0)
    figure = _figure(1.3 + 0.42 * len(rows))
    axes = figure.add_subplot()
    left = np.zeros(len(rows))
    for name, widths in bars.items():
        if any(widths):
            colour, hatch = _PHASES.get(name, _MORE_PHASE)
            axes.barh(
                range(len(rows)), widths, left=left, height=0.62, color=colour, hatch=hatch, edgecolor=_INK,
                linewidth=0.6, label=name,
            )  # fmt: skip
            left = left + widths
    for y, end in enumerate(left):
        axes.annotate(
            f"{end:.3g} {unit}", (end, y), xytext=(5, 0), textcoords="offset points", va="center", fontsize=_SMALL,
            color=_INK,
        )  # fmt: skip
    axes.set_yticks(range(len(rows)), [entry.label for entry, _, _ in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlim(0, float(left.max()) * 1.16)
    axes.set_xlabel(f"median time ({unit})")
    _plain(axes)
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=4, frameon=False, fontsize=_SMALL, borderaxespad=0.2)
    return figure


def ideal(entries: Sequence[Entry]) -> Figure | None:
    """Speedup times density over density, one line a kernel, block and mask; where there are densities to compare."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for entry in entries:
        record = entry.record
        if record.suite == "kernel" and record.of_ideal is not None and record.density is not None and record.block:
            name = f"{record.computed_by}, {record.block[0]}×{record.block[1]}, {record.mask}"
            lines.setdefault(name, []).append((record.density, record.of_ideal))
    if max(map(len, lines.values()), default=0) < 2:
        return None
    figure = _figure(4.4 + 0.2 * -(-len(lines) // 2))
    axes = figure.add_subplot()
    for number, (name, points) in enumerate(sorted(lines.items())):
        x, y = zip(*sorted(points), strict=True)
        colour = _LINES[number % len(_LINES)]
        axes.plot(x, y, marker="o", markersize=4, color=colour, linestyle=("-", "--", ":")[number // len(_LINES) % 3],
                  label=name)  # fmt: skip
    axes.axhline(1, color=_INK, linewidth=1, linestyle="--", zorder=1)
    axes.set_xscale("log")
    axes.set_ylim(bottom=0)
    ticks = sorted({round(x, 2) for points in lines.values() for x, _ in points})
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("density: share of the blocks computed")
    axes.set_ylabel("speedup × density")
    _plain(axes)
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False, fontsize=_SMALL, borderaxespad=0.2)
    return figure


def _figure(height: float) -> Figure:
    """A figure that belongs to no window and no global state."""
    from matplotlib.figure import Figure

    return Figure(figsize=(_WIDTH, height), layout="constrained", facecolor="white")


def _parts(figure: Figure, count: int) -> list[Any]:
    return list(figure.subfigures(count, 1, squeeze=False)[:, 0])


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", color=_FAINT, linewidth=0.5, alpha=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=_FONT - 1)
    axes.xaxis.label.set_fontsize(_FONT)
    axes.yaxis.label.set_fontsize(_FONT)


def _points(entries: Sequence[Entry], name: str) -> list[_Point]:
    points = []
    for entry in entries:
        interval, measured = entry.record.speedup, getattr(entry.record, name)
        if interval is None or measured is None:
            continue
        values = measured if isinstance(measured, tuple) else (measured,)
        # quartiles need two values
        low, y, high = statistics.quantiles(values, method="inclusive") if len(values) > 1 else (*values,) * 3
        if name == "alignment":
            # most videos may show all of their caption and some little of it, which a median would hide
            y = statistics.fmean(values)
        x = interval.median
        span = (x if interval.low is None else interval.low, x if interval.high is None else interval.high)
        points.append(_Point(entry=entry, x=x, y=y, x_span=span, y_span=(low, high)))
    return points


def _dense_level(axes: Axes, shown: Sequence[Entry]) -> None:
    """What dense videos reach themselves."""
    values = [value for entry in shown for value in entry.record.alignment_dense or ()]
    if values:
        level = statistics.fmean(values)
        axes.axhline(level, color=_INK, linewidth=1, linestyle=":", zorder=1)
        axes.annotate(
            "dense videos", (0, level), xycoords=("axes fraction", "data"), xytext=(4, 3), textcoords="offset points",
            fontsize=_SMALL, color=_INK,
        )  # fmt: skip


def _modes(axes: Axes, shown: Sequence[Entry]) -> None:
    """What the markers mean, where several are there."""
    there = [mode for mode in _MODES if any(entry.record.mode == mode for entry in shown)]
    if len(there) < 2:
        return
    for mode in there:
        axes.plot([], [], _MARKERS[mode], color=_INK, markersize=8, label=_MODES[mode])
    axes.legend(
        loc="lower left", bbox_to_anchor=(0, 1), ncols=len(there), frameon=False, fontsize=_SMALL, borderaxespad=0.2
    )


def _name_points(figure: Figure, axes: Axes, points: Sequence[_Point]) -> None:
    """Write each name where it covers no other name, no point and no bar."""
    from matplotlib.patheffects import withStroke
    from matplotlib.text import Text
    from matplotlib.transforms import Bbox

    figure.draw_without_rendering()
    taken = []
    for point in points:
        # half a marker on every side, and a hair's breadth around the bars
        for x_span, y_span, pad in (
            ((point.x, point.x), (point.y, point.y), 5),
            (point.x_span, (point.y, point.y), 1),
            ((point.x, point.x), point.y_span, 1),
        ):
            corners = axes.transData.transform([(x_span[0], y_span[0]), (x_span[1], y_span[1])])
            taken.append(Bbox.from_extents(*corners.min(axis=0), *corners.max(axis=0)).padded(pad * figure.dpi / 72))
    inside = axes.get_window_extent()
    halo = [withStroke(linewidth=3, foreground="white")]
    places = [(distance, side) for distance in _DISTANCES for side in _SIDES]
    for point in points:
        for place in places:
            distance, (right, up, across, down) = place
            text = axes.annotate(
                point.entry.label, (point.x, point.y), xytext=(right * distance, up * distance),
                textcoords="offset points", ha=across, va=down, fontsize=_SMALL, color=_INK, zorder=5,
                path_effects=halo,
                arrowprops={"arrowstyle": "-", "color": _FAINT} if distance > _DISTANCES[0] else None,
            )  # fmt: skip
            # the layout is done: a name must not move it
            text.set_in_layout(False)
            # puts the text in its place; the line to it is not part of its box
            text.get_window_extent()
            box = Text.get_window_extent(text)
            fits = inside.x0 <= box.x0 and box.x1 <= inside.x1 and inside.y0 <= box.y0 and box.y1 <= inside.y1
            # where nothing is free the last place must do
            if (fits and not any(box.overlaps(other) for other in taken)) or place == places[-1]:
                break
            text.remove()
        taken.append(box)


def _frame_boundaries(axes: Axes, entry: Entry, pictures: Pictures, mask: NDArray[np.bool_]) -> None:
    block = entry.record.block
    if pictures.frame_starts is None or block is None:
        return
    starts = pictures.frame_starts[pictures.frame_starts > 0]
    for at in starts / block[0]:
        axes.axhline(at, color="#D55E00", linewidth=0.5)
    for at in starts / block[1]:
        axes.axvline(at, color="#D55E00", linewidth=0.5)


def _count(pictures: Pictures) -> int:
    return 0 if pictures.frames is None else len(pictures.frames)


def _frames(rows: Sequence[tuple[Entry, Pictures]], number: int, caption: str) -> Figure:
    first = rows[0][1].frames
    assert first is not None
    height, width = first.shape[2:4]
    columns = min(_FRAMES, first.shape[1])
    picture = _WIDTH / columns
    lines = textwrap.wrap(caption, _CAPTION_CHARACTERS)
    figure = _figure(len(rows) * (picture * height / width + 0.34) + 0.2 * len(lines))
    if lines:
        # a dollar sign in a prompt is no formula
        figure.suptitle("\n".join(lines), fontsize=_FONT, x=0.01, ha="left", parse_math=False)
    for part, (entry, pictures) in zip(_parts(figure, len(rows)), rows, strict=True):
        assert pictures.frames is not None
        video = pictures.frames[number]
        psnr = entry.record.psnr_db
        title = entry.label if psnr is None or number >= len(psnr) else f"{entry.label}: {psnr[number]:.1f} dB"
        part.suptitle(title, fontsize=_FONT, color=entry.colour, fontweight="bold", x=0.01, ha="left")
        chosen = np.linspace(0, len(video) - 1, columns).round().astype(int)
        for axes, index in zip(part.subplots(1, columns, squeeze=False)[0], chosen, strict=True):
            axes.imshow(video[index], interpolation="nearest")
            axes.set_axis_off()
    return figure


def _unit(seconds: float) -> tuple[str, float]:
    """A unit in which the figure has few zeros, and how many of it make a second."""
    if seconds >= 1:
        return "s", 1.0
    return ("ms", 1e3) if seconds >= 1e-3 else ("µs", 1e6)
