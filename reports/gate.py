"""The gate: has a run become slower, wrong or unfaithful against an earlier run of the same benchmarks?"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from calibatt.bench.record import Record, Run, UnusableFile, plain
from calibatt.bench.statistics import Interval
from calibatt.reports.facts import title

# runs of one build on one machine differ by up to some percent (clock, memory layout): less is no one's fault
TOLERANCE = 0.05
# a fall in PSNR that is plainly more noise; rounding alone moves it by hundredths of a decibel
PSNR_DROP_DB = 1.0
# letters; the reason why an arm failed may be anything
_LONGEST_LINE = 600


class ExitCode(IntEnum):
    """How the gate ends; 2 is the command line's, for files that cannot be judged at all."""

    PASS = 0
    REGRESSION = 1
    INCONCLUSIVE = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """What the gate says of one arm.

    Args:
        workload, arm: which one.
        code: pass, regression or inconclusive.
        reason: the figures, or what is missing.
    """

    workload: str
    arm: str
    code: ExitCode
    reason: str

    def __str__(self) -> str:
        # names are a file's: they may not end the line, nor move the cursor
        return plain(f"{self.code.name.lower():<12}  {self.workload}  {self.arm}: {self.reason}", _LONGEST_LINE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What the gate says of a run: the worst that it found."""

    judgements: tuple[Judgement, ...]

    @property
    def exit_code(self) -> ExitCode:
        """A regression outweighs what is inconclusive, and that outweighs a pass."""
        codes = {one.code for one in self.judgements}
        worst_first = (ExitCode.REGRESSION, ExitCode.INCONCLUSIVE)
        return next((code for code in worst_first if code in codes), ExitCode.PASS)

    @property
    def lines(self) -> tuple[str, ...]:
        """One line an arm, then the verdict."""
        return (*map(str, self.judgements), self.exit_code.name.lower())


def judge(current: Run, baseline: Run, *, tolerance: float = TOLERANCE) -> Verdict:
    """Compare the paired speedups, outcomes and fidelity of two runs, arm by arm.

    A regression is: a speedup whose whole interval lies below the baseline's median less the tolerance; an arm that
    ran and no longer does, or is gone; a median PSNR that fell by more than 1 dB. Speedups without an interval, or
    from another machine, are inconclusive; so is a median below the limit whose interval still reaches it.

    Args:
        current: the run to judge.
        baseline: the run to compare with.
        tolerance: fraction of the speedup whose loss is accepted.

    Raises:
        ValueError: the tolerance is no fraction.
        UnusableFile: a run has two records of one arm.
    """
    if not 0 <= tolerance < 1:
        raise ValueError(f"tolerance {tolerance} must be at least 0 and less than 1")
    now, before = _by_key(current), _by_key(baseline)
    elsewhere = _other_machine(current, baseline)
    judgements = []
    for key in dict.fromkeys([*before, *now]):
        new, old = now.get(key), before.get(key)
        code, reason = _compare(new, old, tolerance, elsewhere)
        shown = new or old
        assert shown is not None
        judgements.append(Judgement(workload=title(shown), arm=_arm(shown), code=code, reason=reason))
    return Verdict(judgements=tuple(judgements))


def _compare(new: Record | None, old: Record | None, tolerance: float, elsewhere: str | None) -> tuple[ExitCode, str]:
    if old is None:
        return ExitCode.PASS, "new, nothing to compare it with"
    if new is None:
        ran = old.outcome == "ok"
        return (ExitCode.REGRESSION, "gone from the run") if ran else (ExitCode.PASS, f"gone; it was {old.outcome}")
    if new.outcome != "ok":
        code = ExitCode.REGRESSION if old.outcome == "ok" else ExitCode.PASS
        return code, f"{new.outcome} (was {old.outcome}): {new.reason}"
    if old.outcome != "ok":
        return ExitCode.PASS, f"runs now (was {old.outcome})"
    parts = [_speed(new, old, tolerance, elsewhere), _fidelity(new, old)]
    found = [part for part in parts if part is not None]
    if not found:
        return ExitCode.PASS, "runs; it has no speedup to compare"
    severity = (ExitCode.PASS, ExitCode.INCONCLUSIVE, ExitCode.REGRESSION)
    return max((code for code, _ in found), key=severity.index), "; ".join(reason for _, reason in found)


def _speed(new: Record, old: Record, tolerance: float, elsewhere: str | None) -> tuple[ExitCode, str] | None:
    speed, reference = new.speedup, old.speedup
    if reference is None:
        return None
    if speed is None:
        return ExitCode.INCONCLUSIVE, "no dense times to compare with in the new run"
    limit = reference.median * (1 - tolerance)
    figures = f"speedup {_interval(speed)}, was {_interval(reference)}"
    if elsewhere is not None:
        return ExitCode.INCONCLUSIVE, f"{figures}, but {elsewhere}"
    if speed.low is None or speed.high is None or reference.low is None:
        return ExitCode.INCONCLUSIVE, f"{figures}: at least six rounds in both runs are needed for an interval"
    if speed.high < limit:
        return ExitCode.REGRESSION, f"{figures}: wholly below {limit:.3f}"
    if speed.median < limit:
        return ExitCode.INCONCLUSIVE, f"{figures}: lower, but the interval reaches {limit:.3f}; run more rounds"
    return ExitCode.PASS, figures


def _fidelity(new: Record, old: Record) -> tuple[ExitCode, str] | None:
    if old.psnr_db is None:
        return None
    if new.psnr_db is None:
        return ExitCode.INCONCLUSIVE, "PSNR was not measured in the new run"
    after, before = statistics.median(new.psnr_db), statistics.median(old.psnr_db)
    figures = f"PSNR {after:.2f} dB, was {before:.2f} dB"
    if (new.prompts, new.weights, new.guidance) != (old.prompts, old.weights, old.guidance):
        return ExitCode.INCONCLUSIVE, f"{figures}, but of other prompts, weights or guidance"
    code = ExitCode.REGRESSION if before - after > PSNR_DROP_DB else ExitCode.PASS
    return code, figures


def _by_key(run: Run) -> dict[tuple[Any, ...], Record]:
    found: dict[tuple[Any, ...], Record] = {}
    for record in run.records:
        if found.setdefault(record.key, record) is not record:
            raise UnusableFile(f"{run.path}: has {title(record)} {_arm(record)} twice; run again into a new file")
    return found


def _other_machine(current: Run, baseline: Run) -> str | None:
    """Why speedups of the two runs cannot be compared, if so."""
    for name, read in _MACHINE.items():
        here, there = read(current.machine), read(baseline.machine)
        if here != there:
            return f"the {name} differs ({here or 'unknown'}, was {there or 'unknown'})"
    return None


# what decides a speedup besides the code
_MACHINE: Mapping[str, Callable[[Mapping[str, Any]], Any]] = {
    "GPU": lambda machine: machine.get("gpu"),
    "CPU": lambda machine: (machine.get("cpu") or {}).get("brand_raw"),
    "number of threads": lambda machine: machine.get("threads"),
}


def _arm(record: Record) -> str:
    block = record.block and "×".join(map(str, record.block))
    details = (record.kernel, *((block, record.mask) if record.suite in ("kernel", "forward") else ()))
    return f"{record.arm} ({', '.join(detail for detail in details if detail)})"


def _interval(speed: Interval) -> str:
    between = "no interval" if speed.low is None or speed.high is None else f"{speed.low:.3f}–{speed.high:.3f}"
    return f"{speed.median:.3f} ({between})"
