"""The README's claims: its commands exist, its code runs, its tables are those of the committed results."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, median

import pytest

import calibatt
from calibatt.bench.record import Record, load_run
from calibatt.bench.statistics import holm, paired_p, paired_ratio, paired_shift
from calibatt.reports.page import tables

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = README + "".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md")))
RESULTS = sorted((ROOT / "bench" / "results").glob("*/*.json"))


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: str(path.relative_to(ROOT / "bench" / "results")))
def test_every_committed_result_is_quoted_as_it_is(path: Path) -> None:
    run = load_run(path)
    assert str(path.relative_to(ROOT)) in PAGES
    assert run.command in PAGES
    for part in tables(run).split("\n\n"):
        assert part.strip() in PAGES


def test_the_comparison_of_whole_videos_is_summed_up_as_it_is() -> None:
    records = load_run(ROOT / "bench" / "results" / "h200" / "videos.json").records
    assert "\n".join((HEAD, *video_rows(records))) in README
    psnr = {(one.target_density, one.method, one.preset): one.psnr_db for one in records if one.psnr_db}
    shifts = [
        [a - b for a, b in zip(psnr[density, "budget", "default"], other, strict=True)]
        for (density, method, _), other in psnr.items()
        if method != "budget"
    ]
    assert len(shifts) == 32
    assert min(map(min, shifts)) > 0
    assert max(holm([paired_p(shift) for shift in shifts])) < 1e-3


HEAD = (
    "| method | PSNR dB, at 0.35 | at 0.25 | Budget is nearer by, at 0.35 | at 0.25 "
    "| speedup (95 %), at 0.35 | at 0.25 | alignment, at 0.35 | at 0.25 |\n"
    "| --- | --- | --- | --- | --- | --- | --- | --- | --- |"
)


def video_rows(records: Sequence[Record]) -> list[str]:
    """A row for each method that reaches either density, the nearest to dense at 0.35 first, random masks last."""
    arms = {(one.method, one.preset, one.target_density): one for one in records if one.psnr_db}
    methods = dict.fromkeys((method, preset) for method, preset, _ in arms)

    def order(which: tuple[str, str]) -> tuple[bool, float]:
        reached = [median(arms[(*which, at)].psnr_db or ()) for at in (0.35, 0.25) if (*which, at) in arms]
        return which[0] == "random", -max(reached)

    rows = []
    for method, preset in sorted(methods, key=order):
        cells: list[list[str]] = [[], [], [], []]
        for at in (0.35, 0.25):
            one, ours = arms.get((method, preset, at)), arms["budget", "default", at]
            if one is None:
                for cell in cells:
                    cell.append("–")
                continue
            shift = [a - b for a, b in zip(ours.psnr_db or (), one.psnr_db or (), strict=True)]
            nearer = sum(step > 0 for step in shift)
            speedup = paired_ratio(one.baseline_samples_s or (), one.samples_s or ())
            cells[0].append(f"{median(one.psnr_db or ()):.1f}")
            cells[1].append("–" if one is ours else f"+{paired_shift(shift):.1f} dB, {nearer} of {len(shift)}")
            cells[2].append(f"{speedup.median:.2f}× ({speedup.low:.2f}–{speedup.high:.2f})")
            cells[3].append(f"{fmean(one.alignment or ()):.2f}")
        name = method if preset == "default" else f"{method}/{preset}"
        rows.append(f"| `{name}` | {' | '.join(part for cell in cells for part in cell)} |")
    return rows


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
