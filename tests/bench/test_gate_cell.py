"""What a process of the gate's study measures."""

from __future__ import annotations

import multiprocessing
import statistics
from pathlib import Path

import pytest
import torch

from calibatt.bench import gate_cell
from calibatt.bench.record import load_run
from calibatt.reports.gate import ExitCode, judge
from calibatt.reports.gate_metrics import choose
from calibatt.reports.gate_study import pool_in


@pytest.mark.slow
def test_a_slowed_arm_has_the_work_to_do_and_stands_where_the_arm_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # so much that no other process hides it
    monkeypatch.setattr(gate_cell, "SLOWDOWNS", {"plain": 0.0, "slow5": 3.0})
    # other tests may run beside this one; a disturbed file says nothing of speed
    monkeypatch.setattr("calibatt.bench.sampling.circumstances", lambda *_: {})
    gate_cell.write(tmp_path, gate_cell.measure(torch.device("cpu"), rounds=7), ["test"])
    runs = {name: load_run(tmp_path / f"{name}.json") for name in ("plain", "slow5")}
    plain, slow = (run.records for run in runs.values())
    assert [record.key for record in plain] == [record.key for record in slow]
    assert [record.method for record in plain] == ["dense", "blocks", "blocks"]
    times = [statistics.median(records[1].samples_s or ()) for records in (plain, slow)]
    assert times[1] > 2 * times[0]
    # the others were timed once
    assert (plain[0].samples_s, plain[2].samples_s) == (slow[0].samples_s, slow[2].samples_s)
    assert {len(record.samples_s or ()) for record in plain} == {7}
    assert runs["plain"].machine["versions"]["torch"] == torch.__version__
    # of the slowed arm, and of no other
    verdict = judge([runs["slow5"]], [runs["plain"]], metrics=choose("speedup", mde="50%"))
    assert [one.code == ExitCode.REGRESSION for one in verdict.judgements] == [False, True, False]


def test_the_load_beside_a_cpu_ends_with_the_measurement_and_a_gpu_has_none() -> None:
    with gate_cell.background_load(torch.device("cuda")):
        assert not multiprocessing.active_children()
    with gate_cell.background_load(torch.device("cpu")):
        assert len(multiprocessing.active_children()) == 1
    assert not multiprocessing.active_children()


@pytest.mark.slow
def test_each_process_has_a_folder_of_its_own(tmp_path: Path) -> None:
    gate_cell.main([str(tmp_path), "--device", "cpu", "--processes", "2", "--rounds", "1"])
    pool = pool_in(tmp_path)
    assert [sorted(process) for process in pool] == [["plain", "slow3", "slow5"]] * 2
