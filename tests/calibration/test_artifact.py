"""The file of a calibration: whole or refused, and what it says is what a method can have learnt."""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from calibatt.calibration import files
from calibatt.calibration.artifact import SCHEMA, Calibration, check_output
from calibatt.calibration.files import UnusableCalibration
from calibatt.calibration.sections import write_sections
from calibatt.methods.calibatt.method import CalibAtt
from calibatt.methods.catalogue import build
from calibatt.methods.learning import sections

Made = Callable[..., Any]


def test_a_saved_calibration_comes_back_bit_for_bit(calibration: Calibration, same: Made, tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "toy.safetensors"
    calibration.save(path)
    back = Calibration.load(path)
    assert same(back, calibration)
    assert back.provenance == calibration.provenance
    assert back.preset == calibration.preset
    assert list(path.parent.iterdir()) == [path]
    # any reader of safetensors reads it
    assert set(safetensors.torch.load_file(path)) == {*calibration.tables, "checksums"}


def test_output_errors_are_learnt_where_asked_for_and_come_back(
    calibration: Calibration, run: Made, same: Made, tmp_path: Path
) -> None:
    made = run(preset="output-reuse", levels=True)
    made.save(tmp_path / "x")
    back = Calibration.load(tmp_path / "x")
    assert same(back, made)
    assert back.tables.keys() - calibration.tables.keys() == {"reuse_error", "mask_error"}
    # what the others go by is what they would have learnt
    assert all(torch.equal(back.tables[name], table) for name, table in calibration.tables.items())
    # all heads, and none
    for ratio, share in ((1e6, 1.0), (0.0, 0.0)):
        method = build("calibatt", preset="output-reuse", calibration=back, error_ratio=ratio)
        assert isinstance(method, CalibAtt)
        assert method.plans.repetitive.float().mean().item() == share


def test_tables_of_every_dtype_come_back(calibration: Calibration, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("calibatt.methods.calibatt.method.CalibAtt.check_tables", lambda learnt: None)
    dtypes = (torch.bool, torch.int8, torch.int64, torch.float16, torch.bfloat16, torch.float64)
    tables = {str(dtype): torch.arange(12).view(2, 3, 2).to(dtype) for dtype in dtypes} | {"flat": torch.ones(2, 3)}
    replace(calibration, tables=tables).save(tmp_path / "x")
    back = Calibration.load(tmp_path / "x").tables
    assert all(torch.equal(back[name], table) and back[name].dtype == table.dtype for name, table in tables.items())


def test_nothing_is_left_behind_when_the_disk_is_full(calibration: Calibration, tmp_path: Path) -> None:
    path = tmp_path / "toy.safetensors"
    path.write_bytes(b"what was there before")

    # as good as a full disk: what is written aside goes there
    (tmp_path / f".{path.name}.partial").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"toy\.safetensors cannot be written: No space left on device") as error:
        calibration.save(path)
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == b"what was there before"


def test_what_a_killed_process_left_is_replaced_and_the_mode_is_the_umasks(
    calibration: Calibration, tmp_path: Path
) -> None:
    path = tmp_path / "toy.safetensors"
    (tmp_path / f".{path.name}.partial").write_bytes(b"half")
    before = os.umask(0o022)
    try:
        calibration.save(path)
    finally:
        os.umask(before)
    assert list(tmp_path.iterdir()) == [path]
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


def test_an_output_that_cannot_be_written_is_refused_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_output(tmp_path / "new" / "folder" / "x")
    (tmp_path / "file").touch()
    check_output(tmp_path / "file")
    os.mkfifo(tmp_path / "pipe")
    for wrong in (tmp_path, tmp_path / "pipe", Path("/dev/null")):
        with pytest.raises(ValueError, match="is not a regular file"):
            check_output(wrong)
    with pytest.raises(ValueError, match="file is not a folder that you can write to"):
        check_output(tmp_path / "file" / "x")
    # root may write anywhere, so who may not is asked for by hand
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(ValueError, match="is not a folder that you can write to"):
        check_output(tmp_path / "x")
    assert {path.name for path in tmp_path.iterdir()} == {"file", "pipe"}


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def flip_a_bit_of_a_mask(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def change(name: str, edit: Callable[[str], str]) -> Callable[[Path], None]:
    def changed(path: Path) -> None:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata()
        tensors = safetensors.torch.load_file(path)
        safetensors.torch.save_file(tensors, path, metadata={**metadata, name: edit(metadata[name])})

    return changed


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (Path.unlink, "does not exist"),
        (lambda path: path.write_text("{}"), "cannot be read"),
        (cut_short, "cut short"),
        (flip_a_bit_of_a_mask, "changed or damaged"),
        (change("facts", lambda facts: facts.replace("0123456789abcdef", "fedcba9876543210")), "changed or damaged"),
        (
            change("schema", lambda _: "calibatt-calibration-1"),
            "calibatt-calibration-1.*run `calibatt calibrate. again",
        ),
        (change("schema", lambda _: "calibatt-learnt-1"), "calibatt-learnt-1.*run `calibatt calibrate` again"),
        (change("schema", lambda _: "x\n" * 10_000), "has the schema"),
        (
            lambda path: safetensors.torch.save_file({"weights": torch.zeros(3)}, path),
            "is no calibration by its header",
        ),
        (lambda path: (path.unlink(), path.mkdir()), "cannot be read"),
    ],
    ids=["missing", "text", "short", "bit", "facts", "schema 1", "learnt 1", "long", "other", "folder"],
)
def test_an_unusable_file_is_refused_in_one_line(
    calibration: Calibration, tmp_path: Path, damage: Callable[[Path], object], says: str
) -> None:
    path = tmp_path / "toy.safetensors"
    calibration.save(path)
    damage(path)
    with pytest.raises(UnusableCalibration, match=says) as error:
        Calibration.load(path, verify=True)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 700


