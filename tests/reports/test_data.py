"""The data of a report, as CSV, JSON and LaTeX."""

from __future__ import annotations

import csv
import io
import json
import re
import statistics
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from calibatt.bench.record import Record, Telemetry, load_run
from calibatt.reports.data import records_csv, records_json
from calibatt.reports.tables import for_terminals, latex


def test_the_json_has_every_field_of_every_record(full_run: Path) -> None:
    run = load_run(full_run)
    (found,) = json.loads(records_json([run]))
    assert (found["file"], found["machine_info"], found["datetime"]) == ("run.json", run.machine, run.datetime)
    assert tuple(Record.from_extra_info(record) for record in found["records"]) == run.records


def test_the_csv_has_a_line_an_arm_with_its_figures(full_run: Path) -> None:
    run = load_run(full_run)
    lines = list(csv.DictReader(io.StringIO(records_csv([run, run]))))
    assert len(lines) == 2 * len(run.records)
    for record, line in zip(run.records, lines, strict=False):
        assert (line["file"], line["arm"], line["suite"]) == ("run.json", record.arm, record.suite)
        assert (line["reason"] or None) == record.reason
        if record.speedup is None:
            assert not line["speedup"]
        else:
            shown = [float(line[name]) for name in ("speedup", "speedup_low", "speedup_high")]
            assert shown == [record.speedup.median, record.speedup.low, record.speedup.high]
            assert float(line["samples_s_median"]) == statistics.median(record.samples_s or ())
            assert int(line["rounds"]) == 6
    assert float(lines[0]["phases_s.plan_median"]) > 0
    # nothing has energy
    assert not [name for name in lines[0] if name.startswith("energy")]


def test_the_csv_has_what_was_read_and_how_many_samples_were_spoilt(
    write_run: Callable[..., Path], make: SimpleNamespace
) -> None:
    read = Telemetry(readings=4, clock_mhz=1000.0, throttled=True, reasons=("HwSlowdown",))
    marks = (True, False, False, True, False, False)
    records = [make.dense_arm(), make.arm("radial", telemetry=read, spoilt=marks, throttled=True)]
    without, line = csv.DictReader(io.StringIO(records_csv([load_run(write_run(records))])))
    assert (line["telemetry.readings"], line["telemetry.clock_mhz"], line["spoilt"]) == ("4", "1000.0", "2")
    assert (without["telemetry.readings"], without["spoilt"]) == ("", "")
    assert not [name for name in line if "reasons" in name or "power" in name]


@pytest.mark.parametrize("text", ["=1+1", "@x", '-2,"3"\n4'])
def test_text_of_others_is_one_cell_and_no_formula(
    text: str, write_run: Callable[..., Path], make: SimpleNamespace
) -> None:
    run = load_run(write_run([make.dense_arm(), make.broken("sta", reason=text)]))
    lines = list(csv.DictReader(io.StringIO(records_csv([run]))))
    assert len(lines) == 2
    assert lines[1]["reason"] == f"'{text}"


def test_latex_tables_have_the_figures_and_no_command_of_others(
    write_run: Callable[..., Path], make: SimpleNamespace
) -> None:
    arms = [make.dense_arm(), make.arm("sparge", preset=r"a_b \write18{x} 5% & $y$ #")]
    text = latex(load_run(write_run(arms)))
    (line,) = [line for line in text.splitlines() if line.startswith("SpargeAttn")]
    assert r"a\_b \textbackslash{}write18\{x\} 5\% \& \$y\$ \#" in line
    head = next(line for line in text.splitlines() if line.startswith("arm &"))
    # as many columns in each line as the table has
    cells = [len(re.findall(r"(?<!\\)&", row)) + 1 for row in (head, line)]
    (columns,) = re.findall(r"\\begin\{tabular\}\{(l+)\}", text)
    assert cells == [len(columns)] * 2
    assert r"$\times$" in line
    assert text.count(r"\begin{table}") == text.count(r"\end{table}") == 1


def test_the_table_at_the_end_of_a_run_has_a_line_an_arm_below_aligned_heads(make: SimpleNamespace) -> None:
    records = [make.dense_arm(), make.arm("radial", 1.2), make.broken("sta", reason="test data: too small\n\x1b[2J")]
    name, head, *lines, end = for_terminals(records)
    assert "denoise · shapes · quick" in name
    assert [line.split()[0] for line in lines] == ["Dense", "Radial", "sta"]
    at = head.index("PSNR dB")
    assert lines[1][at : at + 4].replace(".", "").isdigit()
    assert all(line[at - 2 : at].isspace() for line in lines)
    # a file's text is one line without control codes
    assert "too small" in lines[2]
    assert "\x1b" not in lines[2]
    assert end == ""


def test_of_a_run_in_which_all_is_well_nothing_says_so(make: SimpleNamespace) -> None:
    assert "outcome" not in for_terminals([make.dense_arm(), make.arm("radial")])[1]
