"""Generating a video and writing it to a file."""

from __future__ import annotations

import inspect
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from calibatt.kernels.names import UnknownName
from calibatt.models.catalogue import MODELS
from calibatt.models.generate import generate, generate_all, read_prompts, save_video
from calibatt.models.identity import origin_of
from calibatt.models.shapes.entry import SHAPES
from calibatt.models.shapes.pipeline import assemble, load_pipeline, new_transformer

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


def test_videos_that_are_made_side_by_side_are_those_that_are_made_one_by_one(pipe: Any) -> None:
    prompts = (PROMPT, "a blue square, still, over dots", "a green cross moving up, over grey")
    together = generate_all(MODELS["shapes"], pipe, prompts=prompts, resolution="quick", seed=3, steps=2)
    assert together.shape == (3, 3, 8, 64, 96)
    for number, prompt in enumerate(prompts):
        torch.testing.assert_close(together[number], _video(pipe, prompt=prompt, seed=3 + number), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": " "}, "a prompt is a text"),
        ({"steps": 0}, "at least one step"),
        ({"prompt": "a purple cow"}, "purple"),
        ({"guidance": float("nan")}, "finite"),
    ],
)
def test_bad_input_is_refused_in_one_line(pipe: Any, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        _video(pipe, **change)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("prompt", [None, [PROMPT]])
def test_what_is_no_text_is_refused_in_one_line(pipe: Any, prompt: Any) -> None:
    # as callers without a type checker meet it
    unchecked = inspect.unwrap(generate)
    with pytest.raises(ValueError, match="a prompt is a text"):
        unchecked(MODELS["shapes"], pipe, prompt=prompt, resolution="quick", seed=0)


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
    with pytest.raises(ValueError, match="empty; write one prompt per line"):
        read_prompts(path)


def test_a_list_of_prompts_that_is_no_text_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes(b"\xff\xfe\n")
    with pytest.raises(ValueError, match=r"prompts\.txt: this is no text in UTF-8"):
        read_prompts(path)


def test_a_stop_that_somebody_else_asks_for_is_kept(pipe: Any) -> None:
    done: list[int] = []

    def stop() -> None:
        done.append(1)
        pipe._interrupt = True

    _video(pipe, steps=4, after_step=stop)
    # the pipeline itself looks at the flag before each step
    assert len(done) == 1
    _video(pipe, steps=4, after_step=lambda: done.append(1))
    assert len(done) == 5


def test_a_generation_can_stop_after_a_few_steps(pipe: Any) -> None:
    done: list[int] = []
    _video(pipe, steps=4, stop_after=2, after_step=lambda: done.append(1))
    assert len(done) == 2


def test_the_embedded_pipeline_makes_as_many_frames_as_it_is_asked_for(pipe: Any) -> None:
    for frames in (1, 8):
        made = pipe(
            prompt=PROMPT, height=16, width=32, num_frames=frames, num_inference_steps=1, max_sequence_length=24,
            output_type="pt",
        ).frames  # fmt: skip
        assert made.shape[1] == frames


def _saved(folder: Path, **how: Any) -> Path:
    load_pipeline(device=torch.device("cpu"), dtype=torch.float32).transformer.save_pretrained(folder, **how)
    return folder


def test_weights_are_found_as_they_are_saved_and_as_the_hub_has_them(tmp_path: Path) -> None:
    own = load_pipeline(device=torch.device("cpu"), dtype=torch.float32)
    _saved(tmp_path / "flat")
    _saved(tmp_path / "hub" / "transformer")
    for folder in ("flat", "hub"):
        pipe = load_pipeline(device=torch.device("cpu"), dtype=torch.float32, weights=tmp_path / folder)
        assert origin_of(pipe) == origin_of(own)


def test_other_weights_are_refused_in_one_line(tmp_path: Path) -> None:
    _saved(tmp_path / "pickled", safe_serialization=False)
    shallow = _saved(tmp_path / "shallow") / "config.json"
    shallow.write_text(shallow.read_text().replace('"num_layers": 8', '"num_layers": 6'))
    cut = next(_saved(tmp_path / "cut").glob("*.safetensors"))
    cut.write_bytes(cut.read_bytes()[:1000])
    (tmp_path / "empty").mkdir()
    for name in ("pickled", "shallow", "cut", "empty"):
        with pytest.raises(OSError, match=name) as caught:
            load_pipeline(device=torch.device("cpu"), dtype=torch.float32, weights=tmp_path / name)
        assert "\n" not in str(caught.value)


def test_geometries_are_the_published_ones() -> None:
    # 1 + 80/4 latent frames of 480/16 × 832/16 and 720/16 × 1280/16 tokens
    assert MODELS["wan2.1-14b"].geometry("480p").tokens == 32_760
    assert MODELS["wan2.1-14b"].geometry("720p").tokens == 75_600
    assert (MODELS["mochi-1"].geometry("85f").grid, MODELS["mochi-1"].geometry("85f").tokens) == ((15, 30, 53), 24_106)
    assert MODELS["mochi-1"].geometry("163f").tokens == 44_520 + 256
    assert MODELS["shapes"].geometry("standard").tokens == 6_144
    assert MODELS["shapes"].geometry("quick").tokens == 3_072


@pytest.mark.parametrize(
    ("model", "resolution", "grid", "tokens"),
    [
        ("wan2.2-ti2v-5b", "720p", (31, 22, 40), 27_280),
        ("hunyuanvideo", "720p", (33, 45, 80), 118_800 + 256),
        ("cogvideox-5b", "480p", (13, 30, 45), 17_550 + 226),
        ("cogvideox1.5-5b", "768p", (11, 48, 85), 44_880 + 226),
        ("ltx-video-2b", "512p", (21, 16, 22), 7_392),
    ],
)
def test_a_model_has_the_geometry_that_it_is_published_with(
    model: str, resolution: str, grid: tuple[int, int, int], tokens: int
) -> None:
    geometry = MODELS[model].geometry(resolution)
    assert (geometry.grid, geometry.tokens) == (grid, tokens)


def test_a_model_of_another_package_may_have_its_attention_alone() -> None:
    entry = replace(SHAPES, name="theirs", family=None, loader=None)
    assert entry.geometry("quick").tokens == 3_072
    with pytest.raises(ValueError, match="theirs cannot generate videos here: only its attention is measured"):
        entry.load(resolution="quick", device=torch.device("cpu"), dtype=torch.float32)
