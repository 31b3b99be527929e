"""The main figures of a run in Markdown and LaTeX, for READMEs, pull requests and papers, and as plain text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from calibatt.bench.record import Record, Run, plain
from calibatt.reports.columns import COLUMNS, outcome
from calibatt.reports.facts import title, workloads
from calibatt.reports.pairs import HEAD, MEASURES, standings
from calibatt.reports.rows import DENSE, Row, rows

# characters that LaTeX takes for its own, and ours that its default fonts lack
_LATEX: Mapping[str, str] = MappingProxyType(
    {
        **{one: f"\\{one}" for one in "{}$&#%_"},
        "\\": "\\textbackslash{}", "~": "\\textasciitilde{}", "^": "\\textasciicircum{}", "<": "\\textless{}",
        ">": "\\textgreater{}", "|": "\\textbar{}", "×": "$\\times$", "–": "--", "µ": "\\textmu{}", "−": "$-$",
        "·": "$\\cdot$", "…": "\\dots{}", "“": "``", "”": "''",
    }
)  # fmt: skip
_FIRST = [column for column in COLUMNS if column.first]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Table:
    """One table, in no markup.

    Args:
        above: what stands above it.
        titled: whether that is the name of a workload.
        lines: cells of each line, the head first.
        below: sentences that follow.
    """

    above: str
    titled: bool
    lines: Sequence[Sequence[str]]
    below: Sequence[str] = ()


def tables(run: Run) -> str:
    """In Markdown: a table for each workload with a speedup or a cost, then what has no times, and why."""
    return "\n".join(_in_markdown(table) for table in _tables(run))


def for_terminals(records: Sequence[Record]) -> list[str]:
    """What people want to know first, in aligned columns: a table for each workload."""
    lines = []
    for some in workloads(records):
        arms = rows(some)
        cells = [[column.read(arm) for column in _FIRST] for arm in arms]
        # that all is well goes without saying
        shown = [i for i in range(len(_FIRST)) if {row[i] for row in cells} - {"", "ok"}]
        table = [["", *(_FIRST[i].title for i in shown)]]
        table += [[arm.label, *(row[i] for i in shown)] for arm, row in zip(arms, cells, strict=True)]
        lines += [plain(title(some[0])), *aligned(table), ""]
    return lines


def aligned(table: Sequence[Sequence[str]]) -> list[str]:
    """Lines of text, whose cells stand below each other."""
    table = [[plain(cell) for cell in row] for row in table]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in table]


def latex(run: Run) -> str:
    """The same tables for LaTeX with its package `booktabs`."""
    return "\n".join(_in_latex(table) for table in _tables(run))


def _tables(run: Run) -> Iterator[_Table]:
    for records in workloads(run.records):
        arms = rows(records)
        if any(arm.record.speedup is not None or arm.record.calibration_cost_ratio is not None for arm in arms):
            yield _figures(records, arms)
            for measure in MEASURES:
                if found := standings(arms, measure):
                    lines = [HEAD, *(standing.cells for standing in found)]
                    yield _Table(above=measure.method, titled=False, lines=lines)


def _figures(records: Sequence[Record], arms: Sequence[Row]) -> _Table:
    columns = [column for column in COLUMNS if column.brief]
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
    lines = [["arm", *(columns[i].title for i in shown)]]
    lines += [[arm.label, *(row[i] for i in shown)] for arm, row in zip(timed, cells, strict=True)]
    below = [f"{arm.label}: {outcome(arm)}." for arm in arms if arm.record.outcome != "ok"]
    return _Table(above=title(records[0]), titled=True, lines=lines, below=below)


def _in_markdown(table: _Table) -> str:
    above = f"**{markdown(table.above)}**" if table.titled else table.above
    parts = ["\n".join([above, "", *markdown_table(table.lines), ""])]
    return "\n".join(parts + [markdown(sentence) + "\n" for sentence in table.below])


def _in_latex(table: _Table) -> str:
    head, *lines = ([_latex(cell or "–") for cell in line] for line in table.lines)
    return "\n".join(
        [
            r"\begin{table}", r"\centering", r"\small", f"\\caption{{{_latex(table.above)}}}",
            f"\\begin{{tabular}}{{{'l' * len(head)}}}", r"\toprule", f"{' & '.join(head)} \\\\", r"\midrule",
            *(f"{' & '.join(line)} \\\\" for line in lines), r"\bottomrule", r"\end{tabular}", r"\end{table}",
            *(f"% {plain(sentence)}" for sentence in table.below), "",
        ]
    )  # fmt: skip


def markdown_table(table: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table, the head first."""
    head, *lines = table
    cells = ([markdown(cell or "–") for cell in line] for line in (head, ["---"] * len(head), *lines))
    return [f"| {' | '.join(line)} |" for line in cells]


def markdown(text: str) -> str:
    """Text as Markdown shows it: one line, no cell of its own, no HTML."""
    return plain(text).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")


def _latex(text: str) -> str:
    """Text as LaTeX shows it: one line, no command of its own."""
    return "".join(_LATEX.get(one, one) for one in plain(text))
