"""`pytest bench` itself."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from calibatt.bench import fingerprint
from calibatt.bench.machine import compare
from calibatt.bench.record import load_run
from calibatt.cli import main

ROOT = Path(__file__).resolve().parent.parent.parent


Bench = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def bench(as_a_user_has_it: dict[str, str]) -> Bench:
    """Runs `pytest bench` with some arguments."""

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "pytest", "bench", *arguments]
        return subprocess.run(command, cwd=ROOT, env=as_a_user_has_it, capture_output=True, text=True, check=False)

    return run


def test_blocks_of_the_methods_own_make_one_cell_a_choice_in_every_suite(bench: Bench) -> None:
    done = bench("--collect-only", "-q", "--blocks", "native,32x32", "--methods", "dense,sparge,calibatt")
    assert done.returncode == 0, done.stdout + done.stderr
    for suite in ("attention", "denoise"):
        names = [line for line in done.stdout.splitlines() if f"[{suite}-" in line]
        assert [name.partition("quick-6-")[2].rstrip("]") for name in names] == [
            "dense-fastest", "sparge-native-default", "sparge-32x32-default", "calibatt-native-default",
            "calibatt-32x32-default",
        ]  # fmt: skip
    # CalibAtt's blocks are its calibration's: each choice is learnt by itself
    assert [line.partition("quick-6-")[2] for line in done.stdout.splitlines() if "[calibration-" in line] == [
        "calibatt-native-default]", "calibatt-32x32-default]",
    ]  # fmt: skip


def test_k_and_the_name_of_a_suite_selects_that_suite(bench: Bench) -> None:
    # XAttention has the name of a suite in its own
    done = bench("--collect-only", "-q", "--methods", "dense,calibatt,xattention", "-k", "attention")
    assert done.returncode == 0, done.stdout + done.stderr
    cells = [line.partition("[")[2] for line in done.stdout.splitlines() if "::" in line]
    assert len(cells) == 3
    assert all(cell.startswith("attention-") for cell in cells)


def test_a_wrong_option_is_one_line_before_anything_runs(tmp_path: Path, bench: Bench) -> None:
    unreadable = tmp_path / "prompts.txt"
    unreadable.write_text("a red circle moving left over stripes\na purple cow\n")
    for arguments, message in (
        (["--models", "shape"], "--models shape: unknown model 'shape': did you mean shapes"),
        (["--prompts", str(unreadable), "--rounds", "1", "--calibration-prompts", "1"], "unknown word 'purple'"),
        (["--methods", "dense,sparge[tokp=0.3]"], "sparge[tokp=0.3]: sparge has no setting tokp"),
        (["--methods", "dense,sparge[topk=half]"], "sparge[topk=half]: topk: Input should be a valid number"),
        ([f"--benchmark-json={tmp_path}", "--benchmark-disable"], "--benchmark-disable: nothing would be measured"),
        ([f"--gate={unreadable}", f"--benchmark-json={tmp_path}/x.json"], "prompts.txt: Invalid JSON"),
    ):
        done = bench(*arguments)
        assert done.returncode == pytest.ExitCode.USAGE_ERROR
        (line,) = [line for line in done.stderr.splitlines() if line.strip()]
        assert message in line


@pytest.mark.slow
def test_a_run_that_is_gated_ends_with_the_verdict(tmp_path: Path, bench: Bench) -> None:
    path, before = tmp_path / "now.json", tmp_path / "before.json"
    arguments = ("-k", "kernel", "--kernels", "sdpa-flash", "--densities", "1", f"--benchmark-json={path}")
    none_in_common = ROOT / "bench" / "results" / "h200" / "kernel.json"
    done = bench(*arguments, f"--gate={none_in_common}")
    assert done.returncode == pytest.ExitCode.USAGE_ERROR, done.stdout + done.stderr
    assert "have no arm in common" in done.stdout
    # the table that people want, and where to read on
    assert re.search(r"^ +speedup \(95 %\) +time ", done.stdout, flags=re.MULTILINE)
    assert f"calibatt report {path} -o {tmp_path / 'now.report'}" in done.stdout
    # it is written all the same
    measured = json.loads(path.read_text())
    before.write_text(json.dumps(measured))
    done = bench(*arguments, "--gate", str(before))
    assert done.returncode == 3, done.stdout + done.stderr
    assert "inconclusive" in done.stdout.splitlines()
    gone = {**measured["benchmarks"][0]["extra_info"], "preset": "gone"}
    measured["benchmarks"].append({"stats": {}, "extra_info": gone})
    before.write_text(json.dumps(measured))
    done = bench(*arguments, "--gate", str(before))
    assert done.returncode == 1, done.stdout + done.stderr
    assert "gone from the run" in done.stdout


@pytest.mark.slow
def test_arms_that_differ_by_a_setting_are_measured_beside_each_other(tmp_path: Path, bench: Bench) -> None:
    path = tmp_path / "bench.json"
    arms = ("calibatt", "calibatt[gamma=0.5]", "sparge[topk=0.25]")
    done = bench(
        "-k", "attention", "--methods", f"dense,{','.join(arms)}", "--steps", "2", "--rounds", "1",
        "--calibration-prompts", "1", f"--benchmark-json={path}",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = {record.arm: record for record in load_run(path).records}
    assert set(found) == {"dense", *arms}
    density = {arm: found[arm].density or 0.0 for arm in arms}
    # what is learnt offline: more heads reuse rows
    assert 0 < density["calibatt[gamma=0.5]"] < density["calibatt"] - 0.01
    # what is chosen at every call: the preset keeps half
    assert 0.2 < density["sparge[topk=0.25]"] < 0.45
    assert "sparge[topk=0.25]" in done.stdout


@pytest.mark.slow
def test_a_wanted_fidelity_is_solved_for_under_the_runs_own_dense_schedule(tmp_path: Path, bench: Bench) -> None:
    path = tmp_path / "bench.json"
    done = bench(
        "-k", "denoise", "--methods", "dense,scaling=50dB,sparge/cdf=50dB,lite=0.5,calibatt/masks-only=0.6",
        "--steps", "2", "--rounds", "1", "--calibration-prompts", "1", "--dense-steps", "0.5",
        f"--benchmark-json={path}",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = {record.method: record for record in load_run(path).records}
    near = found["scaling"]
    assert (near.mode, near.target_psnr_db, near.dense_steps, near.dense_layers) == ("equal_fidelity", 50.0, 0.5, 0.0)
    # one of two steps is dense, and the other is not
    assert near.density is not None
    assert 0.5 < near.density < 1
    assert near.psnr_db is not None
    # another caption than it was solved on
    assert 40 < near.psnr_db[0] < 65
    assert "cannot be turned" in (found["sparge"].reason or "")
    assert "leaves no blocks out by itself" in (found["lite"].reason or "")
    # CalibAtt's knob needs levels, which the run asks for by itself
    sparse = found["calibatt"]
    assert (sparse.mode, sparse.target_density) == ("equal_density", 0.6)
    assert sparse.preparation_s is not None
    assert sparse.density is not None
    # solved on four calls of another video
    assert sparse.density == pytest.approx(0.6, abs=0.03)


@pytest.mark.slow
def test_a_stored_calibration_without_levels_is_of_one_density_only(tmp_path: Path, bench: Bench) -> None:
    stored, path = tmp_path / "quick.safetensors", tmp_path / "bench.json"
    assert main(["calibrate", "--resolution", "quick", "--steps", "2", "--count", "1", "-o", str(stored)]) == 0
    done = bench(
        "-k", "attention", "--methods", "dense,calibatt,calibatt=0.35", "--steps", "2", "--rounds", "1",
        "--calibration", str(stored), f"--benchmark-json={path}",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = {record.mode: record for record in load_run(path).records if record.method == "calibatt"}
    assert found["native"].outcome == "ok"
    assert found["equal_density"].outcome == "unsupported"
    assert "its loss cannot be turned: the calibration has masks for a loss of 1" in (
        found["equal_density"].reason or ""
    )


@pytest.mark.slow
def test_inputs_resampled_to_another_size_have_densities_but_no_videos(tmp_path: Path, bench: Bench) -> None:
    path = tmp_path / "bench.json"
    done = bench(
        "--inputs", "resampled", "--methods", "dense,calibatt/masks-only=0.4,sparge=30dB", "--steps", "2", "--rounds",
        "1", "--calibration-prompts", "1", f"--benchmark-json={path}",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    records = load_run(path).records
    # of whole videos and calibrations there are none
    assert {record.suite for record in records} == {"attention"}
    assert all((record.inputs or "").startswith("resampled from shapes, 16×16×24") for record in records)
    found = {record.method: record for record in records}
    assert found["calibatt"].density == pytest.approx(0.4, abs=0.01)
    # what was asked for, and what the default chose
    assert (found["calibatt"].kernel, found["calibatt"].ran_on) == ("default", "flex")
    # videos of that size would take longer to learn from
    assert found["calibatt"].preparation_s is None
    assert "measured on whole videos" in (found["sparge"].reason or "")


@pytest.mark.slow
def test_calls_that_were_captured_are_measured_as_they_are(tmp_path: Path, bench: Bench) -> None:
    folder, path = tmp_path / "calls", tmp_path / "bench.json"
    prompt = "a red circle moving left over stripes"
    assert main(["capture", prompt, "--steps", "1", "--calls", "2", "-o", str(folder)]) == 0
    done = bench(
        "--inputs", f"captures={folder}", "--methods", "dense,sparge=0.5,calibatt,lite=0.5", f"--benchmark-json={path}"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    records = load_run(path).records
    assert {(one.suite, one.inputs, one.steps) for one in records} == {
        ("attention", "captured from shapes, 2 calls", 1)
    }
    found = {one.method: one for one in records}
    assert found["sparge"].density == pytest.approx(0.5, abs=0.02)
    assert found["sparge"].method_error is not None
    assert "give --calibration" in (found["calibatt"].reason or "")
    assert "measured on whole videos" in (found["lite"].reason or "")


@pytest.mark.slow
def test_a_run_leaves_records_of_what_was_and_of_what_could_not_be_timed(tmp_path: Path, bench: Bench) -> None:
    # in a folder that is not there yet
    path = tmp_path / "out" / "bench.json"
    done = bench(
        "--methods", "dense,calibatt,calibatt/masks-only=0.6,radial,svg/learnt", "--kernels", "flex,sdpa-math",
        "--steps", "2", "--rounds", "2", "--calibration-prompts", "1", f"--benchmark-json={path}",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "video 2 of 2" in done.stdout
    run = load_run(path)
    timed = {(record.suite, record.method) for record in run.records if record.outcome == "ok"}
    assert timed >= {
        (suite, method) for suite in ("attention", "denoise") for method in ("dense", "calibatt", "radial", "svg")
    }
    assert timed >= {("calibration", "calibatt"), ("calibration", "svg")}
    for record in run.records:
        # what is learnt offline stands beside every figure that it made possible
        if record.outcome == "ok" and record.suite in ("attention", "denoise"):
            assert (record.preparation_s is not None) == (record.method in ("calibatt", "svg"))
    refused = [record for record in run.records if record.outcome == "unsupported"]
    assert {record.kernel for record in refused} == {"sdpa-math"}
    assert all("choose a sparse one" in (record.reason or "") for record in refused)
    for record in run.records:
        if record.outcome == "ok" and record.suite != "calibration":
            assert record.kernel_error is not None
            assert record.kernel_error_budget is not None
            assert record.kernel_error <= record.kernel_error_budget
        if record.outcome == "ok" and record.suite == "denoise":
            artifact = run.artifact(record)
            assert artifact is not None
            assert artifact.is_file()
    sparse = next(record for record in run.records if record.suite == "denoise" and record.method == "calibatt")
    # of a whole video, every component has its time, and none is counted twice
    assert set(sparse.phases_s or {}) >= {"plan", "attend", "transformer", "text", "vae", "scheduler"}
    assert sum(samples[0] for samples in (sparse.phases_s or {}).values()) <= (sparse.samples_s or ())[0]
    assert sparse.psnr_db is not None
    assert len(sparse.psnr_db) == len(sparse.samples_s or ()) == len(sparse.baseline_samples_s or ()) == 2
    assert sparse.density is not None
    assert 0 < sparse.density < 1
    # whole videos have the density that was asked for: it is known from the calibration
    (solved,) = [r for r in run.records if r.suite == "denoise" and r.target_density == 0.6 and r.outcome == "ok"]
    assert solved.density == pytest.approx(0.6, abs=0.02)
    assert compare(run.machine, fingerprint.machine()).alike
    assert set(run.commit) == {"id", "dirty"}
    timed = [record for record in run.records if record.outcome == "ok" and record.suite != "calibration"]
    on_cpu = run.machine["gpu"] is None
    assert all((record.disturbed is not None) == on_cpu for record in timed)


@pytest.mark.slow
def test_kernels_are_timed_at_a_models_geometry_without_the_model(tmp_path: Path, bench: Bench) -> None:
    path = tmp_path / "kernel.json"
    done = bench(
        "-k", "kernel", "--kernels", "flex,sdpa-flash", "--densities", "1,0.3", "--masks", "random,captured",
        f"--benchmark-json={path}",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = {(r.method, r.kernel, r.preset, r.mask): r for r in load_run(path).records}
    dense = found["dense", "sdpa-flash", "default", None]
    assert dense.gemm_tflops is not None
    assert dense.tflops is not None
    for mask in ("random", "captured"):
        sparse = found["blocks", "flex", "0.3", mask]
        assert sparse.speedup is not None
        assert sparse.density == pytest.approx(0.3, abs=0.02)
        assert sparse.first_call_s is not None
        assert sparse.first_call_s > 0
        assert sparse.of_ideal == pytest.approx(sparse.speedup.median * sparse.density)
        # a dense kernel has no blocks to leave out
        assert found["blocks", "sdpa-flash", "0.3", mask].outcome == "unsupported"
    assert found["blocks", "flex", "1", None].density == 1
