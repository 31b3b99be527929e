"""The report: one HTML page that needs nothing else, and beside it its figures, its tables and its data as files."""

from __future__ import annotations

import base64
import gzip
import hashlib
import importlib.resources
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from calibatt.bench.record import Record, Run, load_run, plain
from calibatt.reports.clips import CAPTION, Clip, clips
from calibatt.reports.columns import COLUMNS, Column
from calibatt.reports.data import records_csv, records_json
from calibatt.reports.facts import run_facts, title, workload_facts, workloads
from calibatt.reports.figures.catalogue import OVERVIEWS, Picture, pictures
from calibatt.reports.figures.style import SHEETS, Sheet
from calibatt.reports.findings import findings
from calibatt.reports.headlines import headlines
from calibatt.reports.pairs import HEAD, MEASURES, Measure, Standing, standings
from calibatt.reports.rows import Row, illustrated, rows
from calibatt.reports.tables import latex, markdown, tables

PAGE = "index.html"
# the figures that people quote, for READMEs, pull requests and papers
TABLES = "tables.md"
LATEX = "tables.tex"
# figures of a page, unless asked otherwise: one of 2,000 arms is made in a minute and has less than 5 MB
FIGURES = 24
# stands in the head of every page, so that only our own folder is ever replaced
_MARK = '<meta name="generator" content="calibatt report">'
# letters of a workload's title in the name of a file: file systems take 255 bytes
_SLUG = 100
# what a workload is known by in the table over all arms
_WORKLOAD = ("suite", "model", "resolution", "steps", "dtype", "compiled", "layers", "inputs", "planted", "seed")


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """One workload on the page.

    Args:
        name: of its anchor.
        title, facts: what names it, and what all its arms have in common.
        place: its run's file, then the values of `_WORKLOAD`, as text.
        findings: sentences about it.
        columns, rows: its table; of each column, which of `COLUMNS` it is.
        standings: who is nearer to dense than whom, by each measure by which that can be told.
        pictures: its figures; None where they are left out.
        clips: its videos that play.
        untimed: arms without times.
    """

    name: str
    title: str
    facts: Sequence[tuple[str, str]]
    place: Sequence[str]
    findings: Sequence[str]
    columns: Sequence[tuple[int, Column]]
    rows: Sequence[tuple[Row, Sequence[str]]]
    standings: Sequence[tuple[Measure, Sequence[Standing]]]
    pictures: Sequence[Picture] | None
    clips: Sequence[Clip]
    untimed: Sequence[Row]


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One run on the page: its anchor, its file's name, where it ran, figures of all its workloads, its workloads."""

    anchor: str
    name: str
    facts: Sequence[tuple[str, str]]
    pictures: Sequence[Picture]
    sections: Sequence[Section]

    @property
    def drawn(self) -> list[Picture]:
        """All of its figures."""
        return [*self.pictures, *(picture for section in self.sections for picture in section.pictures or ())]

    @property
    def files(self) -> dict[str, bytes]:
        """The files of its figures and videos, by name."""
        found = {name: content for picture in self.drawn for name, content in picture.files.items()}
        return found | {clip.name: clip.content for section in self.sections for clip in section.clips}


def write_report(paths: Sequence[Path], out: Path, figures: int = FIGURES, sheet: Sheet = SHEETS["page"]) -> Path:
    """Write a report of one or more runs.

    All is made before anything of an earlier report is touched. Its page is then replaced by a single rename, so that
    `out` always has a whole one, the old or the new.

    Args:
        paths: files of `pytest bench --benchmark-json`.
        out: folder of the report: new, empty, or an earlier report, which is replaced.
        figures: once there are so many, further workloads have none.
        sheet: what figures are to stand on, a page or a column of one.

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
    parts: list[Part] = []
    for number, run in enumerate(runs, start=1):
        parts.append(_part(run, number, figures - sum(len(part.drawn) for part in parts), sheet))
    data = {"data.csv": records_csv(runs), "records.json": records_json(runs)}
    texts = {
        PAGE: _html(parts, data),
        TABLES: "\n".join(f"# {markdown(run.path.name)}\n\n{tables(run)}" for run in runs),
        LATEX: "\n".join(f"% {plain(run.path.name)}\n\n{latex(run)}" for run in runs),
        **data,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as aside:
        new = Path(aside)
        for name, text in texts.items():
            (new / name).write_text(text, encoding="utf-8")
        for part in parts:
            for name, content in part.files.items():
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
    for name in (PAGE, *sorted(names - {PAGE})):
        os.replace(new / name, out / name)


def _html(parts: Sequence[Part], data: Mapping[str, str]) -> str:
    import jinja2

    folder = importlib.resources.files("calibatt.reports")
    template, library, own = (
        folder.joinpath(name).read_text(encoding="utf-8")
        for name in ("page.html", "vendor/datatables.min.js", "page.js")
    )
    script = f"{library}\n{own}"
    sections = [section for part in parts for section in part.sections]
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(template).render(
        mark=_MARK, parts=parts, head=HEAD, clip_caption=CAPTION, beside=(*data, TABLES, LATEX),
        headlines=headlines([[row for row, _ in section.rows] for section in sections]),
        held={name: base64.b64encode(gzip.compress(text.encode(), mtime=0)).decode() for name, text in data.items()},
        workload=("file", *_WORKLOAD), columns=[(i, COLUMNS[i]) for i in _used(sections)],
        script=script, script_hash=f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}",
    )  # fmt: skip


def _used(sections: Sequence[Section]) -> list[int]:
    """The columns that some workload has."""
    return sorted({i for section in sections for i, _ in section.columns})


def _part(run: Run, number: int, figures: int, sheet: Sheet) -> Part:
    found = workloads(run.records)
    suites = dict.fromkeys(records[0].suite for records in found)
    arms = [row for records in found for row in rows(records)]
    overviews = [
        picture
        for suite in suites
        for picture in pictures(
            run, [row for row in arms if row.record.suite == suite], f"{number}-{suite}", OVERVIEWS, sheet
        )
    ]
    left, sections = figures - len(overviews), []
    for place, records in enumerate(found, start=1):
        sections.append(_section(run, records, f"{number}.{place}", sheet=sheet if left > 0 else None))
        left -= len(sections[-1].pictures or ())
    return Part(anchor=f"run-{number}", name=run.path.name, facts=run_facts(run), pictures=overviews, sections=sections)


def _section(run: Run, records: Sequence[Record], number: str, *, sheet: Sheet | None) -> Section:
    arms = rows(records)
    cells = [[column.read(arm) for column in COLUMNS] for arm in arms]
    shown = [i for i in range(len(COLUMNS)) if any(row[i] for row in cells)]
    name = title(records[0])
    stem = f"{number}-{_slug(name)}"
    values = [getattr(records[0], field) for field in _WORKLOAD]
    return Section(
        name=f"workload-{number}",
        title=name,
        facts=workload_facts(records),
        place=[run.path.name, *("" if value is None else str(value) for value in values)],
        findings=findings(arms),
        columns=[(i, COLUMNS[i]) for i in shown],
        rows=[(arm, [row[i] for i in shown]) for arm, row in zip(arms, cells, strict=True)],
        standings=[(measure, found) for measure in MEASURES if (found := standings(arms, measure))],
        pictures=None if sheet is None else pictures(run, illustrated(run, arms), stem, sheet=sheet),
        clips=() if sheet is None else clips(run, arms, stem),
        untimed=[arm for arm in arms if arm.record.outcome != "ok"],
    )


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:_SLUG]
