"""Videos that play: dense attention's beside an arm's, of the same prompt and noise."""

from __future__ import annotations

import base64
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from calibatt.bench.record import Run
from calibatt.reports.artifact import load_clip
from calibatt.reports.findings import ratio
from calibatt.reports.rows import DENSE, Row

CAPTION = (
    "The first video of each arm, of the same prompt and noise as the dense one on its left: the fastest six arms. "
    "Figures are the speedup, and the PSNR of this video against that one."
)

# a page holds these itself
_MOST = 6
# as `calibatt generate` writes videos
_FRAMES_A_SECOND = 8
# pixels between both
_GAP = 8
# constant quality, at which nothing is seen of the compression beside what sparsity does; the speed takes a second a
# video; one thread and no identity of the file, so that one run makes the same files every time
_VP9 = ("-crf", "30", "-b:v", "0", "-deadline", "realtime", "-cpu-used", "6", "-threads", "1", "-fflags", "+bitexact",
        "-flags:v", "+bitexact")  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Clip:
    """A video on the page.

    Args:
        name, content: of its file, WebM.
        title: what is seen on the left and on the right.
        size: width and height in pixels.
    """

    name: str
    content: bytes
    title: str
    size: tuple[int, int]

    @property
    def uri(self) -> str:
        """The video itself, as an address."""
        return f"data:video/webm;base64,{base64.b64encode(self.content).decode()}"


def clips(run: Run, rows: Sequence[Row], stem: str) -> list[Clip]:
    """The fastest arms of a workload that have frames, each beside dense; none where dense has none.

    Args:
        run: where they were measured.
        rows: the arms.
        stem: what the names of the files start with.

    Raises:
        UnusableFile: an artifact is not what it should be.
    """
    dense = next((row for row in rows if row.record.method == DENSE), None)
    left = None if dense is None else load_clip(run.artifact(dense.record))
    found: list[Clip] = []
    timed = [row for row in rows if row.record.speedup is not None]
    for row in sorted(timed, key=ratio, reverse=True):
        if left is None or len(found) == _MOST:
            break
        right = None if row is dense else load_clip(run.artifact(row.record))
        # one that was not made of the same workload cannot stand beside it
        if right is not None and right.shape == left.shape:
            both = _side_by_side(left, right)
            found.append(
                Clip(
                    name=f"{stem}-video-{len(found) + 1}.webm", content=_webm(both), title=_title(row),
                    size=(both.shape[2], both.shape[1]),
                )
            )  # fmt: skip
    return found


def _title(row: Row) -> str:
    psnr = row.record.psnr_db
    facts = [f"{ratio(row):.2f}×"] if row.record.speedup else []
    facts += [f"{psnr[0]:.1f} dB"] if psnr else []
    return f"Dense, and {row.label}" + (f": {', '.join(facts)}" if facts else "")


def _side_by_side(left: NDArray[np.uint8], right: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Both videos with white between them, in an even number of rows and columns, as encoders want it."""
    frames, height, width, _ = left.shape
    both = np.full((frames, height + height % 2, 2 * width + _GAP, 3), 255, np.uint8)
    both[:, :height, :width], both[:, :height, width + _GAP :] = left, right
    return both


def _webm(frames: NDArray[np.uint8]) -> bytes:
    import imageio

    # players find their way only in what was written to a file
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.webm"
        imageio.mimwrite(
            path, list(frames), fps=_FRAMES_A_SECOND, codec="libvpx-vp9", quality=None, macro_block_size=2,
            output_params=list(_VP9), ffmpeg_log_level="error",
        )  # fmt: skip
        return path.read_bytes()
