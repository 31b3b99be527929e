"""Calibrations in folders and repositories: what the card says, and what happens where there is none."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import yaml
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError

from calibatt.calibration.artifact import Calibration
from calibatt.calibration.collect import calibrate_on
from calibatt.calibration.files import UnusableCalibration
from calibatt.methods.catalogue import build, settings_beside

Made = Callable[..., Any]


def test_a_folder_has_the_file_and_a_card_and_comes_back(calibration: Calibration, same: Made, tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    calibration.save_pretrained(folder, licence="apache-2.0")
    assert {path.name for path in folder.iterdir()} == {"calibration.safetensors", "README.md"}
    assert same(Calibration.from_pretrained(folder), calibration)
    # again is the same
    calibration.save_pretrained(str(folder), licence="apache-2.0")


def test_the_card_says_what_it_is_for(calibration: Calibration, tmp_path: Path) -> None:
    own = calibration.provenance
    calibration = replace(calibration, provenance=replace(own, prompts=tuple(f"prompt | {i}" for i in range(20))))
    calibration.save_pretrained(tmp_path, licence="cc-by-4.0")
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    _, head, text = card.split("---\n", 2)
    assert yaml.safe_load(head) == {
        "license": "cc-by-4.0",
        "library_name": "calibatt",
        "tags": ["calibatt", "sparse-attention", "video-diffusion"],
    }
    lines = [line.strip("| ") for line in text.splitlines() if line.startswith("| ")]
    rows = dict(line.split(" | ", 1) for line in lines if line)
    assert rows["method"] == "calibatt, preset default"
    assert "block = [16, 8]" in rows["settings"]
    assert 0 < float(rows["density"]) < 1
    assert (rows["model"], rows["scheduler"]) == ("toy", "Euler")
    assert f"`{own.origin.weights}`" in rows["weights"]
    assert rows["size"] == str(own.geometry)
    assert rows["steps, layers, guidance"] == "2, 3, 3"
    assert rows["prompts"] == "20, from noise of seed 7 on"
    assert rows["bytes"] == f"{calibration.nbytes():,}"
    assert "- prompt | 15\n- and 4 more, which the file has" in text
    assert "prompt | 16" not in text


@pytest.mark.parametrize("preset", ["default", "alone"])
def test_the_card_builds_the_method_under_what_it_was_learnt_with(
    hand_made: Made, prompts: tuple[str, ...], tmp_path: Path, preset: str
) -> None:
    how: dict[str, Any] = {"block": (16, 8), "beside": 2, "trials": 0}
    made = calibrate_on(hand_made(), method="budget", preset=preset, prompts=prompts, seed=7, **how)
    assert settings_beside(made) == how
    made.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    (call,) = [line for line in card.splitlines() if line.startswith("calibatt.sparsify")]
    said = f'"budget", preset="{preset}", calibration=learnt, beside=2, block=(16, 8), trials=0)'
    assert call == f"calibatt.sparsify(pipe, {said}"
    built = build("budget", preset=preset, calibration=Calibration.from_pretrained(tmp_path), **how)
    assert f"| density | {built.mean_density():.3f} |" in card


def test_a_licence_may_be_left_open(calibration: Calibration, tmp_path: Path) -> None:
    calibration.save_pretrained(tmp_path)
    assert "license" not in (tmp_path / "README.md").read_text(encoding="utf-8").split("---\n")[1]


def test_another_card_is_not_replaced(calibration: Calibration, tmp_path: Path) -> None:
    card = tmp_path / "README.md"
    card.write_text("my notes", encoding="utf-8")
    with pytest.raises(ValueError, match=r"README\.md is another card: delete it, or save to another folder$"):
        calibration.save_pretrained(tmp_path)
    assert card.read_text(encoding="utf-8") == "my notes"
    assert list(tmp_path.iterdir()) == [card]


def test_a_folder_without_a_calibration_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnusableCalibration, match=r"calibration\.safetensors"):
        Calibration.from_pretrained(tmp_path)


def test_what_is_no_folder_is_a_repository(
    calibration: Calibration, same: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calibration.save_pretrained(tmp_path)
    asked = []

    def download(repository: str, file: str, **where: Any) -> str:
        asked.append((repository, file, where))
        return str(tmp_path / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert same(Calibration.from_pretrained("somebody/masks", revision="v1", token="t"), calibration)
    assert asked == [("somebody/masks", "calibration.safetensors", {"revision": "v1", "token": "t"})]


@pytest.mark.parametrize(
    "error",
    [
        LocalEntryNotFoundError("no network\nand nothing in the cache"),
        RepositoryNotFoundError("404", response=SimpleNamespace(headers={}, request=None)),  # type: ignore[arg-type]
        huggingface_hub.errors.HFValidationError("Repo id must be in the form 'repo_name' or 'namespace/repo_name'"),
    ],
    ids=["network", "missing", "name"],
)
def test_a_repository_that_cannot_be_had_is_one_line(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*where: Any, **how: Any) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    with pytest.raises(UnusableCalibration, match=r"^somebody/masks is no folder here, and calibration") as caught:
        Calibration.from_pretrained("somebody/masks")
    assert "\n" not in str(caught.value)


def test_a_repository_gets_file_and_card(
    calibration: Calibration, same: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, Any]] = []

    class Hub:
        def __init__(self, *, token: str | None) -> None:
            calls.append(("token", token))

        def create_repo(self, name: str, **how: Any) -> None:
            calls.append((name, how))

        def upload_folder(self, *, repo_id: str, folder_path: str, commit_message: str) -> Any:
            # it is gone afterwards
            Path(folder_path).joinpath("calibration.safetensors").rename(tmp_path / "calibration.safetensors")
            calls.append((repo_id, {path.name for path in Path(folder_path).iterdir()}))
            return SimpleNamespace(commit_url="https://hub/commit")

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    address = calibration.push_to_hub("somebody/masks", licence="mit", private=True, token="t")
    assert address == "https://hub/commit"
    assert calls == [
        ("token", "t"), ("somebody/masks", {"private": True, "exist_ok": True}), ("somebody/masks", {"README.md"}),
    ]  # fmt: skip
    assert same(Calibration.load(tmp_path / "calibration.safetensors"), calibration)
