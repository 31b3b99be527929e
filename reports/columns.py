"""The columns of a report's tables: what each shows of an arm, and how figures are written."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from calibatt.bench.record import Record
from calibatt.reports.rows import DENSE, Row


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a table.

    Args:
        title, hint: what stands above it, and what that means.
        read: what it shows of an arm; nothing where there is nothing.
        brief: whether it stands in the Markdown and LaTeX tables too.
        first: whether the table over all arms shows it before a reader chooses.
    """

    title: str
    hint: str
    read: Callable[[Row], str]
    brief: bool = False
    first: bool = False


# what is looked up, in place of estimated, takes microseconds
_LEAST_PHASE_S = 5e-5


def seconds(value: float) -> str:
    """A time to three digits, with its unit."""
    scale, unit = next(((scale, unit) for scale, unit in ((1.0, "s"), (1e-3, "ms")) if value >= scale), (1e-6, "µs"))
    shown = value / scale
    return f"{shown:.{2 if shown < 10 else 1 if shown < 100 else 0}f} {unit}"


def _median(values: Sequence[float] | None, form: str, *, spread: bool = False) -> str:
    if not values:
        return ""
    shown = form.format(statistics.median(values))
    low, high = form.format(min(values)), form.format(max(values))
    return f"{shown} ({low}–{high})" if spread and low != high else shown


def _speedup(row: Row) -> str:
    interval = row.record.speedup
    if interval is None:
        return "1 (baseline)" if row.record.method == DENSE and row.record.outcome == "ok" else ""
    if interval.low is None or interval.high is None:
        return f"{interval.median:.2f}× (no interval)"
    return f"{interval.median:.2f}× ({interval.low:.2f}–{interval.high:.2f})"


def _time(row: Row) -> str:
    return seconds(statistics.median(row.record.samples_s)) if row.record.samples_s else ""


def _samples(row: Row) -> str:
    record, said = row.record, []
    if record.interval_target is not None and record.interval_reached is not None:
        said.append(f"±{100 * record.interval_target:.3g} %{'' if record.interval_reached else ' not reached'}")
    if some := sum(record.spoilt or ()):
        said.append(f"{some} throttled or disturbed")
    return ", ".join([f"{len(record.samples_s or ())}", *said]) if said else ""


def _clock(row: Row) -> str:
    read = row.record.telemetry
    # as files of earlier versions have it
    if read is None or read.clock_mhz is None or read.lowest_clock_mhz is None:
        return _median(row.record.clocks_mhz, "{:.0f}")
    return f"{read.clock_mhz:.0f} ({read.lowest_clock_mhz:.0f})"


def _others(row: Row) -> str:
    named = (row.record.telemetry and row.record.telemetry.others) or {}
    whole = "" if row.record.disturbed is None else f"{row.record.disturbed:.1%}"
    return ", ".join([whole, *(f"{name} {share:.0%}" for name, share in named.items())]) if whole else ""


def _read(row: Row, name: str, form: str) -> str:
    return _number(None if row.record.telemetry is None else getattr(row.record.telemetry, name), form)


def _phases(row: Row, *names: str) -> str:
    """Median of some phases together; nothing where they take less than the clock tells."""
    record = row.record
    parts = [record.phases_s[name] for name in names if name in record.phases_s] if record.phases_s else []
    total = statistics.median(map(sum, zip(*parts, strict=True))) if parts else 0.0
    return seconds(total) if total >= _LEAST_PHASE_S and record.method != DENSE else ""


def _alignment(row: Row) -> str:
    # a median would hide that some videos show little of their caption where most show all of it
    record = row.record
    own, dense = (f"{statistics.fmean(x):.2f}" if x else "" for x in (record.alignment, record.alignment_dense))
    return own + (f" (dense {dense})" if dense else "")


def _kernel_error(row: Row) -> str:
    error, budget = row.record.kernel_error, row.record.kernel_error_budget
    return "" if error is None else f"{error:.1e}" + ("" if budget is None else f" of {budget:.1e}")


def outcome(row: Row) -> str:
    doubt = f" ({row.record.doubt})" if row.record.doubt else ""
    reason = f": {row.record.reason}" if row.record.reason else ""
    return row.record.outcome.replace("_", " ") + doubt + reason


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
    return record.tflops / record.gemm_tflops if record.tflops and record.gemm_tflops else None


