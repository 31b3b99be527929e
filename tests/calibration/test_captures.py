"""Inputs of attention calls as files: which are written, what comes back, and what is refused."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from calibatt.calibration import captures
from calibatt.calibration.captures import captures_in, capturing
from calibatt.kernels.catalogue import KERNELS
from calibatt.kernels.geometry import Geometry
from calibatt.methods.call import Attention
from calibatt.methods.learning import Origin
from calibatt.methods.site import BRANCHES, Branch, Site

GEOMETRY = Geometry(grid=(2, 2, 3), heads=2, head_dim=8, text_tokens=1, text_side="first")
STEPS, LAYERS = 4, 7
ORIGIN = Origin(model="small", weights="w", scheduler="s")
CPU = torch.device("cpu")
Filmed = Callable[..., None]


def site(step: int, layer: int, branch: Branch = "cond", sample: int = 0) -> Site:
    return Site(
        geometry=GEOMETRY, step=step, steps=STEPS, sigma=0.5, branch=branch, layer=layer, layers=LAYERS, sample=sample
    )


def inputs(where: Site) -> tuple[Tensor, ...]:
    seed = hash((where.step, where.layer, where.branch, where.sample)) % 2**31
    return tuple(torch.randn(3, 1, 2, 13, 8, generator=torch.Generator().manual_seed(seed)))


@pytest.fixture
def film(monkeypatch: pytest.MonkeyPatch) -> Filmed:
    """Captures a video of two samples, both branches of each."""

    class Pipe:
        attention: Attention

    @contextlib.contextmanager
    def installed(pipe: Pipe, attention: Attention) -> Iterator[None]:
        pipe.attention = attention
        yield

    def origin_of(pipe: Any, name: str | None) -> Origin:
        return ORIGIN

    monkeypatch.setattr(captures, "installed", installed)
    monkeypatch.setattr(captures, "origin_of", origin_of)

    def work(folder: Path, *, videos: int = 1, **how: Any) -> None:
        pipe = Pipe()
        with capturing(pipe, folder, kernel=KERNELS["sdpa-math"], **how):
            for _ in range(videos):
                pipe.attention.start_video()
                for step in range(STEPS):
                    for branch in BRANCHES:
                        for layer in range(LAYERS):
                            for sample in range(2):
                                where = site(step, layer, branch, sample)
                                pipe.attention(*inputs(where), where)

    return work


def test_calls_come_back_as_they_were_in_their_order(film: Filmed, tmp_path: Path) -> None:
    film(tmp_path / "new")
    found = captures_in(tmp_path / "new")
    # from the first to the last, of the conditional branch of the first sample
    assert [one.site for one in found] == [site(0, 0), site(1, 2), site(2, 4), site(3, 6)]
    assert {one.origin for one in found} == {ORIGIN}
    for one in found:
        for loaded, there in zip(one.load(CPU, torch.float32), inputs(one.site), strict=True):
            assert torch.equal(loaded, there)
            # tokens before heads in memory
            assert loaded.transpose(1, 2).is_contiguous()


def test_a_second_video_changes_nothing_and_there_are_no_more_calls_than_a_video_has(
    film: Filmed, tmp_path: Path
) -> None:
    film(tmp_path / "one", videos=2, calls=1)
    assert [one.site for one in captures_in(tmp_path / "one")] == [site(0, 0)]
    film(tmp_path / "many", calls=200)
    assert len(captures_in(tmp_path / "many")) <= STEPS * LAYERS


def test_a_folder_with_files_is_refused_before_anything_is_made(film: Filmed, tmp_path: Path) -> None:
    (tmp_path / "note").write_text("mine")
    for place in (tmp_path, tmp_path / "note"):
        with pytest.raises(ValueError, match="is not an empty folder"):
            film(place)


def test_no_video_is_said_so(film: Filmed, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no attention call was captured"):
        film(tmp_path, videos=0)


def test_what_is_no_capture_is_named_in_one_line(film: Filmed, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no captured calls: `calibatt capture`"):
        captures_in(tmp_path)
    film(tmp_path / "a")
    path = tmp_path / "a" / "step-001-layer-002.safetensors"
    tensors = load_file(path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    capture = json.loads(metadata["capture"])

    def refused(**changed: Any) -> str:
        save_file(changed.get("tensors", tensors), path, {**metadata, **changed.get("metadata", {})})
        with pytest.raises(ValueError, match=r"step-001-layer-002") as caught:
            captures_in(tmp_path / "a")
        (line,) = str(caught.value).splitlines()
        return line

    assert "is no captured call of this version (other, not calibatt-capture-1)" in refused(
        metadata={"schema": "other"}
    )
    wrong = {**capture, "site": {**capture["site"], "step": STEPS}}
    assert f"step {STEPS} of {STEPS}" in refused(metadata={"capture": json.dumps(wrong)})
    other = {**capture, "origin": {**capture["origin"], "weights": "others"}}
    assert "different pipelines or sizes" in refused(metadata={"capture": json.dumps(other)})
    assert "(13, 2, 8), tokens × heads × head dim" in refused(tensors={**tensors, "k": tensors["k"][:4].clone()})
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"step-001-layer-002\.safetensors cannot be read as a captured call"):
        captures_in(tmp_path / "a")
