"""A few masks an arm, in one row, or where a figure is narrow in two."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from calibatt.reports.artifact import Pictures
from calibatt.reports.figures.style import FONT, SMALL, beside, new_figure, parts, sheet, size, sparse_portions
from calibatt.reports.rows import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TITLE = "Some masks"
CAPTION = (
    "A few masks as they were used. Each cell is a block of queries (down) and keys (across); dark ones are "
    "computed. Orange lines, where there are any, mark the video's frames."
)
KEY = "Single calls as they were computed, no sample of them."


def draw(rows: Sequence[Row]) -> Iterator[tuple[str, Figure]]:
    """One figure for every eight arms that have masks."""
    for some in sparse_portions([row for row in rows if row.pictures and row.pictures.masks is not None]):
        yield TITLE, _figure([(row, row.pictures) for row in some if row.pictures])


def _figure(rows: Sequence[tuple[Row, Pictures]]) -> Figure:
    columns = max(len(pictures.masks) for _, pictures in rows if pictures.masks is not None)
    across = beside(columns)
    down = -(-columns // across)
    figure = new_figure(len(rows) * down * (sheet().width / max(across, beside(3)) + 0.6))
    for part, (row, pictures) in zip(parts(figure, len(rows)), rows, strict=True):
        part.suptitle(row.heading, fontsize=size(FONT), color=row.colour, fontweight="bold", x=0.02, ha="left")
        _masks(part.subplots(down, across, squeeze=False), row, pictures)
    return figure


def _masks(grid: Any, row: Row, pictures: Pictures) -> None:
    masks, sites = pictures.masks, pictures.mask_sites
    assert masks is not None
    assert sites is not None
    for axes, mask, (step, layer, head) in zip(grid.flat, masks, sites, strict=False):
        axes.imshow(
            mask, cmap="Greys", vmin=0, vmax=1.15, interpolation="nearest", aspect="auto",
            extent=(0, mask.shape[1], mask.shape[0], 0),
        )  # fmt: skip
        _frame_boundaries(axes, row, pictures)
        axes.set_title(f"step {step}, layer {layer}\nhead {head}, density {mask.mean():.2f}", fontsize=size(SMALL))
        axes.set_box_aspect(1)
        axes.tick_params(labelsize=size(SMALL - 2))
        axes.locator_params(nbins=4, integer=True)
        axes.set_xlabel("key block", fontsize=size(SMALL - 1), labelpad=1)
    for axes in grid[:, 0]:
        axes.set_ylabel("query block", fontsize=size(SMALL - 1), labelpad=1)
    for axes in grid.flat[len(masks) :]:
        axes.remove()


def _frame_boundaries(axes: Axes, row: Row, pictures: Pictures) -> None:
    block = row.record.block
    if pictures.frame_starts is None or block is None:
        return
    starts = pictures.frame_starts[pictures.frame_starts > 0]
    for at in starts / block[0]:
        axes.axhline(at, color="#D55E00", linewidth=0.5)
    for at in starts / block[1]:
        axes.axvline(at, color="#D55E00", linewidth=0.5)
