"""Arms as a report shows them: names and looks."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

from calibatt.bench.record import MARKERS, Record, load_run
from calibatt.methods.catalogue import METHODS
from calibatt.reports.rows import COLOURS, GLYPHS, labels, look, rows

RESULTS = sorted((Path(__file__).resolve().parents[2] / "bench" / "results").rglob("*.json"))


def test_names_of_arms_tell_kernels_apart(make: SimpleNamespace) -> None:
    records = [make.arm("radial"), make.arm("radial", kernel="triton"), make.arm("sparge")]
    assert labels(records) == ["Radial, flex", "Radial, triton", "SpargeAttn"]


def test_a_name_stays_on_its_line(make: SimpleNamespace) -> None:
    assert labels([make.arm("a\nb", preset="\x1b[2J")]) == [r"a\nb/\x1b[2J"]


def test_the_methods_of_the_committed_results_have_a_name_and_a_look_that_no_other_has() -> None:
    found: dict[str, set[tuple[str | None, ...]]] = {}
    for path in RESULTS:
        for record in load_run(path).records:
            if record.method in METHODS:
                shown = (record.method_label, record.method_colour, record.method_marker)
                found.setdefault(record.method, set()).add(shown)
    assert set(found) == set(METHODS)
    assert all(len(shown) == 1 and None not in next(iter(shown)) for shown in found.values())
    looks = [next(iter(shown)) for shown in found.values()]
    assert len({label for label, _, _ in looks}) == len({shown[1:] for shown in looks}) == len(METHODS) == 21


def test_a_method_without_a_look_has_one_of_its_names(make: SimpleNamespace) -> None:
    looks = {name: look(make.arm(name)) for name in map("method-{}".format, range(200))}
    assert {colour for colour, _ in looks.values()} == set(COLOURS)
    assert {marker for _, marker in looks.values()} == set(MARKERS)
    assert look(make.arm("method-0", preset="other", mode="equal_density", kernel="triton")) == looks["method-0"]
    # it is the same in another process too
    assert looks["method-0"] == ("#009E73", "X")


def test_a_methods_own_look_is_shown(make: SimpleNamespace) -> None:
    record = make.arm("mine", method_label="Mine & Co.", method_colour="#123456", method_marker="v")
    (row,) = rows([record])
    assert (row.label, row.colour, row.marker, row.heading) == ("Mine & Co.", "#123456", "v", "▼ Mine & Co.")


def test_every_marker_has_a_glyph() -> None:
    assert set(GLYPHS) == set(MARKERS)
    assert len(set(GLYPHS.values())) == len(MARKERS)


def test_dense_stands_first(make: SimpleNamespace) -> None:
    records: list[Record] = [make.arm("radial"), make.dense_arm()]
    shown = rows(records)
    assert [row.label for row in shown] == ["Dense", "Radial"]
