"""Generating a video and writing it to a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from calibatt.kernels.names import UnknownName
from calibatt.models.catalogue import MODELS, weights_digest
from calibatt.models.generate import generate, read_prompts, save_video
from calibatt.models.shapes.pipeline import assemble, new_transformer

PROMPT = "a red circle moving left, over stripes"


@pytest.fixture(scope="module")
def pipe() -> Any:
    torch.manual_seed(0)
    return assemble(new_transformer(layers=1, heads=1))


def _video(pipe: Any, **changes: Any) -> torch.Tensor:
    return generate(
        MODELS["shapes"], pipe, **{"prompt": PROMPT, "resolution": "quick", "seed": 0, "steps": 2, **changes}
    )


def test_a_seed_means_one_video(pipe: Any) -> None:
    first = _video(pipe)
    assert first.shape == (3, 8, 64, 96)
    assert torch.equal(first, _video(pipe))
    assert not torch.equal(first, _video(pipe, seed=1))


@pytest.mark.parametrize(
    ("change", "message"),
    [({"prompt": " "}, "prompt is empty"), ({"steps": 0}, "at least one step"), ({"prompt": "a purple cow"}, "purple")],
)
def test_bad_input_is_refused_in_one_line(pipe: Any, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        _video(pipe, **change)
    assert "\n" not in str(caught.value)


def test_an_unknown_resolution_names_the_nearest(pipe: Any) -> None:
    with pytest.raises(UnknownName, match="did you mean standard"):
        _video(pipe, resolution="standart")


@pytest.mark.parametrize("suffix", [".mp4", ".gif"])
def test_a_file_plays_back_what_was_written(tmp_path: Path, suffix: str) -> None:
    import imageio.v3 as imageio

    video = torch.full((3, 4, 64, 96), -1.0)
    # each frame another level of grey
    video += torch.tensor([0.2, 0.6, 1.0, 1.4])[None, :, None, None]
    path = tmp_path / f"video{suffix}"
    save_video(video, path)
    frames = imageio.imread(path)
    assert frames.shape == (4, 256, 384, 3)
    # H.264 and GIF palettes are lossy: a level of 255 / 2 · 0.4 lies between two frames
    assert frames.mean((1, 2, 3)).tolist() == pytest.approx([25.5, 76.5, 127.5, 178.5], abs=5)
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_write_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"ends in \.mp4 or \.gif"):
        save_video(torch.zeros(3, 2, 64, 96), tmp_path / "video.avi")
    with pytest.raises(Exception):  # noqa: B017, PT011 - whatever the encoder raises
        save_video(torch.zeros(3, 0, 64, 96), tmp_path / "video.mp4")
    assert list(tmp_path.iterdir()) == []


def test_an_empty_list_of_prompts_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("\n  \n")
    with pytest.raises(ValueError, match="empty; write one prompt a line"):
        read_prompts(path)


def test_other_weights_have_another_digest(pipe: Any) -> None:
    torch.manual_seed(1)
    assert weights_digest(pipe) != weights_digest(assemble(new_transformer(layers=1, heads=1)))


def test_geometries_are_the_published_ones() -> None:
    # 1 + 80/4 latent frames of 480/16 × 832/16 and 720/16 × 1280/16 tokens
    assert MODELS["wan2.1-14b"].geometry("480p").tokens == 32_760
    assert MODELS["wan2.1-14b"].geometry("720p").tokens == 75_600
    assert MODELS["shapes"].geometry("standard").tokens == 6_144
    assert MODELS["shapes"].geometry("quick").tokens == 3_072


@pytest.mark.parametrize(
    ("model", "resolution", "grid", "tokens"),
    [
        ("wan2.2-ti2v-5b", "720p", (31, 22, 40), 27_280),
        ("mochi-1", "85f", (15, 30, 53), 23_850 + 256),
        ("mochi-1", "163f", (28, 30, 53), 44_520 + 256),
        ("hunyuanvideo", "720p", (33, 45, 80), 118_800 + 256),
        ("cogvideox-5b", "480p", (13, 30, 45), 17_550 + 226),
        ("cogvideox1.5-5b", "768p", (11, 48, 85), 44_880 + 226),
        ("ltx-video-2b", "512p", (21, 16, 22), 7_392),
    ],
)
def test_a_model_whose_attention_alone_is_measured_has_its_geometry(
    model: str, resolution: str, grid: tuple[int, int, int], tokens: int
) -> None:
    entry = MODELS[model]
    geometry = entry.geometry(resolution)
    assert (geometry.grid, geometry.tokens) == (grid, tokens)
    with pytest.raises(ValueError, match=f"{model} cannot generate here"):
        entry.load(resolution=resolution, device=torch.device("cpu"), dtype=torch.float32)
