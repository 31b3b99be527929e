"""Two runs side by side: what differs about their machines, and what each arm came to in both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from calibatt.bench.machine import compare
from calibatt.bench.record import Run
from calibatt.reports.columns import COLUMNS, Column
from calibatt.reports.facts import run_facts, title, workloads
from calibatt.reports.rows import Row, rows
from calibatt.reports.tables import markdown, markdown_table

# what a run says of itself that is no trait of its machine
_OF_THE_RUN = ("commit", "date", "command")
_COLUMNS = [column for column in COLUMNS if column.first]


def compared(first: Run, second: Run) -> str:
    """Two runs side by side, in Markdown. Nothing is judged: that is the gate's.

    Args:
        first, second: of any machines.
    """
    return "\n".join([*_environment(first, second), *_workloads(first, second)]).rstrip()


def _environment(first: Run, second: Run) -> list[str]:
    found = compare(first.machine, second.machine)
    mine, other = dict(run_facts(first)), dict(run_facts(second))
    facts = [(name, mine.get(name, ""), other.get(name, "")) for name in _OF_THE_RUN]
    facts += [(one.name, one.here, one.there) for one in found.differences]
    lines = _table(("", *_names(first, second)), [fact for fact in facts if fact[1] != fact[2]])
    if found.unknown:
        lines += [f"Not known of both: {markdown(', '.join(found.unknown))}.", ""]
    if found.differences:
        lines += ["Times differ by machine; a speedup is paired with dense attention of its own run.", ""]
    if found.alike:
        lines += ["Of one kind of machine: `calibatt merge` makes one file of them, for one report.", ""]
    return lines


def _workloads(first: Run, second: Run) -> list[str]:
    lines = []
    found: dict[Any, list[Mapping[Any, Row]]] = {}
    titles: dict[Any, str] = {}
    for place, run in enumerate((first, second)):
        for records in workloads(run.records):
            titles.setdefault(records[0].workload, title(records[0]))
            arms = found.setdefault(records[0].workload, [{}, {}])
            arms[place] = {row.record.key: row for row in rows(records)}
    for workload, sides in found.items():
        lines += [f"**{markdown(titles[workload])}**", "", *_arms(sides, _names(first, second))]
    return lines


def _arms(sides: Sequence[Mapping[Any, Row]], names: Sequence[str]) -> list[str]:
    """A line for each arm that either run has; each column twice."""
    head = ["arm", *(f"{column.title}, {name}" for column in _COLUMNS for name in names), "speedup, second over first"]
    cells = []
    for key in dict.fromkeys(key for side in sides for key in side):
        pair = [side.get(key) for side in sides]
        label = next(row.label for row in pair if row is not None)
        shown = [_read(column, row) for column in _COLUMNS for row in pair]
        cells.append((label, *shown, _ratio(pair)))
    return _table(head, cells)


def _read(column: Column, row: Row | None) -> str:
    found = "" if row is None else column.read(row)
    # what nobody asks about
    return "" if found == "ok" else found


def _ratio(pair: Sequence[Row | None]) -> str:
    speedups = [row and row.record.speedup for row in pair]
    first, second = (speedup and speedup.median for speedup in speedups)
    return f"{second / first:.3f}" if first and second else ""


def _names(first: Run, second: Run) -> tuple[str, str]:
    """The files' names, or where these are the same, their paths."""
    if first.path.name != second.path.name:
        return first.path.name, second.path.name
    return str(first.path), str(second.path)


def _table(head: Sequence[str], cells: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table without the columns that nothing fills; nothing where there are no rows."""
    if not cells:
        return []
    filled = [i for i in range(len(head)) if i == 0 or any(row[i] for row in cells)]
    return [*markdown_table([[row[i] for i in filled] for row in (head, *cells)]), ""]
