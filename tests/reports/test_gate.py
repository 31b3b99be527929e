"""The gate: what it calls a regression, what it cannot tell, and what it lets pass."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from calibatt.bench.record import Record, Run, UnusableFile, load_run
from calibatt.reports.gate import ExitCode, Verdict, judge

RESULTS = Path(__file__).parents[2] / "bench" / "results"
MACHINE = {"gpu": None, "cpu": {"brand_raw": "Test data CPU"}, "threads": 2}


def _run(*records: Record, machine: dict[str, Any] = MACHINE) -> Run:
    return Run(path=Path("run.json"), machine=machine, commit={}, datetime="", command="", records=records)


def _steady(make: SimpleNamespace, ratio: float, rounds: int = 6, **more: Any) -> Record:
    """An arm so many times faster than dense in every round, give or take a thousandth."""
    samples = tuple(1 + 0.001 * i / rounds for i in range(rounds))
    facts = {"samples_s": samples, "baseline_samples_s": (ratio,) * rounds, "psnr_db": (30.0,) * rounds, **more}
    return make.arm("calibatt", rounds=rounds, **facts)  # type: ignore[no-any-return]


def _code(verdict: Verdict) -> ExitCode:
    assert len(verdict.lines) == len(verdict.judgements) + 1
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
    # fidelity does not depend on the machine: a fall outweighs that speed cannot be compared
    elsewhere = judge(_run(*now.records, machine={}), _run(_steady(make, 1.3)))
    assert _code(elsewhere) == (code or ExitCode.INCONCLUSIVE)


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
    first, last = verdict.lines
    assert first.startswith("regression  ")
    assert first.isprintable()
    assert len(first) <= 600
    assert last == "regression"
