"""What decides a figure beside the command: machine, versions, code, and the files that the command names."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.metadata
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

# pip names of what decides a figure
_PACKAGES = (
    "calibatt", "torch", "triton", "diffusers", "transformers", "numpy", "flash-attn", "flash-attn-4", "fa3-fwd",
)  # fmt: skip
_ROOMS = ("kernels", "methods", "models", "calibration", "bench")


def machine() -> dict[str, Any]:
    """Versions, threads, and the GPU where there is one, for `machine_info`."""
    facts: dict[str, Any] = {"versions": _versions(), "threads": torch.get_num_threads()}
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
        facts["cuda"] = torch.version.cuda
        facts["cudnn"] = torch.backends.cudnn.version()
        facts["driver"] = _driver()
    return facts


def run(arguments: Sequence[str], files: Sequence[Path | None]) -> dict[str, Any]:
    """What must be the same for a run to go on where another was stopped.

    Args:
        arguments: of the command.
        files: that it reads.

    Raises:
        OSError: a file cannot be read.
    """
    digests = [hashlib.sha256(path.read_bytes()).hexdigest()[:16] for path in files if path is not None]
    return {
        "command": command(arguments),
        "machine": {**machine(), "processor": platform.processor() or platform.machine(), "cores": os.cpu_count()},
        "code": _code(),
        "files": digests,
    }


def command(arguments: Sequence[str]) -> str:
    """The command line."""
    return " ".join(["pytest", *arguments])


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _driver() -> str:
    import pynvml

    pynvml.nvmlInit()
    return str(pynvml.nvmlSystemGetDriverVersion())


def _code() -> str:
    """Digest of the code that measures: in a checkout, a version says little."""
    digest = hashlib.sha256()
    for room in _ROOMS:
        for folder in importlib.import_module(f"calibatt.{room}").__path__:
            for path in sorted(Path(folder).rglob("*.py")):
                digest.update(str(path.relative_to(folder)).encode() + path.read_bytes())
    return digest.hexdigest()[:16]
