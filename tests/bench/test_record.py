"""Records and the files that hold them."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from calibatt.bench.record import Record, Telemetry, UnusableFile, load_run, plain

WHAT: dict[str, Any] = {"suite": "denoise", "model": "shapes", "method": "radial", "kernel": "flex"}
TIMED: dict[str, Any] = {**WHAT, "outcome": "ok", "samples_s": (1.0, 1.1), "baseline_samples_s": (2.0, 2.2)}


def _file(path: Path, *records: Record, untimed: tuple[Record, ...] = ()) -> Path:
    benchmarks = [
        {"stats": {"data": list(record.samples_s or ())}, "extra_info": record.to_extra_info()} for record in records
    ]
    path.write_text(json.dumps({"benchmarks": benchmarks, "untimed": [record.to_extra_info() for record in untimed]}))
    return path


@pytest.mark.parametrize(("target", "reached"), [(0.03, True), (0.02, False), (None, None)])
def test_whether_the_interval_was_reached_follows_from_the_samples(target: float | None, reached: bool | None) -> None:
    # the ratios of six pairs: the interval is from the lowest to the highest, 0.05 of the median
    baseline = (1.95, 1.99, 2.0, 2.0, 2.01, 2.05)
    record = Record(**{**TIMED, "samples_s": (1.0,) * 6, "baseline_samples_s": baseline}, interval_target=target)
    assert record.interval_reached is reached
    info = record.to_extra_info()
    assert info.get("interval_reached") is reached
    assert Record.from_extra_info(info) == record
    # what a file says of it has no say
    assert Record.from_extra_info({**info, "interval_reached": not reached}) == record
    assert Record(**{**TIMED, "baseline_samples_s": None}, interval_target=0.03).interval_reached is None


CPU_READ, GPU_READ = Telemetry(readings=1, load=0.9, disturbed=0.3), Telemetry(readings=1, disturbed=0.3)


@pytest.mark.parametrize(
    ("facts", "doubt", "sound"),
    [
        # a median stands while fewer than half are wrong
        ({"spoilt": (True, False, False), "throttled": True}, None, 2),
        ({"spoilt": (True, False, False, True), "throttled": True}, "throttled", 4),
        ({"spoilt": (False,) * 4, "disturbed": 0.04}, None, 4),
        # where half are marked, the share of the whole may be small
        (
            {"spoilt": (True, True, False), "disturbed": 0.04, "telemetry": CPU_READ},
            "disturbed: others had 4% of the CPUs", 3,
        ),
        ({"spoilt": (True, True), "disturbed": 0.3, "telemetry": GPU_READ}, "disturbed: others had 30% of the GPU", 2),
        # older files mark no samples
        ({"disturbed": 0.04, "throttled": False}, None, 3),
        ({"disturbed": 0.06}, "disturbed: others had 6% of the CPUs", 3),
        ({"throttled": True}, "throttled", 3),
    ],
)  # fmt: skip
def test_a_few_spoilt_samples_are_left_out_and_many_make_all_doubtful(
    facts: dict[str, Any], doubt: str | None, sound: int
) -> None:
    count = len(facts.get("spoilt", (1, 2, 3)))
    times = tuple(map(float, range(1, count + 1)))
    record = Record(**{**TIMED, "samples_s": times, "baseline_samples_s": times}, **facts)
    assert record.doubt == doubt
    kept = record.sound(times)
    assert len(kept) == sound
    marks = facts.get("spoilt", ())
    assert kept == times or kept == tuple(one for one, mark in zip(times, marks, strict=True) if not mark)
    assert Record.from_extra_info(record.to_extra_info()) == record


@pytest.mark.parametrize("spoilt", [(True,), (True, False, False)])
def test_every_sample_is_marked_or_none(spoilt: tuple[bool, ...]) -> None:
    with pytest.raises(ValueError, match="not every sample is marked"):
        Record(**TIMED, spoilt=spoilt)
    with pytest.raises(ValueError, match="not every sample is marked"):
        Record(**TIMED, spoilt=(True, False), energy_j=(1.0, 2.0, 3.0))


def test_a_file_gives_back_the_records_it_was_made_of(tmp_path: Path) -> None:
    timed = Record(**TIMED, block=(64, 64), phases_s={"plan": (0.1, 0.1)}, psnr_db=(30.0, 31.0), prompts=("a", "b"))
    untimed = Record(**WHAT, outcome="unsupported", reason="no compiler")
    run = load_run(_file(tmp_path / "run.json", timed, untimed=(untimed,)))
    assert run.records == (timed, untimed)


@pytest.mark.parametrize(
    "truth", [{"psnr_db": (30.0, 31.0)}, {"ssim": (0.9, 0.9)}, {"alignment": (1.0, 1.0)}, {"method_error": 0.1}]
)
def test_planted_weights_have_no_fidelity(truth: dict[str, Any]) -> None:
    Record(**TIMED, **truth, weights="0123")
    with pytest.raises(ValueError, match="planted weights have no fidelity"):
        Record(**TIMED, **truth, weights="planted 0123")


def test_planted_weights_are_not_compared_with_others() -> None:
    planted, own = Record(**TIMED, weights="planted 0123"), Record(**TIMED, weights="4567")
    assert planted.key != own.key
    assert planted.key == Record(**TIMED, weights="planted 89ab").key


def test_samples_survive_a_file_without_raw_times(tmp_path: Path) -> None:
    # as `pytest bench --benchmark-save` leaves it, unless --benchmark-save-data is given too
    path = _file(tmp_path / "run.json", Record(**TIMED))
    data = json.loads(path.read_text())
    del data["benchmarks"][0]["stats"]["data"]
    path.write_text(json.dumps(data))
    assert load_run(path).records == (Record(**TIMED),)


def test_samples_of_an_older_file_are_its_raw_times(tmp_path: Path) -> None:
    path = _file(tmp_path / "run.json", Record(**TIMED))
    data = json.loads(path.read_text())
    del data["benchmarks"][0]["extra_info"]["samples_s"]
    path.write_text(json.dumps(data))
    assert load_run(path).records == (Record(**TIMED),)


def test_the_arm_and_the_title_differ_in_the_name_and_the_target_alone() -> None:
    facts = {**TIMED, "method": "sparge", "method_label": "SpargeAttn", "preset": "x", "dense_steps": 0.2}
    rest = "/x{}, 20% of the steps dense, blocks native"
    for target, arm, title in (
        ({}, "", ""),
        ({"mode": "equal_density"}, " =density", " at equal density"),
        ({"mode": "equal_density", "target_density": 0.35}, " =0.35", " at density 0.35"),
        ({"mode": "equal_fidelity", "target_psnr_db": 25}, " =25 dB", " at 25 dB"),
    ):
        record = Record(**{**facts, **target}, block_choice="native")
        assert record.arm == "sparge" + rest.format(arm)
        assert record.title == "SpargeAttn" + rest.format(title)
    approximating = Record(**{**facts, "mode": "equal_density", "target_density": 0.35}, remainder="zeroth")
    assert approximating.arm == "sparge/x+tail =0.35, 20% of the steps dense"
    assert approximating.title == "SpargeAttn/x + tail at density 0.35, 20% of the steps dense"
    assert approximating.key != Record(**{**facts, "mode": "equal_density", "target_density": 0.35}).key
    # what a method has of itself is no part of its name
    assert replace(approximating, own_remainder=True).arm == "sparge/x =0.35, 20% of the steps dense"
    set_too = replace(approximating, settings="sink=true")
    assert set_too.arm == "sparge/x[sink=true]+tail =0.35, 20% of the steps dense"
    assert set_too.title == "SpargeAttn/x[sink=true] + tail at density 0.35, 20% of the steps dense"
    assert set_too.key != approximating.key
    # a method of somebody else's may have a name that looks like a target
    assert Record(**{**TIMED, "method": "mine =density"}).title == "mine =density"


def test_what_was_not_measured_is_absent_from_the_file() -> None:
    info = Record(**TIMED).to_extra_info()
    assert None not in info.values()
    assert "psnr_db" not in info
    assert info["speedup"] == {"median": 2.0}


def test_preparing_pays_after_as_many_videos_as_save_what_it_took() -> None:
    # a second less a video, as far as six can tell
    many = {**TIMED, "samples_s": (1.0,) * 6, "baseline_samples_s": (2.0, 2.1, 1.9, 2.0, 2.0, 2.0)}
    assert Record(**many, preparation_s=10.5).pays_after == pytest.approx(10.5)
    # where dense was faster once in six, it may be so in general
    doubtful = {**many, "baseline_samples_s": (2.0, 2.0, 2.0, 2.0, 2.0, 0.9)}
    assert Record(**doubtful, preparation_s=10.5).pays_after is None
    assert Record(**TIMED, preparation_s=10.5).pays_after is None
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
        ({"reason": "x"}, "has a reason"),
        ({"baseline_samples_s": (1.0,)}, "not pairs"),
        ({"density": float("nan")}, "density is nan"),
        ({"psnr_db": (float("inf"), 1.0)}, "psnr_db is inf"),
        ({"kernel_error": 2.0, "kernel_error_budget": 1.0}, "exceeds its budget"),
        ({"suite": "speed"}, "none of"),
        ({"samples_s": (1.0, 0.0)}, "not a positive time"),
        ({"samples_s": (), "baseline_samples_s": ()}, "samples_s is empty"),
        ({"psnr_db": ()}, "psnr_db is empty"),
        ({"phases_s": {"plan": ()}}, "phases_s is empty"),
        ({"phases_s": {"plan": (-1.0,)}}, "negative"),
        ({"phases_s": {"permute": (1.0,), "unpermute": (1.0, 1.0)}}, "not pairs"),
        ({"steps": 10**400}, "steps is too large"),
        ({"density": -0.1}, "negative"),
        ({"disturbed": 1.5}, "no share"),
        ({"block": (0, 64)}, "at least one token"),
        ({"own_remainder": True}, "has a remainder"),
        ({"mode": "equal_fidelity"}, "target_psnr_db"),
        ({"method_colour": "red"}, "#RRGGBB"),
        ({"method_marker": "$x$"}, "none of"),
        ({"artifact": "/etc/passwd"}, "beside the run"),
        ({"artifact": "../other.npz"}, "beside the run"),
    ],
)
def test_a_record_that_contradicts_itself_cannot_be_built(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Record(**{**TIMED, **change})


def _refused(path: Path) -> str:
    with pytest.raises(UnusableFile) as caught:
        load_run(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert len(message) <= 300
    assert message.isprintable()
    return message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        (b"", "Invalid JSON"),
        (b"{", "Invalid JSON"),
        (b"\xff", "Invalid JSON"),
        (b"[" * 100_000, "recursion limit exceeded"),
        (b"1" * 5_000, "number out of range"),
        (b"[]", "should be an object"),
        (b"{}", "benchmarks: Field required"),
        (b'{"benchmarks": [{"stats": {"data": [1.0]}, "extra_info": {}}]}', "schema"),
        (b'{"benchmarks": []}', "holds no records"),
        (b'{"benchmarks": [{"name": "x"}]}', "benchmarks[0].stats: Field required"),
        (b'{"benchmarks": [], "untimed": [1]}', "untimed[0]: Input should be an object"),
        (b'{"benchmarks": [], "machine_info": "x"}', "machine_info: Input should be an object"),
        (b'{"benchmarks": [], "machine_info": {"cpu": []}}', "machine_info.cpu: Input should be an object"),
        (b'{"benchmarks": [], "commit_info": {"dirty": []}}', "commit_info.dirty: Input should be a valid boolean"),
    ],
)
def test_a_file_that_is_not_ours_is_refused_in_one_line(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "other.json"
    if content is not None:
        path.write_bytes(content)
    assert message in _refused(path)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("method", None, "method: Input should be a valid string"),
        ("density", "x", "density: Input should be a valid number"),
        ("density", "0.5", "density: Input should be a valid number"),
        ("density", True, "density: Input should be a valid number"),
        ("density", float("nan"), "density: Input should be a finite number"),
        ("psnr_db", 5, "psnr_db: Input should be a valid array"),
        ("psnr_db", "123456", "psnr_db: Input should be a valid array"),
        ("psnr_db", [30.0, "31"], "psnr_db[1]: Input should be a valid number"),
        ("samples_s", "12", "samples_s: Input should be a valid array"),
        ("steps", {}, "steps: Input should be a valid integer"),
        ("steps", 1.5, "steps: Input should be a valid integer"),
        ("steps", 10**400, "steps is too large"),
        ("density", 10**400, "density: Input should be a finite number"),
        ("block", [64], "block[1]: Field required"),
        ("mode", "speedy", "mode: Input should be 'native'"),
        ("phases_s", {"plan": 1.0}, "phases_s.plan: Input should be a valid array"),
        ("kernel", "x" * 100_000, "kernel: String should have at most 200 characters"),
        ("\x1b[2J\n" * 1000, 1, "Unexpected keyword argument"),
        ("schema", 2, "schema is 2"),
        ("schema", "x" * 100_000, "this version reads 1"),
    ],
)
def test_a_field_of_another_type_is_named_in_one_line(tmp_path: Path, field: str, value: Any, message: str) -> None:
    path = _file(tmp_path / "run.json", Record(**TIMED))
    data = json.loads(path.read_text())
    data["benchmarks"][0]["extra_info"][field] = value
    path.write_text(json.dumps(data))
    said = _refused(path)
    assert message in said
    assert "benchmarks[0].extra_info: " in said


def test_raw_times_that_are_a_text_are_no_samples(tmp_path: Path) -> None:
    path = _file(tmp_path / "run.json", Record(**TIMED))
    data = json.loads(path.read_text())
    data["benchmarks"][0]["stats"]["data"] = "123456"
    path.write_text(json.dumps(data))
    assert "stats.data: Input should be a valid array" in _refused(path)


def test_an_artifact_that_no_file_can_be_is_none(tmp_path: Path) -> None:
    for name in ("a\0b", "é" * 200):
        run = load_run(_file(tmp_path / "run.json", Record(**TIMED, artifact=name)))
        assert run.artifact(run.records[0]) is None


def test_a_line_of_a_terminal_is_shown_as_it_is_and_ends_where_it_ends() -> None:
    assert plain("64×64 – 0.5 µs") == "64×64 – 0.5 µs"
    assert plain("a\r\n\x1b[31m\u202e\x85b") == r"a\r\n\x1b[31m\u202e\x85b"
    assert len(plain("x" * 1000, 300)) == 300
    assert plain("head" + "x" * 1000 + "tail", 300).startswith("head")
    assert plain("head" + "x" * 1000 + "tail", 300).endswith("tail")


def test_a_run_of_thousands_of_records_is_read_in_seconds(tmp_path: Path) -> None:
    records = [Record(**{**TIMED, "method": f"method-{i}"}, psnr_db=(30.0, 31.0)) for i in range(3000)]
    path = _file(tmp_path / "run.json", *records)
    start = time.perf_counter()
    assert len(load_run(path).records) == 3000
    assert time.perf_counter() - start < 5


def test_reading_a_record_imports_no_torch() -> None:
    code = "import sys, calibatt.bench.record; print({'torch', 'numpy', 'matplotlib'} & set(sys.modules))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/")
    assert shown.stdout.strip() == "set()"
