"""Statistics derived from raw samples; each is one pure function."""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

CONFIDENCE = 0.95
# the share of samples that a trimmed mean leaves out at either end: Yuen 1974, Wilcox 2012
_TRIM = 0.2
# the quantile of 1 % then has ten draws below it
_DRAWS = 1000
# runs by which their own spread is estimated: three a side, or one against five
_LEAST_FREEDOM = 4
# of a power of 80 %, as Cohen 1988 has it
_POWER = 0.8
# where the normal density is integrated: to six standard deviations, a tenth of one apart
_REACH, _POINTS = 6.0, 121


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """A median and the interval that covers the true one with 95 % confidence.

    `low` and `high` are None where there are too few samples for an interval.
    """

    median: float
    low: float | None
    high: float | None

    def within(self, share: float) -> bool:
        """Whether half of the interval's width is at most this share of the median; without an interval it is not."""
        return self.low is not None and self.high is not None and self.high - self.low <= 2 * share * self.median


def paired_ratio(baseline: Sequence[float], samples: Sequence[float]) -> Interval:
    """How many times faster `samples` are than `baseline`: the median of the ratios of pairs.

    The interval is the exact, distribution-free one of the sign test (order statistics of the ratios): it assumes
    nothing about the noise, and needs at least six pairs.

    Args:
        baseline, samples: seconds; element i of both was measured in the same round.

    Raises:
        ValueError: the lengths differ, there is none, or a time is not positive.
    """
    if len(baseline) != len(samples) or not samples:
        raise ValueError(f"pairs are needed: got {len(baseline)} baseline and {len(samples)} samples")
    if min(*baseline, *samples) <= 0:
        raise ValueError("times must be positive")
    ratios = sorted(b / s for b, s in zip(baseline, samples, strict=True))
    rank = _sign_test_rank(len(ratios))
    return Interval(
        median=statistics.median(ratios),
        low=None if rank is None else ratios[rank],
        high=None if rank is None else ratios[-1 - rank],
    )


def paired_shift(differences: Sequence[float]) -> float:
    """By how much one of a pair is larger, by Hodges and Lehmann's estimate (1963): it goes with `paired_p`.

    The median of the means of all pairs of differences, each with itself too.
    """
    import numpy as np

    given = np.asarray(differences, dtype=np.float64)
    first, second = np.triu_indices(len(given))
    return float(np.median((given[first] + given[second]) / 2))


def paired_p(differences: Sequence[float]) -> float:
    """P value of Wilcoxon's signed-rank test that pairs do not differ; 1 where none does."""
    from scipy.stats import wilcoxon

    return float(wilcoxon(differences).pvalue) if any(differences) else 1.0


def holm(p_values: Sequence[float]) -> list[float]:
    """P values corrected for their number by Holm's method (1979), in the same order.

    Those at or below a level are the ones that may be called different, with that chance of even one mistake.
    """
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[place]))
        corrected[place] = largest
    return corrected


@dataclass(frozen=True, slots=True, kw_only=True)
class Shift:
    """By how much the samples of new runs lie above those of old ones (negative: below), and how surely.

    Args:
        value: the difference of the means over runs of each run's trimmed mean.
        low, high: the bootstrap's interval, each end with a chance of `level` to be wrong.
        p: that new samples do not lie below old ones: the larger of the rank test's and the interval's.
        best_p: the least p that the rank test can have of so many samples.
        error: standard error of the value: what is common to a run is in it.
        freedom: degrees of freedom of the error.
        estimated: whether the spread between runs is these runs' own.
    """

    value: float
    low: float
    high: float
    p: float
    best_p: float
    error: float
    freedom: float
    estimated: bool

    def detectable(self, level: float) -> float | None:
        """The least fall that runs like these would show with a power of 80 %; None where they cannot show any.

        Args:
            level: the p value, before any correction, at or below which a fall is one.
        """
        from scipy.stats import t

        if self.best_p > level:
            return None
        return float(t.isf(level, self.freedom) + t.isf(1 - _POWER, self.freedom)) * self.error


