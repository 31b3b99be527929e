"""The gate: has a benchmark become slower, wrong or unfaithful against earlier runs of it?

Runs of unlike machines are not compared unless that is asked for, and times that something spoilt decide nothing. A
speedup would hide what makes dense and sparse attention slower alike, so the dense times are compared too, where all
files show that they are of one machine with one software.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from calibatt.bench.machine import Comparison, compare, describe
from calibatt.bench.record import Record, Run, UnusableFile, plain
from calibatt.bench.statistics import holm
from calibatt.reports.facts import title
from calibatt.reports.gate_metrics import METRICS, Finding, Metric, Sampled, Single, Trial, dense_samples
from calibatt.reports.gate_metrics import ExitCode as ExitCode

# what means something on one kind of machine only
_CLOCKED = "dense times, energy and calibration"
# letters; the reason why an arm failed may be anything
_LONGEST_LINE = 600


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """What the gate says of one arm.

    Args:
        workload, arm: which one.
        code: pass, regression or inconclusive: the worst of its findings, where it has some.
        reason: the figures, or what is missing.
        findings: what was compared.
    """

    workload: str
    arm: str
    code: ExitCode
    reason: str
    findings: tuple[Finding, ...] = ()

    def __str__(self) -> str:
        # names are a file's: they may not end the line, nor move the cursor
        return plain(f"{self.code.name.lower():<12}  {self.workload}  {self.arm}: {self.reason}", _LONGEST_LINE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What the gate says of a benchmark: the worst that it found.

    Args:
        judgements: of each arm, or of both sides where they are not compared.
        notes: what limits the comparison.
    """

    judgements: tuple[Judgement, ...]
    notes: tuple[str, ...] = ()

    @property
    def exit_code(self) -> ExitCode:
        """A regression outweighs what is inconclusive, and that outweighs a pass."""
        return _worst(one.code for one in self.judgements)

    @property
    def lines(self) -> tuple[str, ...]:
        """One line an arm, the notes, then the verdict."""
        notes = (plain(f"{'note':<12}  {note}", _LONGEST_LINE) for note in self.notes)
        return (*map(str, self.judgements), *notes, self.exit_code.name.lower())


def judge(
    current: Sequence[Run],
    baseline: Sequence[Run],
    *,
    metrics: Mapping[str, Metric] = METRICS,
    force: bool = False,
) -> Verdict:
    """Compare runs of a benchmark with earlier ones, arm by arm.

    A regression is: a loss of speed that both the bootstrap's interval and the rank test find, the latter corrected
    for all tests of the gate by Holm's method, and that exceeds what is allowed; a figure that is worse by more than is
    allowed; an arm that ran and no longer does, or is gone. Inconclusive are runs of unlike machines, times that were
    throttled or disturbed, and those that would not have shown a loss of the size that is asked for.

    Args:
        current: the runs to judge: of one code and command, each a process.
        baseline: the runs to compare with.
        metrics: what is compared, by name.
        force: compare speedups of unlike machines too.

    Raises:
        ValueError: a side has no run.
        UnusableFile: a run has two records of one arm, or the sides have no arm in common, or nothing of what is asked
            for.
    """
    if not (current and baseline):
        raise ValueError("runs are needed on both sides")
    arms = _arms(current, baseline)
    if not any(arm.new and arm.old for arm in arms):
        raise UnusableFile(f"{current[0].path} and {baseline[0].path} have no arm in common: nothing to compare")
    machines = _machines(current, baseline)
    if machines.difference is not None and not force:
        return Verdict(judgements=(_unlike(current, baseline, machines),))
    asked = ", ".join(metrics)
    if not machines.alike:
        metrics = {name: one for name, one in metrics.items() if not _of_machines(one)}
    known: set[Any] = set()
    compared = [arm.compare(metrics.values(), known) for arm in arms]
    if not any(compared) and any(arm.outcome is None for arm in arms):
        raise UnusableFile(
            f"{current[0].path} and {baseline[0].path} have none of {asked} to compare"
            + (", since their machines are not known to be alike" if not machines.alike else "")
        )
    trials = [one for found in compared for one in found if isinstance(one, Trial)]
    corrected = iter(holm([trial.shift.p for trial in trials]))
    judgements = []
    for arm, found in zip(arms, compared, strict=True):
        findings = [one.judged(next(corrected), len(trials)) if isinstance(one, Trial) else one for one in found]
        judgements.append(arm.judgement(findings))
    return Verdict(judgements=tuple(judgements), notes=(*_notes(machines), *_spread_notes(trials)))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Arm:
    """The records of one arm in the runs of both sides."""

    new: tuple[Record, ...]
    old: tuple[Record, ...]

    @property
    def shown(self) -> Record:
        return (*self.new, *self.old)[0]

    @property
    def outcome(self) -> tuple[ExitCode, str] | None:
        """What can be said without its figures; None where it ran on both sides."""
        if not self.old:
            return ExitCode.PASS, "new, nothing to compare it with"
        # of several runs the first that did not do
        before = next((one for one in self.old if one.outcome != "ok"), self.old[0])
        ran = any(one.outcome == "ok" for one in self.old)
        if not self.new:
            return (
                (ExitCode.REGRESSION, "gone from the run") if ran else (ExitCode.PASS, f"gone; it was {before.outcome}")
            )
        failed = next((one for one in self.new if one.outcome != "ok"), None)
        if failed is not None:
            was = "ok" if ran else before.outcome
            return ExitCode.REGRESSION if ran else ExitCode.PASS, f"{failed.outcome} (was {was}): {failed.reason}"
        return None if ran else (ExitCode.PASS, f"runs now (was {before.outcome})")

    def compare(self, metrics: Iterable[Metric], known: set[Any]) -> list[Trial | Finding]:
        """What each metric says, without those that nobody measured.

        Args:
            metrics: what is compared.
            known: dense times that were compared: arms that are timed in turns share them. Is added to.
        """
        if self.outcome is not None:
            return []
        old = [one for one in self.old if one.outcome == "ok"]
        found = []
        for metric in metrics:
            if metric.name == "time":
                # dense goes on for some arms longer than for others; the first sample they have in common
                first = [(dense_samples(one) or (None,))[0] for one in (*self.new, *old)]
                samples = (self.shown.workload, *first)
                if samples in known:
                    continue
                known.add(samples)
            found.append(metric.compare(self.new, old))
        return [one for one in found if one is not None]

    def judgement(self, findings: Sequence[Finding]) -> Judgement:
        """What the gate says of the arm."""
        known = self.outcome
        code = known[0] if known else _worst(one.code for one in findings)
        reason = known[1] if known else "; ".join(one.said for one in findings) or "runs; nothing of it is compared"
        where = {"workload": title(self.shown), "arm": _name(self.shown)}
        return Judgement(**where, code=code, reason=reason, findings=tuple(findings))


