"""Statistics derived from raw samples; each is one pure function."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """A median and the interval that covers the true one with 95 % confidence.

    `low` and `high` are None where there are too few samples for an interval.
    """

    median: float
    low: float | None
    high: float | None


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
