"""The study of the gate: what it counts, on processes that are made up here, and what is committed of it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from calibatt.bench.record import Record, Run, UnusableFile
from calibatt.reports.gate_metrics import LEVEL, MDE, TOLERANCE
from calibatt.reports.gate_study import Process, facts, pool_in, rates

ROOT = Path(__file__).parents[2]
# what a machine that is fit for it has, and what another one could tell
FIT, OTHER = ROOT / "bench" / "results" / "gate.json", ROOT / "docs" / "gate-shared-machine.json"
COMMITTED = [path for path in (FIT, OTHER) if path.exists()]


def _pool(count: int, *, noise: float, slow: float = 1.0, disturbed: float | None = None) -> list[Process]:
    """Processes of two arms, one of which is slowed by so many times what the file's name says."""
    rng = np.random.default_rng(0)

    def process() -> Process:
        dense, sparse = (tuple(mean * np.exp(noise * rng.standard_normal(20))) for mean in (4e-3, 2e-3))
        files = {}
        for name, share in (("plain", 0.0), ("slow3", 0.03), ("slow5", 0.05)):
            facts = {"suite": "kernel", "model": "test data", "outcome": "ok", "disturbed": disturbed}
            samples = tuple(sample * (1 + slow * share) for sample in sparse)
            files[name] = Run(
                path=Path(name), machine={}, commit={}, datetime="", command="",
                records=(
                    Record(**facts, method="dense", kernel="sdpa", samples_s=dense),
                    Record(**facts, method="blocks", kernel="flex", samples_s=samples, baseline_samples_s=dense),
                ),
            )  # fmt: skip
        return files

    return [process() for _ in range(count)]


def test_what_is_counted_is_what_the_gate_says() -> None:
    quiet = rates(_pool(12, noise=0.005), runs=10, side=5)
    assert (quiet.runs, quiet.false_alarms, quiet.inconclusive) == (10, 0.0, 0.0)
    assert (quiet.power_3pct, quiet.power_5pct) == (1.0, 1.0)
    # a slowdown that did not happen is not found, and one that did is a false alarm where identical code is meant
    assert rates(_pool(12, noise=0.005, slow=0.0), runs=5, side=5).power_5pct == 0.0
    slower = [{**one, "plain": one["slow5"]} if i % 2 else one for i, one in enumerate(_pool(4, noise=0.0001))]
    assert rates(slower, runs=20, side=1).inconclusive == 1.0
    noisy = rates(_pool(12, noise=0.3), runs=5, side=5)
    assert (noisy.inconclusive, noisy.power_5pct) == (1.0, 0.0)
    spoilt = rates(_pool(10, noise=0.005, disturbed=0.5), runs=3, side=5)
    assert (spoilt.inconclusive, spoilt.power_5pct) == (1.0, 0.0)


def test_identical_code_of_unlike_processes_is_a_false_alarm() -> None:
    """Half of the processes are a third slower: a draw that separates them is one."""
    halves = [{**one, "plain": one["slow5"]} if i < 3 else one for i, one in enumerate(_pool(6, noise=0.001, slow=6))]
    found = rates(halves, runs=60, side=3)
    assert 0 < found.false_alarms < 0.3


def test_one_gate_run_needs_its_processes() -> None:
    with pytest.raises(ValueError, match="5 processes a side need 10 in all: there are 9"):
        rates(_pool(9, noise=0.01), runs=1, side=5)


def test_facts_are_of_the_samples() -> None:
    found = facts(_pool(8, noise=0.01))
    assert found["slowed_by_3pct"] == pytest.approx(0.03)
    assert found["slowed_by_5pct"] == pytest.approx(0.05)
    # of a ratio of two times
    assert found["spread_within_a_process"] == pytest.approx(0.01 * 2**0.5, rel=0.3)
    assert found["rounds"] == 20
    assert found["throttled_or_disturbed_processes"] == 0
    # of samples that something spoilt nothing is said but that
    spoilt = facts(_pool(2, noise=0.01, disturbed=0.3))
    assert (spoilt["throttled_or_disturbed_processes"], spoilt["disturbed"]) == (2, [0.3, 0.3])
    assert "slowed_by_5pct" not in spoilt


def test_a_folder_without_processes_says_how_to_measure_them(tmp_path: Path) -> None:
    with pytest.raises(UnusableFile, match="holds no processes"):
        pool_in(tmp_path)


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.name)
def test_what_is_committed_was_measured_at_the_defaults_and_names_its_commit(path: Path) -> None:
    for name, found in json.loads(path.read_text(encoding="utf-8")).items():
        assert name == "cpu" or found["machine"]["gpu"] is not None
        assert found["gate"] == {"level": LEVEL, "tolerance": TOLERANCE, "mde": MDE}
        assert found["commit"]["id"]
        assert found["runs"] >= (200 if name == "cpu" else 50)
        for rate in ("false_alarms", "inconclusive", "power_3pct", "power_5pct"):
            assert 0 <= found[rate] <= 1
        if path == OTHER:
            continue
        # what was injected is what the name says, to a fifth
        assert found["samples"]["slowed_by_3pct"] == pytest.approx(0.03, rel=0.2)
        assert found["samples"]["slowed_by_5pct"] == pytest.approx(0.05, rel=0.2)
