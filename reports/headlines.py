"""What a whole page says, in five sentences at most: the front, the best, the worst, the control, doubts.

They are of one suite, the first of the page that has speedups, but for the doubts, which are of all.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np

from calibatt.reports.facts import title
from calibatt.reports.findings import beaten_by_chance, closeness, listed, ratio, shown_closeness, speed
from calibatt.reports.front import unbeaten
from calibatt.reports.rows import RANDOM, Row

# arms that one sentence names
_MOST_NAMES = 4


def headlines(workloads: Sequence[Sequence[Row]]) -> list[str]:
    """Sentences about the arms of all workloads of a page, in the order of the page."""
    first = next((rows[0].record.suite for rows in workloads if any(row.record.speedup for row in rows)), None)
    lead = [rows for rows in workloads if rows[0].record.suite == first]
    said = [_front(lead), *_extremes(lead), _control(lead)] if first else []
    return [sentence for sentence in [*said, _doubts(workloads)] if sentence]


def _timed(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row.record.speedup is not None and row.record.method != RANDOM]


def _front(workloads: Sequence[Sequence[Row]]) -> str:
    """Which arms no other beats in both speed and fidelity; dense attention beats what is not faster than itself."""
    fronts: dict[str, list[Row]] = defaultdict(list)
    for rows in workloads:
        known = [row for row in _timed(rows) if closeness(row.record) is not None]
        for row in unbeaten(known, lambda row: (ratio(row), closeness(row.record) or 0.0)):
            if ratio(row) > 1:
                fronts[row.label].append(row)
    if not fronts:
        return ""
    if len(workloads) == 1:
        return f"Front of speed and fidelity, {title(workloads[0][0].record)}: {_along(fronts)}."
    often = sorted(fronts.values(), key=len, reverse=True)
    shown = [
        f"{found[0].label} in {len(found)} of {len(workloads)} workloads "
        f"(median {statistics.median(map(ratio, found)):.2f}× at {shown_closeness(_middle(found))})"
        for found in often[:_MOST_NAMES]
    ]
    return f"On the front of speed and fidelity most often: {listed(shown)}."


def _along(fronts: Mapping[str, Sequence[Row]]) -> str:
    """Some arms of one front, evenly along it, from the slowest on."""
    arms = sorted((row for found in fronts.values() for row in found), key=ratio)
    places = np.linspace(0, len(arms) - 1, min(_MOST_NAMES, len(arms))).round().astype(int)
    shown = [f"{arms[i].label} ({ratio(arms[i]):.2f}×, {shown_closeness(arms[i])})" for i in places]
    return listed(shown) + (f", {len(arms)} in all" if len(arms) > len(shown) else "")


def _middle(found: Sequence[Row]) -> Row:
    return sorted(found, key=lambda row: closeness(row.record) or 0.0)[(len(found) - 1) // 2]


def _extremes(workloads: Sequence[Sequence[Row]]) -> list[str]:
    """The fastest and the slowest arm, as far as their intervals let one say."""
    timed = sorted((row for rows in workloads for row in _timed(rows)), key=ratio)
    many = len(workloads) > 1
    said = [f"{name}: {speed(row)}" + (f" ({title(row.record)})" if many else "") for name, row in
            (("Fastest", timed[-1]), ("Slowest", timed[0]))] if timed else []  # fmt: skip
    return said[: len(timed)]


def _control(workloads: Sequence[Sequence[Row]]) -> str:
    """How often random masks are as close to dense, at no more cost."""
    compared = [[row for row in _timed(rows) if closeness(row.record) is not None] for rows in workloads]
    if not any(compared):
        return ""
    # of the workloads that have a control
    found = [
        (arms, controls) for arms, rows in zip(compared, workloads, strict=True) if (controls := beaten_by_chance(rows))
    ]
    if not found:
        return "Control: no random masks were timed, so that nothing shows what the choice of blocks is worth."
    known = [row for arms, _ in found for row in arms]
    tried = {id(row): row for _, controls in found for _, beaten in controls for row in beaten}
    if not tried:
        return f"Control: random masks beat none of {len(known)} arms."
    names = list(dict.fromkeys(row.label for row in tried.values()))
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    some = ", ".join(names[:_MOST_NAMES]) + more if more else listed(names)
    return f"Control: random masks are as close to dense as {len(tried)} of {len(known)} arms, at no more cost: {some}."


def _doubts(workloads: Sequence[Sequence[Row]]) -> str:
    """How many arms have doubtful times, none, or too few for an interval."""
    arms = [row.record for rows in workloads for row in rows]
    counts = {
        "throttled or disturbed": sum(record.doubt is not None for record in arms),
        "without an interval": sum((found := record.speedup) is not None and found.low is None for record in arms),
        "without times": sum(record.outcome != "ok" for record in arms),
    }
    shown = [f"{count} {name}" for name, count in counts.items() if count]
    return f"Doubts: of {len(arms)} arms {listed(shown)}." if shown else ""
