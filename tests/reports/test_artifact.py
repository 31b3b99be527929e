"""An artifact may be anybody's: what it claims is checked before it is loaded."""

from __future__ import annotations

import io
import resource
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from calibatt.bench.record import UnusableFile
from calibatt.reports.artifact import load_clip, load_pictures

FRAMES = np.zeros((1, 3, 8, 8, 3), np.uint8)


def _claim(path: Path, name: str, shape: tuple[int, ...], descr: str, content: bytes = b"\0" * 64) -> Path:
    """An artifact whose array says in its header what it does not hold."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": descr, "fortran_order": False, "shape": shape})
    with zipfile.ZipFile(path, "w") as file:
        file.writestr(f"{name}.npy", header.getvalue() + content)
    return path


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"frames": FRAMES[0]}, "4 dimensions, not 5"),
        ({"frames": FRAMES.astype(np.float32)}, "type float32"),
        ({"frames": FRAMES.astype(np.uint16)}, "type uint16"),
        ({"frames": FRAMES[..., :2]}, "no video's"),
        ({"frames": np.zeros((1, 2, 5000, 2, 3), np.uint8)}, r"shape \(1, 2, 5000, 2, 3\)"),
        ({"frames": np.zeros((1, 2, 500, 2, 3), np.uint8)}, "no video's"),
        ({"frames": np.zeros((1, 0, 8, 8, 3), np.uint8)}, "shape"),
        ({"frames": np.zeros((1000, 1, 2, 2, 3), np.uint8)}, "shape"),
        ({"masks": np.ones((2, 4, 4), bool)}, "not every mask"),
        ({"masks": np.ones((2, 4, 4), bool), "mask_sites": np.zeros((1, 3), int)}, "not every mask"),
        ({"masks": np.ones((1, 4, 4), bool), "mask_sites": np.zeros((1, 2), int)}, "are 3"),
        ({"captions": np.array(["a", None], dtype=object)}, "type object"),
        ({"captions": np.array(["x" * 300_000])}, "1,200,000 bytes"),
        ({"density": np.full((1, 1, 1), np.nan, np.float32)}, "between 0 and 1"),
        ({"density": np.full((1, 1, 1), 2.0, np.float32)}, "between 0 and 1"),
        ({"frame_starts": np.arange(5000)}, "shape"),
    ],
)
def test_an_artifact_of_another_form_is_refused(arrays: dict[str, Any], message: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(UnusableFile, match=message) as caught:
        load_pictures(tmp_path / "a.npz")
    assert str(tmp_path / "a.npz") in str(caught.value)


@pytest.mark.parametrize(
    ("name", "shape", "descr"),
    [
        ("density", (10**14, 1, 1), "<f4"),
        ("density", (1000, 200, 200), "<f4"),
        ("density", (10**30, 10**30, 10**30), "<f4"),
        ("frames", (16, 1024, 4096, 4096, 3), "|u1"),
        ("masks", (64, 8192, 8192), "|b1"),
        ("captions", (1,), "<U200000000"),
        ("density", (-1, 1, 1), "<f4"),
    ],
)
def test_what_a_header_claims_is_not_reserved(name: str, shape: tuple[int, ...], descr: str, tmp_path: Path) -> None:
    path = _claim(tmp_path / "a.npz", name, shape, descr)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UnusableFile, match=r"a\.npz: its"):
        load_pictures(path)
    # kilobytes
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 10_000


def test_an_array_that_is_shorter_than_it_says_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnusableFile, match=r"a\.npz"):
        load_pictures(_claim(tmp_path / "a.npz", "density", (6, 8, 4), "<f4"))


@pytest.mark.parametrize("content", [b"", b"no zip file", b"PK\x03\x04" + b"\xff" * 99])
def test_what_is_no_archive_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    path.write_bytes(content)
    with pytest.raises(UnusableFile, match=r"a\.npz: is not an artifact"):
        load_pictures(path)


@pytest.mark.parametrize(
    "text", ["{'descr': '<f4', 'fortran_order': False, 'shape': ((", "{'descr': [[", "\0" * 40, "(" * 9000]
)
def test_a_damaged_header_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    content = b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("density.npy", content)
    with pytest.raises(UnusableFile, match=r"a\.npz"):
        load_pictures(path)


def test_a_damaged_byte_anywhere_is_refused_or_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    np.savez_compressed(path, density=np.full((2, 3, 4), 0.5, np.float32), frames=FRAMES)
    whole = path.read_bytes()
    refused: list[str] = []
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :])
        try:
            load_pictures(path)
        except UnusableFile as error:
            refused.append(str(error))
    assert len(refused) > len(whole) / 2
    assert max(map(len, refused)) <= 300


def test_of_long_and_large_videos_what_is_shown_is_kept(tmp_path: Path) -> None:
    videos = np.zeros((1, 21, 480, 960, 3), np.uint8) + np.arange(21, dtype=np.uint8)[None, :, None, None, None]
    np.savez_compressed(tmp_path / "a.npz", frames=videos)
    pictures = load_pictures(tmp_path / "a.npz")
    assert pictures is not None
    assert pictures.frames is not None
    # every second pixel is enough for five in a row
    assert pictures.frames.shape == (1, 5, 240, 480, 3)
    assert pictures.frames[0, :, 0, 0, 0].tolist() == [0, 5, 10, 15, 20]
    # nothing of the rest is kept alive
    assert pictures.frames.base is None


def test_no_artifact_has_no_pictures() -> None:
    assert load_pictures(None) is None


def test_a_clip_is_the_whole_first_video_as_it_plays(tmp_path: Path) -> None:
    videos = np.random.default_rng(0).integers(0, 256, (2, 5, 208, 832, 3), dtype=np.uint8)
    np.savez_compressed(tmp_path / "a.npz", frames=videos)
    clip = load_clip(tmp_path / "a.npz")
    assert clip is not None
    np.testing.assert_array_equal(clip, videos[0, :, ::2, ::2])


def test_what_has_no_frames_has_no_clip_and_damage_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    np.savez(path, density=np.full((1, 1, 1), 0.5, np.float32))
    assert load_clip(path) is None
    assert load_clip(None) is None
    path.write_bytes(b"no archive")
    with pytest.raises(UnusableFile, match=r"a\.npz: is not an artifact"):
        load_clip(path)
