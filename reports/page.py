"""The report: one HTML page that needs nothing else, and its figures as PNG files beside it."""

from __future__ import annotations

import base64
import importlib.resources
import io
import re
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calibatt.bench.record import Record, Run, Suite, load_run
from calibatt.reports import figures
from calibatt.reports.entries import DENSE, Entry, entries, palette
from calibatt.reports.headlines import headlines, seconds

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAGE = "index.html"
# the figures that people quote, for READMEs and pull requests
TABLES = "tables.md"
# stands in the head of every page, so that only our own folder is ever replaced
_MARK = '<meta name="generator" content="calibatt report">'
# sharp on a screen of two pixels a point, at seven inches across
_DPI = 160

_HOW_TO_READ = {
    "speedup": (
        "How many times faster each arm is than dense attention in the same rounds. Faint dots are rounds, the marker "
        "their median, the bar its 95 % interval. A bar that touches the dashed line is no proof of a difference. A "
        "hollow marker has too few rounds for an interval."
    ),
    "fidelity": (
        "Right is faster, up is better. The marker is the median, of alignment the mean; the bars are the interval of "
        "the speedup and the middle half of the videos. Circles are a method's own settings, diamonds those that give "
        "it the density asked for. A point above and to the right of another is better in both."
    ),
    "density": (
        "What share of the block products each head computes: steps from left to right, layers from top to bottom, "
        "the heads of a layer next to each other. Bright is dense, dark is sparse."
    ),
    "masks": (
        "A few masks as they were used. Each cell is a block of queries (down) and keys (across); dark ones are "
        "computed. Orange lines, where there are any, mark the video's frames."
    ),
    "frames": (
        "The same prompt and the same noise in every row, time from left to right. The figure behind a name is the "
        "PSNR of that video against the dense one."
    ),
    "ideal": (
        "Speedup times density: at 1 a kernel takes the density's share of the fastest dense kernel's time, which is "
        "all that leaving blocks out can give. What is below is lost to lists, uneven rows and small blocks."
    ),
    "phases": (
        "Where the time goes: choosing blocks (plan), computing them (attend), and what is neither (other). Medians."
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """A figure on the page.

    Args:
        name: of its PNG file.
        png: the file's bytes.
        title: stands above it.
        caption: how to read it.
    """

    name: str
    png: bytes
    title: str
    caption: str

    @property
    def uri(self) -> str:
        """The picture itself, as an address."""
        return f"data:image/png;base64,{base64.b64encode(self.png).decode()}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """One workload on the page."""

    title: str
    facts: Sequence[tuple[str, str]]
    headlines: Sequence[str]
    columns: Sequence[tuple[str, str]]
    rows: Sequence[tuple[Entry, Sequence[str]]]
    pictures: Sequence[Picture]
    untimed: Sequence[Entry]


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One run on the page."""

    name: str
    facts: Sequence[tuple[str, str]]
    sections: Sequence[Section]


def write_report(paths: Sequence[Path], out: Path) -> Path:
    """Write a report of one or more runs.

    Everything is written beside `out` first and then put in its place, so that a failure leaves what was there.

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
    _check_replaceable(out)
    html, pictures = _render(runs)
    brief = "\n".join(f"# {run.path.name}\n\n{tables(run)}" for run in runs)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as aside:
        new = Path(aside) / "new"
        new.mkdir()
        (new / PAGE).write_text(html, encoding="utf-8")
        (new / TABLES).write_text(brief, encoding="utf-8")
        for picture in pictures:
            (new / picture.name).write_bytes(picture.png)
        _swap(new, out, Path(aside) / "old")
    return out / PAGE


def tables(run: Run) -> str:
    """The main figures of a run as Markdown: a table for each workload with a speedup, then what has no times, and why.

    Raises:
        UnusableFile: the run's pictures cannot be read.
    """
    parts = []
    for records in _workloads(run):
        arms = entries(run, records, palette(record.method for record in records))
        if all(arm.record.speedup is None for arm in arms):
            continue
        timed = [arm for arm in arms if arm.record.outcome == "ok"]
        cells = [[read(arm) for title, _, read in _COLUMNS if title in _BRIEF] for arm in timed]
        titles = [title for title, _, _ in _COLUMNS if title in _BRIEF]
        kernels = {arm.record.computed_by for arm in timed if arm.record.method != DENSE}
        # labels tell kernels apart only where an arm ran on several
        told = records[0].suite == "kernel" or len(kernels) < 2
        shown = [
            i for i, title in enumerate(titles) if any(row[i] for row in cells) and not (title == "kernel" and told)
        ]
        rows = [["arm", *(titles[i] for i in shown)], ["---"] * (len(shown) + 1)]
        rows += [[arm.label, *(row[i] or "–" for i in shown)] for arm, row in zip(timed, cells, strict=True)]
        lines = [f"| {' | '.join(row)} |" for row in rows]
        parts.append("\n".join([f"**{_title(records[0])}**", "", *lines, ""]))
        parts += [f"{arm.label}: {_outcome(arm)}.\n" for arm in arms if arm.record.outcome != "ok"]
    return "\n".join(parts)


def _check_replaceable(out: Path) -> None:
    if not out.exists():
        return
    if not out.is_dir():
        raise ValueError(f"{out}: is a file; give a folder for the report")
    names = sorted(path.name for path in out.iterdir())
    page = out / PAGE
    html = page.read_text(encoding="utf-8", errors="replace") if page.is_file() else ""
    ours = {PAGE, TABLES, *re.findall(r'data-file="([^"]+)"', html)} if _MARK in html else set()
    strange = [name for name in names if name not in ours]
    if strange:
        raise ValueError(f"{out}: has files that are no report of ours ({strange[0]}); give a new or an empty folder")


def _swap(new: Path, out: Path, old: Path) -> None:
    if out.exists():
        out.rename(old)
    try:
        new.rename(out)
    except OSError:
        if old.exists():
            old.rename(out)
        raise


def _render(runs: Sequence[Run]) -> tuple[str, list[Picture]]:
    import jinja2

    colours = palette(record.method for run in runs for record in run.records)
    parts = []
    for number, run in enumerate(runs, start=1):
        sections = [
            _section(run, records, colours, f"{number}.{place}")
            for place, records in enumerate(_workloads(run), start=1)
        ]
        parts.append(Part(name=run.path.name, facts=_run_facts(run), sections=sections))
    template = importlib.resources.files("calibatt.reports").joinpath("page.html").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    html = environment.from_string(template).render(mark=_MARK, parts=parts)
    return html, [picture for part in parts for section in part.sections for picture in section.pictures]


_SUITE_ORDER: tuple[Suite, ...] = ("denoise", "attention", "kernel", "calibration")


def _workloads(run: Run) -> list[list[Record]]:
    """The records of each workload; whole generations are what readers come for, the rest follows."""
    found: dict[Any, list[Record]] = {}
    for record in run.records:
        found.setdefault(record.workload, []).append(record)
    return sorted(found.values(), key=lambda records: _SUITE_ORDER.index(records[0].suite))


def _section(run: Run, records: Sequence[Record], colours: Mapping[str, str], number: str) -> Section:
    arms = entries(run, records, colours)
    cells = [[read(entry) for _, _, read in _COLUMNS] for entry in arms]
    shown = [i for i in range(len(_COLUMNS)) if any(row[i] for row in cells)]
    first = records[0]
    return Section(
        title=_title(first),
        facts=_workload_facts(records),
        headlines=headlines(arms),
        columns=[_COLUMNS[i][:2] for i in shown],
        rows=[(entry, [row[i] for i in shown]) for entry, row in zip(arms, cells, strict=True)],
        pictures=_pictures(arms, f"{number}-{_slug(_title(first))}"),
        untimed=[entry for entry in arms if entry.record.outcome != "ok"],
    )


def _pictures(arms: Sequence[Entry], stem: str) -> list[Picture]:
    drawn: list[tuple[str, str, Figure | None]] = [
        ("speedup", "Speedup", figures.speedup(arms)),
        ("fidelity", "Fidelity against speedup", figures.fidelity(arms)),
        ("ideal", "Speedup against the ideal", figures.ideal(arms)),
        ("phases", "Where the time goes", figures.phases(arms)),
    ]
    dense = [arm for arm in arms if arm.record.method == DENSE]
    others = [arm for arm in arms if arm.record.method != DENSE]
    batches = [others[first : first + _MOST_ARMS] for first in range(0, max(1, len(others)), _MOST_ARMS)]
    drawn += [("density", "Density by step, layer and head", figures.density(batch)) for batch in batches]
    drawn += [("masks", "Some masks", figures.masks(batch)) for batch in batches]
    for batch in batches:
        for caption, figure in figures.videos([*dense, *batch]):
            drawn.append(("frames", f"“{caption}”" if caption else "Frames", figure))
    there = [(kind, title, figure) for kind, title, figure in drawn if figure is not None]
    return [
        Picture(name=f"{stem}-{place}-{kind}.png", png=_png(figure), title=title, caption=_HOW_TO_READ[kind])
        for place, (kind, title, figure) in enumerate(there, start=1)
    ]


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI, metadata={"Software": None})
    return buffer.getvalue()


def _title(record: Record) -> str:
    parts = [record.suite, record.model, record.resolution, record.steps and f"{record.steps} steps", record.dtype]
    parts += ["compiled" if record.compiled else None, record.inputs and "inputs resampled"]
    return " · ".join(str(part) for part in parts if part)


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def _run_facts(run: Run) -> list[tuple[str, str]]:
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


# arms of one picture that has a row for each: laying out sixty takes minutes, and none is seen beside the next
_MOST_ARMS = 8
# what is looked up, in place of estimated, takes microseconds
_LEAST_PHASE_S = 5e-5
_YES_NO = {"True": "yes", "False": "no"}


def _workload_facts(records: Sequence[Record]) -> list[tuple[str, str]]:
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


def _median(values: Sequence[float] | None, form: str, *, spread: bool = False) -> str:
    if not values:
        return ""
    shown = form.format(statistics.median(values))
    low, high = form.format(min(values)), form.format(max(values))
    return f"{shown} ({low}–{high})" if spread and low != high else shown


def _speedup(entry: Entry) -> str:
    interval = entry.record.speedup
    if interval is None:
        return "1 (baseline)" if entry.record.method == DENSE and entry.record.outcome == "ok" else ""
    if interval.low is None or interval.high is None:
        return f"{interval.median:.2f}× (no interval)"
    return f"{interval.median:.2f}× ({interval.low:.2f}–{interval.high:.2f})"


def _time(entry: Entry) -> str:
    return seconds(statistics.median(entry.record.samples_s)) if entry.record.samples_s else ""


def _phases(entry: Entry, *names: str) -> str:
    """Median of some phases together; nothing where they take less than the clock tells."""
    record = entry.record
    parts = [record.phases_s[name] for name in names if name in record.phases_s] if record.phases_s else []
    total = statistics.median(map(sum, zip(*parts, strict=True))) if parts else 0.0
    return seconds(total) if total >= _LEAST_PHASE_S and record.method != DENSE else ""


def _alignment(entry: Entry) -> str:
    # a median would hide that some videos show little of their caption where most show all of it
    record = entry.record
    own, dense = (f"{statistics.fmean(x):.2f}" if x else "" for x in (record.alignment, record.alignment_dense))
    return own + (f" (dense {dense})" if dense else "")


def _kernel_error(entry: Entry) -> str:
    error, budget = entry.record.kernel_error, entry.record.kernel_error_budget
    return "" if error is None else f"{error:.1e}" + ("" if budget is None else f" of {budget:.1e}")


def _outcome(entry: Entry) -> str:
    throttled = " (throttled)" if entry.record.throttled else ""
    reason = f": {entry.record.reason}" if entry.record.reason else ""
    return entry.record.outcome.replace("_", " ") + throttled + reason


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def _size(count: int | None) -> str:
    """Bytes in powers of 1024."""
    if count is None:
        return ""
    for scale, unit in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count} B"


def _of_gemm(record: Record) -> float | None:
    return None if record.tflops is None or record.gemm_tflops is None else record.tflops / record.gemm_tflops


def _sparsity(entry: Entry) -> str:
    density = entry.record.density
    return "" if density is None else f"{1 - density:.1%}"


# title, what it means, how it is read; a column that no arm fills is left out
_COLUMNS: Sequence[tuple[str, str, Callable[[Entry], str]]] = (
    ("speedup (95 %)", "over dense, same rounds", _speedup),
    ("time", "median of the rounds", _time),
    ("PSNR dB", "median (least–most) over the videos", lambda e: _median(e.record.psnr_db, "{:.1f}", spread=True)),
    ("SSIM", "median over the videos", lambda entry: _median(entry.record.ssim, "{:.3f}")),
    ("alignment", "how much of the caption can be read back, mean", _alignment),
    ("sparsity", "share of the block products left out", _sparsity),
    ("recall", "attention mass kept", lambda entry: _percent(entry.record.recall)),
    ("method error", "of attention outputs, against dense", lambda e: _number(e.record.method_error, "{:.2f}")),
    ("estimate", "what the method itself takes, of the time", lambda entry: _phases(entry, "plan")),
    ("moves", "into the method's order of tokens and back", lambda entry: _phases(entry, "permute", "unpermute")),
    ("preset", "named settings of the method", lambda entry: entry.record.preset or ""),
    ("mode", "own settings, or one schedule, density or fidelity", lambda e: (e.record.mode or "").replace("_", " ")),
    ("kernel", "what computes the chosen blocks", lambda entry: entry.record.computed_by),
    ("kernel error", "largest, against fp64, of what is allowed", _kernel_error),
    ("of the ideal", "speedup against 1 / density", lambda entry: _percent(entry.record.of_ideal)),
    ("TFLOP/s", "of the blocks kept", lambda entry: _number(entry.record.tflops, "{:.3g}")),
    ("of a GEMM", "that rate against a large matrix product's", lambda entry: _percent(_of_gemm(entry.record))),
    ("peak memory", "of the GPU", lambda entry: _size(entry.record.peak_memory_bytes)),
    ("plan memory", "of one plan, or of the calibration", lambda entry: _size(entry.record.plan_memory_bytes)),
    ("energy J", "median a video", lambda entry: _median(entry.record.energy_j, "{:.0f}")),
    ("clock MHz", "median", lambda entry: _median(entry.record.clocks_mhz, "{:.0f}")),
    ("prepared in", "what the method learns offline", lambda entry: _preparation(entry.record.preparation_s)),
    ("pays after", "videos, until that is saved", lambda entry: _number(entry.record.pays_after, "{:.1f}")),
    ("calibration cost", "times dense generation", lambda e: _number(e.record.calibration_cost_ratio, "{:.2f}×")),
    ("mask agreement", "overlap between prompts", lambda entry: _percent(entry.record.mask_agreement)),
    ("outcome", "and why an arm was not timed", _outcome),
)  # fmt: skip

# those of them that stand in the Markdown tables
_BRIEF = (
    "speedup (95 %)", "time", "PSNR dB", "SSIM", "alignment", "sparsity", "recall", "method error", "estimate", "moves",
    "kernel", "of the ideal", "prepared in", "pays after",
)  # fmt: skip


def _preparation(value: float | None) -> str:
    return "" if value is None else seconds(value)


def _number(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)
