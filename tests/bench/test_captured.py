"""Benchmarks of attention calls that were captured elsewhere."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from calibatt.bench.captured import CapturedVideos, captured_steps
from calibatt.bench.options import Options
from calibatt.bench.suites.catalogue import SUITES
from calibatt.calibration import captures
from calibatt.kernels.catalogue import KERNELS
from calibatt.kernels.geometry import Geometry
from calibatt.kernels.plan import Plan
from calibatt.methods.call import Call, SparseAttention
from calibatt.methods.catalogue import build
from calibatt.methods.learning import Origin
from calibatt.methods.site import Site
from calibatt.models.shapes.entry import SHAPES

GEOMETRY = SHAPES.geometry("quick")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two calls of a video of three steps at the embedded model's quick size."""
    folder = tmp_path_factory.mktemp("captured")
    capturer = captures._Capturer(folder, 2, Origin(model="shapes", weights="w", scheduler="s"))
    shape = (3, 1, GEOMETRY.heads, GEOMETRY.tokens, GEOMETRY.head_dim)
    for step, layer in ((0, 0), (2, 7)):
        q, k, v = torch.randn(shape, generator=torch.Generator().manual_seed(step))
        site = Site(geometry=GEOMETRY, step=step, steps=3, sigma=0.5, branch="cond", layer=layer, layers=8)
        capturer.saw(Call(site=site, q=q, k=k, v=v, plan=Plan.dense(GEOMETRY), out=q))
    return folder


def given(**texts: str) -> Options:
    return Options.read(
        Namespace(**{one.name: texts.get(one.name, one.metadata["default"]) for one in fields(Options)})
    )


def test_only_calls_of_attention_are_measured_at_the_steps_of_the_video(folder: Path) -> None:
    options = given(inputs=f"captures={folder}", methods="dense,sparge")
    cells = {name: [str(cell) for cell in suite.cells(options)] for name, suite in SUITES.items()}
    assert cells.pop("attention") == [
        "shapes-quick-3-captured-dense-fastest", "shapes-quick-3-captured-sparge-default",
    ]  # fmt: skip
    assert not any(cells.values())


def test_another_size_or_number_of_steps_is_refused_and_both_are_named(folder: Path) -> None:
    assert captured_steps(folder, GEOMETRY, None) == captured_steps(folder, GEOMETRY, (3,)) == 3
    with pytest.raises(ValueError, match="a video of 3 steps; leave out --steps"):
        captured_steps(folder, GEOMETRY, (3, 6))
    other = Geometry(grid=(21, 30, 52), heads=12, head_dim=128)
    with pytest.raises(ValueError, match=r"8×16×24 tokens.*not of 21×30×52 tokens.*give --models"):
        captured_steps(folder, other, None)


def test_text_may_be_as_long_as_the_prompt_was(folder: Path) -> None:
    assert captured_steps(folder, Geometry(grid=GEOMETRY.grid, heads=4, head_dim=64, text_tokens=99), None) == 3


def test_a_folder_that_has_none_is_refused_in_a_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no captured calls"):
        given(inputs=f"captures={tmp_path}").workloads()
    with pytest.raises(ValueError, match="--inputs capture=x: unknown choice"):
        given(inputs="capture=x")


def test_all_its_calls_are_probes_and_there_is_no_video(folder: Path) -> None:
    videos = CapturedVideos(folder, resolution="quick", guidance=2.0)
    probes = videos.probes(torch.device("cpu"), torch.bfloat16)
    assert [(probe.site.step, probe.site.layer) for probe in probes] == [(0, 0), (2, 7)]
    assert {probe.q.dtype for probe in probes} == {torch.bfloat16}
    assert videos.inputs == "captured from shapes, 2 calls"
    with pytest.raises(ValueError, match="no whole videos"):
        videos.sigmas("a")
    with pytest.raises(ValueError, match="no whole videos"):
        videos.show(SparseAttention(build("dense"), KERNELS["sdpa-math"]), prompts=("a",), seed=0)
