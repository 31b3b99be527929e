"""Statistics of paired samples."""

from __future__ import annotations

import random

import pytest

from calibatt.bench.statistics import holm, paired_ratio


def test_six_pairs_that_all_gain_have_an_interval_above_one() -> None:
    interval = paired_ratio([2.0, 2.2, 2.1, 2.0, 2.3, 2.4], [1.0, 1.0, 1.0, 1.0, 1.0, 2.0])
    assert (interval.low, interval.high) == (1.2, 2.3)
    assert interval.median == pytest.approx(2.05)


def test_five_pairs_have_no_interval() -> None:
    interval = paired_ratio([2.0] * 5, [1.0] * 5)
    assert interval.median == 2.0
    assert interval.low is None
    assert interval.high is None


def test_the_interval_covers_the_true_median_as_often_as_it_says() -> None:
    draw = random.Random(0)
    covered = 0
    for _ in range(2000):
        ratios = [draw.lognormvariate(0.0, 0.3) for _ in range(15)]
        interval = paired_ratio(ratios, [1.0] * 15)
        assert interval.low is not None
        assert interval.high is not None
        covered += interval.low <= 1.0 <= interval.high
    # exact coverage at 15 pairs is 96.5 %; three standard deviations of 2,000 draws are 1.2 %
    assert 0.953 < covered / 2000 < 0.977


def test_a_hundred_thousand_pairs_take_a_moment() -> None:
    interval = paired_ratio([float(i) for i in range(1, 100_001)], [1.0] * 100_000)
    # 1.96 standard deviations of a fair coin thrown so often are 310
    assert interval.low == pytest.approx(50_000 - 310, abs=2)


def test_common_slowness_of_a_round_cancels() -> None:
    slow = [1.0, 3.0, 1.0, 5.0, 1.0, 2.0]
    interval = paired_ratio([1.5 * s for s in slow], slow)
    assert interval.low == pytest.approx(1.5)
    assert interval.high == pytest.approx(1.5)


@pytest.mark.parametrize(("baseline", "samples"), [([], []), ([1.0], []), ([1.0, 0.0], [1.0, 1.0])])
def test_what_is_no_pair_of_times_is_refused(baseline: list[float], samples: list[float]) -> None:
    with pytest.raises(ValueError, match=r"pairs|positive"):
        paired_ratio(baseline, samples)


def test_holms_correction_is_that_of_a_worked_example() -> None:
    # 4 × 0.005, 3 × 0.01, then no less than those before: 2 × 0.03, 0.04
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []
