"""Who is nearer to dense than whom, paired by video."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from calibatt.bench.record import Record, load_run
from calibatt.reports.findings import findings
from calibatt.reports.page import write_report
from calibatt.reports.pairs import PSNR, SSIM, standings
from calibatt.reports.rows import rows
from calibatt.reports.tables import tables

# videos differ by far more than the methods do, so that only pairs tell these apart
VIDEOS = 25 + 6 * np.random.default_rng(0).standard_normal(32)


def at(make: SimpleNamespace, method: str, above: float, *, seed: int, videos: int = 32, **more: Any) -> Record:
    """An arm whose videos are so many dB above those of an arm at 0, with 1 dB of noise."""
    psnr = VIDEOS[:videos] + above + np.random.default_rng(seed).standard_normal(videos)
    settings = {"mode": "equal_density", "target_density": 0.35} | more
    record = make.arm(method, rounds=6, seed=seed, **settings)
    own = {name: getattr(record, name) for name in type(record).__dataclass_fields__}
    repeated = {name: tuple(own[name][:1]) * videos for name in ("samples_s", "baseline_samples_s", "ssim")}
    return Record(
        **{
            **own, **repeated, "psnr_db": tuple(psnr.tolist()), "alignment": None, "alignment_dense": None,
            "phases_s": None, "prompts": tuple(f"prompt {i}" for i in range(videos)),
        }
    )  # fmt: skip


def said(records: list[Record]) -> dict[str, tuple[set[str], set[str], set[str]]]:
    """Of each arm the names on the three sides, without figures."""

    def names(cell: str) -> set[str]:
        return {name.rsplit(" ", 2)[0] for name in cell.split(", ") if name}

    return {
        label: (names(nearer), names(alike), names(farther))
        for label, nearer, alike, farther in (one.cells for one in standings(rows(records)))
    }


def test_arms_of_one_density_are_told_apart_where_most_videos_agree(make: SimpleNamespace) -> None:
    records = [
        make.dense_arm(), at(make, "calibatt", 3.0, seed=1), at(make, "radial", 3.1, seed=2),
        at(make, "random", 0.0, seed=3),
    ]  # fmt: skip
    assert said(records) == {
        "CalibAtt at density 0.35": ({"Random mask"}, {"Radial"}, set()),
        "Radial at density 0.35": ({"Random mask"}, {"CalibAtt"}, set()),
        "Random mask at density 0.35": (set(), set(), {"CalibAtt", "Radial"}),
    }
    first, _, last = standings(rows(records))
    ((other, shift),) = first.nearer
    assert other is last.row
    assert shift == pytest.approx(3.0, abs=0.6)
    assert last.farther[0] == (first.row, -shift)
    assert f"Random mask {shift:+.1f} dB" in first.cells


def test_arms_of_other_densities_or_videos_are_not_compared(make: SimpleNamespace) -> None:
    records = [
        at(make, "calibatt", 3.0, seed=1), at(make, "random", 0.0, seed=2, target_density=0.25),
        at(make, "radial", 3.0, seed=3, videos=30), at(make, "sparge", 0.0, seed=4, mode="native", target_density=None),
    ]  # fmt: skip
    assert said(records) == {}


def test_what_few_videos_cannot_tell_is_not_tried(make: SimpleNamespace) -> None:
    def arms(videos: int) -> list[Record]:
        return [at(make, name, 9.0 * i, seed=i, videos=videos) for i, name in enumerate(("random", "radial", "sparge"))]

    # three pairs: of six videos that all agree the test makes 2/64, three times that with the correction
    assert said(arms(6)) == {}
    assert said(arms(7))["SpargeAttn at density 0.35"][0] == {"Random mask", "Radial"}


def test_the_same_videos_are_not_told_apart(make: SimpleNamespace) -> None:
    records = [at(make, "calibatt", 0.0, seed=1), at(make, "radial", 0.0, seed=1)]
    assert said(records)["CalibAtt at density 0.35"] == (set(), {"Radial"}, set())


def test_of_two_arms_only_one_is_nearer_where_most_videos_are_the_same(make: SimpleNamespace) -> None:
    one, other = at(make, "calibatt", 0.0, seed=1), at(make, "radial", 0.0, seed=1)
    assert other.psnr_db is not None
    # the same in 17 videos and nearer in 15, so that the median is none
    better = tuple(psnr + (1 if i < 15 else 0) for i, psnr in enumerate(other.psnr_db))
    found = said([one, replace(other, psnr_db=better)])
    assert found["Radial at density 0.35"] == ({"CalibAtt"}, set(), set())
    assert found["CalibAtt at density 0.35"] == (set(), set(), {"Radial"})


def test_names_in_a_group_go_without_what_all_of_it_have(make: SimpleNamespace) -> None:
    wanted = {"mode": "equal_fidelity", "target_density": None, "target_psnr_db": 25.0}
    records = [at(make, "calibatt", 3.0, seed=1, **wanted), at(make, "random", 0.0, seed=2, **wanted)]
    assert said(records)["CalibAtt at 25 dB"][0] == {"Random mask"}


def test_chance_alone_tells_nobody_apart_more_often_than_it_says(make: SimpleNamespace) -> None:
    wrong = 0
    for draw in range(200):
        records = [at(make, name, 0.0, seed=10 * draw + i) for i, name in enumerate(("calibatt", "radial", "random"))]
        wrong += any(nearer or farther for nearer, _, farther in said(records).values())
    # 5 % of 200 are 10, give or take 3
    assert wrong <= 19


def test_what_pairs_do_not_tell_apart_from_random_masks_is_said_and_no_median_says_otherwise(
    make: SimpleNamespace,
) -> None:
    # the control's median is the higher one
    records = [at(make, "calibatt", 3.0, seed=1), at(make, "radial", 0.0, seed=2), at(make, "random", 0.2, seed=3)]
    said = " ".join(findings(rows(records)))
    names = "Radial at density 0.35: not told apart from Random mask at density 0.35 by PSNR"
    assert f"{names}, in pairs of videos; by SSIM all are." in said
    assert "beats no method" in said


def test_what_ssim_tells_apart_is_said_where_psnr_does_not(make: SimpleNamespace) -> None:
    seen = [tuple(0.6 + 0.001 * number + by for number in range(32)) for by in (0.2, 0.1, 0.0)]
    records = [at(make, "calibatt", 0.1, seed=1), at(make, "radial", 0.0, seed=2), at(make, "random", 0.2, seed=3)]
    records = [replace(record, ssim=ssim) for record, ssim in zip(records, seen, strict=True)]
    first, _, control = standings(rows(records), SSIM)
    assert first.cells[1] == "Radial +0.100, Random mask +0.200"
    assert control.cells[3] == "CalibAtt -0.200, Radial -0.100"
    names = (
        "CalibAtt at density 0.35 and Radial at density 0.35: not told apart from Random mask at density 0.35 by PSNR"
    )
    assert f"{names}, in pairs of videos; by SSIM all are." in " ".join(findings(rows(records)))
    records[1] = replace(records[1], ssim=seen[2])
    assert f"{names}, in pairs of videos; by SSIM Radial at density 0.35." in " ".join(findings(rows(records)))


def test_of_many_methods_that_are_alike_a_sentence_has_the_number(make: SimpleNamespace) -> None:
    names = ["sparge", "lite", "adaspa", "nabla", "draft", "jenga"]
    alike = [at(make, name, 0.0, seed=seed) for seed, name in enumerate(names)]
    control = at(make, "random", 0.0, seed=9)

    def said(*others: Record) -> str:
        return next(one for one in findings(rows([*alike, *others, control])) if "not told apart" in one)

    assert said().startswith("All methods: not told apart")
    assert said(at(make, "calibatt", 5.0, seed=8)).startswith("All methods but CalibAtt at density 0.35: not told")
    better = [
        at(make, name, 5.0, seed=20 + seed)
        for seed, name in enumerate(("calibatt", "budget", "sta", "svg", "xattention"))
    ]
    assert said(*better).startswith("6 of 11 methods: not told apart")


def test_page_and_tables_have_it(make: SimpleNamespace, write_run: Callable[..., Path], tmp_path: Path) -> None:
    path = write_run([make.dense_arm(), at(make, "calibatt", 3.0, seed=1), at(make, "random", 0.0, seed=2)])
    row = "| CalibAtt at density 0.35 | Random mask +"
    text = tables(load_run(path))
    assert PSNR.method in text
    # all of one SSIM: none is told apart by it, and that is said too
    assert SSIM.method in text
    assert row in text
    html = write_report([path], tmp_path / "report").read_text(encoding="utf-8")
    assert "Who is nearer to dense" in html
    assert "Random mask +" in html
