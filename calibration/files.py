"""Files of tensors: safetensors, written piece by piece and whole or not at all, and refused where they are damaged."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from calibatt.methods.facts import one_line
from calibatt.methods.learning import Layout

# by safetensors' names; what is learnt has no other types
_DTYPES = {
    torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.int16: "I16", torch.int32: "I32", torch.int64: "I64",
    torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32", torch.float64: "F64",
}  # fmt: skip


class UnusableCalibration(ValueError):
    """The file is not a calibration of this version; the message is one line that says why."""


class TensorFile:
    """A file that is being written: room for every tensor of a layout, filled in any order.

    Args:
        file: open for writing, empty.
        path: for messages.
        layout: dtype and shape of every tensor.
        metadata: of the file.

    Attributes:
        header: the bytes before the first tensor.

    Raises:
        ValueError: a calibration holds no tensors of such a dtype.
        OSError: it cannot be written.
    """

    def __init__(self, file: BinaryIO, path: Path, layout: Layout, metadata: Mapping[str, str]) -> None:
        self._file = file
        self._path = path
        self._layout = layout
        self._starts: dict[str, int] = {}
        header: dict[str, Any] = {"__metadata__": dict(metadata)}
        end = 0
        for name, (dtype, shape) in layout.items():
            if dtype not in _DTYPES:
                raise ValueError(f"{name} is {dtype}: calibrations hold no tensors of that type")
            self._starts[name] = end
            end += math.prod(shape) * dtype.itemsize
            header[name] = {"dtype": _DTYPES[dtype], "shape": shape, "data_offsets": (self._starts[name], end)}
        text = json.dumps(header).encode()
        # data starts at a multiple of 8, as safetensors requires
        text += b" " * (-len(text) % 8)
        self.header = len(text).to_bytes(8, "little") + text
        with naming(path):
            file.write(self.header)

    def put(self, name: str, tensor: Tensor, index: int = 0) -> None:
        """Write a tensor, or the part of a stack of such tensors that has this index.

        Args:
            name: of the tensor in the layout.
            tensor: its values.
            index: of the part, where the layout's tensor is a stack of such.

        Raises:
            OSError: it cannot be written.
        """
        content = raw(tensor)
        with naming(self._path):
            self._file.seek(len(self.header) + self._starts[name] + index * len(content))
            self._file.write(content)


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write to, which takes the place of `path` when the context ends, and leaves nothing when it fails.

    What a killed process leaves behind, the next one that writes this file replaces.

    Raises:
        OSError: it cannot be written.
    """
    aside = path.with_name(f".{path.name}.partial")
    try:
        with naming(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            file = aside.open("wb")
        try:
            yield file
            with naming(path):
                file.flush()
                os.fsync(file.fileno())
                file.close()
        finally:
            # after a failure, closing tries once more to write what is thrown away
            with suppress(OSError):
                file.close()
        with naming(path):
            os.replace(aside, path)
            _sync(path.parent)
    finally:
        aside.unlink(missing_ok=True)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Failures to write, in one line that names the file."""
    try:
        yield
    except OSError as error:
        raise OSError(f"{path} cannot be written: {error.strerror or error}") from None


@contextmanager
def reading(path: Path, schema: str) -> Iterator[tuple[Any, dict[str, str]]]:
    """An open safetensors file and its metadata.

    Args:
        path: of the file.
        schema: that its metadata must have.

    Raises:
        UnusableCalibration: the file is missing, damaged, of another schema, or something else.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata: dict[str, str] = file.metadata() or {}
            _check_schema(path, metadata, schema)
            _check_dtypes(path, file)
            yield file, metadata
    except FileNotFoundError:
        raise UnusableCalibration(f"{path} does not exist: `calibatt calibrate` makes a calibration") from None
    except (OSError, SafetensorError) as error:
        raise UnusableCalibration(
            f"{path} cannot be read as a calibration, or is cut short; its header: {one_line(error)}"
        ) from None


def raw(tensor: Tensor) -> memoryview:
    """A tensor's values as bytes."""
    values: memoryview = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
    return values


def described(name: str, tensor: Tensor) -> bytes:
    """Name, dtype and shape, for checksums."""
    return f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode()


def _check_schema(path: Path, metadata: Mapping[str, str], schema: str) -> None:
    if "schema" not in metadata:
        raise UnusableCalibration(f"{path} is no calibration by its header: `calibatt calibrate` makes one")
    if metadata["schema"] != schema:
        raise UnusableCalibration(
            f"{path} has the schema {one_line(metadata['schema'])!r} in its header, this version reads {schema!r}: "
            "run `calibatt calibrate` again"
        )


def _check_dtypes(path: Path, file: Any) -> None:
    for name in file.keys():  # noqa: SIM118
        dtype = file.get_slice(name).get_dtype()
        if dtype not in _DTYPES.values():
            raise UnusableCalibration(
                f"{path} has {one_line(name)} as {dtype}: calibrations hold no tensors of that type"
            )


def _sync(folder: Path) -> None:
    """Have the folder's entries on the disk, where a folder can be opened (not on Windows)."""
    if hasattr(os, "O_DIRECTORY"):
        opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)
