"""What stands above the figures of a run and of a workload: what a reader must know to run it again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from calibatt.bench.record import SUITES, Record, Run

# whole generations are what readers come for, the rest follows
_SUITE_ORDER = SUITES[::-1]
_YES_NO = {"True": "yes", "False": "no"}


def workloads(run: Run) -> list[list[Record]]:
    """The records of each workload, whole generations first."""
    found: dict[Any, list[Record]] = {}
    for record in run.records:
        found.setdefault(record.workload, []).append(record)
    return sorted(found.values(), key=lambda records: _SUITE_ORDER.index(records[0].suite))


def title(record: Record) -> str:
    """What names a record's workload."""
    parts = [record.suite, record.model, record.resolution, record.steps and f"{record.steps} steps", record.dtype]
    parts += [record.layers and f"{record.layers} layers with random weights"]
    parts += ["compiled" if record.compiled else None, record.inputs and "inputs resampled"]
    return " · ".join(str(part) for part in parts if part)


def run_facts(run: Run) -> list[tuple[str, str]]:
    """What a reader must know to run it again."""
    machine, commit = run.machine, run.commit
    cpu = machine.get("cpu") or {}
    count = cpu.get("count")
    cores = f" ({count} cores)" if count else ""
    system = (machine.get("system"), machine.get("release"), machine.get("machine"))
    facts = [
        ("GPU", machine.get("gpu")),
        ("CPU", cpu.get("brand_raw") and f"{cpu['brand_raw']}{cores}"),
        ("threads", machine.get("threads")),
        ("system", " ".join(str(part) for part in system if part)),
        ("driver", machine.get("driver")),
        ("power limit", (limit := machine.get("gpu_power_limit_w")) and f"{limit:g} W"),
        ("torch build", machine.get("torch_build")),
        # as files of earlier versions have it
        ("CUDA", machine.get("cuda")),
        ("cuDNN", machine.get("cudnn")),
        ("Python", machine.get("python_version")),
        *dict(machine.get("versions") or {}).items(),
        ("commit", _commit(commit)),
        ("date", run.datetime),
        ("command", run.command),
    ]
    return [(name, str(value)) for name, value in facts if value]


def _commit(commit: Mapping[str, Any]) -> str:
    if not commit.get("id"):
        return "unknown"
    dirty = {True: ", with changes that were not committed", False: ", clean"}.get(commit.get("dirty"), "")  # type: ignore[arg-type]
    branch = f" on {commit['branch']}" if commit.get("branch") else ""
    return f"{str(commit['id'])[:12]}{branch}{dirty}"


def workload_facts(records: Sequence[Record]) -> list[tuple[str, str]]:
    """What all arms have in common; where they do not, every value."""
    facts = []
    for name in (
        "weights",
        "inputs",
        "frames",
        "tokens",
        "heads",
        "head_dim",
        "dtype",
        "steps",
        "guidance",
        "compiled",
    ):
        found = (getattr(record, name) for record in records)
        values = dict.fromkeys(_YES_NO.get(str(value), str(value)) for value in found if value is not None)
        if values:
            facts.append((name.replace("_", " "), ", ".join(values)))
    rounds = {len(record.samples_s) for record in records if record.samples_s}
    if rounds:
        facts.append(("rounds", ", ".join(map(str, sorted(rounds)))))
    return facts
