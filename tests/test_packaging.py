"""What an installed wheel can do, and that our folder `kernels` hides nobody else's package."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from calibatt.cli import EXIT_BAD_INPUT, main

ROOT = Path(__file__).resolve().parent.parent


def _run(*command: str, cwd: Path, **environment: str) -> str:
    # pytest-benchmark refuses to measure in a worker of xdist, which these commands are not
    own = {name: value for name, value in os.environ.items() if name != "PYTEST_XDIST_WORKER"}
    done = subprocess.run(command, cwd=cwd, env={**own, **environment}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the wheel is installed: in the folder of somebody's project, as a virtual environment may be."""
    folder = tmp_path_factory.mktemp("project")
    _run(sys.executable, "-m", "pip", "wheel", "--no-deps", "-w", str(folder / "dist"), str(ROOT), cwd=folder)
    (wheel,) = (folder / "dist").glob("calibatt-*.whl")
    site = folder / "site"
    _run(sys.executable, "-m", "pip", "install", "--no-deps", "--target", str(site), str(wheel), cwd=folder)
    return site


@pytest.mark.slow
def test_the_wheel_generates_a_video_away_from_the_checkout(site: Path, tmp_path: Path) -> None:
    where = _run(sys.executable, "-c", "import calibatt; print(calibatt.__file__)", cwd=tmp_path, PYTHONPATH=str(site))
    assert Path(where.strip()).is_relative_to(site)
    _run(
        sys.executable, "-m", "calibatt", "generate", "a red circle, still, over grey", "--resolution", "quick",
        "--steps", "1", "-o", "video.gif", cwd=tmp_path, PYTHONPATH=str(site),
    )  # fmt: skip
    assert (tmp_path / "video.gif").stat().st_size > 0


@pytest.mark.slow
def test_the_wheel_measures_away_from_the_checkout_and_under_its_own_settings(site: Path, tmp_path: Path) -> None:
    # the project's own pytest would stop at once
    (site.parent / "pytest.ini").write_text("[pytest]\naddopts = --no-such-option\n")
    (site.parent / "conftest.py").write_text("raise RuntimeError\n")
    bench = [sys.executable, "-m", "calibatt", "bench"]
    for folder in (tmp_path, site.parent):
        assert "--calibration-prompts" in _run(*bench, "--help", cwd=folder, PYTHONPATH=str(site))
        shown = _run(*bench, "--collect-only", "-q", "--methods", "dense,radial", cwd=folder, PYTHONPATH=str(site))
        assert "denoise-shapes-quick-6-radial-default" in shown
    chosen = ["-q", "-k", "kernel and dense", "--benchmark-json=out.json"]
    _run(*bench, *chosen, cwd=tmp_path, PYTHONPATH=str(site))
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["command"] == f"calibatt bench {' '.join(chosen)}"
    assert found["commit_info"] == {"id": None, "dirty": None}
    assert [one["extra_info"]["suite"] for one in found["benchmarks"]] == ["kernel"]


def test_calibatt_bench_refuses_what_pytest_bench_refuses(tmp_path: Path) -> None:
    said = []
    for command, folder in ((["pytest", "bench"], ROOT), (["calibatt", "bench"], tmp_path)):
        own = {name: value for name, value in os.environ.items() if name != "PYTEST_XDIST_WORKER"}
        done = subprocess.run(
            [sys.executable, "-m", *command, "--methods", "radil"], cwd=folder, env=own, capture_output=True, text=True
        )
        assert done.returncode == pytest.ExitCode.USAGE_ERROR
        said.append(done.stderr)
    assert said[0] == said[1]
    assert "unknown method 'radil': did you mean radial" in said[0]


@pytest.mark.parametrize("command", [["-m", "pytest"], [str(Path(sys.executable).with_name("pytest"))]])
def test_hugging_faces_kernels_package_stays_importable(tmp_path: Path, command: list[str]) -> None:
    (tmp_path / "kernels").mkdir()
    # Diffusers imports this name from Hugging Face's package where that is installed
    (tmp_path / "kernels" / "__init__.py").write_text("def get_kernel(name): return name\n")
    (tmp_path / "witness.py").write_text(
        "def pytest_collection_finish(session):\n"
        "    from kernels import get_kernel\n"
        "    print('kernels says', get_kernel('hello'))\n"
    )
    arguments = ["bench", "-p", "witness", "--collect-only", "-q"]
    assert "kernels says hello" in _run(sys.executable, *command, *arguments, cwd=ROOT, PYTHONPATH=str(tmp_path))


# by the names they are imported by; jinja2 comes with torch, and a pipeline of the user's own needs transformers itself
_EXTRAS = (
    "accelerate", "ftfy", "imageio", "imageio_ffmpeg", "matplotlib", "optuna", "peft", "pynvml",
    "pytest", "pytest_benchmark", "scipy", "skimage",
)  # fmt: skip


@pytest.mark.slow
def test_a_pipeline_is_made_sparse_without_any_extra(tmp_path: Path) -> None:
    program = f"""
import importlib.machinery, sys
class Installed(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in {_EXTRAS} else super().find_spec(name, path, target)
sys.meta_path[sys.meta_path.index(importlib.machinery.PathFinder)] = Installed
import torch, calibatt
entry = calibatt.MODELS["shapes"]
pipe = entry.load(resolution="quick", device=torch.device("cpu"), dtype=torch.float32)
calibatt.sparsify(pipe, "radial")
calibatt.generate(entry, pipe, prompt="a red circle, still, over grey", resolution="quick", steps=1, seed=0)
calibatt.restore(pipe)
prompts = ["a red circle, still, over grey"]
calibatt.calibrate(entry, pipe, prompts=prompts, resolution="quick", steps=1, seed=0, preset="masks-only")
print("made")
"""
    assert _run(sys.executable, "-c", program, cwd=tmp_path).strip() == "made"


def test_a_command_names_the_extra_that_it_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["report", str(ROOT / "bench/results/cpu/losa.json"), "-o", "report"]) == EXIT_BAD_INPUT
    said = capsys.readouterr().err
    assert said == "calibatt report: matplotlib is not installed: pip install 'calibatt[report]'\n"
    assert not list(tmp_path.iterdir())


def test_bench_names_the_extra_that_it_lacks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "pytest_benchmark", None)
    assert main(["bench", "--help"]) == EXIT_BAD_INPUT
    assert capsys.readouterr().err == (
        "calibatt bench: pytest_benchmark is not installed: pip install 'calibatt[bench]'\n"
    )
