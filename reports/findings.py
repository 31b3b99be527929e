"""What the figures say, in sentences: of a workload, and of a whole page.

Where a method is no faster than dense, they say that too.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from calibatt.bench.record import Record
from calibatt.reports.columns import seconds
from calibatt.reports.pairs import PSNR, SSIM, Standing, standings
from calibatt.reports.rows import RANDOM, Row

# densities that differ by less count as equal: the tolerance to which the benchmark sets them
_SAME_DENSITY = 0.01
# methods that a sentence names; of more it gives the number, and the table names them
_NAMED = 4


def findings(rows: Sequence[Row]) -> list[str]:
    """Sentences about one workload: methods from the fastest on, the control, what is doubtful or missing."""
    timed = [row for row in rows if row.record.speedup is not None]
    timed.sort(key=_place)
    said = [speed(row) for row in timed]
    said += [_preparation(row) for row in rows if row.record.suite == "calibration" and row.record.samples_s]
    said += _control(rows, timed)
    throttled = [row.label for row in rows if row.record.doubt and row.record.throttled]
    if throttled:
        said.append(f"Heat or power held the GPU's clock down during {listed(throttled)}: the times are doubtful.")
    disturbed = [row.label for row in rows if row.record.doubt and not row.record.throttled]
    if disturbed:
        said.append(f"Others had a good part of the CPUs during {listed(disturbed)}: the times are doubtful.")
    missing = [row.label for row in rows if row.record.outcome != "ok"]
    if missing:
        said.append(f"Not timed: {listed(missing)}; the reasons are below.")
    return said


def _place(row: Row) -> tuple[bool, float]:
    assert row.record.speedup is not None
    return row.record.method == RANDOM, -row.record.speedup.median


def ratio(row: Row) -> float:
    """Median speedup; NaN of an arm that has none."""
    return row.record.speedup.median if row.record.speedup else math.nan


def speed(row: Row) -> str:
    """How fast an arm is, as far as its interval lets one say, and how near to dense."""
    record, interval = row.record, row.record.speedup
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
            verdict = f"is slower than dense: {figures}"
        else:
            verdict = f"is not measurably faster than dense: {figures}"
    facts = []
    if record.psnr_db is not None:
        facts.append(f"PSNR {statistics.median(record.psnr_db):.1f} dB")
    elif record.method_error is not None:
        facts.append(f"method error {record.method_error:.2g}")
    if record.alignment is not None and record.alignment_dense is not None:
        after, before = statistics.fmean(record.alignment), statistics.fmean(record.alignment_dense)
        facts.append(f"alignment {after:.2f} where dense has {before:.2f}")
    if record.density is not None:
        facts.append(f"density {record.density:.2f}")
    return "; ".join([f"{row.label} {verdict}", ", ".join(facts)] if facts else [f"{row.label} {verdict}"]) + "."


def _preparation(row: Row) -> str:
    record = row.record
    said = f"{row.label} needs {seconds(statistics.median(record.samples_s or ()))} to calibrate"
    if record.calibration_cost_ratio is not None:
        said += f", {record.calibration_cost_ratio:.2f} times what the same videos take densely"
    if record.mask_agreement is not None:
        said += f"; the masks of different prompts overlap by {record.mask_agreement:.0%}"
    if record.mask_iou is not None:
        said += f"; they overlap by {record.mask_iou:.1%} with masks from all queries"
    return f"{said}."


def _control(rows: Sequence[Row], timed: Sequence[Row]) -> list[str]:
    """How the methods stand against masks that are random."""
    if not any(row.record.method != RANDOM and closeness(row.record) is not None for row in timed):
        return []
    controls = beaten_by_chance(rows)
    if not controls:
        ran = any(row.record.method == RANDOM for row in rows)
        why = "could not be timed" if ran else "was not asked for"
        return [f"The random control {why}: nothing shows what the choice of blocks is worth."]
    by_psnr, by_ssim = ({id(one.row): one for one in standings(rows, measure)} for measure in (PSNR, SSIM))
    said = []
    for control, beaten in controls:
        if (found := by_psnr.get(id(control))) and (alike := _alike(found)):
            sentence = f"{alike[0].upper()}{alike[1:]}: not told apart from {control.label} by PSNR, in pairs of videos"
            seen = by_ssim.get(id(control))
            also = "" if seen is None else f"; by SSIM {_alike(seen) or 'all are'}"
            said.append(f"{sentence}{also}.")
        shown = [f"{row.label} ({shown_closeness(control)} against {shown_closeness(row)})" for row in beaten]
        if shown:
            said.append(f"{control.label} beats {listed(shown)}: as close to dense or closer, at no more cost.")
        else:
            said.append(f"{control.label} ({shown_closeness(control)}) beats no method.")
    return said


def _alike(standing: Standing) -> str:
    """The methods that an arm is not told apart from, by name where these are few, or the others are."""
    alike, told = (
        [row.label for row, _ in side if row.record.method != RANDOM]
        for side in (standing.alike, (*standing.nearer, *standing.farther))
    )
    if len(alike) <= _NAMED:
        return listed(alike) if alike else ""
    if len(told) <= _NAMED:
        return "all methods" + (f" but {listed(told)}" if told else "")
    return f"{len(alike)} of {len(alike) + len(told)} methods"


def beaten_by_chance(rows: Sequence[Row]) -> list[tuple[Row, list[Row]]]:
    """Every control of a workload with the methods that it beats: as close to dense or closer, at no more cost."""
    known = [row for row in rows if row.record.speedup is not None and closeness(row.record) is not None]
    controls = [row for row in known if row.record.method == RANDOM]
    paired = {id(standing.row): standing for standing in standings(rows)} if controls else {}
    found = []
    for control in controls:
        standing = paired.get(id(control))
        # where pairs of videos can tell, medians have no say
        told = {} if standing is None else {id(row): True for row, _ in standing.nearer}
        told |= {} if standing is None else {id(row): False for row, _ in (*standing.alike, *standing.farther)}
        beaten = [
            row
            for row in known
            if row.record.method != RANDOM
            and told.get(id(row), _as_close(control.record, row.record))
            and _costs_no_more(control.record, row.record)
        ]
        found.append((control, beaten))
    return found


def _as_close(control: Record, method: Record) -> bool:
    """As close to dense or closer."""
    close, reference = closeness(control), closeness(method)
    return close is not None and reference is not None and close >= reference


def _costs_no_more(control: Record, method: Record) -> bool:
    """No more blocks or no less speed."""
    if control.density is not None and method.density is not None and control.density <= method.density + _SAME_DENSITY:
        return True
    fast, other = control.speedup, method.speedup
    return fast is not None and other is not None and fast.median >= other.median


def closeness(record: Record) -> float | None:
    """How close the arm comes to dense, the higher the closer: by its videos, or by its attention outputs."""
    if record.suite == "denoise":
        return None if record.psnr_db is None else statistics.median(record.psnr_db)
    return None if record.method_error is None else -record.method_error


def shown_closeness(row: Row) -> str:
    """That with its unit; nothing where it was not measured."""
    close = closeness(row.record)
    if close is None:
        return ""
    return f"{close:.1f} dB" if row.record.suite == "denoise" else f"method error {-close:.3g}"


def listed(names: Sequence[str]) -> str:
    """Names as a sentence has them."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
