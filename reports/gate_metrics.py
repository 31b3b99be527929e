"""What the gate compares of an arm, each with what may be lost of it: times by samples, videos by pairs, figures."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from types import MappingProxyType
from typing import Any

from calibatt.bench.record import Record, Samples
from calibatt.bench.statistics import Shift, shift_of_runs
from calibatt.reports.columns import seconds
from calibatt.reports.rows import DENSE

# of the whole gate, over all cells: what the project asks of it on identical code; `gate_study` measures it
LEVEL = 0.01
# a slowdown that is allowed: a third of the 3 % that the gate is to find, so that it seldom hides one
TOLERANCE = 0.01
# a run that would not show a slowdown of this size is too weak to pass: what the gate is to find nearly always
MDE = 0.05


class ExitCode(IntEnum):
    """How the gate ends; 2 is the command line's, for files that cannot be judged at all."""

    PASS = 0
    REGRESSION = 1
    INCONCLUSIVE = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What one comparison says.

    Args:
        metric: what was compared.
        code: pass, regression or inconclusive.
        said: the figures, or what is missing.
        loss, low, high: share of the speed that is lost, and its interval; None where no samples were compared.
        p: of interval and rank test, the larger one, corrected for all tests of the gate.
        detectable: the least loss that these runs would have shown with a power of 80 %; None where none.
    """

    metric: str
    code: ExitCode
    said: str
    loss: float | None = None
    low: float | None = None
    high: float | None = None
    p: float | None = None
    detectable: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """Two sides' samples compared, to be judged when the number of tests is known.

    Args:
        metric: what was compared.
        shift: of logarithms of which more is better.
        figures: medians, in words.
        doubt: why a loss, were there one, would say nothing.
    """

    metric: Sampled
    shift: Shift
    figures: str
    doubt: str | None

    def judged(self, p: float, tests: int) -> Finding:
        """The finding.

        Args:
            p: of the shift, corrected.
            tests: how many there are in the gate.
        """
        metric, shift = self.metric, self.shift
        found = shift.detectable(LEVEL / tests)
        detectable = None if found is None else _loss(-found)
        loss, low, high = _loss(shift.value), _loss(shift.high), _loss(shift.low)
        finds = "would find none" if detectable is None else f"would find {detectable:.1%}"
        said = f"{self.figures}: loss {loss:.1%} ({low:.1%} to {high:.1%}), p {p:.2g}, {finds}"
        if low > 0 and p <= LEVEL and loss > metric.allowed:
            code, why = (ExitCode.INCONCLUSIVE, self.doubt) if self.doubt else (ExitCode.REGRESSION, None)
        elif detectable is None:
            code, why = (
                ExitCode.INCONCLUSIVE,
                f"too few rounds for {tests} test{'' if tests == 1 else 's'}; give more runs, or rounds",
            )
        elif detectable > (asked := max(metric.mde, metric.allowed)):
            code, why = ExitCode.INCONCLUSIVE, f"too noisy to find {asked:.1%}; give more runs, or rounds"
        else:
            code, why = ExitCode.PASS, None
        return Finding(
            metric=metric.name, code=code, said=f"{said}: {why}" if why else said, loss=loss, low=low, high=high,
            p=p, detectable=detectable,
        )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled:
    """A metric with a sample a round, compared in logarithms by an interval and a rank test.

    Args:
        name, title: of `--on`, and in words.
        samples: of a record, in logarithms of which more is better; None where there are none.
        figure: medians of several records, in words.
        allowed: share of the speed that may be lost.
        mde: the least loss that must be detectable with a power of 80 % for a pass (minimal detectable effect).
        spread: standard deviation of the logarithms from run to run, where too few runs tell.
        like_machines: whether it means something on one kind of machine only.
    """

    name: str
    title: str
    samples: Callable[[Record], Sequence[float] | None]
    figure: Callable[[Sequence[Record]], str]
    allowed: float
    mde: float
    spread: float
    like_machines: bool = True

    def compare(self, new: Sequence[Record], old: Sequence[Record]) -> Trial | Finding | None:
        """What the records of one arm say; None where the earlier runs have nothing to compare with."""
        before = [one for one in old if self.samples(one) is not None]
        now = [one for one in new if self.samples(one) is not None]
        if not before:
            return None
        if not now:
            return _missing(self.name, self.title)
        figures = f"{self.title} {self.figure(now)}, was {self.figure(before)}"
        # of a speedup, guidance concerns both sides
        if self.like_machines and {one.guidance for one in now} != {one.guidance for one in before}:
            return Finding(metric=self.name, code=ExitCode.INCONCLUSIVE, said=f"{figures}, but of another guidance")
        sound = [_sound(side) for side in (now, before)]
        doubts = _doubts(now, before)
        if not all(sound):
            return Finding(metric=self.name, code=ExitCode.INCONCLUSIVE, said=f"{figures}: {doubts}")
        ours, theirs = ([self.samples(one) or () for one in side] for side in sound)
        shift = shift_of_runs(ours, theirs, spread=self.spread, level=LEVEL)
        left_out = f" ({doubts}: left out)" if doubts else ""
        if some := sum(sum(one.spoilt or ()) for one in (*sound[0], *sound[1])):
            left_out += f" ({some} sample{'' if some == 1 else 's'} throttled or disturbed: left out)"
        # of a time or an energy, dense attention is no part
        doubt = None if self.like_machines else _other_dense(now, before)
        return Trial(metric=self, shift=shift, figures=figures + left_out, doubt=doubt)


@dataclass(frozen=True, slots=True, kw_only=True)
class Paired:
    """A metric with a value a video, of which more is better, compared on the same prompts and noise.

    Args:
        name: of `--on`.
        values: of a record.
        form: how a value is written.
        allowed: by how much the mean over the videos may fall.
    """

    name: str
    values: Callable[[Record], Sequence[float] | None]
    form: str
    allowed: float

    def compare(self, new: Sequence[Record], old: Sequence[Record]) -> Finding | None:
        """What the records of one arm say; None where the earlier runs have nothing to compare with."""
        now, before = ([one for one in side if self.values(one)] for side in (new, old))
        if not before:
            return None
        if not now:
            return _missing(self.name, self.name)
        count = min(len(self.values(one) or ()) for one in (*now, *before))
        inputs = {((one.prompts or ())[:count], one.weights, one.guidance) for one in (*now, *before)}
        after, earlier = (
            statistics.fmean(value for one in side for value in (self.values(one) or ())[:count])
            for side in (now, before)
        )
        figures = f"{self.name} {self.form.format(after)}, was {self.form.format(earlier)}"
        if len(inputs) > 1:
            said = f"{figures}, but of other prompts, weights or guidance"
            return Finding(metric=self.name, code=ExitCode.INCONCLUSIVE, said=said)
        return _finding(self.name, figures, earlier - after > self.allowed)


@dataclass(frozen=True, slots=True, kw_only=True)
class Single:
    """A metric with one figure a run: the medians over the runs are compared.

    Args:
        name: of `--on`.
        values: figures of a record, by what they are called.
        form: how one is written.
        allowed: by which share of itself it may become worse, or by how much, where it is not relative.
        relative: whether `allowed` is a share.
        more_is_better: whether a fall is worse, and not a rise.
        clocked: whether it is of one kind of machine only, and throttling and other processes change it.
    """

    name: str
    values: Callable[[Record], Mapping[str, float | None]]
    form: Callable[[float], str]
    allowed: float
    relative: bool = True
    more_is_better: bool = False
    clocked: bool = False

    def compare(self, new: Sequence[Record], old: Sequence[Record]) -> Finding | None:
        """What the records of one arm say; None where the earlier runs have nothing to compare with."""
        said, worse = [], False
        now, before = ([*map(self.values, side)] for side in (new, old))
        for label in before[0]:
            after, earlier = ([value for one in side if (value := one[label]) is not None] for side in (now, before))
            if not earlier:
                continue
            if not after:
                return _missing(self.name, label)
            medians = statistics.median(after), statistics.median(earlier)
            said.append(f"{label} {self.form(medians[0])}, was {self.form(medians[1])}")
            worse = worse or self._worse(*medians)
        if not said:
            return None
        if worse and self.clocked and (doubts := _doubts(new, old)):
            return Finding(metric=self.name, code=ExitCode.INCONCLUSIVE, said=f"{'; '.join(said)}: {doubts}")
        return _finding(self.name, "; ".join(said), worse)

    def _worse(self, now: float, before: float) -> bool:
        rise = before - now if self.more_is_better else now - before
        return rise > self.allowed * (abs(before) if self.relative else 1)


Metric = Sampled | Paired | Single


def _loss(shift: float) -> float:
    """Share that is lost where logarithms are shifted."""
    # a ratio beyond all floats is no likelier to be met for being exact
    return -math.expm1(min(shift, 700.0))


def _finding(name: str, figures: str, worse: bool) -> Finding:
    return Finding(metric=name, code=ExitCode.REGRESSION if worse else ExitCode.PASS, said=figures)


def _missing(name: str, title: str) -> Finding:
    return Finding(metric=name, code=ExitCode.INCONCLUSIVE, said=f"{title} was not measured in the new run")


def _sound(records: Sequence[Record]) -> list[Record]:
    """Those whose times nothing spoilt."""
    return [one for one in records if one.doubt is None]


def _doubts(new: Sequence[Record], old: Sequence[Record]) -> str:
    """What spoilt the times of which runs."""
    sides = (("this", new), ("the earlier", old))
    return "; ".join(
        f"{which} run was {doubt}"
        for which, side in sides
        for doubt in dict.fromkeys(one.doubt for one in side)
        if doubt
    )


def _other_dense(new: Sequence[Record], old: Sequence[Record]) -> str | None:
    """That both sides' arms were paired with different dense kernels, which alone changes a speedup."""
    now, before = ({one.baseline for one in side} for side in (new, old))
    if now == before:
        return None
    return "paired with another dense kernel ({}, was {})".format(
        *(" and ".join(sorted(str(name) for name in names)) for names in (now, before))
    )


