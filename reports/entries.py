"""The arms of a workload as a report shows them: name, colour, and the data of their pictures."""

from __future__ import annotations

import zipfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calibatt.bench.record import Record, Run, UnusableFile

DENSE = "dense"
RANDOM = "random"

# as their authors write them; any other method goes by its own name
_NAMES = {
    DENSE: "Dense", "calibatt": "CalibAtt", "radial": "Radial", "sparge": "SpargeAttn", "xattention": "XAttention",
    "adaspa": "AdaSpa", "minference": "MInference", "nabla": "NABLA", "draft": "DraftAttention", "sta": "STA",
    "jenga": "Jenga", "svg": "SVG", "svg2": "SVG2", "svoo": "SVOO", "lite": "LiteAttention", "blasst": "BLASST",
    "scaling": "ScalingAttention", "compact": "Compact Attention", "sage": "SageAttention", RANDOM: "Random mask",
}  # fmt: skip
# Okabe and Ito, "Color Universal Design" (2008), without the yellow that white paper swallows; greys for the controls
_COLOURS = {DENSE: "#333333", "calibatt": "#0072B2", "radial": "#D55E00", "sparge": "#009E73", RANDOM: "#8C8C8C"}
_MORE_COLOURS = ("#CC79A7", "#E69F00", "#56B4E9")
# dimensions of each array of an artifact
_ARRAYS = {"density": 3, "masks": 3, "mask_sites": 2, "frames": 5, "captions": 1, "frame_starts": 1}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Pictures:
    """What an artifact holds; an array that is not in the file is None.

    Args:
        density: kept fraction, float [steps, layers, heads].
        masks: kept blocks, bool [masks, query blocks, key blocks].
        mask_sites: (step, layer, head) of each mask, int [masks, 3].
        frames: uint8 [videos, frames, height, width, 3].
        captions: prompt of each video.
        frame_starts: token at which each frame of the sequence starts, where the plan keeps the tokens in order.
    """

    density: NDArray[np.floating] | None = None
    masks: NDArray[np.bool_] | None = None
    mask_sites: NDArray[np.integer] | None = None
    frames: NDArray[np.uint8] | None = None
    captions: NDArray[np.str_] | None = None
    frame_starts: NDArray[np.integer] | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Entry:
    """One arm in a report.

    Args:
        record: what was measured.
        label: name that no other arm of the workload has.
        colour: of its method, the same in every figure.
        pictures: data of its pictures, if there is any.
    """

    record: Record
    label: str
    colour: str
    pictures: Pictures | None


def entries(run: Run, records: Sequence[Record], colours: Mapping[str, str]) -> tuple[Entry, ...]:
    """The arms of one workload, dense first.

    Raises:
        UnusableFile: an artifact is not what it should be.
    """
    ordered = sorted(records, key=lambda record: record.method != DENSE)
    return tuple(
        Entry(record=record, label=label, colour=colours[record.method], pictures=_pictures(run.artifact(record)))
        for record, label in zip(ordered, labels(ordered), strict=True)
    )


def labels(records: Sequence[Record]) -> list[str]:
    """A name for each record; kernel, block and mask are added where the name alone would stand for several."""
    names = [_name(record) for record in records]
    for field in ("kernel", "block", "mask"):
        count = Counter(names)
        names = [
            name if count[name] == 1 or getattr(record, field) is None else f"{name}, {_shown(getattr(record, field))}"
            for name, record in zip(names, records, strict=True)
        ]
    return names


def palette(methods: Iterable[str]) -> dict[str, str]:
    """A colour for every method."""
    others = sorted(set(methods) - set(_COLOURS))
    return {**_COLOURS, **{name: _MORE_COLOURS[i % len(_MORE_COLOURS)] for i, name in enumerate(others)}}


def _name(record: Record) -> str:
    # the arm's own suffixes, behind the name that people know
    suffixes = (
        record.arm.removeprefix(record.method).replace(" =density", " at equal density").replace(" =", " at density ")
    )
    return _NAMES.get(record.method, record.method) + suffixes


def _shown(value: Any) -> str:
    return "×".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _pictures(path: Path | None) -> Pictures | None:
    if path is None:
        return None
    try:
        with np.load(path, allow_pickle=False) as file:
            found = {name: file[name] for name in _ARRAYS if name in file}
    except (OSError, ValueError, EOFError, AttributeError, TypeError, zipfile.BadZipFile) as error:
        raise UnusableFile(f"{path}: is not an artifact of calibatt ({error}); run the benchmark again") from None
    for name, array in found.items():
        if array.ndim != _ARRAYS[name]:
            raise UnusableFile(f"{path}: its {name} has {array.ndim} dimensions, not {_ARRAYS[name]}")
    if "masks" in found and len(found.get("mask_sites", ())) != len(found["masks"]):
        raise UnusableFile(f"{path}: not every mask says by mask_sites where it stands")
    return Pictures(**found)
