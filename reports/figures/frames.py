"""Frames of the videos: one row an arm, dense first, time from left to right."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from calibatt.bench.record import plain
from calibatt.reports.figures.style import FONT, new_figure, parts, sheet, size, sparse_portions
from calibatt.reports.rows import DENSE, Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TITLE = "Frames"
CAPTION = (
    "The same prompt and the same noise in every row, time from left to right. The figure after a name is the "
    "PSNR of that video against the dense one."
)
KEY = "One video of each arm, of the same prompt and noise; dB: its PSNR against the dense one."

# letters of a prompt that are shown: some twelve lines
_LONGEST_PROMPT = 1000


def draw(rows: Sequence[Row]) -> Iterator[tuple[str, Figure]]:
    """For every eight arms one figure a video, with its prompt as the title; dense stands in each."""
    shown = [row for row in rows if _videos(row) is not None]
    dense = [row for row in shown if row.record.method == DENSE][:1]
    for some in list(sparse_portions(shown)) or [()]:
        videos = [(row, frames) for row in (*dense, *some) if (frames := _videos(row)) is not None]
        for number in range(max((len(frames) for _, frames in videos), default=0)):
            yield _figure([(row, frames[number]) for row, frames in videos if number < len(frames)], number)


def _videos(row: Row) -> NDArray[np.uint8] | None:
    return None if row.pictures is None else row.pictures.frames


def _prompt(rows: Sequence[Row], number: int) -> str:
    """What the video was asked to show, where an artifact says so."""
    for row in rows:
        captions = None if row.pictures is None else row.pictures.captions
        if captions is not None and number < len(captions):
            return plain(str(captions[number]), _LONGEST_PROMPT)
    return ""


def _figure(rows: Sequence[tuple[Row, NDArray[np.uint8]]], number: int) -> tuple[str, Figure]:
    prompt = _prompt([row for row, _ in rows], number)
    columns, height, width, _ = rows[0][1].shape
    lines = textwrap.wrap(prompt, sheet().letters(FONT))
    figure = new_figure(len(rows) * (sheet().width / columns * height / width + 0.34) + 0.2 * len(lines))
    if lines:
        figure.suptitle("\n".join(lines), fontsize=size(FONT), x=0.01, ha="left")
    for part, (row, video) in zip(parts(figure, len(rows)), rows, strict=True):
        psnr = row.record.psnr_db
        name = row.heading if psnr is None or number >= len(psnr) else f"{row.heading}: {psnr[number]:.1f} dB"
        part.suptitle(name, fontsize=size(FONT), color=row.colour, fontweight="bold", x=0.01, ha="left")
        for axes, frame in zip(part.subplots(1, columns, squeeze=False)[0], video, strict=False):
            axes.imshow(frame, interpolation="nearest")
            axes.set_axis_off()
    return f"“{prompt}”" if prompt else TITLE, figure
