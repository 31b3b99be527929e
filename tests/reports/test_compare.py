"""Two runs side by side."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from calibatt.cli import main

Write = Callable[..., Path]
MACHINE = {"gpu": None, "python_version": "3.11.7", "threads": 2, "versions": {"torch": "2.9.0"}}


def _lines(capsys: pytest.CaptureFixture[str], *files: Path) -> list[str]:
    assert main(["compare", *map(str, files)]) == 0
    return capsys.readouterr().out.splitlines()


def _cells(lines: list[str], name: str) -> list[str]:
    (row,) = (line for line in lines if line.startswith(f"| {name} |"))
    return row.strip("| ").split(" | ")


def test_an_arm_of_both_has_its_figures_side_by_side(
    make: SimpleNamespace, write_run: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [
        write_run([make.dense_arm(), make.arm("radial", speed, psnr=psnr)], name)
        for speed, psnr, name in ((1.2, 30, "a.json"), (1.5, 25, "b.json"))
    ]
    lines = _lines(capsys, *files)
    (head,) = (line.strip("| ").split(" | ") for line in lines if line.startswith("| arm |"))
    shown = dict(zip(head, _cells(lines, "Radial"), strict=True))
    assert [
        float(shown[f"speedup (95 %), {name}"].partition("×")[0]) for name in ("a.json", "b.json")
    ] == pytest.approx([1.2, 1.5], abs=0.02)
    assert float(shown["speedup, second over first"]) == pytest.approx(1.25, abs=0.02)
    assert shown["PSNR dB, a.json"] != shown["PSNR dB, b.json"]


def test_an_arm_of_one_run_alone_is_listed(
    make: SimpleNamespace, write_run: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    first = write_run([make.dense_arm(), make.arm("radial")], "a.json")
    second = write_run([make.dense_arm(), make.broken("sparge", reason="test data: not here")], "b.json")
    lines = _lines(capsys, first, second)
    assert "–" in _cells(lines, "Radial")
    assert "unsupported: test data: not here" in _cells(lines, "sparge")


def test_all_that_differs_about_the_machines_is_named(
    make: SimpleNamespace, write_run: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    other: dict[str, Any] = {**MACHINE, "threads": 4, "versions": {"torch": "2.10.0"}}
    files = [write_run([make.dense_arm()], name, machine) for name, machine in (("a.json", MACHINE), ("b.json", other))]
    lines = _lines(capsys, *files)
    assert _cells(lines, "number of threads") == ["number of threads", "2", "4"]
    assert _cells(lines, "version of torch") == ["version of torch", "2.9.0", "2.10.0"]
    assert any(line.startswith("Times differ by machine") for line in lines)
    # of a file against itself nothing differs
    assert not any("number of threads |" in line for line in _lines(capsys, files[0], files[0]))


def test_names_from_files_make_no_cells_of_their_own(
    make: SimpleNamespace, write_run: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [write_run([make.dense_arm(), make.arm("a|b<i>\n")], name) for name in ("a.json", "b.json")]
    assert any(line.startswith("| a\\|b&lt;i>") for line in _lines(capsys, *files))
