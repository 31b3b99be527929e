"""The calibration: what any method learnt, and the file that holds it."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from calibatt.calibration.card import card
from calibatt.calibration.files import (
    TensorFile,
    UnusableCalibration,
    described,
    naming,
    raw,
    reading,
    replacing,
)
from calibatt.kernels.names import look_up
from calibatt.methods.catalogue import METHODS
from calibatt.methods.facts import one_line, read_facts
from calibatt.methods.learning import Learnt, Provenance

SCHEMA = "calibatt-calibration-2"
# in a folder, or a repository of the Hub
_FILE, _CARD = "calibration.safetensors", "README.md"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Calibration(Learnt):
    """What a method learnt, with a file of its own."""

    def save(self, path: Path) -> None:
        """Write the file, whole or not at all.

        Raises:
            OSError: it cannot be written.
        """
        facts = json.dumps(
            {
                "method": self.method,
                "preset": self.preset,
                "settings": dict(self.settings),
                "provenance": asdict(self.provenance),
            }
        )
        metadata = {"schema": SCHEMA, "facts": facts, "sha256": _digest(self.tables, facts)}
        layout = {name: (table.dtype, tuple(table.shape)) for name, table in self.tables.items()}
        with replacing(path) as file:
            content = TensorFile(file, path, layout, metadata)
            for name, table in self.tables.items():
                content.put(name, table)

    @classmethod
    def load(cls, path: Path) -> Calibration:
        """Read a file that `save` wrote, on the CPU.

        Raises:
            UnusableCalibration: the file is missing, damaged, changed, of another version, or not a calibration;
                or no method can have learnt what it holds.
        """
        with reading(path, SCHEMA) as (file, metadata):
            tables = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        facts = metadata.get("facts", "")
        if metadata.get("sha256") != _digest(tables, facts):
            raise UnusableCalibration(f"{path} was changed or damaged after it was saved: its checksum does not match")
        try:
            known = read_facts(_Facts, facts)
            own = cls(
                method=known.method, preset=known.preset, settings=known.settings, tables=tables,
                provenance=known.provenance,
            )  # fmt: skip
            own.validate()
        except ValueError as error:
            raise UnusableCalibration(f"{path} contradicts itself: {one_line(error)}") from None
        return own

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
            ValueError: one line that names the field or the table.
        """
        own = self.provenance
        for name, least in (("steps", own.steps), ("layers", own.layers), ("prompts", len(own.prompts))):
            if least < 1:
                raise ValueError(f"provenance.{name}: must be at least 1, got {least}")
        if own.cost_ratio < 1:
            raise ValueError(f"provenance.cost_ratio: must be at least 1, got {own.cost_ratio}")
        look_up(METHODS, self.method, "method")
        for name, table in self.tables.items():
            if table.is_floating_point() and bool(table.isnan().any()):
                raise ValueError(f"{name}: a value is NaN")
        METHODS[self.method].check_tables(self)


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


def _digest(tables: Mapping[str, Tensor], facts: str) -> str:
    """SHA-256 over everything that the file says, in hex."""
    digest = hashlib.sha256(facts.encode())
    for name, table in sorted(tables.items()):
        digest.update(described(name, table))
        digest.update(raw(table))
    return digest.hexdigest()