def speedups(record: Record) -> Sequence[float] | None:
    """Logarithms of the paired speedups of an arm's rounds, without those that something spoilt."""
    if record.samples_s is None or record.baseline_samples_s is None:
        return None
    pairs = zip(record.sound(record.baseline_samples_s), record.sound(record.samples_s), strict=True)
    return [math.log(dense) - math.log(sparse) for dense, sparse in pairs]


def _speedup(records: Sequence[Record]) -> str:
    return f"{math.exp(_median(records, speedups)):.3f}"


def dense_samples(record: Record) -> Samples | None:
    """Seconds of dense attention in the arm's rounds."""
    return record.samples_s if record.method == DENSE else record.baseline_samples_s


def _sound_dense(record: Record) -> Sequence[float] | None:
    samples = dense_samples(record)
    return samples and record.sound(samples)


def _dense_speed(record: Record) -> Sequence[float] | None:
    samples = _sound_dense(record)
    return samples and [-math.log(sample) for sample in samples]


def _dense_time(records: Sequence[Record]) -> str:
    return seconds(_median(records, _sound_dense))


def _thrift(record: Record) -> Sequence[float] | None:
    """Logarithms of which more is less energy; None of a GPU that counts none."""
    if record.energy_j is None or min(record.energy_j) <= 0:
        return None
    return [-math.log(one) for one in record.sound(record.energy_j)]


