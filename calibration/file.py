"""Files of what was learnt: safetensors with the facts beside the tensors, written whole, and refused when changed."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor


class UnusableCalibration(ValueError):
    """A file that is no calibration of this version; the message is one line that says why."""


def write(path: Path, schema: str, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Write the file, whole or not at all.

    Args:
        path: where to.
        schema: name and version of what is written.
        tensors: of any device.
        facts: as JSON has them.

    Raises:
        OSError: it cannot be written.
    """
    kept = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    text = json.dumps(facts)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        save_file(kept, aside, metadata={"schema": schema, "facts": text, "sha256": _digest(kept, text)})
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def read(path: Path, schema: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and facts of a file that `write` wrote.

    Raises:
        UnusableCalibration: the file is missing, damaged, changed, of another schema, or something else.
    """
    metadata = _metadata(path)
    if metadata["schema"] != schema:
        raise UnusableCalibration(
            f"{path} has the schema {metadata['schema']!r}, here {schema!r} is read: run `calibatt calibrate` again"
        )
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if metadata.get("sha256") != _digest(tensors, metadata["facts"]):
        raise UnusableCalibration(f"{path} was changed or damaged after it was saved: its checksum is another")
    facts: dict[str, Any] = json.loads(metadata["facts"])
    return tensors, facts


def _metadata(path: Path) -> dict[str, str]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata: dict[str, str] = file.metadata() or {}
    except FileNotFoundError:
        raise UnusableCalibration(f"{path} does not exist: `calibatt calibrate` makes a calibration") from None
    except (OSError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise UnusableCalibration(f"{path} cannot be read as a calibration, or is cut short: {reason}") from None
    if "schema" not in metadata or "facts" not in metadata:
        raise UnusableCalibration(f"{path} is not a calibration: `calibatt calibrate` makes one")
    return metadata


def _digest(tensors: Mapping[str, Tensor], facts: str) -> str:
    """SHA-256 over everything that the file says, in hex."""
    digest = hashlib.sha256(facts.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}{tensor.dtype}{list(tensor.shape)}".encode())
        digest.update(tensor.numpy().data)
    return digest.hexdigest()