def shift_of_runs(
    new: Sequence[Sequence[float]], old: Sequence[Sequence[float]], *, spread: float, level: float
) -> Shift:
    """Compare samples of runs, each a process of its own, whose samples have something in common.

    Where there are three runs a side, or one against five, the spread between runs is estimated from them, pooled over
    both sides; with fewer it is what is given, unless they differ by more. It widens the bootstrap's interval, which
    draws samples anew within each run, and it enters the rank test, that of Mann and Whitney (1947) on all samples: its
    p value is averaged over what the runs may have in common (Box 1980). An estimate from few runs may be too low, so
    that the interval, and the p value that goes with it, are by Student's distribution in place of the normal one.

    Args:
        new, old: for each run its samples, of whatever differences mean something: logarithms, where ratios do.
        spread: standard deviation of what is common to a run, where it cannot be estimated.
        level: chance that either end of the interval is wrong.

    Raises:
        ValueError: a side has no run, or a run no samples.
    """
    import numpy as np
    from scipy.stats import norm, t, trim_mean

    if not (new and old and all(new) and all(old)):
        raise ValueError("runs with samples are needed on both sides")
    # the same figures for the same files
    rng = np.random.default_rng(0)
    sides = [[np.asarray(run, dtype=np.float64) for run in side] for side in (new, old)]
    centres = [np.array([trim_mean(run, _TRIM) for run in side]) for side in sides]
    drawn = [np.array([_drawn(run, rng) for run in side]) for side in sides]
    within = sum(float(one.var(axis=1).mean()) / len(one) for one in drawn)
    freedom, share = len(new) + len(old) - 2, 1 / len(new) + 1 / len(old)
    squares = sum(float(((one - one.mean()) ** 2).sum()) for one in centres)
    # what a run's samples explain of it is not counted twice
    own = max(0.0, squares / freedom * share - within) if freedom else 0.0
    # few runs that differ by more than is expected show that too little is expected
    estimated = freedom >= _LEAST_FREEDOM or own > spread**2 * share
    between = own if estimated else spread**2 * share
    noise = drawn[0].mean(axis=0) - drawn[1].mean(axis=0) + math.sqrt(between) * rng.standard_normal(_DRAWS)
    if estimated:
        noise *= np.sqrt(freedom / rng.chisquare(freedom, _DRAWS))
    value, free = float(centres[0].mean() - centres[1].mean()), float(freedom) if estimated else math.inf
    low, high = np.quantile(value + noise, (level, 1 - level))
    ours, theirs = (np.concatenate(side) for side in sides)
    error = math.sqrt(within + between)
    # where nothing varies, any difference is one
    interval_p = float(t.sf(-value / error, free)) if error else float(value >= 0)
    return Shift(
        value=value, low=float(low), high=float(high), p=max(interval_p, _rank_p(ours, theirs, math.sqrt(between))),
        best_p=float(norm.sf(_largest_z(ours.size, theirs.size))), error=error, freedom=free, estimated=estimated,
    )  # fmt: skip


def _drawn(run: Any, rng: Any) -> Any:
    """By how much the trimmed mean of a run's samples differs when they are drawn anew from themselves, many times."""
    from scipy.stats import trim_mean

    means = trim_mean(rng.choice(run, (_DRAWS, run.size)), _TRIM, axis=1)
    # the spread of few samples is less than that of what they are drawn from
    return (means - means.mean()) * math.sqrt(run.size / max(1, run.size - 1))


def _rank_p(ours: Any, theirs: Any, spread: float) -> float:
    """P value that ours do not lie below theirs, averaged over what they may be moved by: normal, with this spread."""
    import numpy as np
    from scipy.stats import mannwhitneyu, norm

    at = np.linspace(-_REACH, _REACH, _POINTS)
    weights = norm.pdf(at)
    moved = ours + spread * at[:, None]
    each = mannwhitneyu(moved, theirs[None], alternative="less", axis=1, method="asymptotic").pvalue
    return float(each @ weights / weights.sum())


def _largest_z(ours: int, theirs: int) -> float:
    """How many standard deviations the rank test finds where every one of ours lies below every one of theirs."""
    pairs = ours * theirs
    # by half a pair less, as the test corrects for continuity
    return (pairs / 2 - 0.5) / math.sqrt(pairs * (ours + theirs + 1) / 12)


# a report asks several times an arm
@functools.cache
def _sign_test_rank(count: int) -> int | None:
    """Largest r for which [ratios[r], ratios[-1-r]] covers the median with the wanted confidence, if any does."""
    best, tail, ways = None, 0, 1
    # in whole numbers, of 2**count: as floats the tails of some thousand samples are zero
    share = Fraction(1 - CONFIDENCE) / 2
    most = (share.numerator << count) // share.denominator
    for rank in range(count // 2):
        # `ways` is count over rank
        tail += ways
        if tail > most:
            break
        best, ways = rank, ways * (count - rank) // (rank + 1)
    return best
