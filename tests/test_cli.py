"""The command line: what it makes, and what it says to bad input."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

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
        (["--out", "folder.gif"], "folder.gif is not a regular file"),
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
    assert "it uses what calibatt learns" in _refused(capsys, "calibrate", "-o", str(out), "--method", "random")
    assert "did you mean masks-only" in _refused(capsys, "calibrate", "-o", str(out), "--preset", "mask-only")
    learns = ("--method", "scaling", "--levels")
    assert "scaling has no setting levels" in _refused(capsys, "calibrate", "-o", str(out), *learns)
    assert "whole number from 1 up" in _refused(capsys, "calibrate", "-o", str(out), "--count", "0")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A small untrained model of that name; the list says how often it was loaded."""
    from calibatt.models.entry import Resolution
    from calibatt.models.shapes.entry import SHAPES
    from calibatt.models.shapes.pipeline import assemble, new_transformer

    loaded: list[str] = []

    def load(*_: object) -> Any:
        loaded.append("tiny")
        torch.manual_seed(0)
        return assemble(new_transformer(layers=2, heads=2))

    entry = replace(
        SHAPES, name="tiny", layers=2, heads=2, block=(16, 16), steps=1, loader=load,
        resolutions={
            "small": Resolution(height=32, width=32, frames=2), "wide": Resolution(height=32, width=48, frames=2),
        },
    )  # fmt: skip
    monkeypatch.setattr("calibatt.models.catalogue.MODELS", {"tiny": entry})
    return loaded


