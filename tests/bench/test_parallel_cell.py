"""Times of one process and of several that share a video's tokens: the same videos from the same masks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

# on a CPU, Diffusers divides by the number of accelerators
SMALL = """
import sys
from dataclasses import replace
from functools import partial

import torch

torch.accelerator.device_count = lambda: 1
from calibatt.bench.parallel_cell import main
from calibatt.models.entry import Resolution
from calibatt.models.families import wan

small = replace(
    wan.ENTRIES[0], heads=8, block=(32, 32),
    resolutions={"tiny": Resolution(height=128, width=160, frames=17, flow_shift=5.0)},
    untrained=partial(wan.untrained, {"ffn_dim": 128, "text_dim": 32}),
)
main(sys.argv[1:], {"small": small})
"""


def _measure(processes: int, folder: Path, *more: str) -> Any:
    out = folder / f"{processes}.json"
    done = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes),
            "--no-python", sys.executable, "-c", SMALL, "--model", "small", "--resolution", "tiny", "--layers", "2",
            "--steps", "2", "--rounds", "1", "--calibration", str(folder / "masks.safetensors"), "--out", str(out),
            *more,
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text(encoding="utf-8"))


@pytest.mark.slow
def test_two_processes_are_measured_on_the_masks_and_videos_of_one(tmp_path: Path) -> None:
    one = _measure(1, tmp_path)
    two = _measure(2, tmp_path, "--against", str(tmp_path / "1.safetensors"))
    assert (one["processes"], two["processes"]) == (1, 2)
    for facts in (one["arms"], two["arms"]):
        assert all(len(arm["samples_s"]) == 1 for arm in facts.values())
    masks = two["arms"]["calibatt"]
    assert masks["density"] == one["arms"]["calibatt"]["density"] < 1
    assert one["arms"]["calibatt"]["imbalance"] == {"in_order": 1.0, "balanced": 1.0}
    assert 1 <= masks["imbalance"]["balanced"] < masks["imbalance"]["in_order"]
    # fp32
    assert all(arm["difference"] < 1e-4 for arm in two["arms"].values())
