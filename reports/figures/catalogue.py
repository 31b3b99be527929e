"""Every figure there is, in the order of the page, and how they become pictures.

A figure is a module with a `TITLE`, a `CAPTION` that says how to read it, and `draw`. A new one is a file here and a
line in `FIGURES`.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from calibatt.reports.figures import density, fidelity, frames, ideal, masks, phases, speedup
from calibatt.reports.rows import Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# sharp on a screen of two pixels a point, at seven inches across
_DPI = 160


class FigureModule(Protocol):
    """What a module of a figure has."""

    __name__: str
    TITLE: str
    CAPTION: str

    def draw(self, rows: Sequence[Row]) -> Iterator[tuple[str, Figure]]:
        """The figures of one workload, each with its title; none where there is nothing to draw."""


FIGURES: tuple[FigureModule, ...] = (speedup, fidelity, ideal, phases, density, masks, frames)


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """A figure on the page.

    Args:
        name: of its PNG file.
        png: the file's bytes.
        title: stands above it.
        caption: how to read it.
    """

    name: str
    png: bytes
    title: str
    caption: str

    @property
    def uri(self) -> str:
        """The picture itself, as an address."""
        return f"data:image/png;base64,{base64.b64encode(self.png).decode()}"


def pictures(rows: Sequence[Row], stem: str) -> list[Picture]:
    """Every figure that the arms of a workload have something for.

    Args:
        rows: the arms.
        stem: what the names of the files start with.
    """
    import matplotlib

    found: list[Picture] = []
    # names and prompts are shown as they are: a dollar sign is no formula
    with matplotlib.rc_context({"text.parse_math": False}):
        for module in FIGURES:
            kind = module.__name__.rpartition(".")[2]
            for title, figure in module.draw(rows):
                name = f"{stem}-{len(found) + 1}-{kind}.png"
                found.append(Picture(name=name, png=_png(figure), title=title, caption=module.CAPTION))
    return found


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI, metadata={"Software": None})
    return buffer.getvalue()
