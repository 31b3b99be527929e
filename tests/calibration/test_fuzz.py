"""Files that were changed in any way are refused in one line, or say what a method can have learnt: 5,000 of them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from calibatt.calibration.artifact import SCHEMA, Calibration
from calibatt.calibration.collect import Run
from calibatt.calibration.files import UnusableCalibration
from calibatt.calibration.sections import write_sections
from calibatt.calibration.shards import Units
from calibatt.kernels.catalogue import KERNELS
from calibatt.methods.learning import sections

Made = Callable[..., Any]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just("1" * 5000),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
DTYPES = st.sampled_from((torch.uint8, torch.float32, torch.int64, torch.bfloat16, torch.bool))
SHAPES = st.lists(st.integers(0, 4), max_size=5)
# what is done to the bytes of a file: cut off at a share of it, and bytes at such places set
EDITS = st.tuples(st.floats(0.2, 1), st.lists(st.tuples(st.floats(0, 0.999), st.integers(0, 255)), max_size=6))


def thoroughly(examples: int) -> Callable[[Any], Any]:
    """The same examples in every run, however long each takes."""
    return settings(
        max_examples=examples, derandomize=True, database=None, deadline=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )  # fmt: skip


def edited(content: bytes, edits: tuple[float, list[tuple[float, int]]]) -> bytes:
    share, places = edits
    changed = bytearray(content[: math.ceil(share * len(content))])
    for place, value in places:
        changed[int(place * len(changed))] = value
    return bytes(changed)


def with_header(content: bytes, change: Callable[[Any], Any]) -> bytes:
    """A safetensors file with another header and the same data."""
    length = int.from_bytes(content[:8], "little")
    text = json.dumps(change(json.loads(content[8 : 8 + length]))).encode()
    return len(text).to_bytes(8, "little") + text + content[8 + length :]


def places(facts: Any) -> list[tuple[Any, ...]]:
    """The way to every value within some JSON."""
    inner = facts.items() if isinstance(facts, dict) else enumerate(facts) if isinstance(facts, list) else ()
    return [way for name, value in inner for way in ((name,), *((name, *rest) for rest in places(value)))]


def put(facts: Any, way: tuple[Any, ...], value: Any) -> Any:
    """The same JSON with another value there."""
    name, *rest = way
    changed = dict(facts) if isinstance(facts, dict) else list(facts)
    changed[name] = put(facts[name], tuple(rest), value) if rest else value
    return changed


def refused_in_one_line(read: Callable[[], object]) -> None:
    """Nothing else may happen than that it is read, or refused so."""
    try:
        read()
    except UnusableCalibration as error:
        said = str(error)
    else:
        return
    assert "\n" not in said
    assert len(said) < 1000


@pytest.fixture(scope="module")
def small(calibration: Calibration) -> Calibration:
    """One step and one layer of it: short files have more of what matters in each byte."""
    tables = {name: table[:1, :1] for name, table in calibration.tables.items()}
    return replace(calibration, tables=tables, provenance=replace(calibration.provenance, steps=1, layers=1))


@pytest.fixture(scope="module")
def whole(small: Calibration, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The bytes of its file."""
    path = tmp_path_factory.mktemp("whole") / "x"
    small.save(path)
    return path.read_bytes()


def facts_of(small: Calibration) -> Any:
    provenance = json.loads(json.dumps(asdict(small.provenance)))
    return {"method": "calibatt", "preset": "default", "settings": dict(small.settings), "provenance": provenance}


def load_signed(path: Path, tables: dict[str, Tensor], facts: str) -> None:
    """Load a file with right checksums, whatever it says."""
    with path.open("wb") as file:
        layout = {name: (table.dtype, tuple(table.shape)) for name, table in tables.items()}
        every = ((name, index, tables[name][index]) for name in tables for index in sections(layout, name))
        write_sections(file, path, layout, every, {"schema": SCHEMA, "facts": facts})
    refused_in_one_line(lambda: Calibration.load(path, verify=True))


@thoroughly(1500)
@given(edits=EDITS)
def test_a_calibration_whose_bytes_were_changed(whole: bytes, tmp_path: Path, edits: Any) -> None:
    path = tmp_path / "x"
    path.write_bytes(edited(whole, edits))
    refused_in_one_line(lambda: Calibration.load(path, verify=True))


@thoroughly(1000)
@given(data=st.data())
def test_a_calibration_whose_header_was_changed(whole: bytes, tmp_path: Path, data: st.DataObject) -> None:
    def change(header: Any) -> Any:
        return put(header, data.draw(st.sampled_from(places(header))), data.draw(JSON))

    path = tmp_path / "x"
    path.write_bytes(with_header(whole, change))
    refused_in_one_line(lambda: Calibration.load(path, verify=True))


@thoroughly(1000)
@given(data=st.data())
def test_a_calibration_with_other_facts_and_a_right_checksum(
    small: Calibration, tmp_path: Path, data: st.DataObject
) -> None:
    facts = facts_of(small)
    for _ in range(data.draw(st.integers(1, 2))):
        facts = put(facts, data.draw(st.sampled_from(places(facts))), data.draw(JSON))
    load_signed(tmp_path / "x", dict(small.tables), json.dumps(facts))


@thoroughly(500)
@given(
    name=st.sampled_from(("bits", "agreement", "similarity", "levels", "bits.rows", "other")),
    dtype=DTYPES,
    shape=SHAPES,
)
def test_a_calibration_with_other_tables_and_a_right_checksum(
    small: Calibration, tmp_path: Path, name: str, dtype: torch.dtype, shape: list[int]
) -> None:
    own = list(small.tables[name].shape) if name in small.tables else [1, 1]
    for shapes in (shape, own):
        load_signed(tmp_path / "x", {**small.tables, name: torch.zeros(shapes).to(dtype)}, json.dumps(facts_of(small)))


@pytest.fixture
def units(hand_made: Made, tmp_path: Path) -> tuple[Run, Units, Path]:
    """A run of one short video, its units, and the file of the only one."""
    run = Run.of(hand_made(steps=1, layers=1), prompts=["a"], seed=7, block=(16, 8), anchors=2, levels=True)
    made = run.units(tmp_path)
    run.note(made, kernel=KERNELS["sdpa-flash"])
    return run, made, tmp_path / "prompt-0000.safetensors"


@thoroughly(600)
@given(edits=EDITS)
def test_a_unit_whose_bytes_were_changed(units: tuple[Run, Units, Path], edits: Any) -> None:
    run, made, path = units
    content = path.read_bytes()
    path.write_bytes(edited(content, edits))
    refused_in_one_line(lambda: run.merge(made))
    path.write_bytes(content)


@thoroughly(400)
@given(name=st.sampled_from(("bits", "similarity", "levels", "other")), dtype=DTYPES, shape=SHAPES)
def test_a_unit_with_other_notes_and_right_checksums(
    units: tuple[Run, Units, Path], name: str, dtype: torch.dtype, shape: list[int]
) -> None:
    run, made, path = units
    content = path.read_bytes()
    with made._reading(0) as unit:
        notes = unit.notes(0)
    with made.writing(0) as writer:
        writer.put(0, {**notes, name: torch.zeros(shape).to(dtype)})
        writer.finish(total=2.0, watching=1.0)
    refused_in_one_line(lambda: run.merge(made))
    path.write_bytes(content)