def test_calibrate_looks_at_prompts_and_output_before_the_model_is_loaded(
    tiny: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    calibrate = ("calibrate", "--model", "tiny", "-o")
    assert "is not a regular file" in _refused(capsys, *calibrate, str(tmp_path))
    assert "is not a regular file" in _refused(capsys, *calibrate, "/dev/null")
    assert "nowhere.txt" in _refused(capsys, *calibrate, str(tmp_path / "c"), "--prompts", "nowhere.txt")
    assert tiny == []
    assert list(tmp_path.iterdir()) == []


def test_a_prompt_that_cannot_be_read_is_found_before_the_model_is_loaded(
    tiny: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle moving left over stripes\na purple cow\n")
    out = str(tmp_path / "video.gif")
    calibrate = ("calibrate", "--model", "tiny", "-o", str(tmp_path / "c"), "--prompts", str(prompts))
    assert "unknown word 'purple'" in _refused(capsys, *calibrate)
    generate = ("generate", "a purple cow", "--model", "tiny", "--method", "dense", "-o", out)
    assert "unknown word 'purple'" in _refused(capsys, *generate)
    assert tiny == []
    assert list(tmp_path.iterdir()) == [prompts]


def test_a_stopped_calibration_says_how_to_go_on_and_comes_to_the_same_file(
    tiny: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from calibatt.calibration import videos
    from calibatt.calibration.artifact import Calibration
    from calibatt.models.generate import generate_all

    def arguments(name: str) -> list[str]:
        return ["calibrate", "--model", "tiny", "--count", "3", "-o", str(tmp_path / name)]

    assert main(arguments("whole")) == 0
    shown: list[int] = []

    def counted(*where: Any, **how: Any) -> Any:
        shown.append(how["seed"])
        if len(shown) == 2:
            raise KeyboardInterrupt
        return generate_all(*where, **how)

    monkeypatch.setattr(videos, "generate_all", counted)
    capsys.readouterr()
    assert main(arguments("parts")) == 130
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said == (
        f"calibatt calibrate: stopped with 1 of 3 videos done, kept in {tmp_path / 'parts.units'}: "
        "run the same command again to resume"
    )
    assert main(arguments("parts")) == 0
    assert "overlap the common one by" in capsys.readouterr().out
    # the first video is not made again; one is begun in the end, for the noise levels
    assert shown == [10_000, 10_001, 10_001, 10_002, 0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["parts", "whole"]
    whole, parts = (Calibration.load(tmp_path / name) for name in ("whole", "parts"))
    assert all(torch.equal(whole.tables[name], parts.tables[name]) for name in whole.tables)


def test_settings_are_set_by_name(tiny: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from calibatt.calibration.artifact import Calibration

    out = tmp_path / "masks"
    how = ["--model", "tiny", "--method", "budget", "--set", "beside=1", "--set", "trials=0"]
    assert main(["calibrate", *how, "--count", "2", "-o", str(out)]) == 0
    made = Calibration.load(out)
    assert (made.settings["beside"], made.settings["trials"]) == (1, 0)
    film = ["generate", "a red circle, still, over grey", "-o", str(tmp_path / "x.gif"), "--calibration", str(out)]
    assert main([*film, *how]) == 0
    capsys.readouterr()
    for given, says in (("beside", "setting 'beside': give NAME=VALUE"), ("besides=2", "no setting besides")):
        assert main(["calibrate", *how, "--set", given, "-o", str(tmp_path / "y")]) == 2
        assert says in capsys.readouterr().err


def test_a_calibration_stopped_in_its_first_video_leaves_nothing(
    tiny: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr("calibatt.calibration.videos.generate_all", stopped)
    assert main(["calibrate", "--model", "tiny", "--count", "1", "-o", str(tmp_path / "c")]) == 130
    assert capsys.readouterr().err.strip().splitlines()[-1] == "calibatt calibrate: stopped; nothing was written"
    assert list(tmp_path.iterdir()) == []


def test_the_last_of_several_processes_writes_the_calibration(
    tiny: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from calibatt.calibration.artifact import Calibration

    arguments = ["calibrate", "--model", "tiny", "--count", "2", "-o"]
    assert main([*arguments, str(tmp_path / "one")]) == 0
    monkeypatch.setenv("WORLD_SIZE", "2")
    capsys.readouterr()
    for rank, wrote in (("1", False), ("0", True)):
        monkeypatch.setenv("RANK", rank)
        assert main([*arguments, str(tmp_path / "two")]) == 0
        assert (tmp_path / "two").exists() == wrote
    assert f"process 1 has ended; the last of 2 to end writes {tmp_path / 'two'}" in capsys.readouterr().out
    one, two = (Calibration.load(tmp_path / name) for name in ("one", "two"))
    assert all(torch.equal(one.tables[name], two.tables[name]) for name in one.tables)


def test_a_calibration_that_cannot_be_written_keeps_its_notes(
    tiny: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from calibatt.calibration.artifact import Calibration

    write = Calibration.write

    def full(self: Calibration, path: Path, parts: Any) -> None:
        raise OSError(f"{path} cannot be written: No space left on device")

    arguments = ["calibrate", "--model", "tiny", "--count", "1", "-o", str(tmp_path / "c")]
    monkeypatch.setattr(Calibration, "write", full)
    assert main(arguments) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith(
        f"calibatt calibrate: {tmp_path / 'c.units' / '.merged'} cannot be written: No space left on device; what is"
    )
    assert "kept in" in said
    monkeypatch.setattr(Calibration, "write", write)
    assert main(arguments) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_a_file_is_described_and_all_of_it_is_checked(
    tiny: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "c"
    assert main(["calibrate", "--model", "tiny", "--count", "1", "-o", str(out)]) == 0
    said = capsys.readouterr().err
    assert "videos to make: 1; their notes take up to " in said
    assert f" GB in {out}.units (" in said
    assert main(["calibration", str(out)]) == 0
    said = capsys.readouterr().out
    assert "method                   calibatt, preset default\n" in said
    assert said.endswith(f"{out} is as it was written\n")
    content = bytearray(out.read_bytes())
    content[len(content) // 2] ^= 1
    out.write_bytes(content)
    assert f"{out} was changed or damaged after it was saved: the checksum of its" in _refused(
        capsys, "calibration", str(out)
    )


def test_a_calibration_is_transferred_and_the_file_says_from_what(
    tiny: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from calibatt.calibration.artifact import Calibration

    own, other = tmp_path / "own", tmp_path / "other"
    size = ["--model", "tiny", "--resolution"]
    assert main(["calibrate", *size, "small", "--count", "1", "-o", str(own)]) == 0
    tiny.clear()
    capsys.readouterr()
    missing = ("transfer", str(tmp_path / "no"), *size, "wide", "-o", str(other))
    assert "no does not exist" in _refused(capsys, *missing)
    assert "is not a regular file" in _refused(capsys, "transfer", str(own), *size, "wide", "-o", str(tmp_path))
    assert "unknown resolution" in _refused(capsys, "transfer", str(own), *size, "huge", "-o", str(other))
    assert tiny == []
    assert main(["transfer", str(own), *size, "wide", "--steps", "3", "-o", str(other)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert [line.rpartition(",")[0] for line in said] == [
        f"{own}: 2×8×8 tokens, 2 heads × 64, 1 steps", f"{other}: 2×8×12 tokens, 2 heads × 64, 3 steps"
    ]  # fmt: skip
    assert Calibration.load(other, verify=True).provenance.steps == 3
    assert main(["calibration", str(other), "--against", str(other)]) == 0
    told = capsys.readouterr().out
    assert "transferred from         2×8×8 tokens, 2 heads × 64, 1 steps of FlowMatch" in told
    assert told.endswith("intersection over union of the masks: 1.000\n")
    assert (
        "2×8×12 tokens, 2 heads × 64, 3 steps, 2 layers, blocks [16, 16] have nothing in common with masks for 2×8×8"
        in (_refused(capsys, "calibration", str(other), "--against", str(own)))
    )


@pytest.mark.parametrize("what", ["disk", "host memory"])
def test_what_there_is_no_room_for_is_refused_before_the_first_video_is_made(
    tiny: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    if what == "disk":
        monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=100))
    else:
        monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=100))
    arguments = ["calibrate", "--model", "tiny", "--count", "2", "-o", str(tmp_path / "c")]
    assert main(arguments) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert f"GB more of {what}, and 1e-07 are free: make room" in said
    assert list(tmp_path.iterdir()) == []


def test_a_preset_is_that_of_the_file(tiny: list[str], tmp_path: Path) -> None:
    from calibatt.calibration.artifact import Calibration

    arguments = ["calibrate", "--model", "tiny", "--count", "1", "--levels", "-o", str(tmp_path / "c")]
    assert main([*arguments, "--preset", "masks-only"]) == 0
    made = Calibration.load(tmp_path / "c")
    assert (made.preset, made.settings["levels"], made.settings["block"]) == ("masks-only", True, [16, 16])


def test_a_fit_writes_its_front_and_the_calibration_of_the_point_asked_for(
    tiny: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from calibatt.calibration.artifact import Calibration
    from calibatt.calibration.fit import Fitting, Front, Point

    values = {"late": 0.7, "early": 0.9, "decay": 8.0, "rho": 0.5, "gamma": 0.95}
    points = tuple(Point(values={**values, "late": x}, density=x, psnr_db=20 + x) for x in (0.5, 0.7))
    asked: list[int] = []

    def front(self: Fitting, units: Any, *, trials: int, progress: bool) -> Front:
        assert len(units.finished()) == len(self.run.prompts) == 2
        assert not {*self.run.prompts} & {*self.tuning}
        asked.append(trials)
        # in another order
        published = replace(points[1], values=dict(sorted(points[1].values.items())))
        return Front(published=published, points=points)

    monkeypatch.setattr(Fitting, "front", front)
    arguments = ["calibrate", "--model", "tiny", "--fit", "--count", "2", "--tuning", "3", "-o", str(tmp_path / "c")]
    for more, late in ((["--trials", "7"], 0.7), (["--density", "0.6"], 0.5)):
        assert main([*arguments, *more]) == 0
        settings = Calibration.load(tmp_path / "c").settings
        assert (settings["schedule"]["late"], settings["gamma"]) == (late, 0.95)
    assert asked == [7, 50]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c", "c.fit", "c.front.json"]
    written = json.loads((tmp_path / "c.front.json").read_text())
    assert [point["density"] for point in written["points"]] == [0.5, 0.7]
    assert (written["model"], len(written["prompts"]), len(written["tuning"])) == ("tiny", 2, 3)
    shown = capsys.readouterr().out
    assert "decay  early  gamma  late   rho    DENSITY  PSNR" in shown
    assert "front      8.000  0.900  0.950  0.500  0.500  0.500    20.5" in shown
    assert "published  8.000  0.900  0.950  0.700  0.500  0.700    20.7" in shown
    assert "density " in shown
    # the front is there whatever is asked of it
    (tmp_path / "c.front.json").unlink()
    assert main([*arguments, "--density", "0.4"]) == 2
    assert "sparsest point has a density of 0.500" in capsys.readouterr().err.splitlines()[-1]
    assert (tmp_path / "c.front.json").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--fit", "--method", "budget"], "budget has no settings that are fitted to a model"),
        (["--trials", "5"], "--trials goes with --fit only"),
        (["--density", "0.5"], "--density goes with --fit only"),
        (["--fit", "--trials", "0"], "--trials 0: give a whole number from 1 up"),
        (["--fit", "--tuning", "0"], "--tuning 0: give a whole number from 1 up"),
        (["--fit", "--density", "nan"], "--density nan: give a share"),
        (["--fit", "--prompts", "two.txt"], "two.txt has 2 prompts: 3 are needed, 2 of them to tune on"),
    ],
    ids=str,
)
def test_what_cannot_be_fitted_is_refused_before_the_model_is_loaded(
    tiny: list[str],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    says: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("two.txt").write_text("a red circle, still, over grey\na red square, still, over grey\n")
    assert says in _refused(capsys, "calibrate", "--model", "tiny", "-o", "c", *arguments)
    assert tiny == []
    assert [path.name for path in tmp_path.iterdir()] == ["two.txt"]


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


def test_a_method_is_shown_with_its_source_its_settings_and_its_presets(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods", "radial"]) == 0
    said = capsys.readouterr().out
    assert "Follows github.com/mit-han-lab/radial-attention" in said
    assert "decay: factor on the width" in said
    assert [line.split() for line in said.splitlines() if line.startswith(("SETTING", "dense_steps"))] == [
        ["SETTING", "default", "no-warmup"],
        ["dense_steps", "0.24", "0.0"],
    ]
    # and how one is set
    assert "--methods 'radial[NAME=VALUE,…]'" in said


def test_a_method_that_is_not_there_is_not_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert "did you mean radial" in _refused(capsys, "methods", "radail")


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
    ("samples_s", "arguments", "code", "verdict"),
    [
        ((1.0,) * 6, ("--mde", "10%"), 0, "pass"),
        ((1.0,) * 6, (), 3, "inconclusive"),
        ((1.5,) * 6, (), 1, "regression"),
        ((1.5,) * 6, ("--tolerance", "40%"), 0, "pass"),
        ((1.0,) * 3, ("--mde", "10%"), 3, "inconclusive"),
        ((1.5,) * 6, ("--on", "density=5%"), 0, "pass"),
    ],
)
def test_gate_exits_with_its_verdict(
    samples_s: Sequence[float],
    arguments: Sequence[str],
    code: int,
    verdict: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = _run(tmp_path / "before.json", density=0.4)
    now = _run(tmp_path / "now.json", samples_s, density=0.4)
    assert main(["gate", now, "--baseline", before, *arguments]) == code
    shown = capsys.readouterr()
    assert shown.out.splitlines()[-1] == verdict
    assert "radial" in shown.out
    assert shown.err == ""


def test_gate_takes_several_files_a_side_and_writes_its_verdict(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [_run(tmp_path / f"now{i}.json", (1.05 + 0.001 * i,) * 8) for i in range(3)]
    before = [_run(tmp_path / f"before{i}.json", (1 + 0.001 * i,) * 8) for i in range(3)]
    outputs = {name: tmp_path / f"verdict.{name}" for name in ("junit", "json", "markdown")}
    flags = [text for name, path in outputs.items() for text in (f"--{name}", str(path))]
    assert main(["gate", *now, "--baseline", *before, *flags]) == 1
    line, _, _ = capsys.readouterr().out.splitlines()
    assert "speedup 1.903, was 1.998: loss 4.8%" in line
    written = json.loads(outputs["json"].read_text())
    assert (written["verdict"], written["exit_code"]) == ("regression", 1)
    assert written["arms"][0]["findings"][0]["loss"] == pytest.approx(0.0475, abs=1e-3)
    assert "| regression | denoise · shapes | radial (flex) |" in outputs["markdown"].read_text()
    assert '<failure message="speedup 1.903' in outputs["junit"].read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--on", "sped"), "--on sped: give some of speedup"),
        (("--tolerance", "x"), "--tolerance x: give a share"),
        (("--json", "{path}"), "is another file of this command"),
        (("--json", "{folder}"), "is not a regular file"),
        (("--junit", "{folder}/none/x.xml"), "there is no folder"),
        (("--junit", "{folder}/x", "--markdown", "{folder}/x"), "is another file of this command"),
    ],
)
def test_gate_refuses_bad_arguments_before_it_judges(
    arguments: Sequence[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = _run(tmp_path / "run.json")
    content = Path(path).read_text()
    given = [text.format(path=path, folder=tmp_path) for text in arguments]
    assert message in _refused(capsys, "gate", path, "--baseline", path, *given)
    assert Path(path).read_text() == content


def test_gate_refuses_files_with_nothing_in_common(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, other = _run(tmp_path / "one.json"), _run(tmp_path / "other.json", method="sta")
    assert "have no arm in common" in _refused(capsys, "gate", one, "--baseline", other)


def test_gate_compares_unlike_machines_only_if_forced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = []
    for name, family in (("now.json", 26), ("before.json", 25)):
        path = Path(_run(tmp_path / name))
        machine = {"cpu": {"brand_raw": "Test data CPU", "family": family}, "threads": 2}
        path.write_text(json.dumps({**json.loads(path.read_text()), "machine_info": machine}))
        paths.append(str(path))
    arguments = ["gate", paths[0], "--baseline", paths[1]]
    assert main(arguments) == 3
    line, verdict = capsys.readouterr().out.splitlines()
    assert verdict == "inconclusive"
    arguments += ["--mde", "10%"]
    assert all(f"{path} (Test data CPU)" in line for path in paths)
    assert "the processor's family differs (26, was 25)" in line
    assert "--force" in line
    assert main([*arguments, "--force"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[-1] == "pass"
    assert any(line.startswith("note") and "processor's family" in line for line in shown)


def test_gate_exits_with_three_of_a_disturbed_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = _run(tmp_path / "run.json", disturbed=0.3)
    assert main(["gate", path, "--baseline", path]) == 3
    assert "others had 30% of the CPUs" in capsys.readouterr().out


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
    def fail(*arguments: Any, **options: Any) -> None:
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
    def stop(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("calibatt.reports.gate.judge", stop)
    path = _run(tmp_path / "run.json")
    assert main(["gate", path, "--baseline", path]) == 130
    assert capsys.readouterr().err == "calibatt gate: stopped; nothing was written\n"


def test_gate_passes_where_the_output_knows_no_letters_but_ascii(tmp_path: Path) -> None:
    path = _run(tmp_path / "run.json", suite="kernel", method="é")
    done = _command(
        "gate",
        path,
        "--baseline",
        path,
        "--mde",
        "10%",
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
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
