"""The report: one HTML page that needs nothing else, and its figures as PNG, SVG and PDF files beside it."""

from __future__ import annotations

import importlib.resources
import os
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from calibatt.bench.record import Record, Run, load_run
from calibatt.reports.columns import COLUMNS, Column
from calibatt.reports.facts import run_facts, title, workload_facts, workloads
from calibatt.reports.figures.catalogue import Picture, pictures
from calibatt.reports.findings import findings
from calibatt.reports.pairs import HEAD, METHOD, Standing, standings
from calibatt.reports.rows import Row, illustrated, rows
from calibatt.reports.tables import markdown, tables

PAGE = "index.html"
# the figures that people quote, for READMEs and pull requests
TABLES = "tables.md"
# stands in the head of every page, so that only our own folder is ever replaced
_MARK = '<meta name="generator" content="calibatt report">'
# letters of a workload's title in the name of a file: file systems take 255 bytes
_SLUG = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """One workload on the page.

    Args:
        title, facts: what names it, and what all its arms have in common.
        findings: sentences about it.
        columns, rows: its table.
        standings: who is nearer to dense than whom, where that can be told.
        pictures: its figures.
        untimed: arms without times.
    """

    title: str
    facts: Sequence[tuple[str, str]]
    findings: Sequence[str]
    columns: Sequence[Column]
    rows: Sequence[tuple[Row, Sequence[str]]]
    standings: Sequence[Standing]
    pictures: Sequence[Picture]
    untimed: Sequence[Row]


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One run on the page: its file's name, where it ran, its workloads."""

    name: str
    facts: Sequence[tuple[str, str]]
    sections: Sequence[Section]


def write_report(paths: Sequence[Path], out: Path) -> Path:
    """Write a report of one or more runs.

    All is made before anything of an earlier report is touched. Its page is then replaced by a single rename, so that
    `out` always has a whole one, the old or the new.

    Args:
        paths: files of `pytest bench --benchmark-json`.
        out: folder of the report: new, empty, or an earlier report, which is replaced.

    Returns:
        The page.

    Raises:
        UnusableFile: a file is not a run, or its pictures cannot be read.
        ValueError: there is no file, or `out` holds something that is not a report.
    """
    if not paths:
        raise ValueError("a report needs at least one file of `pytest bench --benchmark-json`")
    runs = [load_run(path) for path in paths]
    # a link stays a link: what it points to is replaced
    out = out.resolve()
    old = _files_of_report(out)
    parts = [_part(run, number) for number, run in enumerate(runs, start=1)]
    brief = "\n".join(f"# {markdown(run.path.name)}\n\n{tables(run)}" for run in runs)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as aside:
        new = Path(aside)
        (new / PAGE).write_text(_html(parts), encoding="utf-8")
        (new / TABLES).write_text(brief, encoding="utf-8")
        for part in parts:
            for section in part.sections:
                for picture in section.pictures:
                    for name, content in picture.files.items():
                        (new / name).write_bytes(content)
        _replace(old, new, out)
    return out / PAGE


def _files_of_report(out: Path) -> set[str]:
    """Names of the files in `out`, all of which an earlier report wrote."""
    if not out.exists():
        return set()
    if not out.is_dir():
        raise ValueError(f"{out}: is a file; give a folder for the report")
    names = {path.name for path in out.iterdir()}
    page = out / PAGE
    html = page.read_text(encoding="utf-8", errors="replace") if page.is_file() else ""
    ours = {PAGE, TABLES, *re.findall(r'data-file="([^"]+)"', html)} if _MARK in html else set()
    if strange := sorted(names - ours):
        raise ValueError(f"{out}: has files that are no report of ours ({strange[0]}); give a new or an empty folder")
    return names


def _replace(old: set[str], new: Path, out: Path) -> None:
    """Put the files of `new` into `out`; at every moment there is a whole page, which names every file beside it."""
    names = {path.name for path in new.iterdir()}
    out.mkdir(exist_ok=True)
    for name in sorted(old - names):
        (out / name).unlink()
    # the page holds its figures itself: the files are there for other uses, and may follow
    for name in (PAGE, TABLES, *sorted(names - {PAGE, TABLES})):
        os.replace(new / name, out / name)


def _html(parts: Sequence[Part]) -> str:
    import jinja2

    template = importlib.resources.files("calibatt.reports").joinpath("page.html").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(template).render(mark=_MARK, parts=parts, paired=METHOD, head=HEAD)


def _part(run: Run, number: int) -> Part:
    sections = [_section(run, records, f"{number}.{place}") for place, records in enumerate(workloads(run), start=1)]
    return Part(name=run.path.name, facts=run_facts(run), sections=sections)


def _section(run: Run, records: Sequence[Record], number: str) -> Section:
    arms = rows(records)
    cells = [[column.read(arm) for column in COLUMNS] for arm in arms]
    shown = [i for i in range(len(COLUMNS)) if any(row[i] for row in cells)]
    name = title(records[0])
    return Section(
        title=name,
        facts=workload_facts(records),
        findings=findings(arms),
        columns=[COLUMNS[i] for i in shown],
        rows=[(arm, [row[i] for i in shown]) for arm, row in zip(arms, cells, strict=True)],
        standings=standings(arms),
        pictures=pictures(run, illustrated(run, arms), f"{number}-{_slug(name)}"),
        untimed=[arm for arm in arms if arm.record.outcome != "ok"],
    )


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:_SLUG]
