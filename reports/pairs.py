"""Which arms are nearer to dense than which others: paired by video, at equal density or equal settings.

By PSNR and by SSIM, which need not agree: where videos have gone another way than dense, PSNR hardly ranks them, and
SSIM still sees how much of their structure is kept.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from calibatt.bench.record import Record
from calibatt.bench.statistics import CONFIDENCE, holm, paired_p, paired_shift
from calibatt.reports.rows import DENSE, Row

HEAD = ("arm", "nearer to dense than", "not told apart from", "farther than")


@dataclass(frozen=True, slots=True, kw_only=True)
class Measure:
    """What nearness to dense is measured by.

    Args:
        name: of the measure.
        of: its values of a record, one a video; more is nearer.
        shown: how a difference is written.
    """

    name: str
    of: Callable[[Record], Sequence[float] | None]
    shown: str

    @property
    def method(self) -> str:
        """What a report says above the table."""
        return (
            f"{self.name} against dense, paired by video: Wilcoxon's signed-rank test at 5 %, with Holm's correction "
            "over all pairs. Beside each name is by how much the arm is nearer, by Hodges and Lehmann's estimate, "
            "which goes with that test."
        )


PSNR = Measure(name="PSNR", of=lambda record: record.psnr_db, shown="{:+.1f} dB")
SSIM = Measure(name="SSIM", of=lambda record: record.ssim, shown="{:+.3f}")
MEASURES = (PSNR, SSIM)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Standing:
    """How one arm stands among those that it is compared with.

    Args:
        row: the arm.
        measure: by what.
        nearer, alike, farther: the others, and by how much the arm is nearer than they are.
    """

    row: Row
    measure: Measure
    nearer: tuple[tuple[Row, float], ...]
    alike: tuple[tuple[Row, float], ...]
    farther: tuple[tuple[Row, float], ...]

    @property
    def cells(self) -> tuple[str, ...]:
        """What stands below `HEAD`."""
        sides = (self.nearer, self.alike, self.farther)
        return (
            self.row.label,
            *(", ".join(f"{_short(other)} {self.measure.shown.format(by)}" for other, by in side) for side in sides),
        )


def standings(rows: Sequence[Row], measure: Measure = PSNR) -> list[Standing]:
    """Every arm of a workload against the others of its density, of its fidelity, or of those with their own settings.

    None where there are too few videos to tell any pair apart, however alike the differences.
    """
    groups = [group for group in _groups(rows, measure).values() if len(group) > 1]
    pairs = [pair for group in groups for pair in itertools.combinations(group, 2)]
    if not pairs:
        return []
    values = {id(row): measure.of(row.record) or () for group in groups for row in group}
    differences = [[x - y for x, y in zip(values[id(a)], values[id(b)], strict=True)] for a, b in pairs]
    # of n differences that all have one sign, the test makes this
    if 2.0 ** (1 - min(map(len, differences))) * len(pairs) > 1 - CONFIDENCE:
        return []
    verdicts: dict[tuple[int, int], tuple[float, bool]] = {}
    for (a, b), difference, p in zip(pairs, differences, holm([paired_p(d) for d in differences]), strict=True):
        shift, apart = paired_shift(difference), p <= 1 - CONFIDENCE
        verdicts[id(a), id(b)] = shift, apart
        verdicts[id(b), id(a)] = -shift, apart
    return [_standing(row, measure, group, verdicts) for group in groups for row in group]


def _groups(rows: Sequence[Row], measure: Measure) -> Mapping[Any, list[Row]]:
    """Sparse arms by what they were set to and by their videos."""
    found: dict[Any, list[Row]] = {}
    for row in rows:
        record = row.record
        if measure.of(record) is not None and record.method != DENSE:
            wanted = (record.mode, record.target_density, record.target_psnr_db)
            dense = (record.dense_steps, record.dense_layers)
            found.setdefault((wanted, dense, record.prompts), []).append(row)
    return found


def _standing(
    row: Row, measure: Measure, group: Sequence[Row], verdicts: Mapping[tuple[int, int], tuple[float, bool]]
) -> Standing:
    sides: dict[str, list[tuple[Row, float]]] = {"nearer": [], "alike": [], "farther": []}
    for other in group:
        if other is row:
            continue
        shift, apart = verdicts[id(row), id(other)]
        side = "alike" if not apart else "nearer" if shift > 0 else "farther"
        sides[side].append((other, shift))
    return Standing(row=row, measure=measure, **{name: tuple(others) for name, others in sides.items()})


def _short(row: Row) -> str:
    """The label without the target that all of its group have."""
    density, psnr = row.record.target_density, row.record.target_psnr_db
    targets = ([] if density is None else [f" at density {density:g}"]) + ([] if psnr is None else [f" at {psnr:g} dB"])
    return functools.reduce(lambda label, target: label.replace(target, ""), targets, row.label)
