"""Every figure there is, in the order of the page, and how they become pictures.

A figure is a module with a `TITLE`, a `CAPTION` that says how to read it, a `KEY` that says what its marks are, and
`draw`. A new one is a file here and a line in `FIGURES`, or in `OVERVIEWS` where it is of all workloads.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from calibatt.bench.record import Run
from calibatt.reports.facts import imprint, samples
from calibatt.reports.figures import density, fidelity, frames, heatmap, ideal, masks, phases, speedup
from calibatt.reports.figures.style import SHEETS, Sheet, drawn_on, sign
from calibatt.reports.rows import Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# across, on whatever sheet: sharp on a screen of two pixels a point, where a page's width is shown, and in print
_PIXELS = 1120
# the kinds of files of a figure, and what is left out of each, so that one run makes the same files every time
_FILES: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {"png": {"Software": None}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}
)


@runtime_checkable
class FigureModule(Protocol):
    """What a module of a figure has."""

    __name__: str
    TITLE: str
    CAPTION: str
    KEY: str

    def draw(self, rows: Sequence[Row]) -> Iterator[tuple[str, Figure]]:
        """The figures of some arms, each with its title; none where there is nothing to draw."""


FIGURES: tuple[FigureModule, ...] = (speedup, fidelity, ideal, phases, density, masks, frames)
# drawn once of all workloads of a suite together
OVERVIEWS: tuple[FigureModule, ...] = (heatmap,)


# of these the page has lossy pictures, which look the same and take a fifth of the bytes
_PHOTOGRAPHS: tuple[FigureModule, ...] = (frames,)
# of WebP's 100: no difference is seen on a screen
_LOSSY_QUALITY = 85


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """A figure on the page.

    Args:
        files: bytes of each of its files by name.
        title: stands above it.
        caption: how to read it.
        shown: the picture that the page holds, WebP.
        size: its width and height in pixels.
    """

    files: Mapping[str, bytes]
    title: str
    caption: str
    shown: bytes
    size: tuple[int, int]

    @property
    def uri(self) -> str:
        """The picture itself, as an address."""
        return f"data:image/webp;base64,{base64.b64encode(self.shown).decode()}"


def pictures(
    run: Run, rows: Sequence[Row], stem: str, modules: Sequence[FigureModule] = FIGURES, sheet: Sheet = SHEETS["page"]
) -> list[Picture]:
    """Every figure that the arms have something for.

    Args:
        run: where they were measured.
        rows: the arms.
        stem: what the names of the files start with.
        modules: the figures to draw.
        sheet: what they are to stand on.
    """
    import matplotlib

    found: list[Picture] = []
    facts = imprint(run, rows)
    # names and prompts are shown as they are: a dollar sign is no formula. Without a salt, names inside an SVG file
    # are drawn at random
    with matplotlib.rc_context({"text.parse_math": False, "svg.hashsalt": "calibatt"}), drawn_on(sheet):
        for module in modules:
            kind = module.__name__.rpartition(".")[2]
            for title, figure in module.draw(rows):
                box = sign(figure, f"{facts}\n{module.KEY.format(samples=samples(rows))}")
                files = {}
                for suffix, metadata in _FILES.items():
                    buffer = io.BytesIO()
                    figure.savefig(buffer, format=suffix, dpi=_PIXELS / sheet.width, metadata=metadata, bbox_inches=box)
                    files[suffix] = buffer.getvalue()
                shown, size = _for_page(files["png"], lossy=module in _PHOTOGRAPHS)
                names = {f"{stem}-{len(found) + 1}-{kind}.{suffix}": content for suffix, content in files.items()}
                found.append(Picture(files=names, title=title, caption=module.CAPTION, shown=shown, size=size))
    return found


def _for_page(png: bytes, *, lossy: bool) -> tuple[bytes, tuple[int, int]]:
    """A picture as the page holds it, a third as large, and its width and height."""
    import imageio.v3 as imageio

    # figures have no transparent pixels
    pixels = imageio.imread(png, extension=".png", mode="RGB")
    how = {"quality": _LOSSY_QUALITY} if lossy else {"lossless": True}
    return imageio.imwrite("<bytes>", pixels, extension=".webp", **how), (pixels.shape[1], pixels.shape[0])
