"""The command line: what it makes, and what it says to bad input."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from calibatt.cli import main
from calibatt.models.catalogue import MODELS

PROMPT = "a red circle moving left and a blue square, still, over stripes"


def _refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(arguments) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    return lines[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "calibat"], "unknown method 'calibat': did you mean calibatt"),
        (["--method", "radial", "--preset", "defalt"], "did you mean default"),
        (["--model", "shape"], "did you mean shapes"),
        (["--resolution", "quik"], "did you mean quick"),
        (["--kernel", "flx"], "did you mean flex"),
        (["--method", "calibatt"], "make one by `calibatt calibrate --model shapes"),
        (["--method", "calibatt", "--calibration", "missing.safetensors"], "missing.safetensors does not exist"),
        (
            ["--method", "sta", "--preset", "searched"],
            "calibatt calibrate --method sta --preset searched --model shapes",
        ),
        (["--method", "radial", "--kernel", "sdpa-flash"], "choose a sparse one"),
        (["--method", "svg2", "--preset", "clusters", "--kernel", "flex"], "FlexAttention has blocks of one size"),
        (["--method", "sage", "--kernel", "flex"], "does not multiply queries and keys in INT8"),
        (["--method", "lite", "--kernel", "flex"], "leaves no blocks out by itself"),
        (["--steps", "0"], "whole number from 1 up"),
        (["--device", "tpu"], "this machine has"),
        (["--out", "video.avi"], "ends in .mp4 or .gif"),
        (["--weights", "nowhere"], "nowhere"),
    ],
)
def test_generate_refuses_bad_input_in_one_line(
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in _refused(capsys, "generate", PROMPT, *arguments)
    assert list(tmp_path.iterdir()) == []


def test_calibrate_refuses_what_has_nothing_to_learn_in_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "x.safetensors"
    assert "sparge/default learns nothing" in _refused(capsys, "calibrate", "-o", str(out), "--method", "sparge")
    assert "did you mean sparge" in _refused(capsys, "calibrate", "-o", str(out), "--method", "sparg")
    learns = ("--method", "scaling", "--levels")
    assert "leave them out for scaling" in _refused(capsys, "calibrate", "-o", str(out), *learns)
    assert not out.exists()


def test_generate_refuses_a_prompt_that_the_model_does_not_know(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "video.gif"
    assert main(["generate", "a purple cow", "-o", str(out)]) == 2
    assert "purple" in capsys.readouterr().err.splitlines()[-1]
    assert not out.exists()


def test_calibrate_refuses_an_empty_list_of_prompts(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.touch()
    assert "empty" in _refused(capsys, "calibrate", "--prompts", str(prompts), "-o", str(tmp_path / "c.safetensors"))
    assert list(tmp_path.iterdir()) == [prompts]


@pytest.mark.parametrize("content", ["", "[]", '{"benchmarks": []}', '{"benchmarks": [{"name": "theirs"}]}'])
def test_report_and_gate_refuse_a_json_that_is_not_ours(
    content: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "run.json"
    path.write_text(content)
    assert str(path) in _refused(capsys, "report", str(path), "-o", str(tmp_path / "report"))
    assert str(path) in _refused(capsys, "gate", str(path), "--baseline", str(path))
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("table", ["methods", "models", "kernels"])
def test_the_tables_name_everything_there_is(table: str, capsys: pytest.CaptureFixture[str]) -> None:
    from calibatt.kernels.catalogue import KERNELS
    from calibatt.methods.catalogue import METHODS

    assert main([table]) == 0
    shown = capsys.readouterr().out
    for name in {"methods": METHODS, "models": MODELS, "kernels": KERNELS}[table]:
        assert name in shown


@pytest.mark.slow
def test_a_video_is_made_calibrated_and_sped_up(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    calibration = tmp_path / "quick.safetensors"
    size = ["--resolution", "quick", "--steps", "2"]
    assert main(["calibrate", *size, "--count", "1", "--levels", "-o", str(calibration)]) == 0
    out = tmp_path / "video.gif"
    arguments = ["generate", PROMPT, *size, "-o", str(out), "--method", "calibatt", "--calibration", str(calibration)]
    assert main([*arguments, "--compare"]) == 0
    assert "times as fast, PSNR" in capsys.readouterr().out
    assert out.stat().st_size > 0
    # the same calibration does not fit another number of steps, nor another size
    for other, named in ((["--steps", "3"], "2 steps"), (["--resolution", "standard"], "8×16×24")):
        assert main([*arguments, *other]) == 2
        assert named in capsys.readouterr().err.splitlines()[-1]


def test_the_module_is_the_same_command(tmp_path: Path) -> None:
    shown = subprocess.run(
        [sys.executable, "-m", "calibatt", "models"], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert "shapes" in shown.stdout


def _run(path: Path, samples_s: Sequence[float] = (1.0,) * 6, method: str = "radial", **more: Any) -> str:
    """A file of one arm, by itself twice as fast as dense."""
    info = {"schema": 1, "suite": "denoise", "model": "shapes", "method": method, "kernel": "flex", "outcome": "ok",
            "samples_s": list(samples_s), "baseline_samples_s": [2.0] * len(samples_s), "block": [64, 64]}  # fmt: skip
    path.write_text(json.dumps({"benchmarks": [{"stats": {}, "extra_info": {**info, **more}}]}))
    return str(path)


def _command(*arguments: str, **more: Any) -> subprocess.CompletedProcess[str]:
    code = "import sys; from calibatt.cli import main; sys.exit(main(sys.argv[1:]))"
    return subprocess.run([sys.executable, "-c", code, *arguments], text=True, cwd="/", **more)


@pytest.mark.parametrize(
    ("samples_s", "code", "verdict"),
    [
        ((1.0,) * 6, 0, "pass"),
        ((1.5,) * 6, 1, "regression"),
        ((0.8, 0.9, 1.1, 1.1, 1.2, 1.3), 3, "inconclusive"),
        ((1.0,) * 3, 3, "inconclusive"),
    ],
)
def test_gate_exits_with_its_verdict(
    samples_s: Sequence[float], code: int, verdict: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before, now = _run(tmp_path / "before.json"), _run(tmp_path / "now.json", samples_s)
    assert main(["gate", now, "--baseline", before]) == code
    shown = capsys.readouterr()
    assert shown.out.splitlines()[-1] == verdict
    assert "radial" in shown.out
    assert shown.err == ""


def test_gate_exits_with_two_of_a_file_that_cannot_be_judged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = _run(tmp_path / "run.json", method_label=5)
    assert "method_label: Input should be a valid string" in _refused(capsys, "gate", path, "--baseline", path)


def test_an_error_is_one_line_of_bounded_length(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = _run(tmp_path / "run.json", **{"x\n\x1b[2J" * 10_000: 1})
    for arguments in (["gate", path, "--baseline", path], ["gate", "x" * 5_000, "--baseline", path]):
        line = _refused(capsys, *arguments)
        assert len(line) <= 300
        assert line.isprintable()


@pytest.mark.parametrize("error", [RecursionError("too deep"), MemoryError(), IndexError("a\nb"), ZeroDivisionError()])
def test_what_was_not_foreseen_exits_with_a_code_that_is_no_verdict(
    error: Exception, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any) -> None:
        raise error

    monkeypatch.setattr("calibatt.reports.gate.judge", fail)
    path = _run(tmp_path / "run.json")
    assert main(["gate", path, "--baseline", path]) == 70
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"calibatt gate: internal error: {type(error).__name__}")
    assert "CALIBATT_TRACEBACK=1" in line
    monkeypatch.setenv("CALIBATT_TRACEBACK", "1")
    assert main(["gate", path, "--baseline", path]) == 70
    assert "Traceback (most recent call last)" in capsys.readouterr().err


def test_being_stopped_is_no_verdict(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("calibatt.reports.gate.judge", stop)
    path = _run(tmp_path / "run.json")
    assert main(["gate", path, "--baseline", path]) == 130
    assert capsys.readouterr().err == "calibatt gate: stopped; nothing was written\n"


def test_gate_passes_where_the_output_knows_no_letters_but_ascii(tmp_path: Path) -> None:
    path = _run(tmp_path / "run.json", suite="kernel", method="é")
    done = _command(
        "gate", path, "--baseline", path, capture_output=True, env={**os.environ, "PYTHONIOENCODING": "ascii"}
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.isascii()
    assert r"\xe9 (flex, 64\xd764)" in done.stdout


@pytest.mark.parametrize("count", [1, 3000])
def test_a_reader_that_left_is_no_error_and_no_verdict(count: int, tmp_path: Path) -> None:
    path = Path(_run(tmp_path / "run.json"))
    data = json.loads(path.read_text())
    (one,) = data["benchmarks"]
    # what fits the buffer is written at the end, more of it before
    data["benchmarks"] = [{**one, "extra_info": {**one["extra_info"], "preset": f"p{i}"}} for i in range(count)]
    path.write_text(json.dumps(data))
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = _command("gate", str(path), "--baseline", str(path), stdout=writing, stderr=subprocess.PIPE)
        assert (done.returncode, done.stderr) == (141, "")
        # nor is there a reader of the error
        assert _command("gate", "nowhere", "--baseline", "nowhere", stderr=writing).returncode == 2
    finally:
        os.close(writing)