def _sparsity(row: Row) -> str:
    density = row.record.density
    return "" if density is None else f"{1 - density:.1%}"


def _preparation(value: float | None) -> str:
    return "" if value is None else seconds(value)


def _number(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


# a column that no arm fills is left out
COLUMNS: Sequence[Column] = (
    Column("speedup (95 %)", "over dense, same rounds", _speedup, brief=True, first=True),
    Column(
        "samples",
        "whether half of the speedup's interval is within what was asked for, and how many something spoilt",
        _samples,
        brief=True,
    ),
    Column("time", "median of the rounds", _time, brief=True, first=True),
    Column(
        "PSNR dB",
        "median (lowest–highest) over the videos",
        lambda row: _median(row.record.psnr_db, "{:.1f}", spread=True),
        brief=True,
        first=True,
    ),
    Column("SSIM", "median over the videos", lambda row: _median(row.record.ssim, "{:.3f}"), brief=True),
    Column("alignment", "how much of the caption can be read back, mean", _alignment, brief=True),
    Column("sparsity", "share of the block products left out", _sparsity, brief=True, first=True),
    Column("recall", "attention mass kept", lambda row: _percent(row.record.recall), brief=True),
    Column(
        "method error",
        "of attention outputs against dense, over the calls of a dense video, or some of them",
        lambda row: _number(row.record.method_error, "{:.2f}"),
        brief=True,
        first=True,
    ),
    Column("of calls", "that the method error is pooled over", lambda row: _number(row.record.error_calls, "{:d}")),
    Column("estimate", "time that choosing the blocks takes", lambda row: _phases(row, "plan"), brief=True),
    Column(
        "moves",
        "time to reorder tokens and back",
        lambda row: _phases(row, "permute", "unpermute"),
        brief=True,
    ),
    Column("preset", "named settings of the method", lambda row: row.record.preset or ""),
    Column("settings", "set in place of the preset's", lambda row: row.record.settings or ""),
    Column(
        "mode",
        "own settings, or one schedule, density or fidelity",
        lambda row: (row.record.mode or "").replace("_", " "),
    ),
    Column("kernel", "what computes the chosen blocks", lambda row: row.record.computed_by, brief=True, first=True),
    Column("kernel error", "largest, against fp64; and its budget", _kernel_error),
    Column("of the ideal", "speedup against 1 / density", lambda row: _percent(row.record.of_ideal), brief=True),
    Column("TFLOP/s", "of the blocks kept", lambda row: _number(row.record.tflops, "{:.3g}")),
    Column("of a GEMM", "that rate against a large matrix product's", lambda row: _percent(_of_gemm(row.record))),
    Column("peak memory", "of the GPU", lambda row: _size(row.record.peak_memory_bytes), first=True),
    Column("plan memory", "of one plan, or of the calibration", lambda row: _size(row.record.plan_memory_bytes)),
    Column("energy J", "median a video", lambda row: _median(row.record.energy_j, "{:.0f}")),
    Column("clock MHz", "median (lowest)", _clock),
    Column("power W", "of the GPU, median", lambda row: _read(row, "power_w", "{:.0f}")),
    Column("heat °C", "of the GPU, highest", lambda row: _read(row, "temperature_c", "{:.0f}")),
    Column(
        "held down by",
        "what held the GPU's clock down, as NVML names it",
        lambda row: ", ".join((row.record.telemetry and row.record.telemetry.reasons) or ()),
    ),
    Column("others had", "share of the CPUs or the GPU, and whose processes took most", _others),
    Column("prepared in", "time of the offline part", lambda row: _preparation(row.record.preparation_s), brief=True),
    Column(
        "pays after", "videos until that is saved", lambda row: _number(row.record.pays_after, "{:.1f}"), brief=True
    ),
    Column(
        "calibration cost",
        "times dense generation",
        lambda row: _number(row.record.calibration_cost_ratio, "{:.2f}×"),
        brief=True,
    ),
    Column("mask agreement", "overlap between prompts", lambda row: _percent(row.record.mask_agreement)),
    Column("mask IoU", "overlap with masks from all queries", lambda row: _percent(row.record.mask_iou), brief=True),
    Column("outcome", "and why an arm has no times", outcome, first=True),
)
