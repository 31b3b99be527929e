"""A method's own learner watches dense videos, and what it learnt survives a file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from calibatt.calibration import file
from calibatt.calibration.file import UnusableCalibration
from calibatt.calibration.learn import SCHEMA, Watcher, learn, load_learnt, save_learnt
from calibatt.kernels.catalogue import KERNELS
from calibatt.kernels.geometry import Geometry
from calibatt.methods.learning import Learnt
from calibatt.methods.site import Site
from calibatt.models.catalogue import SHAPES, Resolution
from calibatt.models.shapes.pipeline import assemble, new_transformer

SDPA = KERNELS["sdpa-flash"]
PROMPTS = ("a red circle moving left, over stripes", "a blue square moving right, over stripes")
TINY = replace(
    SHAPES, name="tiny", layers=2, heads=2, block=(16, 16), steps=2,
    resolutions={"small": Resolution(height=32, width=32, frames=2)},
)  # fmt: skip
GEOMETRY = Geometry(grid=(2, 3, 4), heads=2, head_dim=8)


class Seen:
    """Remembers where it was called, and whether with what attention sees."""

    def __init__(self) -> None:
        self.sites: list[Site] = []

    def watch(self, q: Tensor, k: Tensor, v: Tensor, site: Site) -> None:
        assert q.shape == k.shape == v.shape == (2, 24, 8)
        self.sites.append(site)

    def tables(self) -> Mapping[str, Tensor]:
        return {}


def site(**where: Any) -> Site:
    given = {"geometry": GEOMETRY, "step": 1, "steps": 3, "sigma": 0.5, "branch": "cond", "layer": 0, "layers": 2}
    return Site(**{**given, **where})


def learnt(**other: Any) -> Learnt:
    table = torch.rand(3, 2, 5, generator=torch.Generator().manual_seed(0))
    facts = {"method": "sta", "geometry": GEOMETRY, "steps": 3, "layers": 2, "tables": {"distance": table}}
    return Learnt(**{**facts, "preset": "searched", "model": "tiny", "weights": "ab", "prompts": PROMPTS, **other})


def test_the_learner_sees_the_conditional_calls_alone_and_the_output_is_dense_attention() -> None:
    seen = Seen()
    watcher = Watcher(seen, SDPA)
    q, k, v = torch.randn(3, 1, 2, 24, 8, generator=torch.Generator().manual_seed(0))
    for branch in ("cond", "uncond"):
        plan = watcher.plan(q[0], k[0], site(branch=branch))
        assert torch.equal(watcher.attend(q, k, v, plan), SDPA.attend(q, k, v, plan))
    assert [where.branch for where in seen.sites] == ["cond"]
    assert watcher.watch.seconds > 0


def test_learning_watches_every_prompt_step_and_layer_and_says_what_it_cost() -> None:
    torch.manual_seed(0)
    pipe = assemble(new_transformer(layers=2, heads=2))
    made = learn(
        TINY, pipe, method="blasst", preset="calibrated-oracle", resolution="small", prompts=PROMPTS, seed=7,
        kernel=SDPA, block=(16, 16),
    )  # fmt: skip
    assert (made.steps, made.layers, made.prompts, made.model) == (2, 2, PROMPTS, "tiny")
    # a mean over nothing would be NaN
    assert made.tables["left_out"].isfinite().all()
    assert made.cost_ratio > 1
    with pytest.raises(ValueError, match="sparge/default learns nothing"):
        learn(TINY, pipe, method="sparge", resolution="small", prompts=PROMPTS, seed=0, kernel=SDPA)


def test_what_was_learnt_comes_back_from_its_file(tmp_path: Path) -> None:
    path = tmp_path / "sta.safetensors"
    one = learnt()
    save_learnt(one, path)
    back = load_learnt(path)
    assert torch.equal(back.tables["distance"], one.tables["distance"])
    assert replace(back, tables={}).__repr__() == replace(one, tables={}).__repr__()


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    file.write(path, "calibatt-calibration-1", {"bits": torch.zeros(3)}, {})
    with pytest.raises(UnusableCalibration, match="run `calibatt calibrate` again"):
        load_learnt(path)
    file.write(path, SCHEMA, {"distance": torch.zeros(3, 2)}, {"method": "sta"})
    with pytest.raises(UnusableCalibration, match="contradicts itself"):
        load_learnt(path)


@pytest.mark.parametrize(
    "other", [{"geometry": replace(GEOMETRY, grid=(2, 4, 3))}, {"steps": 4}, {"layers": 3}], ids=lambda x: next(iter(x))
)
def test_a_site_of_other_videos_is_refused(other: dict[str, Any]) -> None:
    assert learnt().at("distance", site()).shape == (5,)
    with pytest.raises(ValueError, match="sta learnt for"):
        learnt().at("distance", site(**other))


def test_another_model_or_table_is_refused() -> None:
    learnt().check_model("tiny", "ab")
    with pytest.raises(ValueError, match="not from tiny with weights cd"):
        learnt().check_model("tiny", "cd")
    with pytest.raises(ValueError, match=r"table distance is \[2, 2\], for 3 steps"):
        learnt(tables={"distance": torch.zeros(2, 2)})
