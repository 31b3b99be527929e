"""What a page says first."""

from __future__ import annotations

import itertools
import random
from types import SimpleNamespace

from calibatt.bench.record import Record
from calibatt.reports.front import unbeaten
from calibatt.reports.headlines import headlines
from calibatt.reports.rows import Row, rows


def _groups(*groups: list[Record]) -> list[tuple[Row, ...]]:
    return [rows(records) for records in groups]


def _matrix(make: SimpleNamespace) -> list[tuple[Row, ...]]:
    records = make.many(60)
    return _groups(*(records[first : first + 20] for first in range(0, 60, 20)))


def test_of_one_workload_the_front_the_extremes_the_control_and_doubts_are_said(make: SimpleNamespace) -> None:
    arms = [
        make.dense_arm(), make.arm("calibatt", 1.5, psnr=25), make.arm("radial", 1.2, psnr=35, seed=1),
        make.arm("sparge", 0.8, psnr=20, seed=2, throttled=True), make.arm("random", 1.3, psnr=22, seed=3),
        make.broken("sta"),
    ]  # fmt: skip
    front, fastest, slowest, control, doubts = headlines(_groups(arms))
    assert front.index("Radial (1.") < front.index("CalibAtt (1.")
    assert "SpargeAttn" not in front
    assert fastest.startswith("Fastest: CalibAtt is faster than dense: 1.")
    assert slowest.startswith("Slowest: SpargeAttn is slower than dense: 0.")
    assert control.endswith("as close to dense as 1 of 3 arms, at no more cost: SpargeAttn.")
    assert doubts == "Doubts: of 6 arms 1 throttled or disturbed and 1 without times."


def test_there_are_five_at_most_and_a_fidelity_beside_every_speed(make: SimpleNamespace) -> None:
    for groups in (_matrix(make), _groups([make.dense_arm(), make.arm("calibatt")])):
        said = headlines(groups)
        assert 0 < len(said) <= 5
        for sentence in said:
            assert "×" not in sentence or " dB" in sentence


def test_of_several_workloads_it_is_said_how_often_an_arm_is_on_the_front_and_where_it_is_fastest(
    make: SimpleNamespace,
) -> None:
    front, fastest, *_ = headlines(_matrix(make))
    assert "in 3 of 3 workloads (median" in front
    assert "(denoise · model-0 · " in fastest


def test_no_control_is_said(make: SimpleNamespace) -> None:
    said = headlines(_groups([make.dense_arm(), make.arm("calibatt")]))
    assert any(sentence.startswith("Control: no random masks were timed") for sentence in said)


def test_an_arm_without_a_control_beside_it_is_not_counted(make: SimpleNamespace) -> None:
    with_one = [make.dense_arm(), make.arm("radial", 1.2, psnr=35), make.arm("random", 1.3, psnr=22, seed=3)]
    without = [make.dense_arm(steps=9), *(make.arm(name, steps=9) for name in ("radial", "sparge", "calibatt"))]
    assert "Control: random masks beat none of 1 arms." in headlines(_groups(with_one, without))


def test_an_arm_that_is_no_faster_is_not_called_so(make: SimpleNamespace) -> None:
    said = headlines(_groups([make.dense_arm(), make.arm("calibatt", 0.8)]))
    assert not any("Front" in sentence for sentence in said)
    assert said[0].startswith("Fastest: CalibAtt is slower than dense")


def test_without_a_speedup_only_doubts_are_said(make: SimpleNamespace) -> None:
    assert headlines(_groups([make.broken("sta")])) == ["Doubts: of 1 arms 1 without times."]
    assert headlines(_groups([make.dense_arm()])) == []


def test_the_front_is_what_none_beats() -> None:
    chance = random.Random(0)
    points = [(chance.randrange(6), chance.randrange(6)) for _ in range(40)]
    points = list(dict.fromkeys((float(x), float(y)) for x, y in points))
    front = unbeaten(points, lambda point: point)
    for point in points:
        beaten = any(x >= point[0] and y >= point[1] and (x, y) != point for x, y in points)
        assert (point in front) is not beaten
    assert all(a[0] < b[0] and a[1] > b[1] for a, b in itertools.pairwise(front))
