"""An artifact: the data of an arm's pictures, a `.npz` file beside the run.

It is read as a file of somebody else's: what it claims to hold is checked before any of that is loaded.
"""

from __future__ import annotations

import math
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from calibatt.bench.record import UnusableFile

T = TypeVar("T")

# so many masks and frames of a video are shown: more in a row are too small to see
_MASKS = 4
_FRAMES = 5
# pixels across of a frame as it is kept: at `_FRAMES` in a row, twice what is drawn
_FRAME_PIXELS = 448
# and as it plays, beside another: some 800 across both
_CLIP_PIXELS = 416
# a picture wider or higher than this is no video's
_ASPECT = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class _Form:
    """What an array of an artifact must be like.

    Args:
        kinds: numpy's letters for the types of its elements.
        most: largest size of each dimension.
        most_bytes: of all of it.
    """

    kinds: str
    most: tuple[int, ...]
    most_bytes: int


# the largest model here has 50 steps of 40 layers of 40 heads, and 1,182 × 1,182 blocks of 64 tokens at 720p; two 720p
# videos of 81 frames take 448 MB
_FORMS: Mapping[str, _Form] = MappingProxyType(
    {
        "density": _Form(kinds="f", most=(1024, 256, 256), most_bytes=2**24),
        "masks": _Form(kinds="b", most=(64, 2**13, 2**13), most_bytes=2**28),
        "mask_sites": _Form(kinds="iu", most=(64, 3), most_bytes=2**16),
        "frames": _Form(kinds="u", most=(16, 1024, 4096, 4096, 3), most_bytes=2**29),
        "captions": _Form(kinds="U", most=(16,), most_bytes=2**20),
        "frame_starts": _Form(kinds="iu", most=(1024,), most_bytes=2**16),
    }
)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Pictures:
    """What an artifact holds, as far as it is shown; an array that is not in the file is None.

    Args:
        density: kept fraction, float [steps, layers, heads].
        masks: kept blocks, bool [masks, query blocks, key blocks].
        mask_sites: (step, layer, head) of each mask, int [masks, 3].
        frames: uint8 [videos, frames, height, width, 3], the frames spread evenly over each video.
        captions: prompt of each video.
        frame_starts: token at which each frame of the sequence starts, where the plan keeps the tokens in order.
    """

    density: NDArray[np.floating] | None = None
    masks: NDArray[np.bool_] | None = None
    mask_sites: NDArray[np.integer] | None = None
    frames: NDArray[np.uint8] | None = None
    captions: NDArray[np.str_] | None = None
    frame_starts: NDArray[np.integer] | None = None


def load_pictures(path: Path | None) -> Pictures | None:
    """Read an artifact; None where there is no file.

    Raises:
        UnusableFile: it is damaged, holds something else, or claims more than pictures need.
    """
    return _read(path, _load)


def load_clip(path: Path | None) -> NDArray[np.uint8] | None:
    """All frames of an artifact's first video, uint8 [frames, height, width, 3]; None where there is none.

    Raises:
        UnusableFile: as of `load_pictures`.
    """
    return _read(path, _load_clip)


def _read(path: Path | None, load: Callable[[Path], T]) -> T | None:
    if path is None:
        return None
    try:
        return load(path)
    except UnusableFile as error:
        raise UnusableFile(
            f"{path}: {error}; run the benchmark again, or delete the file for a report without"
        ) from None
    # zipfile, zlib, tokenize and numpy do not document what they raise on a damaged file
    except Exception as error:
        raise UnusableFile(
            f"{path}: is not an artifact of calibatt ({type(error).__name__}: {error}); run the benchmark again"
        ) from None


def _load(path: Path) -> Pictures:
    found: dict[str, NDArray[Any]] = {}
    with zipfile.ZipFile(path) as file:
        names = set(file.namelist())
        for name, form in _FORMS.items():
            if f"{name}.npy" in names:
                with file.open(f"{name}.npy") as stream:
                    _check_header(name, form, stream)
                with file.open(f"{name}.npy") as stream:
                    found[name] = np.lib.format.read_array(stream, allow_pickle=False)
    if "masks" in found and len(found.get("mask_sites", ())) != len(found["masks"]):
        raise UnusableFile("not every mask says by mask_sites where it stands")
    # a mean of shares may be rounded up; and this is False of NaN
    if "density" in found and not ((found["density"] >= 0) & (found["density"] < 1.001)).all():
        raise UnusableFile("a density is not between 0 and 1")
    for name in ("masks", "mask_sites"):
        if name in found:
            found[name] = found[name][:_MASKS].copy()
    if "frames" in found:
        found["frames"] = _shown_frames(found["frames"])
    return Pictures(**found)


def _load_clip(path: Path) -> NDArray[np.uint8] | None:
    with zipfile.ZipFile(path) as file:
        if "frames.npy" not in file.namelist():
            return None
        with file.open("frames.npy") as stream:
            _, *shape = _check_header("frames", _FORMS["frames"], stream)
            # the videos stand one after the other, and the rest is not read
            video = np.frombuffer(stream.read(math.prod(shape)), np.uint8).reshape(shape)
    every = max(1, round(shape[2] / _CLIP_PIXELS))
    shown: NDArray[np.uint8] = video[:, ::every, ::every].copy()
    return shown


def _check_header(name: str, form: _Form, stream: IO[bytes]) -> tuple[int, ...]:
    """The shape of an array, which is one that is shown; the stream is then where its elements begin."""
    version = np.lib.format.read_magic(stream)
    if version != (1, 0):
        raise UnusableFile(f"its {name} is of numpy's format {version}, not (1, 0)")
    shape, by_columns, dtype = np.lib.format.read_array_header_1_0(stream)
    if by_columns and name == "frames":
        raise UnusableFile("its frames are stored by columns")
    if len(shape) != len(form.most):
        raise UnusableFile(f"its {name} has {len(shape)} dimensions, not {len(form.most)}")
    if dtype.kind not in form.kinds or (name == "frames" and dtype != np.uint8):
        raise UnusableFile(f"its {name} is of type {dtype}")
    size = dtype.itemsize
    for length, most in zip(shape, form.most, strict=True):
        size *= length
        if not 1 <= length <= most:
            raise UnusableFile(f"its {name} has the shape {shape}: between 1 and {form.most} is shown")
    if size > form.most_bytes:
        raise UnusableFile(f"its {name} would take {size:,} bytes, more than {form.most_bytes:,}")
    if name == "mask_sites" and shape[1] != 3:
        raise UnusableFile(f"its {name} has the shape {shape}: step, layer and head are 3")
    if name == "frames" and (shape[4] != 3 or not 1 / _ASPECT <= shape[2] / shape[3] <= _ASPECT):
        raise UnusableFile(f"its {name} has the shape {shape}, which is no video's")
    return tuple(shape)


def _shown_frames(videos: NDArray[np.uint8]) -> NDArray[np.uint8]:
    count, width = videos.shape[1], videos.shape[3]
    chosen = np.linspace(0, count - 1, min(_FRAMES, count)).round().astype(int)
    every = max(1, width // _FRAME_PIXELS)
    # a copy, so that the rest of the videos is freed
    shown: NDArray[np.uint8] = videos[:, chosen, ::every, ::every].copy()
    return shown
