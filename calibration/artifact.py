"""The calibration: what any method learnt, and the file that holds it."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from calibatt.calibration.card import card
from calibatt.calibration.files import UnusableCalibration, naming, replacing
from calibatt.calibration.resized import transfer
from calibatt.calibration.sections import Index, SectionedTables, label, write_sections
from calibatt.calibration.videos import Videos
from calibatt.kernels.geometry import Geometry
from calibatt.kernels.names import look_up
from calibatt.methods.catalogue import METHODS
from calibatt.methods.facts import one_line, read_facts
from calibatt.methods.learning import ROWS, Learnt, Provenance, sections

SCHEMA = "calibatt-calibration-3"
# in a folder, or a repository of the Hub
_FILE, _CARD = "calibration.safetensors", "README.md"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Calibration(Learnt):
    """What a method learnt, with a file of its own."""

    def save(self, path: Path) -> None:
        """Write the file, whole or not at all; of tables that lie in a file, one part is held at a time.

        Raises:
            UnusableCalibration: the file that tables lie in is damaged.
            OSError: it cannot be written.
        """
        self.write(path, ((name, index, self.parts.part(name, index)) for name, index in self._every()))

    def write(self, path: Path, parts: Iterable[tuple[str, Index, Tensor]]) -> None:
        """Write a file of this layout and these facts with other values, whole or not at all.

        Args:
            path: of the file.
            parts: table, index and values of each part of each table.

        Raises:
            ValueError: no method can have learnt a part.
            OSError: it cannot be written.
        """
        facts = {"method": self.method, "preset": self.preset, "settings": dict(self.settings)}
        text = json.dumps({**facts, "provenance": asdict(self.provenance)})
        with replacing(path) as file:
            write_sections(file, path, self.parts.layout, parts, {"schema": SCHEMA, "facts": text})

    @classmethod
    def load(cls, path: Path, *, verify: bool = False) -> Calibration:
        """Map a file that `save` wrote into memory: each part of its tables is read and checked when it is first used.

        Args:
            path: of the file.
            verify: read and check all of them now.

        Raises:
            UnusableCalibration: the file is missing, damaged, changed, of another version, or not a calibration;
                or no method can have learnt what it holds.
        """
        tables = SectionedTables(path, SCHEMA)
        try:
            known = read_facts(_Facts, tables.metadata.get("facts", ""))
            own = cls(
                method=known.method, preset=known.preset, settings=known.settings, tables=tables,
                provenance=known.provenance,
            )  # fmt: skip
            own.check_facts()
            tables.check = partial(check_part, known.method, known.settings, known.provenance.geometry)
            own._check_rows()
        except UnusableCalibration:
            raise
        except ValueError as error:
            raise UnusableCalibration(f"{path} contradicts itself: {one_line(error)}") from None
        if verify:
            for name, index in own._every():
                tables.part(name, index)
        return own

    def transferred(self, videos: Videos, *, block: tuple[int, int] | None = None) -> Calibration:
        """The calibration for another size or number of steps of the same model, nothing learnt anew.

        What is known of blocks goes by their place in the video (`methods/transfer.py`); each step takes what is known
        of the step whose noise level is nearest. Tables are made when they are used: save it, and load what was saved.

        Args:
            videos: of the size and steps that it is to be for; one is begun, and ends at its first attention call.
            block: tokens of a query and of a key block; as they were where None.

        Raises:
            CalibrationMismatch: the videos are of another model, other weights of it, or another adapter.
            ValueError: what the method learnt cannot be transferred, or not to this size; or the calibration was made
                before calibrations kept noise levels.
        """
        return transfer(self, videos, block=block)

    def save_pretrained(self, folder: str | Path, *, licence: str | None = None) -> None:
        """Write the file into a folder, with a card beside it, as repositories of the Hugging Face Hub have them.

        Args:
            folder: made where it is missing.
            licence: of the calibration, as the Hub names licences; None leaves it open.

        Raises:
            ValueError: another card lies there.
            OSError: it cannot be written.
        """
        folder = Path(folder)
        path, text = folder / _CARD, card(self, _FILE, licence=licence).encode()
        if path.exists() and path.read_bytes() != text:
            raise ValueError(f"{path} is another card: delete it, or save to another folder")
        self.save(folder / _FILE)
        with replacing(path) as file, naming(path):
            file.write(text)

    @classmethod
    def from_pretrained(cls, source: str | Path, **where: Any) -> Calibration:
        """Read what `save_pretrained` or `push_to_hub` wrote.

        Args:
            source: a folder, or else a repository of the Hugging Face Hub, as owner/name.
            where: for `huggingface_hub.hf_hub_download`: revision, token, cache_dir, local_files_only and others.

        Raises:
            UnusableCalibration: as `load`; or the repository cannot be had.
        """
        if Path(source).is_dir():
            return cls.load(Path(source) / _FILE)
        from huggingface_hub import hf_hub_download

        try:
            path = hf_hub_download(str(source), _FILE, **where)
        # what it raises for a missing repository, a gated one, a wrong name and no network has this in common
        except (OSError, ValueError) as error:
            raise UnusableCalibration(
                f"{source} is no folder here, and {_FILE} cannot be had from the Hub: {one_line(error)}"
            ) from None
        return cls.load(Path(path))

    def push_to_hub(
        self, repository: str, *, licence: str | None = None, private: bool | None = None, token: str | None = None
    ) -> str:
        """Put the file and its card into a repository of the Hugging Face Hub, which is made where it is missing.

        Args:
            repository: owner/name.
            licence: as for `save_pretrained`.
            private: whether a new repository is; None for what its owner's account says.
            token: None for the one that is logged in with.

        Returns:
            Address of the commit.

        Raises:
            OSError: the Hub cannot be reached, or refuses.
        """
        from huggingface_hub import HfApi

        api = HfApi(token=token)
        with tempfile.TemporaryDirectory(prefix="calibatt-") as folder:
            self.save_pretrained(folder, licence=licence)
            api.create_repo(repository, private=private, exist_ok=True)
            done = api.upload_folder(
                repo_id=repository, folder_path=folder, commit_message=f"A calibration of {self.method}"
            )
        return str(done.commit_url)

    def validate(self) -> None:
        """Refuse what no method can have learnt.

        Raises:
            ValueError: one line that names the field, or the table and where in it.
        """
        self.check_facts()
        self._check_rows()
        for name, index in self._every():
            self.check_part(name, index, self.parts.part(name, index))

    def check_part(self, name: str, index: Index, part: Tensor) -> None:
        """Refuse values that the method cannot have learnt.

        Raises:
            ValueError: one line that names the table and where in it.
        """
        try:
            check_part(self.method, self.settings, self.provenance.geometry, name, part)
        except ValueError as error:
            raise ValueError(f"{label(name, index)}: {error}") from None

    def check_facts(self) -> None:
        """Refuse facts, and names, dtypes and shapes of tables, that cannot be any method's; no values are read.

        Raises:
            ValueError: one line that names the field or the table.
        """
        own = self.provenance
        for name, least in (("steps", own.steps), ("layers", own.layers), ("prompts", len(own.prompts))):
            if least < 1:
                raise ValueError(f"provenance.{name}: must be at least 1, got {least}")
        if own.sigmas and len(own.sigmas) != own.steps:
            raise ValueError(f"provenance.sigmas: {len(own.sigmas)} noise levels of {own.steps} steps")
        if own.cost_ratio < 1:
            raise ValueError(f"provenance.cost_ratio: must be at least 1, got {own.cost_ratio}")
        look_up(METHODS, self.method, "method").check_tables(self)

    def _check_rows(self) -> None:
        """Refuse rows that there are not, where sites share some."""
        for name, (_, shape) in self.parts.layout.items():
            if name + ROWS in self.tables:
                rows = self.tables[name + ROWS]
                if rows.dtype != torch.int32 or not bool(((rows >= 0) & (rows < shape[0])).all()):
                    raise ValueError(f"{name}{ROWS}: a row is not one of the {shape[0]} that there are")

    def _every(self) -> Iterator[tuple[str, Index]]:
        """All parts of all tables."""
        layout = self.parts.layout
        return ((name, index) for name in layout for index in sections(layout, name))


def check_part(method: str, settings: Mapping[str, Any], geometry: Geometry, name: str, part: Tensor) -> None:
    """Refuse values that a method cannot have learnt.

    Args:
        method: its name.
        settings, geometry: what it learnt by and from.
        name: of the table.
        part: of one step and layer, or a row that some share.

    Raises:
        ValueError: one line that says what is wrong.
    """
    if part.is_floating_point() and bool(part.isnan().any()):
        raise ValueError("a value is NaN")
    METHODS[method].check_part(name, part, settings, geometry)


def check_output(path: Path) -> None:
    """Refuse, before any work is done, to write a file where it cannot be written.

    Raises:
        ValueError: the path is not a regular file, or its folder cannot be written to.
    """
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is not a regular file: give the name of a file")
    folder = path.parent
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(f"{path} cannot be written: {folder} is not a folder that you can write to")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Facts:
    """What a file holds besides its tables."""

    method: str
    preset: str
    settings: Mapping[str, Any]
    provenance: Provenance
