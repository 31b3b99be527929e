"""The README's claims: its commands exist, its code runs, its tables are those of the committed results."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from operator import attrgetter
from pathlib import Path
from statistics import fmean, median

import pytest

import calibatt
from calibatt.bench.overhead import LIMITS, verdict
from calibatt.bench.record import Record, load_run
from calibatt.bench.statistics import Interval, holm, paired_p, paired_ratio, paired_shift
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
    arms = {_which(one): one for one in records if one.psnr_db}
    rivals = {key: one for key, one in arms.items() if one.method != "budget"}
    ours = {density: arms["budget", density] for density in (0.35, 0.25)}
    assert len(rivals) == 34
    for values in (attrgetter("psnr_db"), attrgetter("ssim")):
        shifts = [
            [a - b for a, b in zip(values(ours[density]), values(one), strict=True)]
            for (_, density), one in rivals.items()
        ]
        assert {len(shift) for shift in shifts} == {32}
        assert min(map(min, shifts)) > 0
        assert max(holm([paired_p(shift) for shift in shifts])) < 1e-3


def test_what_remainders_do_to_whole_videos_is_quoted_as_it_is() -> None:
    records = load_run(ROOT / "bench" / "results" / "h200" / "videos.json").records
    arms = {_which(one): one for one in records if one.psnr_db}
    rows = []
    for (name, density), one in arms.items():
        if name.endswith("+tail"):
            bare = arms[name.removesuffix("+tail"), density]
            assert one.prompts == bare.prompts
            shift = [a - b for a, b in zip(one.psnr_db or (), bare.psnr_db or (), strict=True)]
            times = [median(record.samples_s or ()) for record in (one, bare)]
            errors = [record.method_error for record in (bare, one)]
            rows.append(
                f"| `{name}` | {density:g} | {paired_shift(shift):+.1f} dB, nearer in {sum(by > 0 for by in shift)} of "
                f"{len(shift)} | {errors[0]:.2f} → {errors[1]:.2f} | {times[0] / times[1]:.2f}× |"
            )
    assert len(rows) == 5
    assert "\n".join(rows) in PAGES


def _which(record: Record) -> tuple[str, float | None]:
    """The name of an arm, with its remainder where it was given one, and its density."""
    preset = "" if record.preset == "default" else f"/{record.preset}"
    tail = "+tail" if record.remainder is not None and not record.own_remainder else ""
    return f"{record.method}{preset}{tail}", record.target_density


HEAD = (
    "| method | PSNR dB, at 0.35 | at 0.25 | Budget is nearer by, at 0.35 | at 0.25 "
    "| speedup (95 %), at 0.35 | at 0.25 | alignment, at 0.35 | at 0.25 |\n"
    "| --- | --- | --- | --- | --- | --- | --- | --- | --- |"
)


def video_rows(records: Sequence[Record]) -> list[str]:
    """A row for each method that reaches either density, the nearest to dense at 0.35 first, random masks last."""
    arms = {_which(one): one for one in records if one.psnr_db}

    def order(name: str) -> tuple[bool, float]:
        reached = [median(arms[name, at].psnr_db or ()) for at in (0.35, 0.25) if (name, at) in arms]
        return name.startswith("random"), -max(reached)

    rows = []
    for name in sorted(dict.fromkeys(name for name, _ in arms), key=order):
        cells: list[list[str]] = [[], [], [], []]
        for at in (0.35, 0.25):
            one, ours = arms.get((name, at)), arms["budget", at]
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
        rows.append(f"| `{name}` | {' | '.join(part for cell in cells for part in cell)} |")
    return rows


def test_planted_sparsities_stand_beside_the_published_ones_as_they_are() -> None:
    records = load_run(ROOT / "bench" / "results" / "h200" / "native.json").records
    rows = re.findall(r"\| (\w+) \| (\d+p) \| ([\d.]+) % \| ([\d.]+) % \|", PAGES)
    published = {(name, size): (float(here), float(there)) for name, size, here, there in rows}
    arms = {(one.method_label, one.resolution): one for one in records if one.method != "dense"}
    assert published.keys() == arms.keys()
    for arm, one in arms.items():
        assert published[arm][0] == pytest.approx(100 * (1 - (one.density or 0)), abs=0.05)
    near = {arm for arm, (here, there) in published.items() if abs(here - there) < 5}
    assert near == {(name, size) for name in ("CalibAtt", "SpargeAttn", "Radial") for size in ("480p", "720p")}


@pytest.mark.parametrize("name", ["1.3B", "14B"])
def test_planted_heads_stand_beside_the_published_ones_as_they_were_measured(name: str) -> None:
    path = ROOT / "models" / "planted" / f"shares-wan2.1-{name.lower()}-720p.json"
    found = json.loads(path.read_text(encoding="utf-8"))
    for kind, own, first in (("planted", "late", ""), ("published", "late_published", "_published")):
        shares = dict(zip(found["levels"], found[own]["quantiles"], strict=True))
        shown = [found[own]["mean"], *(shares[level] for level in (0.05, 0.25, 0.5, 0.75, 0.95))]
        cells = [*shown, found[f"mean_at_first_step{first}"]]
        assert f"| Wan 2.1 {name}, {kind} | {' | '.join(f'{100 * cell:.1f}' for cell in cells)} |" in PAGES


def test_what_measuring_adds_is_quoted_as_it_is() -> None:
    page = " ".join((ROOT / "docs" / "gate.md").read_text(encoding="utf-8").split())
    found = json.loads((ROOT / "bench" / "results" / "overhead.json").read_text(encoding="utf-8"))
    assert found["commit_info"]["dirty"] is False
    for cell in found["cells"].values():
        less = [100 * (1 - cell["harness"][name]) for name in ("median", "high", "low")]
        assert "{:.1f} % ({:.1f} to {:.1f})".format(*less) in page
        more = [100 * (cell["telemetry"][name] - 1) for name in ("median", "low", "high")]
        assert "{:+.1f} % ({:+.1f} to {:+.1f})".format(*more).replace("-", "−") in page
        for kind, limit in LIMITS.items():
            ratio = Interval(**{name: cell[kind][name] for name in ("median", "low", "high")})
            assert verdict(ratio, limit) == "not known"


def test_what_two_gpus_make_of_a_video_is_quoted_as_it_is() -> None:
    page = (ROOT / "docs" / "parallel.md").read_text(encoding="utf-8")
    one, two = json.loads((ROOT / "bench" / "results" / "parallel.json").read_text(encoding="utf-8"))
    assert (one["processes"], two["processes"]) == (1, 2)
    for run in (one, two):
        assert run["commit_info"]["dirty"] is False
        assert "--resolution 720p --layers 10 --steps 4 --compile" in run["command"]
        assert "--rounds 2" in run["command"]
    times = {
        (run["processes"], name): median(arm["samples_s"]) for run in (one, two) for name, arm in run["arms"].items()
    }
    for label, name in (("dense", "dense"), ("CalibAtt", "calibatt")):
        first, second = times[1, name], times[2, name]
        assert f"| {label} | {first:.2f} s | {second:.2f} s | {first / second:.2f} |" in page
        assert two["arms"][name]["difference"] == 0
    gains = [times[processes, "dense"] / times[processes, "calibatt"] for processes in (1, 2)]
    assert f"| CalibAtt over dense | {gains[0]:.2f} | {gains[1]:.2f} | |" in page
    uneven = two["arms"]["calibatt"]["imbalance"]
    assert f"has {uneven['in_order']:.3f} times the mean" in page
    assert f"and {uneven['balanced']:.3f} times as they are assigned" in page


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
