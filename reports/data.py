"""The records of a report as data for other tools: all of them as JSON, and a line each as CSV."""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any

from calibatt.bench.record import Record, Run, Telemetry

# spreadsheets take text that starts so for a formula
_FORMULA = ("=", "+", "-", "@")


def records_json(runs: Sequence[Run]) -> str:
    """Every run with all fields of its records, raw samples included, as `Record.to_extra_info` has them."""
    found = [
        {
            "file": run.path.name,
            "machine_info": dict(run.machine),
            "commit_info": dict(run.commit),
            "datetime": run.datetime,
            "command": run.command,
            "records": [record.to_extra_info() for record in run.records],
        }
        for run in runs
    ]
    return json.dumps(found, separators=(",", ":"), sort_keys=True)


def records_csv(runs: Sequence[Run]) -> str:
    """A line a record: the fields of `Record`, with medians of samples (`…_median`) and the speedup with its interval.

    A column that no record fills is left out.
    """
    lines = [{"file": run.path.name, "arm": record.arm, **_flat(record)} for run in runs for record in run.records]
    wanted = [field.name for field in fields(Record)]
    names = dict.fromkeys(name for line in lines for name in line)
    # columns stand together by their field, in the order of the record
    ordered = sorted(names, key=lambda name: wanted.index(_field(name)) if _field(name) in wanted else -1)
    text = io.StringIO()
    writer = csv.DictWriter(text, ordered, lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: _cell(value) for name, value in line.items()} for line in lines)
    return text.getvalue()


def _flat(record: Record) -> dict[str, Any]:
    found: dict[str, Any] = dict(_speedup(record))
    for field in fields(record):
        value = getattr(record, field.name)
        if isinstance(value, Telemetry):
            read = {part.name: getattr(value, part.name) for part in fields(value)}
            found |= {f"telemetry.{name}": one for name, one in read.items() if isinstance(one, int | float)}
        elif field.name == "spoilt" and value is not None:
            found["spoilt"] = sum(value)
        elif isinstance(value, Mapping):
            found |= {f"{field.name}.{name}_median": statistics.median(part) for name, part in value.items()}
        elif field.name == "block" and value is not None:
            found[field.name] = "×".join(map(str, value))
        elif isinstance(value, tuple) and field.name != "prompts":
            found[f"{field.name}_median"] = statistics.median(value)
        elif value is not None and field.name != "prompts":
            found[field.name] = value
    return found


def _speedup(record: Record) -> Iterator[tuple[str, float]]:
    interval = record.speedup
    if interval is not None:
        yield "speedup", interval.median
        if interval.low is not None and interval.high is not None:
            yield from (("speedup_low", interval.low), ("speedup_high", interval.high))
        yield "rounds", len(record.samples_s or ())


def _field(name: str) -> str:
    return name.partition(".")[0].removesuffix("_median")


def _cell(value: Any) -> Any:
    return f"'{value}" if isinstance(value, str) and value.startswith(_FORMULA) else value
