"""Files of several visits to a machine as one."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from calibatt.bench.record import UnusableFile, load_run
from calibatt.cli import main
from calibatt.reports.facts import title
from calibatt.reports.merge import merge, merge_alike
from calibatt.reports.pairs import standings
from calibatt.reports.rows import rows

Write = Callable[..., Path]
CPU = {"brand_raw": "Test data CPU", "count": 2}


def test_each_arm_keeps_the_dense_samples_that_it_was_paired_with(
    make: SimpleNamespace, write_run: Write, tmp_path: Path
) -> None:
    first = write_run([make.dense_arm(), make.arm("radial", 1.2, seed=1)], "first.json")
    other = write_run([make.dense_arm(seed=9), make.arm("sparge", 1.4, seed=2)], "other.json")
    run = merge([first, other], tmp_path / "new" / "both.json")
    by_method = {record.method: record for record in run.records}
    assert list(by_method) == ["dense", "radial", "sparge"]
    for path in (first, other):
        for record in load_run(path).records:
            if record.method != "dense":
                assert by_method[record.method] == record
    # of dense the first file's
    assert by_method["dense"] == load_run(first).records[0]
    text = (tmp_path / "new" / "both.json").read_text()
    written = json.loads(text)
    # a line for each record
    lines = text.splitlines()
    assert all(json.dumps(one) in {line.rstrip(",") for line in lines} for one in written["benchmarks"])
    assert [one["file"] for one in written["merged"]] == ["first.json", "other.json"]
    assert [one["commit"] for one in written["merged"]] == ["0123456789abcdef"] * 2


def test_arms_of_the_same_videos_are_told_apart_across_files(
    make: SimpleNamespace, write_run: Write, tmp_path: Path
) -> None:
    prompts = tuple(f"prompt {i}" for i in range(12))
    near, far = (
        make.arm(name, rounds=12, psnr=psnr, seed=i, prompts=prompts)
        for i, (name, psnr) in enumerate((("radial", 35), ("sparge", 20)))
    )
    files = [write_run([make.dense_arm(), one], f"{i}.json") for i, one in enumerate((near, far))]
    (one, other) = standings(rows(merge(files, tmp_path / "both.json").records))
    assert [row.record.method for row, _ in one.nearer] == ["sparge"]
    assert [row.record.method for row, _ in other.farther] == ["radial"]


def test_an_arm_without_times_in_one_file_has_those_of_the_other(
    make: SimpleNamespace, write_run: Write, tmp_path: Path
) -> None:
    files = [
        write_run([make.dense_arm(), make.broken("radial"), make.broken("sta", reason="first")], "a.json"),
        write_run([make.dense_arm(), make.arm("radial"), make.broken("sta", reason="again")], "b.json"),
    ]
    run = merge(files, tmp_path / "both.json")
    assert [(one.method, one.outcome, one.reason) for one in run.records] == [
        ("dense", "ok", None), ("radial", "ok", None), ("sta", "unsupported", "first"),
    ]  # fmt: skip


def test_pictures_go_along(make: SimpleNamespace, write_run: Write, tmp_path: Path) -> None:
    for name in ("a", "b"):
        make.artifact(tmp_path / f"{name}.artifacts" / "same.npz", 0.5, ord(name))
    files = [
        write_run([make.arm("radial", artifact="a.artifacts/same.npz")], "a.json"),
        write_run([make.arm("sparge", artifact="b.artifacts/same.npz")], "b.json"),
        write_run([make.arm("random", artifact="c.artifacts/lost.npz")], "c.json"),
    ]
    run = merge(files, tmp_path / "all.json")
    radial, sparge, random = run.records
    for record, name in ((radial, "a"), (sparge, "b")):
        copied = run.artifact(record)
        assert copied is not None
        assert copied.parent == tmp_path / "all.artifacts"
        assert copied.read_bytes() == (tmp_path / f"{name}.artifacts" / "same.npz").read_bytes()
    assert random.artifact is None


def test_a_disk_that_is_full_leaves_nothing_and_another_runs_pictures_stay(
    make: SimpleNamespace, write_run: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make.artifact(tmp_path / "a.artifacts" / "radial.npz", 0.5, 0)
    files = [
        write_run([make.arm("radial", artifact="a.artifacts/radial.npz")], "a.json"),
        write_run([make.arm("sparge")], "b.json"),
    ]
    (tmp_path / "taken.artifacts").mkdir()
    with pytest.raises(ValueError, match=r"taken\.artifacts exists: name another file"):
        merge(files, tmp_path / "taken.json")

    def full(self: Path, *where: Any, **how: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match=r"all\.json cannot be written: No space left on device"):
        merge(files, tmp_path / "all.json")
    assert not list(tmp_path.glob("*all*"))


@pytest.mark.parametrize(
    ("machine", "says"),
    [
        ({"gpu": "NVIDIA H100"}, "the GPU is none and NVIDIA H100"),
        ({"cpu": {"brand_raw": "Zen 5", "count": 2}}, "the processor is Test data CPU and Zen 5"),
        ({"versions": {"calibatt": "0.1.0", "torch": "2.11"}}, "the version of torch is 2.9.0 and 2.11"),
    ],
)
def test_unlike_machines_are_refused_in_one_line(
    make: SimpleNamespace, write_run: Write, tmp_path: Path, machine: dict[str, Any], says: str
) -> None:
    one = write_run([make.arm("radial")], "one.json")
    mine = json.loads(one.read_text())["machine_info"]
    other = write_run([make.arm("sparge")], "other.json", machine={**mine, **machine})
    with pytest.raises(UnusableFile) as caught:
        merge([one, other], tmp_path / "both.json")
    assert str(caught.value).endswith(f"are of unlike machines, so they make no one file: {says}")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "both.json").exists()


def test_the_clock_of_the_moment_makes_no_other_machine(
    make: SimpleNamespace, write_run: Write, tmp_path: Path
) -> None:
    files = [
        write_run([make.arm(name)], f"{name}.json", machine={"cpu": {**CPU, "hz_actual": [hz, 0]}})
        for name, hz in (("radial", 2_000_000_000), ("sparge", 3_000_000_000))
    ]
    assert len(merge(files, tmp_path / "both.json").records) == 2


def test_of_an_arm_that_two_files_have_the_last_files_replaces_the_others_when_asked(
    make: SimpleNamespace, write_run: Write, tmp_path: Path
) -> None:
    make.artifact(tmp_path / "a.artifacts" / "old.npz", 0.5, 0)
    first = [make.dense_arm(), make.arm("radial", artifact="a.artifacts/old.npz"), make.arm("sparge")]
    files = [
        write_run(first, "one.json"),
        write_run([make.dense_arm(seed=9), make.arm("radial", seed=3), make.arm("sta")], "two.json"),
    ]
    assert main(["merge", *map(str, files), "-o", str(tmp_path / "both.json"), "--replace"]) == 0
    run = load_run(tmp_path / "both.json")
    assert [record.method for record in run.records] == ["dense", "radial", "sparge", "sta"]
    one, two = (load_run(path).records for path in files)
    assert list(run.records) == [one[0], two[1], one[2], two[2]]
    # the picture of what was replaced is nobody's
    assert not (tmp_path / "both.artifacts").exists()


def test_files_of_several_kinds_of_machine_make_one_file_each(
    make: SimpleNamespace, write_run: Write, tmp_path: Path
) -> None:
    machines = ({"cpu": {**CPU, "family": 25}}, {"cpu": {**CPU, "family": 26}}, {"cpu": {**CPU, "family": 25}})
    names = ("radial", "sparge", "sta")
    files = [
        write_run([make.dense_arm(), make.arm(name)], f"{name}.json", machine)
        for name, machine in zip(names, machines, strict=True)
    ]
    out = tmp_path / "results.json"
    for chosen, expected in (
        (files, {"results-1.json": ["dense", "radial", "sta"], "results-2.json": ["dense", "sparge"]}),
        # of an earlier call nothing is left
        (files[::2], {"results.json": ["dense", "radial", "sta"]}),
        (files[:1], {"results.json": ["dense", "radial"]}),
    ):
        runs = merge_alike(chosen, out)
        assert {run.path.name: [record.method for record in run.records] for run in runs} == expected
        assert sorted(path.name for path in tmp_path.glob("results*")) == sorted(expected)


def test_seeds_are_told_apart_and_files_without_one_have_0(
    make: SimpleNamespace, write_run: Write, tmp_path: Path
) -> None:
    old, first, other = (dataclasses.replace(make.arm("radial"), seed=seed) for seed in (None, 0, 7))
    assert old.key == first.key != other.key
    files = [write_run([make.dense_arm(), one], f"{i}.json") for i, one in enumerate((first, other))]
    merged = merge(files, tmp_path / "both.json").records
    assert [title(record).rpartition(" · ")[2] for record in merged if record.method == "radial"] == [
        "float32", "seed 7",
    ]  # fmt: skip
    with pytest.raises(UnusableFile, match="both have times"):
        merge([files[0], write_run([old], "old.json")], tmp_path / "more.json")


def test_what_cannot_be_one_file_is_refused(make: SimpleNamespace, write_run: Write, tmp_path: Path) -> None:
    one = write_run([make.dense_arm(), make.arm("radial")], "one.json")
    same = write_run([make.dense_arm(), make.arm("radial", seed=3)], "same.json")
    with pytest.raises(UnusableFile, match=r"one\.json and .*same\.json both have times of Radial: leave one"):
        merge([one, same], tmp_path / "both.json")
    for few in ([one], [one, one], []):
        with pytest.raises(ValueError, match="give two files or more, each once"):
            merge(few, tmp_path / "both.json")
    with pytest.raises(ValueError, match=r"same\.json exists: name another file"):
        merge([one, same], same)
    (tmp_path / "none.json").write_text("{}")
    with pytest.raises(UnusableFile, match=r"none\.json"):
        merge([one, tmp_path / "none.json"], tmp_path / "both.json")
    (tmp_path / "file").write_text("")
    other = write_run([make.arm("sparge")], "other.json")
    with pytest.raises(OSError, match=r"both\.json cannot be written"):
        merge([one, other], tmp_path / "file" / "both.json")
    assert not list(tmp_path.rglob("*both*"))


def test_the_command_says_what_it_wrote(
    make: SimpleNamespace, write_run: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [str(write_run([make.arm(name)], f"{name}.json")) for name in ("radial", "sparge")]
    out = tmp_path / "both.json"
    assert main(["merge", *files, "-o", str(out)]) == 0
    assert capsys.readouterr().out == f"wrote {out}: 2 records of 2 files\n"
    assert main(["merge", *files, "-o", str(out)]) == 2
    assert "exists: name another file" in capsys.readouterr().err
