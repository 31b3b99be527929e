"""How often the gate is wrong: identical code judged against itself, and code that is a few percent slower.

    python -m calibatt.bench.gate_cell out/gate
    python -m calibatt.reports.gate_study out/gate -o bench/results/gate.json

The first command measures small cells in processes of their own. A gate run takes some of these as new and as many
others as old, at the gate's defaults. There are fewer processes than gate runs would need, so each gate run draws its
own from the same pool: `drawn` in the file says how. Every sample was measured, the slowed ones with the work done.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calibatt.bench.record import Record, Run, UnusableFile, load_run
from calibatt.reports.gate import ExitCode, judge
from calibatt.reports.gate_metrics import LEVEL, MDE, TOLERANCE, speedups
from calibatt.reports.rows import DENSE

# as `bench/gate_cell.py` names its files, and what the slowed arm has there, in percent
_FILES = {"plain": 0, "slow3": 3, "slow5": 5}

# the runs of one process, by the names of its files
Process = Mapping[str, Run]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """Shares of the gate runs.

    Args:
        runs: how many there were, of each kind.
        false_alarms, inconclusive: of those of identical code, whose verdict is a regression, or inconclusive.
        power_3pct, power_5pct: of those whose arm was slowed, that find the regression in that arm.
    """

    runs: int
    false_alarms: float
    inconclusive: float
    power_3pct: float
    power_5pct: float


def rates(pool: Sequence[Process], *, runs: int, side: int, seed: int = 0) -> Rates:
    """Judge identical code, and slowed code, again and again.

    Args:
        pool: processes, of each its files.
        runs: gate runs of each kind.
        side: processes on either side of one.
        seed: of the draw.

    Raises:
        ValueError: there are fewer processes than one gate run needs.
    """
    if len(pool) < 2 * side:
        raise ValueError(f"{side} processes a side need {2 * side} in all: there are {len(pool)}")
    draw, counts = random.Random(seed), dict.fromkeys(("false", "inconclusive", "slow3", "slow5"), 0)
    for _ in range(runs):
        drawn = draw.sample(list(pool), 2 * side)
        old = [one["plain"] for one in drawn[side:]]
        verdict = judge([one["plain"] for one in drawn[:side]], old)
        counts["false"] += verdict.exit_code == ExitCode.REGRESSION
        counts["inconclusive"] += verdict.exit_code == ExitCode.INCONCLUSIVE
        for name in ("slow3", "slow5"):
            # the slowed arm is the first after dense
            arm = judge([one[name] for one in drawn[:side]], old).judgements[1]
            counts[name] += arm.code == ExitCode.REGRESSION
    return Rates(
        runs=runs, false_alarms=counts["false"] / runs, inconclusive=counts["inconclusive"] / runs,
        power_3pct=counts["slow3"] / runs, power_5pct=counts["slow5"] / runs,
    )  # fmt: skip


def facts(pool: Sequence[Process]) -> dict[str, Any]:
    """What others did, and of processes that nothing spoilt the spread within and between them, and what slowing took.

    Of fewer than two such processes, nothing is said.
    """
    arms = [_slowed_arm(one["plain"]) for one in pool]
    sound = [one for one, arm in zip(pool, arms, strict=True) if arm.doubt is None]
    found: dict[str, Any] = {
        "rounds": len(arms[0].samples_s or ()),
        "throttled_or_disturbed_processes": len(pool) - len(sound),
        "disturbed": [None if arm.disturbed is None else _figure(arm.disturbed) for arm in arms],
    }
    if len(sound) < 2:
        return found
    plain = [_slowed_arm(one["plain"]) for one in sound]
    logs = [speedups(one) or () for one in plain]
    return {
        **found,
        "sample_s": _figure(statistics.median(value for one in plain for value in one.samples_s or ())),
        "spread_within_a_process": _figure(statistics.median(map(statistics.stdev, logs))),
        "spread_of_the_medians_of_processes": _figure(statistics.stdev(map(statistics.median, logs))),
        **{f"slowed_by_{percent}pct": _figure(_slowdown(sound, name)) for name, percent in _FILES.items() if percent},
    }


def _slowdown(pool: Sequence[Process], name: str) -> float:
    """What the slowed arm took more than the same arm, round by round: the median over all."""
    ratios = []
    for one in pool:
        slow, plain = (_slowed_arm(one[file]).samples_s or () for file in (name, "plain"))
        ratios += [x / y for x, y in zip(slow, plain, strict=True)]
    return statistics.median(ratios) - 1


def _slowed_arm(run: Run) -> Record:
    return next(one for one in run.records if one.method != DENSE)


def _figure(value: float) -> float:
    return float(f"{value:.4g}")


def pool_in(folder: Path) -> list[Process]:
    """The processes that `bench/gate_cell.py` measured into a folder.

    Raises:
        UnusableFile: there is none, or a file of one is none of ours.
    """
    places = sorted(path for path in folder.glob("*") if path.is_dir())
    if not places:
        raise UnusableFile(f"{folder}: holds no processes; python -m calibatt.bench.gate_cell {folder} measures them")
    return [{name: load_run(place / f"{name}.json") for name in _FILES} for place in places]


def _name(machine: Mapping[str, Any]) -> str:
    """A short name of what computed: `cpu`, or the GPU's, as `h100`."""
    gpu = machine.get("gpu")
    return "cpu" if gpu is None else str(gpu).removeprefix("NVIDIA ").split()[0].lower()


def main(arguments: Sequence[str]) -> None:
    """Judge, and write what came of it beside what the file holds of other devices."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of python -m calibatt.bench.gate_cell")
    parser.add_argument("-o", "--out", type=Path, required=True, help="the JSON file; what is there is kept")
    parser.add_argument("--runs", type=int, default=200, help="gate runs of each kind; default: %(default)s")
    parser.add_argument("--side", type=int, default=5, help="processes on either side of one; default: %(default)s")
    given = parser.parse_args(arguments)
    content = json.loads(given.out.read_text(encoding="utf-8")) if given.out.exists() else {}
    pool = pool_in(given.folder)
    found = rates(pool, runs=given.runs, side=given.side)
    first = pool[0]["plain"]
    content[_name(first.machine)] = {
        "false_alarms": found.false_alarms, "inconclusive": found.inconclusive, "runs": found.runs,
        "power_5pct": found.power_5pct, "power_3pct": found.power_3pct,
        "processes": len(pool), "processes_a_side": given.side,
        "drawn": f"each of the {given.runs} gate runs draws {2 * given.side} of the {len(pool)} processes, none "
        "twice; gate runs share processes, so that they are not independent",
        "gate": {"level": LEVEL, "tolerance": TOLERANCE, "mde": MDE},
        "samples": facts(pool),
        "commands": [first.command, " ".join(["python -m calibatt.reports.gate_study", *arguments])],
        "datetime": first.datetime, "commit": dict(first.commit), "machine": dict(first.machine),
    }  # fmt: skip
    given.out.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(content[_name(first.machine)], indent=2))


if __name__ == "__main__":
    main(sys.argv[1:])
