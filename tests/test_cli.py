"""The command line: what it makes, and what it says to bad input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from calibatt.cli import main
from calibatt.models.catalogue import MODELS
from calibatt.models.shapes.pipeline import WEIGHTS, new_transformer

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
        (["--out", "folder.gif"], "folder.gif is no file that can be replaced"),
        (["--weights", "nowhere"], "nowhere has no config.json"),
        (["--method", "random"], "make one by `calibatt calibrate --model shapes"),
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
    (tmp_path / "folder.gif").mkdir()
    assert message in _refused(capsys, "generate", PROMPT, *arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["folder.gif"]


def test_calibrate_refuses_what_has_nothing_to_learn_in_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "x.safetensors"
    assert "sparge/default learns nothing" in _refused(capsys, "calibrate", "-o", str(out), "--method", "sparge")
    assert "did you mean sparge" in _refused(capsys, "calibrate", "-o", str(out), "--method", "sparg")
    learns = ("--method", "scaling", "--levels")
    assert "leave them out for scaling" in _refused(capsys, "calibrate", "-o", str(out), *learns)
    assert not out.exists()


def test_generate_refuses_weights_of_another_format_or_model(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    transformer, out = new_transformer(layers=1), tmp_path / "video.gif"
    transformer.save_pretrained(tmp_path / "pickled", safe_serialization=False)
    transformer.save_pretrained(tmp_path / "shallow")
    config = tmp_path / "shallow" / "config.json"
    config.write_text(config.read_text().replace('"num_layers": 1', '"num_layers": 2'))
    for folder, message in (("pickled", "with .safetensors beside it"), ("shallow", "does not hold this model")):
        arguments = ("generate", PROMPT, "--weights", str(tmp_path / folder), "-o", str(out))
        assert message in _refused(capsys, *arguments)
    assert not out.exists()


def test_generate_takes_weights_as_the_hub_has_them(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    folder = tmp_path / "pipeline"
    (folder / "transformer").mkdir(parents=True)
    for file in WEIGHTS.iterdir():
        (folder / "transformer" / file.name).symlink_to(file)
    out = tmp_path / "video.gif"
    size = ["--resolution", "quick", "--steps", "1"]
    assert main(["generate", PROMPT, *size, "--weights", str(folder), "-o", str(out)]) == 0
    assert out.is_file()


def test_generate_refuses_a_calibration_of_other_weights_before_a_video_is_made(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    calibration, out = tmp_path / "c.safetensors", tmp_path / "video.gif"
    size = ["--resolution", "quick", "--steps", "1"]
    assert main(["calibrate", *size, "--count", "1", "-o", str(calibration)]) == 0
    other = tmp_path / "other"
    new_transformer().save_pretrained(other)
    arguments = ["--method", "calibatt", "--calibration", str(calibration), "--weights", str(other), "--compare"]
    assert main(["generate", PROMPT, *size, *arguments, "-o", str(out)]) == 2
    shown = capsys.readouterr()
    assert "calibatt learnt is for shapes with weights" in shown.err.splitlines()[-1]
    assert "dense:" not in shown.out
    assert not out.exists()


def test_generate_refuses_what_the_model_cannot_make(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "video.gif"
    for arguments, message in ((["a purple cow"], "purple"), ([PROMPT, "--guidance", "nan"], "a finite number")):
        assert main(["generate", *arguments, "-o", str(out)]) == 2
        assert message in capsys.readouterr().err.splitlines()[-1]
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
    import subprocess
    import sys

    shown = subprocess.run(
        [sys.executable, "-m", "calibatt", "models"], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert "shapes" in shown.stdout


def test_gate_passes_a_file_against_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    info = {"schema": 1, "suite": "denoise", "model": "shapes", "method": "radial", "kernel": "flex", "outcome": "ok",
            "baseline_samples_s": [2.0] * 6}  # fmt: skip
    path = tmp_path / "run.json"
    path.write_text(json.dumps({"benchmarks": [{"stats": {"data": [1.0] * 6}, "extra_info": info}]}))
    assert main(["gate", str(path), "--baseline", str(path)]) == 0
    assert "radial" in capsys.readouterr().out
