"""Records and the files that hold them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from calibatt.bench.record import Record, UnusableFile, load_run

WHAT: dict[str, Any] = {"suite": "denoise", "model": "shapes", "method": "radial", "kernel": "flex"}
TIMED: dict[str, Any] = {**WHAT, "outcome": "ok", "samples_s": (1.0, 1.1), "baseline_samples_s": (2.0, 2.2)}


def _file(path: Path, *records: Record, untimed: tuple[Record, ...] = ()) -> Path:
    benchmarks = [
        {"stats": {"data": list(record.samples_s or ())}, "extra_info": record.to_extra_info()} for record in records
    ]
    path.write_text(json.dumps({"benchmarks": benchmarks, "untimed": [record.to_extra_info() for record in untimed]}))
    return path


def test_a_file_gives_back_the_records_it_was_made_of(tmp_path: Path) -> None:
    timed = Record(**TIMED, block=(64, 64), phases_s={"plan": (0.1, 0.1)}, psnr_db=(30.0, 31.0), prompts=("a", "b"))
    untimed = Record(**WHAT, outcome="unsupported", reason="no compiler")
    run = load_run(_file(tmp_path / "run.json", timed, untimed=(untimed,)))
    assert run.records == (timed, untimed)


def test_what_was_not_measured_is_absent_from_the_file() -> None:
    info = Record(**TIMED).to_extra_info()
    assert None not in info.values()
    assert "psnr_db" not in info
    assert info["speedup"] == {"median": 2.0}


def test_preparing_pays_after_as_many_videos_as_save_what_it_took() -> None:
    # 2.1 seconds a video densely, 1.05 with the arm
    assert Record(**TIMED, preparation_s=10.5).pays_after == pytest.approx(10)
    slower = {**TIMED, "samples_s": (3.0, 3.1)}
    attention = {**TIMED, "suite": "attention"}
    # nothing to prepare, nothing saved, and no videos
    assert [
        Record(**one).pays_after
        for one in (TIMED, {**slower, "preparation_s": 1.0}, {**attention, "preparation_s": 1.0})
    ] == [None, None, None]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"samples_s": None, "baseline_samples_s": None}, "has samples"),
        ({"outcome": "wrong", "reason": "x"}, "has samples"),
        ({"reason": "x"}, "says why"),
        ({"baseline_samples_s": (1.0,)}, "not pairs"),
        ({"density": float("nan")}, "density is nan"),
        ({"psnr_db": (float("inf"), 1.0)}, "psnr_db is inf"),
        ({"kernel_error": 2.0, "kernel_error_budget": 1.0}, "exceeds its budget"),
        ({"suite": "speed"}, "none of"),
    ],
)
def test_a_record_that_contradicts_itself_cannot_be_built(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Record(**{**TIMED, **change})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        ("{", "not JSON"),
        ("[]", "not a pytest-benchmark file"),
        ('{"benchmarks": [{"stats": {"data": [1.0]}, "extra_info": {}}]}', "schema"),
        ('{"benchmarks": []}', "holds no records"),
        ('{"benchmarks": [{"name": "x"}]}', "not a calibatt run"),
    ],
)
def test_a_file_that_is_not_ours_is_refused_in_one_line(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "other.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UnusableFile, match=message) as caught:
        load_run(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_record_of_another_schema_is_refused(tmp_path: Path) -> None:
    path = _file(tmp_path / "run.json", Record(**TIMED))
    data = json.loads(path.read_text())
    data["benchmarks"][0]["extra_info"]["schema"] = 2
    path.write_text(json.dumps(data))
    with pytest.raises(UnusableFile, match="schema is 2"):
        load_run(path)
