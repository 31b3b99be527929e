"""Files in sections: mapped, checked where they are used, and whatever bit is flipped is found, by file and section."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from calibatt.calibration.artifact import Calibration
from calibatt.calibration.files import UnusableCalibration
from calibatt.calibration.sections import label
from calibatt.methods.calibatt.method import CalibAtt
from calibatt.methods.catalogue import build
from calibatt.methods.learning import sections
from calibatt.methods.site import Site

Made = Callable[..., Any]


@pytest.fixture
def path(calibration: Calibration, tmp_path: Path) -> Path:
    calibration.save(tmp_path / "x")
    return tmp_path / "x"


def spans(path: Path) -> dict[str, tuple[int, int]]:
    """Of each section the bytes where it lies, from the file's own header."""
    content = path.read_bytes()
    length = 8 + int.from_bytes(content[:8], "little")
    found = {"header": (0, length)}
    loaded = Calibration.load(path)
    layout = loaded.parts.layout
    start = length
    for name in layout:
        for index in sections(layout, name):
            end = start + loaded.parts.part(name, index).nbytes
            found[label(name, index)] = (start, end)
            start = end
    found["checksums"] = (start, len(content))
    return found


def flipped(path: Path, bit: int) -> None:
    with path.open("r+b") as file:
        file.seek(bit // 8)
        (byte,) = file.read(1)
        file.seek(bit // 8)
        file.write(bytes([byte ^ 1 << bit % 8]))


def refused(path: Path, section: str) -> None:
    with pytest.raises(UnusableCalibration) as error:
        Calibration.load(path, verify=True)
    said = str(error.value)
    assert str(path) in said
    assert section in said
    assert "\n" not in said


def test_the_sections_of_a_file_are_all_of_it(path: Path, calibration: Calibration) -> None:
    found = list(spans(path).items())
    assert len(found) == 2 + 4 * 2 * 3
    assert sorted(calibration.tables) == ["agreement", "bits", "levels", "similarity"]
    assert all(found[i][1][1] == found[i + 1][1][0] for i in range(len(found) - 1))
    assert found[-1][1][1] == path.stat().st_size


def test_any_of_200_flipped_bits_is_found_by_file_and_section(path: Path) -> None:
    found, drawn = spans(path), random.Random(16)
    for _ in range(200):
        bit = drawn.randrange(8 * path.stat().st_size)
        (section,) = [name for name, (start, end) in found.items() if start <= bit // 8 < end]
        flipped(path, bit)
        refused(path, section)
        flipped(path, bit)
    Calibration.load(path, verify=True)


def test_a_flipped_bit_is_found_in_each_section(path: Path) -> None:
    drawn = random.Random(0)
    for section, (start, end) in spans(path).items():
        bit = drawn.randrange(8 * start, 8 * end)
        flipped(path, bit)
        refused(path, section)
        flipped(path, bit)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.05, 0.3, 0.6, 0.9, 0.999])
def test_a_file_that_is_cut_short_is_refused_at_once(path: Path, share: float) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(UnusableCalibration, match="cut short; its header: "):
        Calibration.load(path)
    path.write_bytes(content + b"\0")
    with pytest.raises(UnusableCalibration, match="cut short; its header: "):
        Calibration.load(path)


def test_a_damaged_section_is_found_where_it_is_used_and_not_before(path: Path, hand_made: Made) -> None:
    start, _ = spans(path)["bits, step 1, layer 0"]
    flipped(path, 8 * start)
    loaded = Calibration.load(path)
    method = build("calibatt", preset="masks-only", calibration=loaded)
    q = torch.zeros(2, 60, 16)

    def plan(step: int, layer: int) -> Any:
        where = Site(geometry=hand_made().geometry, step=step, steps=2, layer=layer, layers=3, sigma=1.0, branch="cond")
        return method.plan(q, q, q, where)

    plan(0, 0)
    plan(0, 1)
    # the next one is made ahead of its use
    with pytest.raises(
        UnusableCalibration, match=r"x was changed or damaged .* section bits, step 1, layer 0 does not"
    ):
        plan(0, 2)
    # the whole of a table is all of its sections
    assert loaded.tables["similarity"].shape == (2, 3, 2)
    with pytest.raises(UnusableCalibration, match="bits, step 1, layer 0"):
        loaded.tables["bits"]


def test_loading_reads_no_table_and_each_section_is_checked_once(
    path: Path, calibration: Calibration, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(CalibAtt, "check_part", lambda name, part, settings, geometry: asked.append(name))
    loaded = Calibration.load(path)
    assert asked == []
    for _ in range(2):
        assert torch.equal(loaded.part("bits", 1, 2), calibration.tables["bits"][1, 2])
    assert asked == ["bits"]
    assert torch.equal(loaded.tables["bits"], calibration.tables["bits"])
    assert asked == ["bits"] * 6


def test_tables_are_read_from_the_file_when_they_are_used(path: Path) -> None:
    start, _ = spans(path)["levels, step 0, layer 1"]
    loaded = Calibration.load(path)
    flipped(path, 8 * start)
    with pytest.raises(UnusableCalibration, match="section levels, step 0, layer 1 does not match"):
        loaded.part("levels", 0, 1)


def test_a_file_may_be_deleted_while_it_is_used(path: Path, calibration: Calibration) -> None:
    loaded = Calibration.load(path)
    path.unlink()
    assert torch.equal(loaded.tables["levels"], calibration.tables["levels"])


def test_shared_masks_take_less_room_in_the_file_and_come_back(run: Made, same: Made, tmp_path: Path) -> None:
    whole, made = run(), run(share=0.5)
    assert len(made.tables["bits"]) < 2 * 3 * 2
    made.save(tmp_path / "shared")
    back = Calibration.load(tmp_path / "shared", verify=True)
    assert same(back, made)
    assert back.tables["bits"].nbytes < whole.tables["bits"].nbytes
    for step in range(2):
        for layer in range(3):
            own = whole.part("bits", step, layer)
            assert torch.equal(own & back.part("bits", step, layer), own)
    # each row is a section
    end = spans(tmp_path / "shared")["bits, row 1"][1]
    flipped(tmp_path / "shared", 8 * end - 1)
    refused(tmp_path / "shared", "bits, row 1")
