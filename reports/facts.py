"""What stands above the figures of a run and of a workload: what a reader must know to run it again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from calibatt.bench.record import SUITES, Record, Run, plain
from calibatt.reports.rows import DENSE, Row, shared_words

# whole generations are what readers come for, the rest follows
_SUITE_ORDER = SUITES[::-1]
_YES_NO = {"True": "yes", "False": "no"}
# characters of a fact below a figure: a longer one would take a line of its own
_LONGEST_FACT = 80
# throttled arms that are named below a figure; the table marks all of them
_MOST_THROTTLED = 3


def workloads(records: Sequence[Record]) -> list[list[Record]]:
    """Records of each workload, whole generations first."""
    found: dict[Any, list[Record]] = {}
    for record in records:
        found.setdefault(record.workload, []).append(record)
    return sorted(found.values(), key=lambda records: _SUITE_ORDER.index(records[0].suite))


def title(record: Record) -> str:
    """What names a record's workload."""
    return " · ".join(parts_of_title(record))


def parts_of_title(record: Record) -> list[str]:
    """The parts of that name."""
    return [*_name(record), *([f"inputs {record.inputs.split()[0]}"] if record.inputs else [])]


def _name(record: Record) -> list[str]:
    parts = [record.suite, record.model, record.resolution, record.steps and f"{record.steps} steps", record.dtype]
    parts += [record.layers and f"{record.layers} layers{'' if record.planted else ' with random weights'}"]
    parts += ["planted weights" if record.planted else None]
    parts += ["compiled" if record.compiled else None]
    parts += [record.seed and f"seed {record.seed}"]
    return [str(part) for part in parts if part]


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


def imprint(run: Run, rows: Sequence[Row]) -> str:
    """What a figure says of itself, wherever it is shown: what was run, on what, when, and what about it is not as in a
    model's own videos. What the file does not say is left out, and of several workloads what they do not share."""
    record = rows[0].record
    workloads = list({row.record.workload: row.record for row in rows}.values())
    shared = shared_words(rows)
    masks = sorted({row.record.mask for row in rows if row.record.mask})
    baselines = sorted({row.record.baseline for row in rows if row.record.baseline})
    throttled = [row.label for row in rows if row.record.throttled]
    cpu = run.machine.get("cpu") or {}
    facts = [
        *(part for part in _name(record) if all(part in _name(other) for other in workloads)),
        len(workloads) > 1 and f"{len(workloads)} workloads",
        # of a kernel by itself nothing is a model's but the sizes
        record.suite == "kernel" and "queries, keys and values drawn at random",
        shared and f"every arm: {', '.join(shared)}",
        masks and f"masks {', '.join(masks)}",
        record.inputs and f"inputs {record.inputs}",
        baselines and f"dense: {', '.join(baselines)}",
        throttled and f"clock held down during {_some(throttled)}",
        run.machine.get("gpu") or cpu.get("brand_raw"),
        # a day tells runs apart
        run.datetime.partition("T")[0],
        run.path.name,
    ]
    # a line never starts with the dot
    return "\N{NO-BREAK SPACE}· ".join(plain(str(fact), _LONGEST_FACT) for fact in facts if fact)


def _some(names: Sequence[str]) -> str:
    more = len(names) - _MOST_THROTTLED
    return ", ".join(names[:_MOST_THROTTLED]) + (f" and {more} more" if more > 0 else "")


def samples(rows: Sequence[Row]) -> str:
    """How many samples an arm has, in words; nothing where none is timed."""
    counts = sorted({len(row.record.samples_s) for row in rows if row.record.samples_s and row.record.method != DENSE})
    if not counts:
        return ""
    # a round of this suite is a video
    word = "video" if rows[0].record.suite == "denoise" else "round"
    some = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    return f"{some} {word}{'s' * (counts[-1] > 1)} an arm"


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
        "seed",
    ):
        found = (getattr(record, name) for record in records)
        values = dict.fromkeys(_YES_NO.get(str(value), str(value)) for value in found if value is not None)
        if values:
            facts.append((name.replace("_", " "), ", ".join(values)))
    rounds = {len(record.samples_s) for record in records if record.samples_s}
    if rounds:
        facts.append(("rounds", ", ".join(map(str, sorted(rounds)))))
    return facts
