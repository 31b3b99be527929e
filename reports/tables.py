"""The main figures of a run in Markdown, for READMEs and pull requests."""

from __future__ import annotations

from collections.abc import Sequence

from calibatt.bench.record import Run, plain
from calibatt.reports.columns import COLUMNS, outcome
from calibatt.reports.facts import title, workloads
from calibatt.reports.pairs import HEAD, METHOD, standings
from calibatt.reports.rows import DENSE, Row, rows


def tables(run: Run) -> str:
    """A table for each workload with a speedup, then what has no times, and why."""
    parts = []
    columns = [column for column in COLUMNS if column.brief]
    for records in workloads(run):
        arms = rows(records)
        if all(arm.record.speedup is None for arm in arms):
            continue
        timed = [arm for arm in arms if arm.record.outcome == "ok"]
        cells = [[column.read(arm) for column in columns] for arm in timed]
        kernels = {arm.record.computed_by for arm in timed if arm.record.method != DENSE}
        # labels tell kernels apart only where an arm ran on several
        told = records[0].suite == "kernel" or len(kernels) < 2
        shown = [
            i
            for i, column in enumerate(columns)
            if any(row[i] for row in cells) and not (column.title == "kernel" and told)
        ]
        table = [["arm", *(columns[i].title for i in shown)], ["---"] * (len(shown) + 1)]
        table += [[arm.label, *(row[i] or "–" for i in shown)] for arm, row in zip(timed, cells, strict=True)]
        lines = [f"| {' | '.join(map(markdown, line))} |" for line in table]
        parts.append("\n".join([f"**{markdown(title(records[0]))}**", "", *lines, ""]))
        parts += [markdown(f"{arm.label}: {outcome(arm)}.") + "\n" for arm in arms if arm.record.outcome != "ok"]
        parts += _pairs(arms)
    return "\n".join(parts)


def _pairs(arms: Sequence[Row]) -> list[str]:
    """Who is nearer to dense than whom, where that can be told."""
    found = standings(arms)
    if not found:
        return []
    lines = [HEAD, ["---"] * len(HEAD), *(standing.cells for standing in found)]
    table = "\n".join(f"| {' | '.join(markdown(cell or '–') for cell in line)} |" for line in lines)
    return [f"{METHOD}\n\n{table}\n"]


def markdown(text: str) -> str:
    """Text as Markdown shows it: one line, no cell of its own, no HTML."""
    return plain(text).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")
