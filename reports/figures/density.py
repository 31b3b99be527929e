"""Kept fraction of the block products by step, layer and head, one map an arm."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from calibatt.reports.figures.style import FONT, SMALL, beside, in_lines, new_figure, size, sparse_portions
from calibatt.reports.rows import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TITLE = "Density by step, layer and head"
CAPTION = (
    "What share of the block products each head computes: steps from left to right, layers from top to bottom, "
    "the heads of a layer next to each other. Bright is dense, dark is sparse."
)
KEY = "Share of the block products computed at each call, no interval."

# of the width, above one of two maps
_TITLE = 0.38


def draw(rows: Sequence[Row]) -> Iterator[tuple[str, Figure]]:
    """One figure for every eight arms whose densities are known."""
    for some in sparse_portions([row for row in rows if row.pictures and row.pictures.density is not None]):
        maps = [(row, row.pictures.density) for row in some if row.pictures and row.pictures.density is not None]
        yield TITLE, _figure(maps)


def _figure(maps: Sequence[tuple[Row, NDArray[np.floating]]]) -> Figure:
    columns = min(beside(2), len(maps))
    lines = -(-len(maps) // columns)
    figure = new_figure(3.0 * lines + 0.3)
    grid = figure.subplots(lines, columns, squeeze=False)
    images = [_map(axes, row, values) for axes, (row, values) in zip(grid.flat, maps, strict=False)]
    for axes in grid.flat[len(maps) :]:
        axes.remove()
    bar = figure.colorbar(images[0], ax=list(grid.flat[: len(maps)]), fraction=0.04, pad=0.02)
    bar.set_label("density: share of the blocks computed")
    return figure


def _map(axes: Axes, row: Row, values: NDArray[np.floating]) -> Any:
    steps, layers, heads = values.shape
    image = axes.imshow(
        values.reshape(steps, layers * heads).T, aspect="auto", interpolation="nearest", cmap="cividis", vmin=0,
        vmax=1, extent=(-0.5, steps - 0.5, layers * heads, 0),
    )  # fmt: skip
    # lines between layers, unless there are so many that they would hide the map
    if heads > 1 and layers <= 16:
        axes.hlines(np.arange(1, layers) * heads, -0.5, steps - 0.5, color="white", linewidth=0.6)
    every = -(-layers // 8)
    shown = range(0, layers, every)
    axes.set_yticks([(layer + 0.5) * heads for layer in shown], list(map(str, shown)))
    axes.set_xticks(range(0, steps, -(-steps // 8)))
    name = in_lines(row.heading, FONT, _TITLE * 2 / beside(2))
    axes.set_title(f"{name}\nmean {values.mean():.2f}", fontsize=size(FONT), color=row.colour, loc="left")
    axes.set_xlabel("step")
    axes.set_ylabel(f"layer ({heads} heads each)" if heads > 1 else "layer")
    axes.tick_params(labelsize=size(SMALL))
    return image
