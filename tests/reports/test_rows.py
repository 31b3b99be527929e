"""Arms as a report shows them: names and looks."""

from __future__ import annotations

from types import SimpleNamespace

from calibatt.bench.record import MARKERS, Record, Telemetry
from calibatt.reports.columns import COLUMNS
from calibatt.reports.rows import COLOURS, GLYPHS, labels, look, rows, shared_words, short


def test_names_of_arms_tell_kernels_apart(make: SimpleNamespace) -> None:
    records = [make.arm("radial"), make.arm("radial", kernel="triton"), make.arm("sparge")]
    assert labels(records) == ["Radial, flex", "Radial, triton", "SpargeAttn"]


def test_a_name_stays_on_its_line(make: SimpleNamespace) -> None:
    assert labels([make.arm("a\nb", preset="\x1b[2J")]) == [r"a\nb/\x1b[2J"]


def test_words_that_all_sparse_arms_share_are_found_wherever_they_stand_and_left_out_of_figures(
    make: SimpleNamespace,
) -> None:
    records = [make.arm(name, dense_steps=0.1, block_choice=size) for name, size in (("radial", "a"), ("sparge", "b"))]
    arms = rows([make.dense_arm(), *records])
    assert arms[1].label == "Radial, 10% of the steps dense, blocks a"
    assert shared_words(arms) == ("10% of the steps dense",)
    assert [short(arm, shared_words(arms)) for arm in arms] == ["Dense", "Radial, blocks a", "SpargeAttn, blocks b"]
    # one arm shares nothing with itself, and dense alone has no words
    assert shared_words(arms[:2]) == shared_words(arms[:1]) == ()


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


def test_a_table_says_how_many_samples_there_are_and_whether_they_were_enough(make: SimpleNamespace) -> None:
    (column,) = (one for one in COLUMNS if one.title == "samples")
    times = {"samples_s": (1.0,) * 6, "baseline_samples_s": (1.95, 1.99, 2.0, 2.0, 2.01, 2.05)}
    arms = rows([make.arm("radial", **times, interval_target=target) for target in (0.03, 0.01, None)])
    assert [column.read(arm) for arm in arms] == ["6, ±3 %", "6, ±1 % not reached", ""]
    marked = {"spoilt": (True, False, True, False, False, False), "throttled": True}
    arms = rows([make.arm("radial", **times, **marked, interval_target=target) for target in (0.01, None)])
    said = "2 throttled or disturbed"
    assert [column.read(arm) for arm in arms] == [f"6, ±1 % not reached, {said}", f"6, {said}"]


def test_columns_show_what_was_read_while_the_samples_were_taken(make: SimpleNamespace) -> None:
    read = Telemetry(
        readings=9, clock_mhz=1755, lowest_clock_mhz=1200, power_w=612.4, temperature_c=71, throttled=True,
        reasons=("SwPowerCap", "HwSlowdown"), disturbed=0.25, others={"cc1plus": 0.2, "X": 0.05},
    )  # fmt: skip
    arms = rows(
        [
            make.arm("radial", telemetry=read, disturbed=0.25, throttled=True),
            # as older files have it
            make.arm("sparge", clocks_mhz=(1700.0, 1710.0, 1720.0)),
            make.arm("sta"),
        ]
    )
    shown = {one.title: [one.read(arm) for arm in arms] for one in COLUMNS}
    assert shown["clock MHz"] == ["1755 (1200)", "1710", ""]
    assert shown["power W"] == ["612", "", ""]
    assert shown["heat °C"] == ["71", "", ""]
    assert shown["held down by"] == ["SwPowerCap, HwSlowdown", "", ""]
    assert shown["others had"] == ["25.0%, cc1plus 20%, X 5%", "", ""]
