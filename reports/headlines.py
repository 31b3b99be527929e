"""What a workload's figures say, in sentences; a method that is not faster is said to be so."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from calibatt.bench.record import Record
from calibatt.reports.entries import RANDOM, Entry

# densities that differ by less count as equal: the tolerance to which the benchmark sets them
_SAME_DENSITY = 0.01


def headlines(entries: Sequence[Entry]) -> list[str]:
    """Sentences about one workload: methods from the fastest on, the control, what is doubtful or missing."""
    timed = [entry for entry in entries if entry.record.speedup is not None]
    timed.sort(key=_place)
    said = [_speed(entry) for entry in timed]
    said += [_preparation(entry) for entry in entries if entry.record.suite == "calibration" and entry.record.samples_s]
    said += _control(entries, timed)
    throttled = [entry.label for entry in entries if entry.record.throttled]
    if throttled:
        said.append(f"Heat or power held the GPU's clock down during {_listed(throttled)}: the times are doubtful.")
    missing = [entry.label for entry in entries if entry.record.outcome != "ok"]
    if missing:
        said.append(f"Not timed: {_listed(missing)}; the reasons stand below.")
    return said


def _place(entry: Entry) -> tuple[bool, float]:
    assert entry.record.speedup is not None
    return entry.record.method == RANDOM, -entry.record.speedup.median


def seconds(value: float) -> str:
    """A time of three digits, with its unit."""
    scale, unit = next(((scale, unit) for scale, unit in ((1.0, "s"), (1e-3, "ms")) if value >= scale), (1e-6, "µs"))
    shown = value / scale
    return f"{shown:.{2 if shown < 10 else 1 if shown < 100 else 0}f} {unit}"


def _speed(entry: Entry) -> str:
    record, interval = entry.record, entry.record.speedup
    assert interval is not None
    if interval.low is None or interval.high is None:
        count = len(record.samples_s or ())
        verdict = (
            f"shows {interval.median:.2f}× in {count} round{'s' * (count != 1)}, too few for an interval or a claim"
        )
    else:
        figures = f"{interval.median:.2f}× (95 % interval {interval.low:.2f}–{interval.high:.2f})"
        if interval.low > 1:
            verdict = f"is faster than dense: {figures}"
        elif interval.high < 1:
            verdict = f"is not faster but slower than dense: {figures}"
        else:
            verdict = f"is not measurably faster than dense: {figures}"
    facts = []
    if record.psnr_db is not None:
        facts.append(f"PSNR {statistics.median(record.psnr_db):.1f} dB")
    if record.alignment is not None and record.alignment_dense is not None:
        after, before = statistics.fmean(record.alignment), statistics.fmean(record.alignment_dense)
        facts.append(f"alignment {after:.2f} where dense has {before:.2f}")
    if record.density is not None:
        facts.append(f"density {record.density:.2f}")
    return "; ".join([f"{entry.label} {verdict}", ", ".join(facts)] if facts else [f"{entry.label} {verdict}"]) + "."


def _preparation(entry: Entry) -> str:
    record = entry.record
    said = f"{entry.label} needs {seconds(statistics.median(record.samples_s or ()))} to calibrate"
    if record.calibration_cost_ratio is not None:
        said += f", {record.calibration_cost_ratio:.2f} times what the same videos take densely"
    if record.mask_agreement is not None:
        said += f"; the masks of different prompts overlap by {record.mask_agreement:.0%}"
    return f"{said}."


def _control(entries: Sequence[Entry], timed: Sequence[Entry]) -> list[str]:
    """How the methods stand against masks that were drawn by lot."""
    methods = [entry for entry in timed if entry.record.method != RANDOM and _closeness(entry.record) is not None]
    if not methods:
        return []
    controls = [entry for entry in timed if entry.record.method == RANDOM and _closeness(entry.record) is not None]
    if not controls:
        ran = any(entry.record.method == RANDOM for entry in entries)
        why = "could not be timed" if ran else "was not asked for"
        return [f"The random control {why}: nothing shows what the choice of blocks is worth."]
    said = []
    for control in controls:
        beaten = [
            f"{method.label} ({_shown(control.record)} against {_shown(method.record)})"
            for method in methods
            if _beats(control.record, method.record)
        ]
        if beaten:
            said.append(f"{control.label} beats {_listed(beaten)}: as close to dense or closer, at no more cost.")
        else:
            said.append(f"{control.label} ({_shown(control.record)}) beats no method.")
    return said


def _beats(control: Record, method: Record) -> bool:
    """As close to dense or closer, for no more blocks or no less speed."""
    close, reference = _closeness(control), _closeness(method)
    if close is None or reference is None or close < reference:
        return False
    if control.density is not None and method.density is not None and control.density <= method.density + _SAME_DENSITY:
        return True
    fast, other = control.speedup, method.speedup
    return fast is not None and other is not None and fast.median >= other.median


def _closeness(record: Record) -> float | None:
    """How close the arm comes to dense, the higher the closer: by its videos, or by its attention outputs."""
    if record.suite == "denoise":
        return None if record.psnr_db is None else statistics.median(record.psnr_db)
    return None if record.method_error is None else -record.method_error


def _shown(record: Record) -> str:
    closeness = _closeness(record)
    assert closeness is not None
    return f"{closeness:.1f} dB" if record.suite == "denoise" else f"method error {-closeness:.3g}"


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