def _energy(records: Sequence[Record]) -> str:
    return f"{_median(records, lambda record: record.energy_j and record.sound(record.energy_j)):.4g} J"


def _median(records: Sequence[Record], read: Callable[[Record], Sequence[float] | None]) -> float:
    return statistics.median(itertools.chain.from_iterable(read(one) or () for one in records))


def _calibration(record: Record) -> Mapping[str, float | None]:
    return {"cost of calibration": record.calibration_cost_ratio, "seconds of preparation": record.preparation_s}


def _memory(record: Record) -> Mapping[str, float | None]:
    return {"peak memory": record.peak_memory_bytes, "memory of plans": record.plan_memory_bytes}


def _figure(name: str, field: str) -> Callable[[Record], Mapping[str, float | None]]:
    return lambda record: {name: getattr(record, field)}


def _megabytes(count: float) -> str:
    return f"{count / 1e6:.4g} MB"


def _plainly(value: float) -> str:
    return f"{value:.4g}"


_ALL: tuple[Metric, ...] = (
    # two files of one H200, bench/results/h200/kernel.json and kernel-blocks.json, differ by 2.4 to 2.7 % in four arms:
    # √½ of that is a run's
    Sampled(
        name="speedup", title="speedup", samples=speedups, figure=_speedup, allowed=TOLERANCE, mde=MDE, spread=0.017,
        like_machines=False,
    ),
    # dense medians of the committed files of one machine differ by up to 6.6 % (bench/results/cpu, attention suite)
    Sampled(
        name="time", title="dense time", samples=_dense_speed, figure=_dense_time, allowed=0.1, mde=0.3, spread=0.047
    ),
    # dense videos of bench/results/h100/videos.json and ablation.json took 5.5 % more and less
    Sampled(name="energy", title="energy", samples=_thrift, figure=_energy, allowed=0.1, mde=0.3, spread=0.039),
    # one figure a run: the same lesson took 59.6 and 65.3 s (methods-equal.json, methods-calibatt.json of results/cpu)
    Single(name="calibration", values=_calibration, form=_plainly, allowed=0.5, clocked=True),
    # what is allocated repeats to the byte; this leaves room for a library's work space
    Single(name="memory", values=_memory, form=_megabytes, allowed=0.1),
    # the same prompts and noise: rounding moves a mean by hundredths of a decibel
    Paired(name="psnr", values=lambda record: record.psnr_db, form="{:.2f} dB", allowed=0.5),
    # one object in twenty that is no longer what the caption says
    Paired(name="alignment", values=lambda record: record.alignment, form="{:.3f}", allowed=0.05),
    # these repeat to rounding where masks do: budget's in videos.json and ablation.json to 0.06 %
    Single(name="density", values=_figure("density", "density"), form=_plainly, allowed=0.02),
    Single(
        name="recall", values=_figure("recall", "recall"), form=_plainly, allowed=0.01, relative=False,
        more_is_better=True,
    ),
    Single(name="error", values=_figure("method error", "method_error"), form=_plainly, allowed=0.05),
)  # fmt: skip
# by their names for `--on`
METRICS: Mapping[str, Metric] = MappingProxyType({one.name: one for one in _ALL})