def signed(path: Path, tables: dict[str, Tensor], facts: str) -> None:
    """A file with right checksums, whatever it says."""
    with path.open("wb") as file:
        layout = {name: (table.dtype, tuple(table.shape)) for name, table in tables.items()}
        every = ((name, index, tables[name][index]) for name in tables for index in sections(layout, name))
        write_sections(file, path, layout, every, {"schema": SCHEMA, "facts": facts})


def facts_of(calibration: Calibration) -> dict[str, Any]:
    provenance = json.loads(json.dumps(asdict(calibration.provenance)))
    return {
        "method": "calibatt", "preset": "default", "settings": dict(calibration.settings), "provenance": provenance
    }  # fmt: skip


def set_in(facts: dict[str, Any], path: str, value: Any) -> None:
    *outer, last = path.split(".")
    for name in outer:
        facts = facts[name]
    facts[last] = value


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("settings.rho", math.nan, "rho: .*finite"),
        ("settings.rho", "x", "rho: .*number"),
        ("settings.block", [0, 0], "at least one token"),
        ("settings.block", [16, 9], "bits|levels"),
        ("settings.levels", False, "tables: CalibAtt has"),
        ("settings.anchors", 10**9, "anchors"),
        ("settings", {}, "block: "),
        ("provenance.layers", 0, "3 layers|0 layers|layers"),
        ("provenance.steps", True, "steps: "),
        ("provenance.steps", 9, "9 steps"),
        ("provenance.cost_ratio", math.nan, "cost_ratio: .*finite"),
        ("provenance.cost_ratio", -1.0, "cost_ratio"),
        ("provenance.prompts", [], "prompts"),
        ("provenance.prompts", "cats", "prompts: "),
        ("provenance.geometry.heads", 10**12, "bits: "),
        ("provenance.geometry.grid", [2, 6], "grid"),
        ("provenance.geometry.text_side", "middle", "text_side: "),
        ("provenance.origin.weights", None, "weights: "),
        ("provenance.versions", {"torch": 2}, r"versions\.torch: "),
        ("provenance.note", "hello\nworld", "note: "),
        ("method", "calibat", "unknown method 'calibat': did you mean calibatt"),
        ("preset", 1, "preset: "),
    ],
    ids=str,
)
def test_a_right_checksum_does_not_make_facts_right(
    calibration: Calibration, tmp_path: Path, field: str, value: Any, says: str
) -> None:
    facts = facts_of(calibration)
    signed(tmp_path / "x", dict(calibration.tables), json.dumps(facts))
    Calibration.load(tmp_path / "x")
    set_in(facts, field, value)
    signed(tmp_path / "x", dict(calibration.tables), json.dumps(facts))
    with pytest.raises(UnusableCalibration, match=f"contradicts itself: .*({says})") as error:
        Calibration.load(tmp_path / "x", verify=True)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["", "null", "[" * 100_000, '{"a":' * 5_000, "NaN", "{} , {}", "\\ud800"], ids=len)
def test_facts_that_are_none_are_refused(calibration: Calibration, tmp_path: Path, text: str) -> None:
    signed(tmp_path / "x", dict(calibration.tables), text)
    with pytest.raises(UnusableCalibration, match="contradicts itself"):
        Calibration.load(tmp_path / "x")


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        (lambda t: {**t, "bits": torch.zeros_like(t["bits"])}, "bits, step 0, layer 0: a row of a mask has no block"),
        (lambda t: {**t, "similarity": t["similarity"] * math.nan}, "similarity, step 0, layer 0: a value is NaN"),
        (lambda t: {**t, "bits": t["bits"].to(torch.int64)}, "bits: .*int64"),
        (lambda t: {**t, "similarity": torch.zeros(())}, r"table similarity is \[\]"),
        (lambda t: {}, "tables: "),
        (lambda t: {name: table[:1] for name, table in t.items()}, "for 2 steps"),
    ],
    ids=["zeros", "NaN", "dtype", "scalar", "none", "steps"],
)
def test_a_right_checksum_does_not_make_tables_right(
    calibration: Calibration, tmp_path: Path, changed: Callable[[dict[str, Tensor]], dict[str, Tensor]], says: str
) -> None:
    signed(tmp_path / "x", changed(dict(calibration.tables)), json.dumps(facts_of(calibration)))
    with pytest.raises(UnusableCalibration, match=says) as error:
        Calibration.load(tmp_path / "x", verify=True)
    assert "\n" not in str(error.value)


def test_what_would_not_be_read_is_not_learnt(calibration: Calibration) -> None:
    with pytest.raises(ValueError, match="cost_ratio"):
        replace(calibration, provenance=replace(calibration.provenance, cost_ratio=0.5)).validate()


def test_files_are_safetensors_with_aligned_data(calibration: Calibration, tmp_path: Path) -> None:
    calibration.save(tmp_path / "x")
    length = int.from_bytes((tmp_path / "x").read_bytes()[:8], "little")
    assert length % 8 == 0
    assert set(files._DTYPES.values()) > {"U8", "F32"}
