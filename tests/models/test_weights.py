"""Weights as the Hub has them: read from a folder, or one line that says why not and what to do."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

from calibatt.models.catalogue import MODELS
from calibatt.models.entry import ModelEntry

CPU = torch.device("cpu")
OF_THE_HUB = [name for name in MODELS if name not in ("shapes", "shapes-4step")]


def refusal(entry: ModelEntry, weights: Path | None = None) -> str:
    """What `load` says, which is one line."""
    with pytest.raises(OSError) as refused:  # noqa: PT011
        entry.load(resolution=next(iter(entry.resolutions)), device=CPU, dtype=torch.float32, weights=weights)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_what_was_saved_is_loaded_back(model: Any) -> None:
    from safetensors.torch import load_file

    for part in ("transformer", "transformer_2", "vae"):
        if getattr(model.pipe, part, None) is None:
            continue
        (file,) = (model.folder / part).glob("*.safetensors")
        saved, loaded = load_file(file), getattr(model.pipe, part).state_dict()
        assert saved.keys() <= loaded.keys()
        assert all(torch.equal(saved[name], loaded[name]) for name in saved)


def test_parts_have_the_dtype_asked_for_or_their_own(model: Any) -> None:
    pipe = model.load(torch.bfloat16)
    own = torch.float32 if model.entry.name.startswith("wan") else torch.bfloat16
    assert (pipe.transformer.dtype, pipe.vae.dtype) == (torch.bfloat16, own)


def test_there_is_a_small_one_of_every_model(tiny: Callable[[str], Any]) -> None:
    # 14B differs from 1.3B in its sizes alone
    for name in OF_THE_HUB:
        assert name == "wan2.1-14b" or tiny(name).entry.name == name


@pytest.mark.parametrize("name", OF_THE_HUB)
def test_without_a_network_one_line_says_so(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    said = refusal(MODELS[name])
    assert "is not on this disk, and the Hugging Face Hub cannot be reached: connect to it, or name a folder" in said


@pytest.mark.parametrize("part", ["transformer", "text_encoder"])
@pytest.mark.parametrize("kept", [100, -100], ids=["in the header", "in the weights"])
def test_a_file_that_is_cut_off_is_named(tiny: Callable[[str], Any], tmp_path: Path, part: str, kept: int) -> None:
    model = tiny("cogvideox-5b")
    folder = Path(shutil.copytree(model.folder, tmp_path / "copy"))
    (file,) = (folder / part).glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:kept])
    said = refusal(model.entry, folder)
    assert said.startswith(f"{file} is cut off or damaged (")
    assert said.endswith("download or copy it again")


def test_a_folder_without_weights_or_with_those_of_another_model_is_refused(
    tiny: Callable[[str], Any], tmp_path: Path
) -> None:
    entry = tiny("cogvideox-5b").entry
    assert "model_index.json" in refusal(entry, tmp_path)
    assert f"{tmp_path / 'nowhere'} cannot be loaded" in refusal(entry, tmp_path / "nowhere")
    ltx = tiny("ltx-video-2b").folder
    # Diffusers only warns
    assert refusal(entry, ltx) == (
        f"{ltx} does not hold cogvideox-5b, which is a CogVideoXTransformer3DModel of 2 layers and 2 heads: "
        "it holds a LTXVideoTransformer3DModel"
    )
    assert refusal(replace(entry, layers=42, heads=48), tiny("cogvideox-5b").folder).endswith(
        "which is a CogVideoXTransformer3DModel of 42 layers and 48 heads: it holds one of 2 and 2"
    )


@pytest.mark.parametrize(
    ("kind", "status", "said"),
    [
        (
            GatedRepoError,
            403,
            "at https://huggingface.co/genmo/mochi-1-preview, then log in by `hf auth login`",
        ),
        (RepositoryNotFoundError, 401, "at https://huggingface.co/genmo/mochi-1-preview"),
        (
            RepositoryNotFoundError,
            404,
            "genmo/mochi-1-preview cannot be had from the Hugging Face Hub: it is not",
        ),
        (HfHubHTTPError, 503, "genmo/mochi-1-preview cannot be had from the Hugging Face Hub: it is not"),
    ],
    ids=["gated", "logged out", "missing", "down"],
)
def test_what_the_hub_answers_is_told_in_one_line(
    kind: type[HfHubHTTPError], status: int, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer(*_: Any, **__: Any) -> Any:
        response: Any = SimpleNamespace(headers={}, request=None, status_code=status)
        raise kind("it is not\nto be had", response=response)

    monkeypatch.setattr("diffusers.pipelines.pipeline_utils.model_info", answer)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert said in refusal(MODELS["mochi-1"])
