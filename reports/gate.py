"""The gate: has a run become slower, wrong or unfaithful against an earlier run of the same benchmarks?

Runs of unlike machines are not compared unless that is asked for, and times that something spoilt decide nothing. A
speedup would hide what makes dense and sparse attention slower alike, so the dense times are compared too, where both
files show that they are of one machine with one software.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from calibatt.bench.machine import Comparison, compare, describe
from calibatt.bench.record import Record, Run, UnusableFile, plain
from calibatt.bench.statistics import Interval, paired_ratio
from calibatt.reports.columns import seconds
from calibatt.reports.facts import title

# runs of one build on one machine differ by up to some percent (clock, memory layout): less is no one's fault
TOLERANCE = 0.05
# times vary more than their ratios: dense medians of the committed files of one machine differ by up to 6.6 %
# (bench/results/cpu, attention suite)
TIME_TOLERANCE = 0.1
# a fall in PSNR that is plainly more noise; rounding alone moves it by hundredths of a decibel
PSNR_DROP_DB = 1.0
# letters; the reason why an arm failed may be anything
_LONGEST_LINE = 600
_TOO_FEW = "at least six rounds in both runs are needed for an interval"


class ExitCode(IntEnum):
    """How the gate ends; 2 is the command line's, for files that cannot be judged at all."""

    PASS = 0
    REGRESSION = 1
    INCONCLUSIVE = 3


# what one comparison says
_Part = tuple[ExitCode, str]


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
    """What the gate says of a run: the worst that it found.

    Args:
        judgements: of each arm, or of both files where they are not compared.
        notes: what limits the comparison.
    """

    judgements: tuple[Judgement, ...]
    notes: tuple[str, ...] = ()

    @property
    def exit_code(self) -> ExitCode:
        """A regression outweighs what is inconclusive, and that outweighs a pass."""
        codes = {one.code for one in self.judgements}
        worst_first = (ExitCode.REGRESSION, ExitCode.INCONCLUSIVE)
        return next((code for code in worst_first if code in codes), ExitCode.PASS)

    @property
    def lines(self) -> tuple[str, ...]:
        """One line an arm, the notes, then the verdict."""
        notes = (plain(f"{'note':<12}  {note}", _LONGEST_LINE) for note in self.notes)
        return (*map(str, self.judgements), *notes, self.exit_code.name.lower())


def judge(current: Run, baseline: Run, *, tolerance: float = TOLERANCE, force: bool = False) -> Verdict:
    """Compare the paired speedups, dense times, outcomes and fidelity of two runs, arm by arm.

    A regression is: a speedup whose whole interval lies below the baseline's median less the tolerance; an arm that
    ran and no longer does, or is gone; a median PSNR that fell by more than 1 dB; dense times, an arm's own or its
    baseline's, whose speed fell by more than 10 %, on machines known to be alike. Inconclusive are runs of unlike
    machines, times that were throttled or disturbed, those without an interval, and a median below the limit whose
    interval still reaches it.

    Args:
        current: the run to judge.
        baseline: the run to compare with.
        tolerance: fraction of the speedup whose loss is accepted.
        force: compare speedups of unlike machines too.

    Raises:
        ValueError: the tolerance is no fraction.
        UnusableFile: a run has two records of one arm.
    """
    if not 0 <= tolerance < 1:
        raise ValueError(f"tolerance {tolerance} must be at least 0 and less than 1")
    now, before = _by_key(current), _by_key(baseline)
    machines = compare(current.machine, baseline.machine)
    if machines.difference is not None and not force:
        said = f"{machines.difference}; --force compares them all the same"
        sides = f"{current.path} ({describe(current.machine)}) and {baseline.path} ({describe(baseline.machine)})"
        return Verdict(
            judgements=(Judgement(workload="unlike machines", arm=sides, code=ExitCode.INCONCLUSIVE, reason=said),)
        )
    judgements = []
    for key in dict.fromkeys([*before, *now]):
        new, old = now.get(key), before.get(key)
        code, reason = _compare(new, old, tolerance, machines.alike)
        shown = new or old
        assert shown is not None
        judgements.append(Judgement(workload=title(shown), arm=_arm(shown), code=code, reason=reason))
    return Verdict(judgements=tuple(judgements), notes=_notes(machines))


