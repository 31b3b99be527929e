"""Several result files as one: of a comparison that took more than one visit to a machine."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from calibatt.bench.machine import compare
from calibatt.bench.record import Record, Run, UnusableFile, load_run
from calibatt.reports.gate_files import write_whole
from calibatt.reports.rows import DENSE


def merge(paths: Sequence[Path], out: Path, *, replace: bool = False) -> Run:
    """Write one file with the records of several; each arm keeps the dense samples that it was paired with.

    Of dense attention the first file's record stands. An arm without times in one file and with some in another has
    the latter. `merged` in the file lists what it was made from.

    Args:
        paths: the files, of one kind of machine.
        out: the file to write; data of pictures go into the folder beside it.
        replace: whether an arm that several files have times of is that of the last of them.

    Raises:
        ValueError: there are fewer than two files, or the output or its folder of pictures exists.
        UnusableFile: a file is none of ours; machines are unlike; or two files have times of the same arm and `replace`
            is not given.
        OSError: the output cannot be written.
    """
    if len({path.resolve() for path in paths}) < max(2, len(paths)):
        raise ValueError("give two files or more, each once")
    return _merge(paths, out, replace)


def merge_alike(paths: Sequence[Path], out: Path) -> list[Run]:
    """Write one file for each kind of machine that the files are of, which may be one.

    Args:
        paths: the files, one or more.
        out: the file to write; where there are several kinds, files with numbers are. What was there of an earlier call
            is replaced.

    Raises:
        UnusableFile, OSError: as `merge`.
    """
    kinds: list[list[Run]] = []
    for run in map(load_run, paths):
        alike = (kind for kind in kinds if compare(kind[0].machine, run.machine).difference is None)
        if (found := next(alike, None)) is None:
            kinds.append([run])
        else:
            found.append(run)
    for old in (out, *out.parent.glob(f"{out.stem}-[0-9]*{out.suffix}")):
        old.unlink(missing_ok=True)
        shutil.rmtree(old.with_suffix(".artifacts"), ignore_errors=True)
    names = [out] if len(kinds) == 1 else [out.with_stem(f"{out.stem}-{i + 1}") for i in range(len(kinds))]
    return [_merge([run.path for run in kind], name, False) for kind, name in zip(kinds, names, strict=True)]


def _merge(paths: Sequence[Path], out: Path, replace: bool) -> Run:
    folder = f"{out.stem}.artifacts"
    for path in (out, out.parent / folder):
        if path.exists():
            raise ValueError(f"{path} exists: name another file")
    runs = [load_run(path) for path in paths]
    for run in runs[1:]:
        _check_alike(runs[0], run)
    whole = [json.loads(path.read_bytes()) for path in paths]
    timed: dict[Any, tuple[Run, Record, Any]] = {}
    for run, data in zip(runs, whole, strict=True):
        count = len(data["benchmarks"])
        for record, benchmark in zip(run.records[:count], data["benchmarks"], strict=True):
            if record.key in timed:
                if record.method == DENSE:
                    continue
                if not replace:
                    raise UnusableFile(
                        f"{timed[record.key][0].path} and {run.path} both have times of {record.title}: leave one of "
                        "them out, or give --replace, with which that of the file named last stands"
                    )
            timed[record.key] = (run, record, benchmark)
    copies: dict[str, Path] = {}
    for run, record, benchmark in timed.values():
        _take_picture(run, record, benchmark["extra_info"], folder, copies)
    said, untimed = set(timed), []
    for run, data in zip(runs, whole, strict=True):
        for record, info in zip(run.records[len(data["benchmarks"]) :], data.get("untimed", []), strict=True):
            if record.key not in said:
                said.add(record.key)
                untimed.append(info)
    merged = {
        **whole[0],
        "benchmarks": [benchmark for _, _, benchmark in timed.values()],
        "untimed": untimed,
        "command": " && ".join(dict.fromkeys(run.command for run in runs if run.command)),
        "merged": [
            {"file": run.path.name, "datetime": run.datetime, "commit": run.commit.get("id"), "command": run.command}
            for run in runs
        ],
    }
    _write(merged, out, out.parent / folder, copies)
    return load_run(out)


def _check_alike(one: Run, other: Run) -> None:
    """Refuse files whose machines or software are known to differ; what one of them does not say is no difference."""
    difference = compare(one.machine, other.machine).difference
    if difference is not None:
        raise UnusableFile(
            f"{one.path} and {other.path} are of unlike machines, so they make no one file: the {difference.name} is "
            f"{difference.here} and {difference.there}"
        )


def _take_picture(run: Run, record: Record, info: dict[str, Any], folder: str, copies: dict[str, Path]) -> None:
    """Note where the data of a record's pictures goes; without data, it has none."""
    info.pop("artifact", None)
    found = run.artifact(record)
    if found is not None:
        # two files may have given two arms' pictures one name
        info["artifact"] = f"{folder}/{len(copies)}-{found.name}"
        copies[info["artifact"]] = found


def _write(merged: Mapping[str, Any], out: Path, folder: Path, copies: Mapping[str, Path]) -> None:
    """All of it, or nothing: the data of pictures first."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        for name, source in copies.items():
            folder.mkdir(exist_ok=True)
            shutil.copyfile(source, out.parent / name)
        write_whole(out, _text(merged))
    except OSError as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise OSError(f"{out} cannot be written: {error.strerror or error}") from None


def _text(merged: Mapping[str, Any]) -> str:
    """As JSON with a line for each record: half of the length of an indented one, and lines differ where records do."""
    return "{" + ",\n".join(f"{json.dumps(name)}: {_lines(value)}" for name, value in merged.items()) + "}\n"


def _lines(value: Any) -> str:
    """A value as JSON; of a list, each entry on a line of its own."""
    if not isinstance(value, list):
        return json.dumps(value)
    return "[\n" + ",\n".join(map(json.dumps, value)) + "\n]"
