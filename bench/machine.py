"""What of a machine and its software decides a speed, and where two of them differ.

In `machine_info` of a result file, and in what is kept of a stopped run, a field that is missing is unknown, as in
files of earlier versions; one that is null says that there is none. Nothing here imports torch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

_UNKNOWN = object()
# of ours the digest of the code says more, and the commit
_OWN = "calibatt"


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """A field in which two machines differ, and both values."""

    name: str
    here: str
    there: str

    def __str__(self) -> str:
        return f"the {self.name} differs ({self.here}, was {self.there})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """How alike two machines are.

    Args:
        differences: between what both say.
        unknown: fields that not both say.
    """

    differences: tuple[Difference, ...]
    unknown: tuple[str, ...]

    @property
    def difference(self) -> Difference | None:
        """The first."""
        return next(iter(self.differences), None)

    @property
    def alike(self) -> bool:
        """Whether they are the same in every field that decides a speed."""
        return not self.differences and not self.unknown


def compare(here: Mapping[str, Any], there: Mapping[str, Any]) -> Comparison:
    """Compare two machines in all that decides a speed.

    Args:
        here, there: `machine_info` of a file, or what `fingerprint.machine` gave.
    """
    packages = sorted({*(here.get("versions") or {}), *(there.get("versions") or {})} - {_OWN})
    fields = {**_FIELDS, **{f"version of {name}": _package(name) for name in packages}}
    differences, unknown = [], []
    for name, read in fields.items():
        mine, other = read(here), read(there)
        if mine is _UNKNOWN or other is _UNKNOWN:
            unknown.append(name)
        elif mine != other:
            differences.append(Difference(name=name, here=_shown(mine), there=_shown(other)))
    return Comparison(differences=tuple(differences), unknown=tuple(unknown))


def describe(machine: Mapping[str, Any]) -> str:
    """A machine's processors in a few words."""
    named = (machine.get("gpu"), (machine.get("cpu") or {}).get("brand_raw"))
    return ", ".join(name for name in named if name) or "an unknown machine"


def digest_of_flags(flags: Iterable[str]) -> str:
    """What stands for the flags of a processor: some hundred words."""
    return hashlib.sha256(" ".join(sorted(set(flags))).encode()).hexdigest()[:16]


def _top(name: str) -> Callable[[Mapping[str, Any]], Any]:
    return lambda machine: machine.get(name, _UNKNOWN)


def _cpu(name: str) -> Callable[[Mapping[str, Any]], Any]:
    return lambda machine: (machine.get("cpu") or {}).get(name, _UNKNOWN)


def _package(name: str) -> Callable[[Mapping[str, Any]], Any]:
    return lambda machine: (machine.get("versions") or {}).get(name, _UNKNOWN)


def _flags(machine: Mapping[str, Any]) -> Any:
    cpu = machine.get("cpu") or {}
    # earlier versions wrote them all
    return digest_of_flags(cpu["flags"]) if cpu.get("flags") else cpu.get("flags_sha256", _UNKNOWN)


def _torch_build(machine: Mapping[str, Any]) -> Any:
    # earlier versions wrote CUDA's version, where there was a GPU
    return f"CUDA {machine['cuda']}" if machine.get("cuda") else machine.get("torch_build", _UNKNOWN)


def _python(machine: Mapping[str, Any]) -> Any:
    version = machine.get("python_version")
    # a third number mends errors
    return ".".join(version.split(".")[:2]) if version else _UNKNOWN


def _shown(value: Any) -> str:
    return "none" if value is None else str(value)


_FIELDS: Mapping[str, Callable[[Mapping[str, Any]], Any]] = MappingProxyType(
    {
        # every version has named the GPU where there was one
        "GPU": lambda machine: machine.get("gpu"),
        "GPU's power limit": _top("gpu_power_limit_w"),
        "GPU's driver": _top("driver"),
        "processor": _cpu("brand_raw"),
        "processor's vendor": _cpu("vendor_id_raw"),
        "processor's family": _cpu("family"),
        "processor's model": _cpu("model"),
        "processor's stepping": _cpu("stepping"),
        "digest of the processor's flags": _flags,
        "size of the caches": _cpu("caches"),
        "number of CPUs": _cpu("count"),
        "number of cores": _cpu("cores"),
        "number of CPUs that the process may use": _cpu("usable"),
        "number of threads": _top("threads"),
        "operating system": _top("system"),
        "version of Python": _python,
        "build of torch": _torch_build,
        "version of cuDNN": _top("cudnn"),
    }
)
