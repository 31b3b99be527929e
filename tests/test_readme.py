"""The README's claims: its commands exist, its code runs, its tables are those of the committed results."""

from __future__ import annotations

import json
import re
from pathlib import Path
from statistics import fmean, median
from typing import Any

import pytest

import calibatt
from calibatt.bench.record import load_run
from calibatt.bench.statistics import holm, paired_p, paired_ratio, paired_shift
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


def stopped_run(path: Path) -> tuple[str, list[dict[str, Any]]]:
    """The command of a run that was stopped, and of each round that it had kept the videos by arm."""
    first, *kept = (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())
    rounds = [round_ for one in kept if "rounds" in one for round_ in one["rounds"]]
    return first["command"], [{arm.split(" on ")[0]: video for arm, video in round_.items()} for round_ in rounds]


def test_the_run_that_was_stopped_is_quoted_as_it_is() -> None:
    command, rounds = stopped_run(ROOT / "bench" / "results" / "h100" / "videos-24.jsonl")
    assert command in README
    assert len(rounds) == 24
    dense = [round_["dense"]["seconds"] for round_ in rounds]
    for density in ("0.35", "0.25"):
        ours = f"budget={density}"
        shifts: dict[str, list[float]] = {}
        for arm in (arm for arm in rounds[0] if arm.endswith(density)):
            found = [round_[arm] for round_ in rounds]
            shifts[arm] = [r[ours]["psnr_db"] - r[arm]["psnr_db"] for r in rounds]
            nearer = sum(shift > 0 for shift in shifts[arm])
            ahead = "–" if arm == ours else f"+{paired_shift(shifts[arm]):.1f} dB, in {nearer} of 24"
            speedup = paired_ratio(dense, [video["seconds"] for video in found])
            row = (
                f"| `{arm}` | {median(video['psnr_db'] for video in found):.1f} | {ahead} | "
                f"{speedup.median:.2f}× ({speedup.low:.2f}–{speedup.high:.2f}) | "
                f"{fmean(video['alignment'] for video in found):.2f} |"
            )
            assert row in README
        del shifts[ours]
        assert max(holm([paired_p(shift) for shift in shifts.values()])) < 1e-6


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
