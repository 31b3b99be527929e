"""A calibration that is killed at any moment, again and again, comes to the file of one that was left alone."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from calibatt.calibration.artifact import Calibration

# Imports once, and then runs the command line in a process of its own for each line that it reads: seconds to live,
# and the output. Says with what each ended: an exit code, or minus a signal.
DRIVER = """
import os, signal, sys, time
from dataclasses import replace
import torch
torch.set_num_threads(1)
import calibatt.models.catalogue
from calibatt.cli import main
from calibatt.models.entry import Resolution
from calibatt.models.shapes.entry import SHAPES
from calibatt.models.shapes.pipeline import assemble, new_transformer

def load(*_):
    torch.manual_seed(0)
    return assemble(new_transformer(layers=2, heads=2))

load()
calibatt.models.catalogue.MODELS = {"tiny": replace(
    SHAPES, name="tiny", layers=2, heads=2, block=(16, 16), steps=4, loader=load,
    resolutions={"small": Resolution(height=32, width=32, frames=2)},
)}
for line in sys.stdin:
    alive, out = line.split(" ", 1)
    start = time.perf_counter()
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        arguments = ["calibrate", "--model", "tiny", "--device", "cpu", "--count", "3", "--levels", "-o", out.strip()]
        os._exit(main(arguments))
    ended, status = 0, 0
    while not ended:
        time.sleep(0.0005)
        if time.perf_counter() - start > float(alive):
            os.kill(child, signal.SIGKILL)
            ended, status = os.waitpid(child, 0)
        else:
            ended, status = os.waitpid(child, os.WNOHANG)
    print(os.waitstatus_to_exitcode(status), time.perf_counter() - start, flush=True)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="processes are made by fork")
def test_killed_at_20_random_moments_a_calibration_comes_to_the_same_file(tmp_path: Path) -> None:
    drawn, kills = random.Random(16), 0
    with subprocess.Popen(
        [sys.executable, "-c", DRIVER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as driver:
        assert driver.stdin is not None
        assert driver.stdout is not None

        def ran(name: str, seconds: float) -> tuple[int, float]:
            print(seconds, tmp_path / name, file=driver.stdin, flush=True)
            code, took = driver.stdout.readline().split()
            return int(code), float(took)

        code, whole = ran("alone", 600)
        assert code == 0
        while kills < 20:
            code, _ = ran("killed", drawn.uniform(0, whole))
            assert code in (0, -9)
            kills += code == -9
            if code == 0:
                check(tmp_path)
        assert ran("killed", 600)[0] == 0
        check(tmp_path)
        driver.stdin.close()
    assert [path.name for path in tmp_path.iterdir()] == ["alone"]


def check(folder: Path) -> None:
    """The file is that of the run that nobody killed, and nothing else is left; it goes."""
    assert sorted(path.name for path in folder.iterdir()) == ["alone", "killed"]
    alone, killed = (Calibration.load(folder / name, verify=True) for name in ("alone", "killed"))
    assert alone.tables.keys() == killed.tables.keys()
    assert all(torch.equal(alone.tables[name], killed.tables[name]) for name in alone.tables)
    (folder / "killed").unlink()
