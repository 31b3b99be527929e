"""Ten thousand damaged files: each is read, or refused as unusable; nothing else is ever raised."""

from __future__ import annotations

import copy
import io
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from calibatt.bench.record import Record, Run, UnusableFile, load_run
from calibatt.reports.artifact import load_clip, load_pictures
from calibatt.reports.columns import COLUMNS
from calibatt.reports.data import records_csv, records_json
from calibatt.reports.facts import imprint, run_facts, samples, workload_facts, workloads
from calibatt.reports.findings import findings
from calibatt.reports.gate import judge
from calibatt.reports.headlines import headlines
from calibatt.reports.rows import rows
from calibatt.reports.tables import latex, tables

RESULTS = Path(__file__).resolve().parents[2] / "bench" / "results"
# the same inputs every time, on every machine, however slow
SETTINGS = settings(derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck))


def _few() -> dict[str, Any]:
    """A committed run cut down to an arm or two of every suite and one that was not timed."""
    run: dict[str, Any] = json.loads((RESULTS / "cpu" / "quick.json").read_text(encoding="utf-8"))
    found: dict[str, list[Any]] = {}
    for benchmark in run["benchmarks"]:
        found.setdefault(benchmark["extra_info"]["suite"], []).append(benchmark)
    run["benchmarks"] = [*found["denoise"][:2], *(found[suite][-1] for suite in ("attention", "kernel", "calibration"))]
    methods = json.loads((RESULTS / "cpu" / "methods.json").read_text(encoding="utf-8"))
    run["untimed"] = methods["untimed"][:1]
    # as newer files have it
    run["machine_info"] |= {"torch_build": "CPU", "gpu": None, "gpu_power_limit_w": 700.0}
    run["machine_info"]["cpu"] = {
        "brand_raw": "Test data CPU", "family": 25, "caches": {"L2": 1048576}, "flags": ["avx2"], "count": 2,
        "usable": 2,
    }  # fmt: skip
    for benchmark in run["benchmarks"]:
        # as newer files have them
        benchmark["extra_info"]["samples_s"] = benchmark["stats"]["data"]
        benchmark["stats"] = {"data": benchmark["stats"]["data"]}
    return run


RUN = _few()
CONTENT = json.dumps(RUN).encode()


