"""The gate: what it calls a regression, what it cannot tell, and what it lets pass."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from calibatt.bench.machine import digest_of_flags
from calibatt.bench.record import Record, Run, UnusableFile, load_run
from calibatt.reports.gate import ExitCode, Verdict, judge

RESULTS = Path(__file__).parents[2] / "bench" / "results"
# as earlier versions wrote it, and in full
MACHINE = {"gpu": None, "cpu": {"brand_raw": "Test data CPU"}, "threads": 2}
CPU = {
    "vendor_id_raw": "Test data", "family": 25, "model": 17, "stepping": 1, "brand_raw": "Test data CPU",
    "flags_sha256": "4471762b209a29f3", "caches": {"L1d": 32768, "L2": 1048576}, "count": 2, "cores": 2, "usable": 2,
}  # fmt: skip
FULL = {
    "system": "Linux", "python_version": "3.11.7", "cpu": CPU, "threads": 2, "gpu": None, "gpu_power_limit_w": None,
    "driver": None, "torch_build": "CPU", "cudnn": None,
    "versions": {"calibatt": "0.1.0", "torch": "2.9.0", "triton": None},
}  # fmt: skip


def _run(*records: Record, machine: dict[str, Any] = MACHINE) -> Run:
    return Run(path=Path("run.json"), machine=machine, commit={}, datetime="", command="", records=records)


def _steady(make: SimpleNamespace, ratio: float, rounds: int = 6, **more: Any) -> Record:
    """An arm so many times faster than dense in every round, give or take a thousandth."""
    samples = tuple(1 + 0.001 * i / rounds for i in range(rounds))
    facts = {"samples_s": samples, "baseline_samples_s": (ratio,) * rounds, "psnr_db": (30.0,) * rounds, **more}
    return make.arm("calibatt", rounds=rounds, **facts)  # type: ignore[no-any-return]


def _code(verdict: Verdict) -> ExitCode:
    assert len(verdict.lines) == len(verdict.judgements) + len(verdict.notes) + 1
    return verdict.exit_code


def test_a_run_passes_against_itself(make: SimpleNamespace) -> None:
    run = _run(make.dense_arm(), make.arm("calibatt"), make.broken("sta"))
    assert _code(judge(run, run)) == ExitCode.PASS == 0


@pytest.mark.parametrize("path", sorted(RESULTS.rglob("*.json")), ids=lambda path: path.name)
def test_a_committed_run_can_be_judged_and_passes_against_itself(path: Path) -> None:
    run = load_run(path)
    assert _code(judge(run, run)) == ExitCode.PASS


def test_dense_is_the_same_arm_on_whichever_kernel_is_fastest(make: SimpleNamespace) -> None:
    one, other = (_run(make.dense_arm(suite="kernel", mode=None, kernel=kernel)) for kernel in ("fa3", "sdpa-cudnn"))
    assert _code(judge(one, other)) == ExitCode.PASS


@pytest.mark.parametrize(("ratio", "code"), [(1.5, ExitCode.PASS), (1.28, ExitCode.PASS), (1.2, ExitCode.REGRESSION)])
def test_a_speedup_wholly_below_the_tolerance_is_a_regression(
    ratio: float, code: ExitCode, make: SimpleNamespace
) -> None:
    assert _code(judge(_run(_steady(make, ratio)), _run(_steady(make, 1.3)))) == code


def test_the_tolerance_is_a_fraction_of_the_baseline(make: SimpleNamespace) -> None:
    now, before = _run(_steady(make, 1.2)), _run(_steady(make, 1.3))
    assert _code(judge(now, before, tolerance=0.1)) == ExitCode.PASS
    with pytest.raises(ValueError, match="tolerance"):
        judge(now, before, tolerance=5)


def test_a_lower_speedup_that_noise_may_explain_is_inconclusive(make: SimpleNamespace) -> None:
    noisy = _steady(make, 1.2, samples_s=(0.8, 0.9, 1.0, 1.0, 1.1, 1.2))
    verdict = judge(_run(noisy), _run(_steady(make, 1.3)))
    assert _code(verdict) == ExitCode.INCONCLUSIVE == 3
    assert "more rounds" in verdict.lines[0]


@pytest.mark.parametrize(("now", "before"), [(3, 6), (6, 3)])
def test_too_few_rounds_on_either_side_are_inconclusive(now: int, before: int, make: SimpleNamespace) -> None:
    verdict = judge(_run(_steady(make, 1.3, now, prompts=None)), _run(_steady(make, 1.3, before, prompts=None)))
    assert _code(verdict) == ExitCode.INCONCLUSIVE
    assert "six rounds" in verdict.lines[0]


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"cpu": {**CPU, "family": 26, "model": 2}}, "the processor's family differs (26, was 25)"),
        ({"cpu": {**CPU, "model": 2}}, "the processor's model differs (2, was 17)"),
        ({"cpu": {**CPU, "flags_sha256": "ab"}}, "the digest of the processor's flags differs"),
        ({"cpu": {**CPU, "usable": 1}}, "the number of CPUs that the process may use differs (1, was 2)"),
        ({"gpu": "Other"}, "the GPU differs (Other, was none)"),
        ({"threads": 4}, "the number of threads differs (4, was 2)"),
        ({"torch_build": "CUDA 13.0"}, "the build of torch differs (CUDA 13.0, was CPU)"),
        ({"versions": {**FULL["versions"], "triton": "3.9.0"}}, "the version of triton differs (3.9.0, was none)"),
    ],
)
def test_unlike_machines_are_compared_only_if_forced(other: dict[str, Any], said: str, make: SimpleNamespace) -> None:
    now, before = _run(_steady(make, 1.0), machine={**FULL, **other}), _run(_steady(make, 1.3), machine=FULL)
    verdict = judge(now, before)
    assert _code(verdict) == ExitCode.INCONCLUSIVE
    line, _ = verdict.lines
    assert said in line
    assert line.count("run.json") == 2
    assert line.count("Test data CPU") == 2
    forced = judge(now, before, force=True)
    assert _code(forced) == ExitCode.REGRESSION
    assert said in forced.lines[1]
    assert "baseline's time" not in forced.lines[0]


def test_another_version_of_calibatt_and_another_patch_of_python_are_alike(make: SimpleNamespace) -> None:
    other = {**FULL, "python_version": "3.11.9", "versions": {**FULL["versions"], "calibatt": "9"}}
    verdict = judge(_run(_steady(make, 1.3), machine=other), _run(_steady(make, 1.3), machine=FULL))
    assert _code(verdict) == ExitCode.PASS
    assert not verdict.notes


def test_of_an_older_file_what_both_have_is_compared_and_the_rest_named(make: SimpleNamespace) -> None:
    now = _run(_steady(make, 1.3), machine=FULL)
    verdict = judge(now, _run(_steady(make, 1.3)))
    assert _code(verdict) == ExitCode.PASS
    (note,) = verdict.notes
    assert "processor's model" in note
    assert "version of torch" in note
    assert "threads" not in note
    assert _code(judge(now, _run(_steady(make, 1.3), machine={**MACHINE, "threads": 4}))) == ExitCode.INCONCLUSIVE


def test_flags_that_an_older_file_has_in_full_are_compared_by_their_digest(make: SimpleNamespace) -> None:
    old = {**FULL, "cpu": {**CPU, "flags": ["avx2", "avx512f"]}}
    for flags, code in ((["avx512f", "avx2"], ExitCode.PASS), (["avx2"], ExitCode.INCONCLUSIVE)):
        new = {**FULL, "cpu": {**CPU, "flags_sha256": digest_of_flags(flags)}}
        assert _code(judge(_run(_steady(make, 1.3), machine=new), _run(_steady(make, 1.3), machine=old))) == code


def _slower(record: Record, times: float) -> Record:
    samples, dense = record.samples_s or (), record.baseline_samples_s
    return replace(
        record, samples_s=tuple(sample * times for sample in samples),
        baseline_samples_s=dense and tuple(sample * times for sample in dense),
    )  # fmt: skip


def test_dense_and_sparse_both_three_times_slower_are_a_regression(make: SimpleNamespace) -> None:
    arms = (make.dense_arm(), make.arm("calibatt"))
    slower = [_slower(one, 3) for one in arms]
    verdict = judge(_run(*slower, machine=FULL), _run(*arms, machine=FULL))
    assert [one.code for one in verdict.judgements] == [ExitCode.REGRESSION] * 2
    assert "time 12.0 s, was 4.00 s" in verdict.lines[0]
    assert "baseline's time 12.0 s, was 4.01 s" in verdict.lines[1]
    # nobody asked for the dense arm
    assert _code(judge(_run(slower[1], machine=FULL), _run(arms[1], machine=FULL))) == ExitCode.REGRESSION
    # of files that do not show that the machines are alike, nor of forced ones, times say nothing
    assert _code(judge(_run(*slower), _run(*arms))) == ExitCode.PASS
    assert _code(judge(_run(*slower, machine={**FULL, "threads": 4}), _run(*arms, machine=FULL), force=True)) == 0


@pytest.mark.parametrize(("times", "code"), [(0.5, ExitCode.PASS), (1.08, ExitCode.PASS), (1.2, ExitCode.REGRESSION)])
def test_a_dense_time_may_vary_by_as_much_as_it_does_on_one_machine(
    times: float, code: ExitCode, make: SimpleNamespace
) -> None:
    dense = make.dense_arm(samples_s=tuple(1 + 0.001 * i for i in range(6)))
    assert _code(judge(_run(_slower(dense, times), machine=FULL), _run(dense, machine=FULL))) == code


def test_dense_times_of_too_few_rounds_or_another_guidance_are_inconclusive(make: SimpleNamespace) -> None:
    dense = make.dense_arm(prompts=None)
    for other in (make.dense_arm(rounds=3, prompts=None), make.dense_arm(prompts=None, guidance=2.0)):
        assert _code(judge(_run(other, machine=FULL), _run(dense, machine=FULL))) == ExitCode.INCONCLUSIVE


@pytest.mark.parametrize(
    ("spoilt", "said"),
    [({"throttled": True}, "throttled"), ({"disturbed": 0.12}, "disturbed: others had 12% of the CPUs")],
)
def test_times_that_something_spoilt_are_neither_passed_nor_failed(
    spoilt: dict[str, Any], said: str, make: SimpleNamespace
) -> None:
    steady = _steady(make, 1.3)
    other = _steady(make, 1.3, preset="other")
    for ratio in (1.3, 1.0):
        verdict = judge(_run(_steady(make, ratio, **spoilt), other, machine=FULL), _run(steady, other, machine=FULL))
        # the other arm is judged as ever
        assert [one.code for one in verdict.judgements] == [ExitCode.INCONCLUSIVE, ExitCode.PASS]
        assert f"this run was {said}" in verdict.lines[0]
    earlier = judge(_run(steady, machine=FULL), _run(_steady(make, 1.3, **spoilt), machine=FULL))
    assert _code(earlier) == ExitCode.INCONCLUSIVE
    assert f"the earlier run was {said}" in earlier.lines[0]
    # an arm without a speedup too
    dense = _run(make.dense_arm(**spoilt))
    assert _code(judge(dense, dense)) == ExitCode.INCONCLUSIVE
    # what a video is like does not depend on the clock
    unlike = _run(_steady(make, 1.3, psnr_db=(20.0,) * 6, **spoilt), machine=FULL)
    assert _code(judge(unlike, _run(steady, machine=FULL))) == ExitCode.REGRESSION


def test_a_little_that_others_do_spoils_nothing(make: SimpleNamespace) -> None:
    run = _run(_steady(make, 1.3, disturbed=0.05, throttled=False), machine=FULL)
    assert _code(judge(run, run)) == ExitCode.PASS


def test_a_benchmark_that_vanished_is_a_regression(make: SimpleNamespace) -> None:
    verdict = judge(_run(make.dense_arm()), _run(make.dense_arm(), make.arm("calibatt")))
    assert _code(verdict) == ExitCode.REGRESSION == 1
    assert "gone" in verdict.lines[1]


@pytest.mark.parametrize("outcome", ["wrong", "failed", "out_of_memory", "unsupported"])
def test_an_arm_that_no_longer_runs_is_a_regression_with_its_reason(outcome: str, make: SimpleNamespace) -> None:
    now = make.broken("calibatt", outcome, "test data: it broke")
    verdict = judge(_run(now), _run(make.arm("calibatt")))
    assert _code(verdict) == ExitCode.REGRESSION
    assert "it broke" in verdict.lines[0]
    assert len(verdict.judgements) == 1


def test_an_arm_that_did_not_run_before_either_passes(make: SimpleNamespace) -> None:
    before = _run(make.broken("calibatt"))
    assert _code(judge(_run(make.broken("calibatt", "failed")), before)) == ExitCode.PASS
    assert _code(judge(_run(make.arm("calibatt")), before)) == ExitCode.PASS
    assert _code(judge(_run(make.dense_arm()), before)) == ExitCode.PASS


@pytest.mark.parametrize(("psnr", "code"), [(29.1, ExitCode.PASS), (28.9, ExitCode.REGRESSION), (35.0, ExitCode.PASS)])
def test_a_fall_in_psnr_of_more_than_a_decibel_is_a_regression(
    psnr: float, code: ExitCode, make: SimpleNamespace
) -> None:
    now = _run(_steady(make, 1.3, psnr_db=(psnr,) * 6))
    assert _code(judge(now, _run(_steady(make, 1.3)))) == code
    forced = judge(_run(*now.records, machine={**MACHINE, "threads": 4}), _run(_steady(make, 1.3)), force=True)
    assert _code(forced) == code


def test_psnr_of_other_prompts_is_not_compared(make: SimpleNamespace) -> None:
    now = _steady(make, 1.3, psnr_db=(20.0,) * 6, prompts=("test data",) * 6)
    assert _code(judge(_run(now), _run(_steady(make, 1.3)))) == ExitCode.INCONCLUSIVE


def test_dense_may_run_on_another_kernel(make: SimpleNamespace) -> None:
    assert _code(judge(_run(make.dense_arm(kernel="sdpa-math")), _run(make.dense_arm()))) == ExitCode.PASS


def test_a_run_with_an_arm_twice_is_refused(make: SimpleNamespace) -> None:
    with pytest.raises(UnusableFile, match="twice"):
        judge(_run(make.arm("calibatt"), make.arm("calibatt")), _run(make.arm("calibatt")))


def test_a_regression_outweighs_what_is_inconclusive_and_that_a_pass(make: SimpleNamespace) -> None:
    before = _run(*(_steady(make, 1.3, preset=name) for name in "abc"))
    better = _steady(make, 1.3, preset="a")
    unsure = _steady(make, 1.2, preset="b", samples_s=(0.8, 0.9, 1.0, 1.0, 1.1, 1.2))
    worse = _steady(make, 1.0, preset="c")
    steady = _steady(make, 1.3, preset="c")
    for now, code in (
        ((better, unsure, worse), 1),
        ((better, unsure, steady), 3),
        ((better,), 1),
        ((worse, better), 1),
    ):
        assert _code(judge(_run(*now), before)) == code
    codes = [one.code.value for one in judge(_run(better, unsure, worse), before).judgements]
    assert codes == [0, 3, 1]


def test_within_an_arm_too_a_regression_outweighs_what_is_inconclusive(make: SimpleNamespace) -> None:
    # its PSNR fell, and its speed cannot be told
    now = _steady(make, 1.3, 3, prompts=None, psnr_db=(10.0,) * 3)
    (one,) = judge(_run(now), _run(_steady(make, 1.3, prompts=None))).judgements
    assert one.code == ExitCode.REGRESSION
    assert "six rounds" in one.reason


def test_a_name_or_a_reason_cannot_forge_a_line(make: SimpleNamespace) -> None:
    evil = "x\npass          all is well\r\x1b[2K\x1b[1A"
    now = make.broken(evil, "failed", "\n".join(["pass"] * 1000))
    verdict = judge(_run(now), _run(make.arm(evil)))
    assert _code(verdict) == ExitCode.REGRESSION
    first, _, last = verdict.lines
    assert first.startswith("regression  ")
    assert first.isprintable()
    assert len(first) <= 600
    assert last == "regression"
