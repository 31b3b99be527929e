"""What a file says of the machine and the code that it was made with."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from calibatt.bench import fingerprint
from calibatt.bench.machine import compare, describe
from calibatt.bench.record import load_run

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "bench" / "results"
COMMIT = re.compile("[0-9a-f]{40}")

# made before this was asked of them; never to be added to
WITHOUT_COMMIT = {
    "h200/kernel.json": "measured in a copy of the tree without its history",
    "h200/kernel-blocks.json": "measured in a copy of the tree without its history",
    "h200/kernel-models.json": "measured in a copy of the tree without its history",
    "h200/kernel-rows.json": "measured in a copy of the tree without its history",
}


def commit_of(path: Path) -> str | None:
    """The commit that a result file names."""
    found = load_run(path).commit.get("id")
    return found if COMMIT.fullmatch(found or "") else None


def results() -> dict[str, Path]:
    return {str(path.relative_to(RESULTS)): path for path in sorted(RESULTS.glob("*/*.json"))}


@pytest.mark.parametrize("name", results())
def test_a_committed_result_names_its_commit(name: str) -> None:
    if name not in WITHOUT_COMMIT:
        assert commit_of(results()[name]), f"{name} names no commit: measure again in a checkout"


def test_the_list_of_results_without_a_commit_holds_those_alone() -> None:
    assert {name for name, path in results().items() if not commit_of(path)} == set(WITHOUT_COMMIT)


def test_a_result_without_a_commit_is_found(tmp_path: Path) -> None:
    record = {"schema": 1, "suite": "kernel", "model": "m", "method": "dense", "kernel": "k", "outcome": "failed"}
    for id_, expected in (("unversioned", None), (None, None), ("ab" * 20, "ab" * 20)):
        whole = {"benchmarks": [], "untimed": [{**record, "reason": "none"}], "commit_info": {"id": id_}}
        path = tmp_path / "run.json"
        path.write_text(json.dumps(whole))
        assert commit_of(path) == expected


def test_a_machine_is_like_itself_after_a_file_and_every_field_is_known() -> None:
    machine = fingerprint.machine()
    comparison = compare(json.loads(json.dumps(machine)), fingerprint.machine())
    assert comparison.alike, comparison
    cpu = machine["cpu"]
    assert cpu["count"] >= cpu["usable"] > 0
    assert str(cpu["brand_raw"]) in describe(machine)
    assert machine["torch_build"] == ("CPU" if torch.version.cuda is None else f"CUDA {torch.version.cuda}")
    assert machine["versions"]["torch"].startswith(torch.__version__.partition("+")[0])


class NotSupported(Exception):
    """As NVML has it."""


@pytest.mark.parametrize("limited", [True, False])
def test_a_gpu_is_named_with_its_driver_and_its_power_limit_if_it_has_one(
    limited: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def limit(handle: str) -> int:
        if not limited:
            raise NotSupported
        return 700_000

    fake = SimpleNamespace(
        nvmlDeviceGetPowerManagementLimit=limit, nvmlSystemGetDriverVersion=lambda: "580.1",
        NVMLError_NotSupported=NotSupported,
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monkeypatch.setattr(fingerprint, "nvml_handle", lambda device: "a handle")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "Test data GPU")
    machine = fingerprint.machine()
    assert [machine[name] for name in ("gpu", "gpu_power_limit_w", "driver")] == [
        "Test data GPU", 700.0 if limited else None, "580.1",
    ]  # fmt: skip
    assert describe(machine).startswith("Test data GPU, ")


def test_it_names_neither_the_host_nor_a_path_nor_a_frequency() -> None:
    said = json.dumps(fingerprint.run(["-k", "kernel"], []))
    for name in {platform.node(), str(ROOT), str(Path.home()), "hz_"} - {"", "/"}:
        assert name not in said


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="only Linux says on which CPUs a process may run")
@pytest.mark.skipif((psutil.cpu_count() or 1) < 2, reason="there is one CPU")
def test_a_process_that_may_use_fewer_cpus_is_another_machine() -> None:
    code = (
        "import os, json; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
        "from calibatt.bench.fingerprint import machine; print(json.dumps(machine()['cpu']['usable']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == 1
    here = fingerprint.machine()
    difference = compare({**here, "cpu": {**here["cpu"], "usable": 1}}, {**here, "cpu": {**here["cpu"], "usable": 2}})
    assert str(difference.difference) == "the number of CPUs that the process may use differs (1, was 2)"


def test_what_neither_file_says_is_unknown() -> None:
    comparison = compare({}, {})
    assert comparison.difference is None
    assert "number of threads" in comparison.unknown
    assert not comparison.alike


# what tests and hooks set would lead git elsewhere
GIT = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}


def _git(folder: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=Test data", "-c", "user.email=test@example.org")
    done = subprocess.run(
        ["git", *identity, *arguments], cwd=folder, capture_output=True, text=True, check=True, env=GIT
    )
    return done.stdout.strip()


@pytest.mark.skipif(shutil.which("git") is None, reason="there is no git")
def test_the_commit_is_that_of_the_code_and_says_whether_it_was_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = tmp_path / "bench" / "fingerprint.py"
    code.parent.mkdir()
    code.write_text("")
    monkeypatch.setattr(fingerprint, "__file__", str(code))
    none: dict[str, Any] = {"id": None, "dirty": None}
    assert fingerprint.commit() == none
    _git(tmp_path, "init", "--quiet")
    # a wheel in an environment inside somebody's checkout
    assert fingerprint.commit() == none
    _git(tmp_path, "add", "--all")
    _git(tmp_path, "commit", "--quiet", "--message=one")
    clean = {"id": _git(tmp_path, "rev-parse", "HEAD"), "dirty": False}
    assert fingerprint.commit() == clean
    (tmp_path / "run.json.partial.jsonl").write_text("{}")
    assert fingerprint.commit() == clean
    method = tmp_path / "bench" / "new.py"
    method.write_text("")
    assert fingerprint.commit() == {**clean, "dirty": True}
    method.unlink()
    code.write_text("changed")
    assert fingerprint.commit() == {**clean, "dirty": True}