def _places(value: Any, here: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The way to every value of a JSON document."""
    found = [here] if here else []
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in items:
            found += _places(item, (*here, key))
    return found


def _deep(levels: int) -> list[Any]:
    nested: list[Any] = []
    for _ in range(levels):
        nested = [nested]
    return nested


PLACES = _places(RUN)
# most of a record is read, little of the rest
RECORDS = [place for place in PLACES if "extra_info" in place or place[0] == "untimed"]
VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 10**18, 10**400, 0.5, -0.5, 1e-320, 1e308, -1e308, float("nan"), float("inf"),
    "", "x", "123456", "1", "é\n\x1b[2J", "<b>|`$\\x$", "x" * 300, [], [[]], {}, {"a": 1}, [0], [1.0] * 6, [None],
    ["x"],     [1e308] * 6, [1e-320] * 6, [64, 64], [0, 0], [10**400], {"plan": [1.0]}, {"plan": []}, {"x": {"y": [1]}},
    _deep(50), _deep(500), "native", "equal_density", "equal_fidelity", "ok", "failed", "kernel", "denoise", "dense",
    "random", "../x", "/dev/zero", "run.json", "\0", "#ffffff", "*",
]  # fmt: skip
json_values = st.one_of(
    st.integers(0, len(VALUES) - 1).map(lambda place: VALUES[place]),
    st.floats(),
    st.integers(),
    st.text(max_size=5),
    st.lists(st.floats(width=16), max_size=7),
)
mutations = st.lists(
    st.tuples(
        st.one_of(
            st.integers(0, len(RECORDS) - 1).map(lambda place: RECORDS[place]),
            st.integers(0, len(PLACES) - 1).map(lambda place: PLACES[place]),
        ),
        st.sampled_from(["replace", "replace", "delete", "rename", "wrap", "repeat", "copy"]),
        json_values,
    ),
    min_size=1,
    max_size=3,
)


def _mutate(document: Any, place: tuple[Any, ...], how: str, value: Any) -> None:
    *way, last = place
    holder = document
    try:
        for key in way:
            holder = holder[key]
        old = holder[last]
    except (KeyError, IndexError, TypeError):
        # an earlier mutation took it away
        return
    if not isinstance(holder, dict | list):
        return
    if how == "replace":
        holder[last] = value
    elif how == "delete":
        del holder[last]
    elif how == "wrap":
        holder[last] = [old]
    elif how == "repeat":
        holder[last] = [old] * 40
    elif isinstance(holder, list):
        holder.append(old if how == "copy" else value)
    elif how == "copy":
        holder[f"{last}_"] = old
    else:
        holder[str(value)[:50]] = holder.pop(last)


def _shown(run: Run) -> None:
    """All that a report makes of a run, but the drawing."""
    assert tables(run) is not None
    assert latex(run) is not None
    assert run_facts(run)
    assert records_csv([run])
    assert records_json([run])
    assert len(headlines([rows(records) for records in workloads(run.records)])) <= 5
    for records in workloads(run.records):
        arms = rows(records)
        assert all(isinstance(column.read(arm), str) for arm in arms for column in COLUMNS)
        assert all(isinstance(sentence, str) for sentence in findings(arms))
        workload_facts(records)
        assert "\n" not in imprint(run, arms) + samples(arms)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The run before anything was done to it."""
    path = tmp_path_factory.mktemp("fuzz") / "run.json"
    path.write_bytes(CONTENT)
    return load_run(path)


def _read(content: bytes, base: Run) -> bool:
    """Whether the content is a usable run; then it is judged and shown."""
    path = base.path.with_name("damaged.json")
    path.write_bytes(content)
    try:
        run = load_run(path)
        for verdict in (judge([run], [base]), judge([base, base], [run, base])):
            assert all(line.isprintable() for line in verdict.lines)
        _shown(run)
    except UnusableFile as error:
        assert len(str(error)) <= 300  # noqa: PT017
        assert str(error).isprintable()  # noqa: PT017
        return False
    return True


@pytest.mark.slow
def test_a_damaged_document_is_read_or_refused(base: Run) -> None:
    usable = []

    @settings(SETTINGS, max_examples=5000)
    @given(mutations)
    def check(changes: list[tuple[tuple[Any, ...], str, Any]]) -> None:
        document = json.loads(CONTENT)
        for place, how, value in changes:
            _mutate(document, place, how, copy.deepcopy(value))
        usable.append(_read(json.dumps(document).encode(), base))

    check()
    # both are reached: damage that shows, and damage that does not
    assert 0.1 < sum(usable) / len(usable) < 0.9


@pytest.mark.slow
def test_damaged_bytes_are_read_or_refused(base: Run) -> None:
    @settings(SETTINGS, max_examples=3500)
    @given(
        st.lists(
            st.tuples(st.integers(0, len(CONTENT)), st.integers(0, 60), st.binary(max_size=5)), min_size=1, max_size=3
        )
    )
    def check(changes: list[tuple[int, int, bytes]]) -> None:
        content = CONTENT
        for place, length, new in changes:
            content = content[:place] + new + content[place + length :]
        _read(content, base)

    check()


def _archive() -> bytes:
    file = io.BytesIO()
    np.savez_compressed(
        file,
        density=np.full((2, 3, 4), 0.5, np.float32),
        masks=np.eye(4, dtype=bool)[None],
        mask_sites=np.zeros((1, 3), int),
        frames=np.zeros((1, 3, 8, 8, 3), np.uint8),
        captions=np.array(["a red circle"]),
        frame_starts=np.arange(3),
    )
    return file.getvalue()


ARCHIVE = _archive()
NAMES = ["density", "masks", "mask_sites", "frames", "captions", "frame_starts"]


def _checked(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    try:
        load_clip(path)
        load_pictures(path)
    except UnusableFile as error:
        assert len(str(error)) <= 300  # noqa: PT017


def test_damaged_artifacts_are_read_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"

    @settings(SETTINGS, max_examples=1000)
    @given(
        st.lists(
            st.tuples(st.integers(0, len(ARCHIVE)), st.integers(0, 9), st.binary(max_size=4)), min_size=1, max_size=3
        )
    )
    def bytes_of_the_archive(changes: list[tuple[int, int, bytes]]) -> None:
        content = ARCHIVE
        for place, length, new in changes:
            content = content[:place] + new + content[place + length :]
        _checked(path, content)

    @settings(SETTINGS, max_examples=500)
    @given(
        st.sampled_from(NAMES),
        st.sampled_from(["<f4", "|b1", "|u1", "<i8", "<U3", "|O", "<U100000000", ">f8", "<M8[s]", "|V8", "<c8", "x"]),
        st.lists(st.sampled_from([-1, 0, 1, 2, 3, 8, 5000, 2**31, 2**63, 10**30]), max_size=6),
        st.binary(max_size=64),
    )
    def headers(name: str, descr: str, shape: list[int], content: bytes) -> None:
        text = repr({"descr": descr, "fortran_order": False, "shape": tuple(shape)}).encode()
        archive = io.BytesIO()
        with zipfile.ZipFile(archive, "w") as file:
            file.writestr(f"{name}.npy", b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + content)
        _checked(path, archive.getvalue())

    bytes_of_the_archive()
    headers()


def test_the_document_that_is_damaged_has_every_kind_of_record(base: Run) -> None:
    assert {record.suite for record in base.records} == {"kernel", "attention", "denoise", "calibration"}
    assert {record.outcome for record in base.records} >= {"ok", "unsupported"}
    assert all(isinstance(record, Record) for record in base.records)
    assert _read(CONTENT, base)
