"""Files of tables in sections: each part of a table, of one site, has its checksum, which is checked when it is used.

Such a file is one of safetensors. Beside the tables it holds `checksums`, the last of its tensors: SHA-256 of every
part of every table, in the order in which they lie, of the header, and of all these checksums.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from calibatt.calibration.files import TensorFile, UnusableCalibration, raw, reading
from calibatt.methods.facts import one_line
from calibatt.methods.learning import Layout, Tables, sections

_CHECKSUMS = "checksums"
_CHECKSUM_BYTES = hashlib.sha256().digest_size
# what safetensors itself takes
_LONGEST_HEADER = 100_000_000
Index = tuple[int, ...]
Check = Callable[[str, Tensor], None]


def write_sections(
    file: BinaryIO, path: Path, layout: Layout, parts: Iterable[tuple[str, Index, Tensor]], metadata: Mapping[str, str]
) -> None:
    """Write tables part by part, each once, in any order; none is held.

    Args:
        file: open for writing, empty.
        path: for messages.
        layout: of the tables.
        parts: table, index and values of each.
        metadata: of the file.

    Raises:
        ValueError: a calibration holds no table of such a name or dtype.
        OSError: it cannot be written.
    """
    if _CHECKSUMS in layout:
        raise ValueError(f"no table is named {_CHECKSUMS}: the file's own are")
    # the largest elements first, so that all of a type begin at multiples of its size
    layout = dict(sorted(layout.items(), key=lambda item: -item[1][0].itemsize))
    numbers = _numbers(layout)
    whole = {**layout, _CHECKSUMS: (torch.uint8, (len(numbers) + 2, _CHECKSUM_BYTES))}
    content = TensorFile(file, path, whole, metadata)
    checksums = torch.zeros(len(numbers) + 2, _CHECKSUM_BYTES, dtype=torch.uint8)
    first = {name: number for (name, _), number in reversed(numbers.items())}
    for name, index, part in parts:
        number = numbers[name, index]
        content.put(name, part, number - first[name])
        checksums[number] = _checksum(label(name, index), raw(part))
    checksums[-2] = _checksum("header", content.header)
    checksums[-1] = _checksum(_CHECKSUMS, raw(checksums[:-1]))
    content.put(_CHECKSUMS, checksums)


class SectionedTables(Tables):
    """Tables of a file, mapped into memory: each part is read, and checked, when it is first asked for.

    Args:
        path: of the file.
        schema: that its metadata must have.

    Attributes:
        metadata: of the file.
        check: refuses values that cannot be, by table and part; until it is set, any may be.

    Raises:
        UnusableCalibration: the file is missing, cut short, of another schema or something else, or its header or its
            checksums are damaged; later, whenever a part is asked for that is damaged or refused.
    """

    def __init__(self, path: Path, schema: str) -> None:
        with reading(path, schema) as (file, self.metadata):
            super().__init__({name: file.get_tensor(name) for name in file.offset_keys()})
        self._path = path
        self.check: Check = lambda name, part: None
        checksums = self._tables.pop(_CHECKSUMS, torch.empty(0))
        if checksums.dtype != torch.uint8 or checksums.shape[1:] != (_CHECKSUM_BYTES,) or len(checksums) < 2:
            raise self._damaged("header")
        if not torch.equal(checksums[-1], _checksum(_CHECKSUMS, raw(checksums[:-1]))):
            raise self._damaged(_CHECKSUMS)
        if not torch.equal(checksums[-2], _checksum("header", _header(path))):
            raise self._damaged("header")
        # a copy: what was checked is not read from the file again
        self._checksums = checksums.clone()
        self._numbers = _numbers(self.layout)
        if len(self._numbers) + 2 != len(checksums):
            raise self._damaged("header")
        self._seen = torch.zeros(len(self._numbers), dtype=torch.bool)

    def __getitem__(self, name: str) -> Tensor:
        table = super().__getitem__(name)
        for index in sections(self.layout, name):
            self.part(name, index)
        return table

    def part(self, name: str, index: Index) -> Tensor:
        """What lies there, once it has been found to be what was written, and to be possible."""
        part = super().part(name, index)
        number = self._numbers[name, index]
        if not self._seen[number]:
            where = label(name, index)
            if not torch.equal(self._checksums[number], _checksum(where, raw(part))):
                raise self._damaged(where)
            try:
                self.check(name, part)
            except ValueError as error:
                raise UnusableCalibration(f"{self._path} contradicts itself: {where}: {one_line(error)}") from None
            self._seen[number] = True
        return part

    def _damaged(self, section: str) -> UnusableCalibration:
        return UnusableCalibration(
            f"{self._path} was changed or damaged after it was saved: the checksum of its section {section} does not "
            "match"
        )


def _numbers(layout: Layout) -> dict[tuple[str, Index], int]:
    """All parts of all tables, numbered in the order in which they lie."""
    every = [(name, index) for name in layout for index in sections(layout, name)]
    return {part: number for number, part in enumerate(every)}


def label(name: str, index: Index) -> str:
    """How a section is called in messages."""
    names = ("step", "layer") if len(index) == 2 else ("row",)
    return ", ".join((one_line(name), *(f"{what} {which}" for what, which in zip(names, index, strict=False))))


def _checksum(label: str, content: memoryview | bytes) -> Tensor:
    digest = hashlib.sha256(f"{label}\n".encode())
    digest.update(content)
    return torch.frombuffer(bytearray(digest.digest()), dtype=torch.uint8)


def _header(path: Path) -> bytes:
    """The bytes before the first tensor."""
    with path.open("rb") as file:
        length = file.read(8)
        return length + file.read(min(int.from_bytes(length, "little"), _LONGEST_HEADER))
