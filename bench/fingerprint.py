"""What decides a figure beside the command: machine, versions, code, and the files that the command names.

No name of a host, no path, and nothing that changes from minute to minute: result files are published, and a stopped
run goes on later.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import importlib.metadata
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import torch

from calibatt.bench.launch import command_line
from calibatt.bench.machine import digest_of_flags
from calibatt.bench.telemetry import nvml_handle, usable_cpus

# pip names of what decides a figure; nvidia-cutlass-dsl compiles FlashAttention-4
_PACKAGES = (
    "calibatt", "torch", "triton", "diffusers", "transformers", "numpy",
    "flash-attn", "flash-attn-4", "fa3-fwd", "nvidia-cutlass-dsl",
)  # fmt: skip
_ROOMS = ("kernels", "methods", "models", "calibration", "bench")
# of py-cpuinfo, by its names; its frequencies change, and its sizes of caches are wrong on some machines
_CPU = ("vendor_id_raw", "family", "model", "stepping", "brand_raw")


def machine() -> dict[str, Any]:
    """Processors, software and threads, for `machine_info`; None stands for what there is none of."""
    return {
        "system": platform.system(),
        "python_version": platform.python_version(),
        "cpu": _cpu(),
        "threads": torch.get_num_threads(),
        **_gpu(),
        "torch_build": _torch_build(),
        "cudnn": torch.backends.cudnn.version(),
        "versions": _versions(),
    }


def commit() -> dict[str, Any]:
    """The commit of calibatt's code, and whether that was changed since, for `commit_info`; None from a wheel."""
    folder = Path(__file__).parent
    try:
        # an installed package may lie inside a checkout of something else
        _git(folder, "ls-files", "--error-unmatch", Path(__file__).name)
        changes = _git(folder, "status", "--porcelain", "--untracked-files=all").splitlines()
        # of what git does not know, only code can decide a figure
        dirty = any(not line.startswith("??") or line.endswith(".py") for line in changes)
        return {"id": _git(folder, "rev-parse", "HEAD"), "dirty": dirty}
    except (OSError, subprocess.CalledProcessError):
        return {"id": None, "dirty": None}


def run(arguments: Sequence[str], files: Sequence[Path | None]) -> dict[str, Any]:
    """What must be the same for a run to go on where another was stopped, and the commit, whose code may be the same.

    Args:
        arguments: of the command.
        files: that it reads.

    Raises:
        OSError: a file cannot be read.
    """
    digests = [_digest(path) for path in files if path is not None]
    return {
        "command": command_line(arguments), "machine": machine(), "code": _code(), "files": digests, "commit": commit(),
    }  # fmt: skip


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


# it starts processes, for a second
@functools.cache
def _cpu_info() -> dict[str, Any]:
    import cpuinfo

    found: dict[str, Any] = cpuinfo.get_cpu_info()
    return found


def _cpu() -> dict[str, Any]:
    info = _cpu_info()
    return {
        **{name: info.get(name) for name in _CPU},
        "flags_sha256": digest_of_flags(info["flags"]) if info.get("flags") else None,
        "caches": _caches(),
        "count": psutil.cpu_count(),
        "cores": psutil.cpu_count(logical=False),
        "usable": _usable(),
    }


def _caches() -> dict[str, int] | None:
    """Bytes of each cache of a CPU that this process may use, where Linux tells."""
    found = {}
    for folder in sorted(Path(f"/sys/devices/system/cpu/cpu{usable_cpus()[0]}/cache").glob("index*")):
        level, kind, size = ((folder / name).read_text().strip() for name in ("level", "type", "size"))
        # the kernel writes kilobytes
        found[f"L{level}{'' if kind == 'Unified' else kind[0].lower()}"] = int(size.removesuffix("K")) * 1024
    return found or None


def _usable() -> float:
    """CPUs that this process may use: those that it may run on, or less where a container's share is less."""
    count = len(usable_cpus())
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):
        return count
    return count if quota == "max" else min(count, int(quota) / int(period))


def _gpu() -> dict[str, Any]:
    if not torch.cuda.is_available():
        return dict.fromkeys(("gpu", "gpu_power_limit_w", "driver"))
    import pynvml

    handle, limit_w = nvml_handle(torch.device("cuda")), None
    # parts of a GPU, and some small ones, have none
    with contextlib.suppress(pynvml.NVMLError_NotSupported):
        # NVML counts milliwatts
        limit_w = pynvml.nvmlDeviceGetPowerManagementLimit(handle) / 1e3
    return {
        "gpu": torch.cuda.get_device_name(),
        "gpu_power_limit_w": limit_w,
        "driver": str(pynvml.nvmlSystemGetDriverVersion()),
    }


def _torch_build() -> str:
    if torch.version.cuda:
        return f"CUDA {torch.version.cuda}"
    return f"ROCm {torch.version.hip}" if torch.version.hip else "CPU"


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = dict.fromkeys(_PACKAGES)
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def _code() -> str:
    """Digest of the code that measures: in a checkout, a version says little."""
    digest = hashlib.sha256()
    for room in _ROOMS:
        for folder in importlib.import_module(f"calibatt.{room}").__path__:
            for path in sorted(Path(folder).rglob("*.py")):
                digest.update(str(path.relative_to(folder)).encode() + path.read_bytes())
    return digest.hexdigest()[:16]