def _notes(machines: Comparison) -> tuple[str, ...]:
    notes = []
    if machines.difference is not None:
        notes.append(f"forced, though {machines.difference}: dense times are not compared")
    if machines.unknown:
        notes.append(f"dense times are not compared, for one file or both do not say: {', '.join(machines.unknown)}")
    return tuple(notes)


def _compare(new: Record | None, old: Record | None, tolerance: float, alike: bool) -> _Part:
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
    found = [*_times(new, old, tolerance, alike), *_some(_fidelity(new, old))]
    if not found:
        return ExitCode.PASS, "runs; it has no speedup to compare"
    severity = (ExitCode.PASS, ExitCode.INCONCLUSIVE, ExitCode.REGRESSION)
    return max((code for code, _ in found), key=severity.index), "; ".join(reason for _, reason in found)


def _times(new: Record, old: Record, tolerance: float, alike: bool) -> list[_Part]:
    """What its times say; if they are doubtful, nothing for sure."""
    parts = [*_some(_speed(new, old, tolerance)), *_some(_dense_time(new, old) if alike else None)]
    doubts = [f"{which} run was {one.doubt}" for which, one in (("this", new), ("the earlier", old)) if one.doubt]
    if not doubts:
        return parts
    return [(ExitCode.INCONCLUSIVE, "; ".join([*(reason for _, reason in parts), *doubts]))]


def _dense_time(new: Record, old: Record) -> _Part | None:
    now, before = _dense_samples(new), _dense_samples(old)
    if now is None or before is None:
        return None
    medians = (seconds(statistics.median(samples)) for samples in (now, before))
    whose = "time" if new.baseline_samples_s is None else "baseline's time"
    figures = f"{whose} {', was '.join(medians)}"
    if new.guidance != old.guidance:
        return ExitCode.INCONCLUSIVE, f"{figures}, but of another guidance"
    # round by round: in both runs, a round has the same prompt and the same seed
    count = min(len(now), len(before))
    speed = paired_ratio(before[:count], now[:count])
    return _against(speed, 1 - TIME_TOLERANCE, f"{figures}, {_interval(speed)} of its speed")


def _dense_samples(record: Record) -> Sequence[float] | None:
    return record.samples_s if record.method == "dense" else record.baseline_samples_s


def _speed(new: Record, old: Record, tolerance: float) -> _Part | None:
    speed, reference = new.speedup, old.speedup
    if reference is None:
        return None
    if speed is None:
        return ExitCode.INCONCLUSIVE, "no dense times to compare with in the new run"
    limit = reference.median * (1 - tolerance)
    figures = f"speedup {_interval(speed)}, was {_interval(reference)}"
    if reference.low is None:
        return ExitCode.INCONCLUSIVE, f"{figures}: {_TOO_FEW}"
    return _against(speed, limit, figures)


def _against(speed: Interval, limit: float, figures: str) -> _Part:
    """A regression is wholly below the limit; what may be above it, or may not, is inconclusive."""
    if speed.low is None or speed.high is None:
        return ExitCode.INCONCLUSIVE, f"{figures}: {_TOO_FEW}"
    if speed.high < limit:
        return ExitCode.REGRESSION, f"{figures}: wholly below {limit:.3f}"
    if speed.median < limit:
        return ExitCode.INCONCLUSIVE, f"{figures}: lower, but the interval reaches {limit:.3f}; run more rounds"
    return ExitCode.PASS, figures


def _fidelity(new: Record, old: Record) -> _Part | None:
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


def _some(part: _Part | None) -> tuple[_Part, ...]:
    return () if part is None else (part,)


def _arm(record: Record) -> str:
    block = record.block and "×".join(map(str, record.block))
    details = (record.kernel, *((block, record.mask) if record.suite in ("kernel", "forward") else ()))
    return f"{record.arm} ({', '.join(detail for detail in details if detail)})"


def _interval(speed: Interval) -> str:
    between = "no interval" if speed.low is None or speed.high is None else f"{speed.low:.3f}–{speed.high:.3f}"
    return f"{speed.median:.3f} ({between})"
