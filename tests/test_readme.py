"""The README's claims: its commands exist, its code runs, its tables are those of the committed results."""

from __future__ import annotations

import re
from pathlib import Path
from statistics import fmean, median

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


def test_the_comparison_of_whole_videos_is_summed_up_as_it_is() -> None:
    records = [one for one in load_run(ROOT / "bench" / "results" / "h100" / "videos.json").records if one.psnr_db]
    arms = {
        f"{one.method}{'' if one.preset == 'default' else f'/{one.preset}'}={one.target_density}": one
        for one in records
    }
    shifts: dict[str, list[float]] = {}
    for arm, record in arms.items():
        ours = arms[f"budget={record.target_density}"]
        assert record.psnr_db
        assert record.samples_s
        assert record.alignment
        shifts[arm] = [a - b for a, b in zip(ours.psnr_db or (), record.psnr_db, strict=True)]
        nearer = sum(shift > 0 for shift in shifts[arm])
        ahead = "–" if record is ours else f"+{paired_shift(shifts[arm]):.1f} dB, in {nearer} of {len(shifts[arm])}"
        speedup = paired_ratio(record.baseline_samples_s or (), record.samples_s)
        row = (
            f"| `{arm}` | {median(record.psnr_db):.1f} | {ahead} | "
            f"{speedup.median:.2f}× ({speedup.low:.2f}–{speedup.high:.2f}) | {fmean(record.alignment):.2f} |"
        )
        assert row in README
    others = [shift for arm, shift in shifts.items() if not arm.startswith("budget=")]
    assert len(others) == 17
    assert max(holm([paired_p(shift) for shift in others])) < 1e-6


def test_what_each_part_of_budget_adds_is_quoted_as_it_is() -> None:
    page = (ROOT / "docs" / "methods" / "budget.md").read_text(encoding="utf-8")
    records = load_run(ROOT / "bench" / "results" / "h100" / "ablation.json").records
    psnr = {one.preset: one.psnr_db for one in records if one.psnr_db}
    shifts = {name: [a - b for a, b in zip(psnr["default"], psnr[name], strict=True)] for name in psnr}
    for name, shift in shifts.items():
        ahead = "–" if name == "default" else f"+{paired_shift(shift):.1f} dB"
        assert f"| `{name}` | {median(psnr[name]):.1f} | {ahead} |" in page
    del shifts["default"]
    assert len(shifts) == 6
    assert max(holm([paired_p(shift) for shift in shifts.values()])) < 0.05


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
