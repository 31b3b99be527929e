"""The gate: what it calls a regression, what it cannot tell, and what it lets pass."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from calibatt.bench.record import Record, Run
from calibatt.reports.gate import ExitCode, Verdict, judge

MACHINE = {"gpu": None, "cpu": {"brand_raw": "Test data CPU"}, "threads": 2}


def _run(*records: Record, machine: dict[str, Any] = MACHINE) -> Run:
    return Run(path=Path("run.json"), machine=machine, commit={}, datetime="", command="", records=records)


def _steady(make: SimpleNamespace, ratio: float, rounds: int = 6, **more: Any) -> Record:
    """An arm so many times faster than dense in every round, give or take a thousandth."""
    samples = tuple(1 + 0.001 * i / rounds for i in range(rounds))
    facts = {"samples_s": samples, "baseline_samples_s": (ratio,) * rounds, "psnr_db": (30.0,) * rounds, **more}
    return make.arm("calibatt", rounds=rounds, **facts)  # type: ignore[no-any-return]


def _code(verdict: Verdict) -> ExitCode:
    assert len(verdict.lines) == len(verdict.findings) + 1
    return verdict.exit_code


def test_a_run_passes_against_itself(make: SimpleNamespace) -> None:
    run = _run(make.dense_arm(), make.arm("calibatt"), make.broken("sta"))
    assert _code(judge(run, run)) == ExitCode.PASS == 0


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


@pytest.mark.parametrize("other", [{"cpu": {"brand_raw": "Other"}}, {"gpu": "Other"}, {"threads": 4}])
def test_speedups_of_another_machine_are_not_compared(other: dict[str, Any], make: SimpleNamespace) -> None:
    verdict = judge(_run(_steady(make, 1.0), machine={**MACHINE, **other}), _run(_steady(make, 1.3)))
    assert _code(verdict) == ExitCode.INCONCLUSIVE
    assert "differs" in verdict.lines[0]


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
    assert len(verdict.findings) == 1


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
    # fidelity does not depend on the machine: a fall outweighs that speed cannot be compared
    elsewhere = judge(_run(*now.records, machine={}), _run(_steady(make, 1.3)))
    assert _code(elsewhere) == (code or ExitCode.INCONCLUSIVE)


def test_psnr_of_other_prompts_is_not_compared(make: SimpleNamespace) -> None:
    now = _steady(make, 1.3, psnr_db=(20.0,) * 6, prompts=("test data",) * 6)
    assert _code(judge(_run(now), _run(_steady(make, 1.3)))) == ExitCode.INCONCLUSIVE


def test_dense_may_run_on_another_kernel(make: SimpleNamespace) -> None:
    assert _code(judge(_run(make.dense_arm(kernel="sdpa-math")), _run(make.dense_arm()))) == ExitCode.PASS


def test_a_run_with_an_arm_twice_is_refused(make: SimpleNamespace) -> None:
    with pytest.raises(ValueError, match="twice"):
        judge(_run(make.arm("calibatt"), make.arm("calibatt")), _run(make.arm("calibatt")))
