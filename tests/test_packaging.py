"""What an installed wheel can do, and that our folder `kernels` hides nobody else's package."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def _run(*command: str, cwd: Path, **environment: str) -> str:
    # pytest-benchmark refuses to measure in a worker of xdist, which these commands are not
    own = {name: value for name, value in os.environ.items() if name != "PYTEST_XDIST_WORKER"}
    done = subprocess.run(command, cwd=cwd, env={**own, **environment}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_wheel_generates_a_video_away_from_the_checkout(tmp_path: Path) -> None:
    _run(sys.executable, "-m", "pip", "wheel", "--no-deps", "-w", str(tmp_path / "dist"), str(ROOT), cwd=tmp_path)
    (wheel,) = (tmp_path / "dist").glob("calibatt-*.whl")
    site = tmp_path / "site"
    _run(sys.executable, "-m", "pip", "install", "--no-deps", "--target", str(site), str(wheel), cwd=tmp_path)
    where = _run(sys.executable, "-c", "import calibatt; print(calibatt.__file__)", cwd=tmp_path, PYTHONPATH=str(site))
    assert Path(where.strip()).is_relative_to(site)
    _run(
        sys.executable, "-m", "calibatt", "generate", "a red circle, still, over grey", "--resolution", "quick",
        "--steps", "1", "-o", "video.gif", cwd=tmp_path, PYTHONPATH=str(site),
    )  # fmt: skip
    assert (tmp_path / "video.gif").stat().st_size > 0


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