def _arms(current: Sequence[Run], baseline: Sequence[Run]) -> list[_Arm]:
    """All arms of both sides, those of the baseline first."""
    now, before = (_by_key(runs) for runs in (current, baseline))
    return [_Arm(new=tuple(now.get(key, ())), old=tuple(before.get(key, ()))) for key in dict.fromkeys([*before, *now])]


def _by_key(runs: Sequence[Run]) -> dict[Any, list[Record]]:
    found: dict[Any, list[Record]] = {}
    for run in runs:
        keys = set()
        for record in run.records:
            if record.key in keys:
                raise UnusableFile(f"{run.path}: has {title(record)} {_name(record)} twice; run again into a new file")
            keys.add(record.key)
            found.setdefault(record.key, []).append(record)
    return found


def _worst(codes: Iterable[ExitCode]) -> ExitCode:
    found = set(codes)
    worst_first = (ExitCode.REGRESSION, ExitCode.INCONCLUSIVE)
    return next((code for code in worst_first if code in found), ExitCode.PASS)


def _of_machines(metric: Metric) -> bool:
    if isinstance(metric, Single):
        return metric.clocked
    return isinstance(metric, Sampled) and metric.like_machines


def _machines(current: Sequence[Run], baseline: Sequence[Run]) -> Comparison:
    """How alike all machines are: each is compared with the first."""
    first, *others = (*current, *baseline)
    found = [compare(first.machine, other.machine) for other in others]
    differences = tuple(difference for one in found for difference in one.differences)
    unknown = dict.fromkeys(name for one in found for name in one.unknown)
    return Comparison(differences=differences, unknown=tuple(unknown))


def _unlike(current: Sequence[Run], baseline: Sequence[Run], machines: Comparison) -> Judgement:
    now, before = (
        " and ".join(f"{run.path} ({describe(run.machine)})" for run in runs) for runs in (current, baseline)
    )
    said = f"{machines.difference}; --force compares them all the same"
    return Judgement(workload="unlike machines", arm=f"{now} and {before}", code=ExitCode.INCONCLUSIVE, reason=said)


def _notes(machines: Comparison) -> list[str]:
    notes = []
    if machines.difference is not None:
        notes.append(f"forced, though {machines.difference}: {_CLOCKED} are not compared")
    if machines.unknown:
        unknown = ", ".join(machines.unknown)
        notes.append(f"{_CLOCKED} are not compared, for not all files say: {unknown}")
    return notes


def _spread_notes(trials: Sequence[Trial]) -> list[str]:
    """That the spread between runs is taken from elsewhere, where that is so."""
    spreads = {trial.metric.name: trial.metric.spread for trial in trials if not trial.shift.estimated}
    if not spreads:
        return []
    taken = ", ".join(f"{spread:.1%} for {name}" for name, spread in spreads.items())
    return [
        f"the spread between runs is not known from so few files, and taken as {taken}; three new and three earlier "
        "files tell it, or one and five"
    ]


def _name(record: Record) -> str:
    block = record.block and "×".join(map(str, record.block))
    details = (record.kernel, *((block, record.mask) if record.suite in ("kernel", "forward") else ()))
    return f"{record.arm} ({', '.join(detail for detail in details if detail)})"
