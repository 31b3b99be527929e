"""The README's claims: its commands exist, its code runs, its tables are those of the committed results."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import calibatt
from calibatt.bench.record import load_run
from calibatt.reports.page import tables

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = README + "".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md")))
RESULTS = sorted((ROOT / "bench" / "results").rglob("*.json"))


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: str(path.relative_to(ROOT / "bench" / "results")))
def test_every_committed_result_is_quoted_as_it_is(path: Path) -> None:
    run = load_run(path)
    assert str(path.relative_to(ROOT)) in PAGES
    assert run.command in PAGES
    for part in tables(run).split("\n\n"):
        assert part.strip() in PAGES


def test_the_tests_are_run_by_the_command_that_it_gives() -> None:
    (command,) = re.findall(r"^python3 -m pip install tox && tox -e tests$", README, flags=re.MULTILINE)
    assert command in (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()


@pytest.mark.slow
def test_its_python_runs_as_pasted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    short, code = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    # a pipeline of one's own is not here, but what is done with it is
    assert {name for name in calibatt.__all__ if f"calibatt.{name}" in short} == {"sparsify", "restore"}
    compile(short, "README.md", "exec")
    monkeypatch.chdir(tmp_path)
    # two steps show the same as six, in a third of the time
    assert '"quick", 6\n' in code
    exec(code.replace('"quick", 6\n', '"quick", 2\n'), {})
    assert (tmp_path / "out" / "mine.safetensors").is_file()
    assert (tmp_path / "out" / "mine.gif").is_file()
