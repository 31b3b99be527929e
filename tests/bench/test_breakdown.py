"""What a step spends its time on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from calibatt.bench.breakdown import Breakdown, Work, works_of
from calibatt.cli import main

PROMPT = "a red circle, still, over grey"


def _event(cat: str, name: str, start: float, took: float, lane: int = 1) -> dict[str, Any]:
    return {"cat": cat, "name": name, "ts": start, "dur": took, "pid": 0, "tid": lane}


def _seconds(events: list[dict[str, Any]]) -> dict[tuple[str, str], tuple[float, int]]:
    return {(work.name, work.part): (round(work.seconds * 1e6, 6), work.launches) for work in works_of(events)}


def test_an_operator_counts_without_those_that_it_calls() -> None:
    events = [
        _event("user_annotation", "plan", 0, 100),
        _event("cpu_op", "outer", 10, 50),
        _event("cpu_op", "inner", 20, 30),
        _event("cpu_op", "after", 200, 5),
    ]
    assert _seconds(events) == {
        ("outer", "plan"): (20, 1),
        ("inner", "plan"): (30, 1),
        ("(compiled code and Python)", "plan"): (50, 1),
        ("after", "rest"): (5, 1),
    }


def test_a_kernel_belongs_to_the_phase_that_launched_it_whatever_the_host_did_meanwhile() -> None:
    events = [
        _event("user_annotation", "attend", 0, 2),
        _event("cpu_op", "launch", 1, 1),
        _event("gpu_user_annotation", "attend", 50, 40, lane=7),
        _event("kernel", "sparse", 50, 10, lane=7),
        _event("kernel", "sparse", 70, 20, lane=7),
        _event("kernel", "gemm", 90, 30, lane=7),
        # of another stream, at the same time
        _event("kernel", "copy", 60, 5, lane=8),
    ]
    assert _seconds(events) == {
        ("sparse", "attend"): (30, 2),
        ("gemm", "rest"): (30, 1),
        ("copy", "rest"): (5, 1),
    }


def test_annotations_of_others_change_no_part() -> None:
    events = [
        _event("user_annotation", "attend", 0, 50),
        _event("user_annotation", "somebody's", 10, 30),
        _event("cpu_op", "inner", 20, 10),
    ]
    assert _seconds(events)["inner", "attend"] == (10, 1)


def test_what_no_kernel_took_is_idle() -> None:
    works = [
        Work(name="a", part="plan", seconds=0.25, launches=2),
        Work(name="b", part="rest", seconds=0.5, launches=1),
    ]
    found = Breakdown(seconds=1.0, works=works)
    assert (found.idle_s, found.of("plan"), found.of("attend")) == (0.25, (0.25, 2), (0, 0))


@pytest.mark.slow
def test_a_step_is_broken_down_and_its_trace_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = tmp_path / "trace.json"
    arguments = ["--resolution", "quick", "--steps", "2", "--method", "radial", "--top", "3", "--trace", str(trace)]
    assert main(["profile", PROMPT, *arguments]) == 0
    parts, _, kernels = capsys.readouterr().out.partition("KERNEL")
    named = [line.split()[0] for line in parts.splitlines()[3:] if line]
    assert named == ["plan", "attend", "rest", "idle"]
    assert len(kernels.strip().splitlines()) == 1 + 3 + 1
    # one pass a branch of guidance, in each of eight layers
    marks = [event for event in json.loads(trace.read_bytes())["traceEvents"] if event.get("name") == "attend"]
    assert len(marks) == 2 * 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--step", "2", "--steps", "2"], "--step 2: there are steps 0 to 1"),
        (["--step", "-1"], "--step -1: there are steps 0 to"),
        (["--top", "0"], "--top 0: give a whole number from 1 up"),
        (["--trace", "."], "is not a regular file"),
    ],
)
def test_bad_input_is_refused_before_the_model_is_loaded(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["profile", PROMPT, *arguments]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line