def choose(on: str | None = None, tolerance: str | None = None, mde: str | None = None) -> Mapping[str, Metric]:
    """The metrics that the command line asks for.

    Args:
        on: names, separated by commas, each with `=` and what is allowed, if not its own; None for all.
        tolerance: of the speedup, such as `3%` or `0.03`.
        mde: of the speedup.

    Raises:
        ValueError: one makes no sense; the message is one line that says what to do.
    """
    found: dict[str, Metric] = {}
    for text in METRICS if on is None else filter(None, map(str.strip, on.split(","))):
        name, equal, allowed = text.partition("=")
        if name in found:
            raise ValueError(f"--on {on}: {name} stands there twice")
        metric = METRICS.get(name)
        if metric is None:
            raise ValueError(f"--on {text}: give some of {', '.join(METRICS)}")
        found[name] = replace(metric, allowed=_amount(metric, f"--on {text}", allowed)) if equal else metric
    if not found:
        raise ValueError(f"--on {on}: give some of {', '.join(METRICS)}")
    given = {"allowed": ("--tolerance", tolerance), "mde": ("--mde", mde)}
    for field, (flag, amount) in given.items():
        if amount is None:
            continue
        speedup = found.get("speedup")
        if not isinstance(speedup, Sampled):
            raise ValueError(f"{flag} {amount}: is of speedup, which --on leaves out")
        change: dict[str, Any] = {field: _amount(speedup, f"{flag} {amount}", amount)}
        found["speedup"] = replace(speedup, **change)
    return MappingProxyType(found)


def _amount(metric: Metric, given: str, text: str) -> float:
    """What is allowed of a metric, as it was given: a share of what it is, or as many of its units."""
    try:
        number = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        number = math.nan
    share = isinstance(metric, Sampled) or (isinstance(metric, Single) and metric.relative)
    if text.endswith("%") and not share:
        raise ValueError(f"{given}: is of no share; give a number of its units, such as {metric.allowed:g}")
    # written so that NaN fails too
    if not 0 <= number < (1 if isinstance(metric, Sampled) else math.inf):
        below = " to below 1" if isinstance(metric, Sampled) else ""
        raise ValueError(f"{given}: give {f'a share from 0{below}, such as 0.03 or 3%' if share else 'a number'}")
    return number
