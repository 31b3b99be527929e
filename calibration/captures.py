"""Queries, keys and values of some attention calls of a real model, as files that can be measured elsewhere."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from calibatt.calibration.files import replacing
from calibatt.kernels.base import Attender
from calibatt.kernels.catalogue import DEFAULT
from calibatt.methods.call import Call, SparseAttention
from calibatt.methods.catalogue import build
from calibatt.methods.facts import one_line, read_facts
from calibatt.methods.learning import Origin
from calibatt.methods.site import Site
from calibatt.models.adapter import installed
from calibatt.models.identity import origin_of

_SCHEMA = "calibatt-capture-1"
_NAMES = ("q", "k", "v")
# one of Wan 14B at 720p has 2.3 GB
CALLS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Captured:
    """Where a captured call happened, and in which pipeline.

    Args:
        path: of its file.
        site: its place; of the conditional branch.
        origin: the pipeline.
    """

    path: Path
    site: Site
    origin: Origin

    def load(self, device: torch.device, dtype: torch.dtype) -> tuple[Float[Tensor, "1 heads tokens head_dim"], ...]:
        """Queries, keys and values; tokens before heads in memory, as models hand them over.

        Raises:
            ValueError: the file is gone or damaged.
        """
        with _reading(self.path) as file:
            found = [file.get_tensor(name) for name in _NAMES]
        return tuple(x.to(device, dtype).transpose(0, 1)[None] for x in found)


@contextmanager
def capturing(
    pipe: Any, folder: Path | str, *, calls: int = CALLS, name: str | None = None, kernel: Attender = DEFAULT
) -> Iterator[list[Path]]:
    """While this context is open, inputs of some attention calls of the pipeline's first video are written to files.

    The calls are of the conditional branch, from the first step and layer to the last, evenly; each is written when it
    happens. Attention is dense meanwhile.

    Args:
        pipe: as for `attached`.
        folder: for the files; must be new or empty.
        calls: how many, if the video has as many steps or layers.
        name: of the model; the class of its transformer where None.
        kernel: computes attention.

    Returns:
        The files that have been written so far.

    Raises:
        ValueError: the folder has files, or none of the calls happened; or as `installed`.
        OSError: a file cannot be written.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is not an empty folder: captured calls of two videos must not be mixed")
    capturer = _Capturer(folder, calls, origin_of(pipe, name))
    with installed(pipe, SparseAttention(build("dense"), kernel, observers=[capturer])):
        yield capturer.paths
    if not capturer.paths:
        raise ValueError("no attention call was captured: has a video been made?")


class _Capturer:
    """Writes the inputs of some calls of the conditional branch: where, a call says, which knows how many there are."""

    def __init__(self, folder: Path, calls: int, origin: Origin) -> None:
        self.paths: list[Path] = []
        self._folder = folder
        self._shares = [i / max(1, calls - 1) for i in range(calls)]
        self._origin = origin

    def saw(self, call: Call) -> None:
        site = call.site
        places = {(round((site.steps - 1) * x), round((site.layers - 1) * x)) for x in self._shares}
        path = self._folder / f"step-{site.step:03}-layer-{site.layer:03}.safetensors"
        wanted = (site.step, site.layer) in places and site.branch == "cond" and site.sample == 0
        if wanted and path not in self.paths:
            _write(path, call, self._origin)
            self.paths.append(path)


def _write(path: Path, call: Call, origin: Origin) -> None:
    facts = _Facts(site=call.site, origin=origin)
    tensors = {
        name: x[0].transpose(0, 1).contiguous().cpu() for name, x in zip(_NAMES, (call.q, call.k, call.v), strict=True)
    }
    with replacing(path) as file:
        file.write(save(tensors, {"schema": _SCHEMA, "capture": json.dumps(asdict(facts))}))


def captures_in(folder: Path) -> list[Captured]:
    """The captured calls of a folder, in the order in which they happened; nothing of their tensors is read.

    Raises:
        ValueError: there are none, one is damaged, or they are of several pipelines or sizes.
    """
    found = sorted(
        (_described(path) for path in folder.glob("*.safetensors")), key=lambda one: (one.site.step, one.site.layer)
    )
    if not found:
        raise ValueError(f"{folder} has no captured calls: `calibatt capture` makes them")
    first = found[0]
    for other in found[1:]:
        if _run_of(other) != _run_of(first):
            raise ValueError(f"{first.path.name} and {other.path.name} in {folder} are of different pipelines or sizes")
    return found


def _run_of(one: Captured) -> tuple[Any, ...]:
    return one.origin, one.site.geometry, one.site.steps, one.site.layers


def _described(path: Path) -> Captured:
    with _reading(path) as file:
        metadata = file.metadata() or {}
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    if metadata.get("schema") != _SCHEMA:
        raise ValueError(f"{path} is no captured call of this version ({metadata.get('schema')}, not {_SCHEMA})")
    try:
        facts = read_facts(_Facts, metadata.get("capture", ""))
    except ValueError as error:
        raise ValueError(f"{path} does not say where its call happened: {error}") from None
    geometry = facts.site.geometry
    shape = (geometry.tokens, geometry.heads, geometry.head_dim)
    if shapes != dict.fromkeys(_NAMES, shape):
        raise ValueError(f"{path} is to hold q, k and v of {shape}, tokens × heads × head dim; it holds {shapes}")
    return Captured(path=path, site=facts.site, origin=facts.origin)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Facts:
    """What a file says besides its tensors."""

    site: Site
    origin: Origin


@contextmanager
def _reading(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} cannot be read as a captured call, or is cut short: {one_line(error)}") from None
