"""The gate: what it calls a regression, what it cannot tell, and what it lets pass."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calibatt.bench.machine import digest_of_flags
from calibatt.bench.record import Record, Run, UnusableFile, load_run
from calibatt.reports.gate import ExitCode, Verdict
from calibatt.reports.gate import judge as judge_runs
from calibatt.reports.gate_metrics import METRICS, Sampled, choose

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


def judge(now: Run, before: Run, **options: Any) -> Verdict:
    """One run against one, which must show a slowdown of half, and no less."""
    return judge_runs([now], [before], **{"metrics": choose(mde="50%"), **options})


def _steady(make: SimpleNamespace, ratio: float, rounds: int = 6, **more: Any) -> Record:
    """An arm so many times faster than dense in every round, give or take a thousandth."""
    samples = tuple(1 + 0.001 * i / rounds for i in range(rounds))
    facts = {"samples_s": samples, "baseline_samples_s": (ratio,) * rounds, "psnr_db": (30.0,) * rounds, **more}
    return make.arm("calibatt", rounds=rounds, **facts)  # type: ignore[no-any-return]


def _code(verdict: Verdict) -> ExitCode:
    assert len(verdict.lines) == len(verdict.judgements) + len(verdict.notes) + 1
    return verdict.exit_code


def test_arms_of_unlike_settings_are_not_compared(make: SimpleNamespace) -> None:
    before, now = _steady(make, 1.3), _steady(make, 1.0, settings="rho=0.5")
    verdict = judge(_run(now), _run(before, now))
    assert _code(verdict) == ExitCode.REGRESSION
    # the one is gone, the other as it was; a slower one is no regression of the faster
    assert [(one.code.name, one.reason) for one in verdict.judgements if "rho=0.5" not in one.arm] == [
        ("REGRESSION", "gone from the run")
    ]
    assert all(one.code == ExitCode.PASS for one in verdict.judgements if "rho=0.5" in one.arm)


def test_a_run_passes_against_itself(make: SimpleNamespace) -> None:
    run = _run(make.dense_arm(), make.arm("calibatt"), make.broken("sta"))
    assert _code(judge(run, run)) == ExitCode.PASS == 0


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*/*.json")), ids=lambda path: path.name)
def test_a_committed_run_can_be_judged_and_is_no_regression_against_itself(path: Path) -> None:
    run = load_run(path)
    verdict = judge_runs([run] * 3, [run] * 3)
    findings = [finding for one in verdict.judgements for finding in one.findings]
    doubtful = [finding for finding in findings if finding.code != ExitCode.PASS]
    assert {finding.code for finding in doubtful} <= {ExitCode.INCONCLUSIVE}
    # and that only where its samples are too noisy, or spoilt; or where it says itself that they have no interval
    unsure = any(one.speedup is not None and one.speedup.low is None for one in run.records)
    grounds = ("too noisy", "run was", *(("too few rounds",) if unsure else ()))
    assert [finding.said for finding in doubtful if not any(ground in finding.said for ground in grounds)] == []
    # what a calibration costs is one figure, of which no share is lost
    sampled = any(one.suite != "calibration" for one in run.records)
    assert findings
    assert any(finding.loss == 0 for finding in findings) == sampled


def test_a_committed_run_of_which_one_arm_is_slower_is_a_regression_in_that_arm() -> None:
    run = load_run(RESULTS / "h200" / "kernel-models.json")
    place, record = next((i, one) for i, one in enumerate(run.records) if one.baseline_samples_s)
    slower = replace(record, samples_s=tuple(1.05 * sample for sample in record.samples_s or ()))
    now = replace(run, records=(*run.records[:place], slower, *run.records[place + 1 :]))
    verdict = judge_runs([now] * 5, [run] * 5)
    (one,) = [one for one in verdict.judgements if one.code == ExitCode.REGRESSION]
    assert "loss 4.8%" in one.reason


def test_dense_is_the_same_arm_on_whichever_kernel_is_fastest(make: SimpleNamespace) -> None:
    one, other = (_run(make.dense_arm(suite="kernel", mode=None, kernel=kernel)) for kernel in ("fa3", "sdpa-cudnn"))
    assert _code(judge(one, other)) == ExitCode.PASS


@pytest.mark.parametrize(
    ("ratio", "code"), [(1.5, ExitCode.PASS), (1.29, ExitCode.PASS), (1.26, ExitCode.PASS), (1.1, ExitCode.REGRESSION)]
)
def test_a_loss_that_runs_do_not_differ_by_is_a_regression(ratio: float, code: ExitCode, make: SimpleNamespace) -> None:
    # of two single files, 1.26 may be the spread between runs: 1.7 % each
    assert _code(judge(_run(_steady(make, ratio)), _run(_steady(make, 1.3)))) == code


def test_the_tolerance_is_a_loss_that_is_allowed_and_no_limit_of_what_is_seen(make: SimpleNamespace) -> None:
    def of(ratio: float) -> list[Run]:
        return [_run(_steady(make, ratio, 20, prompts=None)) for _ in range(3)]

    for tolerance, loss, code in (
        ("1%", 0.03, ExitCode.REGRESSION),
        ("1%", 0.005, ExitCode.PASS),
        ("4%", 0.03, ExitCode.PASS),
        ("4%", 0.05, ExitCode.REGRESSION),
    ):
        verdict = judge_runs(of(1.3 * (1 - loss)), of(1.3), metrics=choose("speedup", tolerance))
        assert _code(verdict) == code
        ((finding,),) = [one.findings for one in verdict.judgements]
        # what is allowed, is seen all the same
        assert finding.low is not None
        assert finding.low > 0
        assert finding.p is not None
        assert finding.p < 0.01


def test_a_run_too_weak_for_what_is_asked_is_inconclusive_and_says_what_it_would_have_found(
    make: SimpleNamespace,
) -> None:
    now, before = _run(_steady(make, 1.3)), _run(_steady(make, 1.3))
    verdict = judge_runs([now], [before])
    assert _code(verdict) == ExitCode.INCONCLUSIVE == 3
    assert "would find 7.3%: too noisy to find 5.0%; give more runs" in verdict.lines[0]
    *_, note = verdict.notes
    assert "the spread between runs is not known from so few files, and taken as 1.7% for speedup" in note
    # √2 · 1.7 % · (2.33 + 0.84) is 7.6 %, in logarithms
    for asked, code in (("7.2%", ExitCode.INCONCLUSIVE), ("7.4%", ExitCode.PASS)):
        assert _code(judge(now, before, metrics=choose(mde=asked))) == code
    noisy = _steady(make, 1.3, samples_s=(0.5, 0.6, 1.0, 1.0, 1.4, 1.5))
    assert "too noisy to find 50.0%" in judge(_run(noisy), _run(noisy)).lines[0]


def test_of_three_runs_a_side_their_own_spread_is_taken(make: SimpleNamespace) -> None:
    def of(*ratios: float) -> list[Run]:
        return [_run(_steady(make, ratio, 20, prompts=None), machine=FULL) for ratio in ratios]

    speedup = choose("speedup")
    close = judge_runs(of(1.2, 1.201, 1.199), of(1.25, 1.251, 1.249), metrics=speedup)
    assert _code(close) == ExitCode.REGRESSION
    assert not close.notes
    # in 60 rounds a side the loss is beyond all doubt, in three runs it is not
    assert _code(judge_runs(of(1.1, 1.2, 1.3), of(1.15, 1.25, 1.35), metrics=speedup)) == ExitCode.INCONCLUSIVE
    # a rolling baseline does for one new run
    assert not judge_runs(of(1.25), of(1.25, 1.251, 1.249, 1.25, 1.252), metrics=speedup).notes


def test_p_values_are_corrected_for_the_number_of_arms(make: SimpleNamespace) -> None:
    def of(count: int, ratio: float) -> Run:
        others = [_steady(make, 1.3, preset=f"p{i}", prompts=None) for i in range(count - 1)]
        return _run(_steady(make, ratio, preset="slower", prompts=None), *others)

    verdicts = [judge(of(count, 1.15), of(count, 1.3)) for count in (1, 20)]
    assert [_code(verdict) for verdict in verdicts] == [ExitCode.REGRESSION, ExitCode.INCONCLUSIVE]
    assert "too few rounds for 20 tests" in verdicts[1].lines[0]
    one, many = (verdict.judgements[0].findings[0].p or 0 for verdict in verdicts)
    assert many == pytest.approx(20 * one)


@pytest.mark.parametrize(("now", "before"), [(3, 6), (6, 3)])
def test_too_few_rounds_on_either_side_are_inconclusive(now: int, before: int, make: SimpleNamespace) -> None:
    verdict = judge(_run(_steady(make, 1.3, now, prompts=None)), _run(_steady(make, 1.3, before, prompts=None)))
    assert _code(verdict) == ExitCode.INCONCLUSIVE
    assert "too few rounds" in verdict.lines[0]


def test_another_dense_kernel_is_no_regression_of_the_arm(make: SimpleNamespace) -> None:
    now = _run(_steady(make, 1.0, baseline="sdpa-math"))
    verdict = judge(now, _run(_steady(make, 1.3)))
    assert _code(verdict) == ExitCode.INCONCLUSIVE
    assert "paired with another dense kernel (sdpa-math, was sdpa-flash)" in verdict.lines[0]


def test_a_spoilt_run_of_several_is_left_out_and_named(make: SimpleNamespace) -> None:
    good, spoilt = _run(_steady(make, 1.3)), _run(_steady(make, 1.0, disturbed=0.3))
    speedup = choose("speedup", mde="50%")
    verdict = judge_runs([good, spoilt, good, good], [good] * 3, metrics=speedup)
    assert _code(verdict) == ExitCode.PASS
    assert "(this run was disturbed: others had 30% of the CPUs: left out)" in verdict.lines[0]
    assert _code(judge_runs([spoilt] * 3, [good] * 3, metrics=speedup)) == ExitCode.INCONCLUSIVE


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
    assert "dense time" not in forced.lines[0]


def test_another_version_of_calibatt_and_another_patch_of_python_are_alike(make: SimpleNamespace) -> None:
    other = {**FULL, "python_version": "3.11.9", "versions": {**FULL["versions"], "calibatt": "9"}}
    verdict = judge(_run(_steady(make, 1.3), machine=other), _run(_steady(make, 1.3), machine=FULL))
    assert _code(verdict) == ExitCode.PASS
    assert not any("not compared" in note for note in verdict.notes)


def test_of_an_older_file_what_both_have_is_compared_and_the_rest_named(make: SimpleNamespace) -> None:
    now = _run(_steady(make, 1.3), machine=FULL)
    verdict = judge(now, _run(_steady(make, 1.3)))
    assert _code(verdict) == ExitCode.PASS
    note, _ = verdict.notes
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
    assert "dense time 12.0 s, was 4.00 s: loss 66.7%" in verdict.lines[0]
    assert "dense time 12.0 s, was 4.01 s: loss 66.7%" in verdict.lines[1]
    # arms that were timed in turns have their dense times in common, and these are compared once
    shared = [replace(arms[1], preset=name) for name in "abc"]
    again = judge(_run(*shared, machine=FULL), _run(*shared, machine=FULL))
    assert ["dense time" in line for line in again.lines[:3]] == [True, False, False]
    # nobody asked for the dense arm
    assert _code(judge(_run(slower[1], machine=FULL), _run(arms[1], machine=FULL))) == ExitCode.REGRESSION
    # of files that do not show that the machines are alike, nor of forced ones, times say nothing
    assert _code(judge(_run(*slower), _run(*arms))) == ExitCode.PASS
    assert _code(judge(_run(*slower, machine={**FULL, "threads": 4}), _run(*arms, machine=FULL), force=True)) == 0


@pytest.mark.parametrize(("times", "code"), [(0.5, ExitCode.PASS), (1.08, ExitCode.PASS), (1.3, ExitCode.REGRESSION)])
def test_a_dense_time_may_vary_by_as_much_as_it_does_on_one_machine(
    times: float, code: ExitCode, make: SimpleNamespace
) -> None:
    dense = make.dense_arm(samples_s=tuple(1 + 0.001 * i for i in range(6)))
    times_alone = choose("time")
    assert (
        _code(judge(_run(_slower(dense, times), machine=FULL), _run(dense, machine=FULL), metrics=times_alone)) == code
    )


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
    dense = _run(make.dense_arm(**spoilt), machine=FULL)
    assert _code(judge(dense, dense)) == ExitCode.INCONCLUSIVE
    # what a video is like does not depend on the clock
    unlike = _run(_steady(make, 1.3, psnr_db=(20.0,) * 6, **spoilt), machine=FULL)
    assert _code(judge(unlike, _run(steady, machine=FULL))) == ExitCode.REGRESSION


def _in_part(make: SimpleNamespace, rounds: int, spoilt: int, ratio: float, amiss: float, **more: Any) -> Record:
    """An arm so many times faster than dense, of whose rounds the first few are marked and have another ratio."""
    baseline = (amiss,) * spoilt + (ratio,) * (rounds - spoilt)
    marks = tuple(i < spoilt for i in range(rounds))
    facts = {"baseline_samples_s": baseline, "spoilt": marks, "throttled": True, "prompts": None, **more}
    return _steady(make, ratio, rounds, **facts)


def test_spoilt_samples_have_no_say_and_are_counted(make: SimpleNamespace) -> None:
    before = _run(_steady(make, 1.3, 20, prompts=None))
    for ratio, amiss, code in ((1.3, 0.2, ExitCode.PASS), (1.0, 2.6, ExitCode.REGRESSION)):
        now = _in_part(make, 20, 9, ratio, amiss)
        assert now.doubt is None
        verdict = judge(_run(now), before, metrics=choose("speedup", mde="50%"))
        assert _code(verdict) == code
        assert (
            f"speedup {ratio - 0.001:.3f}, was 1.299 (9 samples throttled or disturbed: left out)" in verdict.lines[0]
        )
        # unmarked, the same samples would decide otherwise
        unmarked = judge(_run(replace(now, spoilt=None, throttled=None)), before, metrics=choose("speedup", mde="50%"))
        assert _code(unmarked) != code
    one = judge(_run(_in_part(make, 20, 1, 1.3, 0.2)), before)
    assert "(1 sample throttled or disturbed: left out)" in one.lines[0]


def test_where_too_few_sound_samples_stay_the_gate_cannot_tell(make: SimpleNamespace) -> None:
    before = _run(_steady(make, 1.3, 6, prompts=None))
    for ratio in (1.3, 1.0):
        # five would do
        assert _code(judge(_run(_steady(make, ratio, 5, prompts=None)), before)) != ExitCode.INCONCLUSIVE
        verdict = judge(_run(_in_part(make, 5, 2, ratio, ratio)), before, metrics=choose("speedup", mde="50%"))
        assert _code(verdict) == ExitCode.INCONCLUSIVE
        assert "too few rounds" in verdict.lines[0]
    # and where half are spoilt, all of them are left out
    verdict = judge(_run(_in_part(make, 20, 10, 1.0, 1.0)), before, metrics=choose("speedup", mde="50%"))
    assert _code(verdict) == ExitCode.INCONCLUSIVE
    assert "this run was throttled" in verdict.lines[0]


def test_spoilt_samples_of_dense_times_and_energy_have_no_say_either(make: SimpleNamespace) -> None:
    facts = {"rounds": 20, "prompts": None}
    dense = make.dense_arm(**facts, energy_j=(5.0,) * 20)
    slow = tuple(9.0 * one if i < 9 else one for i, one in enumerate(dense.samples_s))
    hot = replace(
        dense, samples_s=slow, energy_j=(50.0,) * 9 + (5.0,) * 11, spoilt=(True,) * 9 + (False,) * 11, throttled=True
    )
    verdict = judge(_run(hot, machine=FULL), _run(dense, machine=FULL), metrics=choose("time,energy"))
    assert _code(verdict) == ExitCode.PASS
    assert "energy 5 J, was 5 J" in verdict.lines[0]
    assert verdict.lines[0].count("9 samples throttled or disturbed: left out") == 2


def test_dense_times_that_go_on_longer_for_some_arms_are_compared_once(make: SimpleNamespace) -> None:
    dense = make.dense_arm(rounds=20, prompts=None)
    samples = dense.samples_s
    arms = [
        make.arm(
            "calibatt", preset=f"p{count}", rounds=count, prompts=None, baseline_samples_s=samples[:count],
            samples_s=(1.0,) * count,
        )
        for count in (10, 15, 20)
    ]  # fmt: skip
    run = _run(dense, *arms, machine=FULL)
    assert ["dense time" in line for line in judge(run, run).lines[:4]] == [True, False, False, False]


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
    both = _run(make.broken("calibatt"), make.dense_arm())
    assert _code(judge(_run(make.dense_arm()), both)) == ExitCode.PASS


def test_runs_with_nothing_in_common_are_refused(make: SimpleNamespace) -> None:
    with pytest.raises(UnusableFile, match="have no arm in common"):
        judge(_run(make.arm("calibatt")), _run(make.arm("radial")))


def test_a_new_arm_is_listed(make: SimpleNamespace) -> None:
    verdict = judge(_run(make.dense_arm(), make.arm("calibatt")), _run(make.dense_arm()))
    assert _code(verdict) == ExitCode.PASS
    assert "calibatt (flex): new, nothing to compare it with" in verdict.lines[1]


@pytest.mark.parametrize(("psnr", "code"), [(29.6, ExitCode.PASS), (29.4, ExitCode.REGRESSION), (35.0, ExitCode.PASS)])
def test_a_fall_in_psnr_of_more_than_half_a_decibel_is_a_regression(
    psnr: float, code: ExitCode, make: SimpleNamespace
) -> None:
    now = _run(_steady(make, 1.3, psnr_db=(psnr,) * 6))
    assert _code(judge(now, _run(_steady(make, 1.3)))) == code
    forced = judge(_run(*now.records, machine={**MACHINE, "threads": 4}), _run(_steady(make, 1.3)), force=True)
    assert _code(forced) == code


def test_a_fall_in_psnr_is_of_the_mean_over_the_same_videos(make: SimpleNamespace) -> None:
    before = _run(_steady(make, 1.3))
    # two of six by 15 dB, which no median shows; all by 0.6 dB
    for psnr in ((15.0, 15.0, *(30.0,) * 4), (29.4,) * 6):
        assert _code(judge(_run(_steady(make, 1.3, psnr_db=psnr)), before)) == ExitCode.REGRESSION
    # of a run that ended sooner, the videos that both have
    whole = _steady(make, 1.3, psnr_db=(30.0, 31.0, 32.0, 10.0, 10.0, 10.0))
    cut = _steady(make, 1.3, 3, psnr_db=(30.0, 31.0, 32.0), prompts=whole.prompts[:3])
    for now, then in ((whole, cut), (cut, whole)):
        verdict = judge(_run(now), _run(then), metrics=choose("psnr"))
        assert "psnr 31.00 dB, was 31.00 dB" in verdict.lines[0]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"alignment": (0.5,) * 6}, "alignment 0.500"),
        ({"density": 1.0}, "density 1, was 0.42"),
        ({"recall": 0.05}, "recall 0.05, was 0.93"),
        ({"method_error": 0.95}, "method error 0.95"),
        ({"plan_memory_bytes": 10**9}, "memory of plans 1000 MB, was 1 MB"),
        ({"peak_memory_bytes": 2 * 10**9}, "peak memory 2000 MB, was 1000 MB"),
        ({"preparation_s": 1000.0}, "seconds of preparation 1000, was 10"),
        ({"calibration_cost_ratio": 140.0}, "cost of calibration 140, was 1.4"),
        ({"energy_j": (200.0,) * 6}, "energy 200 J, was 100 J: loss 50.0%"),
    ],
)
def test_whatever_else_becomes_worse_is_a_regression_and_better_a_pass(
    changed: dict[str, Any], said: str, make: SimpleNamespace
) -> None:
    facts = {"plan_memory_bytes": 10**6, "peak_memory_bytes": 10**9, "preparation_s": 10.0,
             "calibration_cost_ratio": 1.4, "energy_j": (100.0,) * 6}  # fmt: skip
    good, bad = (_run(_steady(make, 1.3, **{**facts, **more}), machine=FULL) for more in ({}, changed))
    verdict = judge(bad, good)
    assert _code(verdict) == ExitCode.REGRESSION
    assert said in verdict.lines[0]
    (finding,) = [one for one in verdict.judgements[0].findings if one.code == ExitCode.REGRESSION]
    assert _code(judge(good, bad)) == ExitCode.PASS
    # each alone, and none but what is asked for
    assert _code(judge(bad, good, metrics=choose(finding.metric))) == ExitCode.REGRESSION
    assert _code(judge(bad, good, metrics=choose("speedup", mde="50%"))) == ExitCode.PASS


def test_what_the_new_run_did_not_measure_is_inconclusive(make: SimpleNamespace) -> None:
    for missing in ("psnr_db", "density", "baseline_samples_s"):
        verdict = judge(_run(_steady(make, 1.3, **{missing: None})), _run(_steady(make, 1.3)))
        assert _code(verdict) == ExitCode.INCONCLUSIVE
        assert "was not measured in the new run" in verdict.lines[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("speed",), "--on speed: give some of speedup, time"),
        (("",), "give some of"),
        (("psnr,psnr",), "psnr stands there twice"),
        (("psnr=x",), "--on psnr=x: give a number"),
        (("psnr=-1",), "--on psnr=-1: give a number"),
        (("speedup=120%",), "such as 0.03 or 3%"),
        ((None, "nan"), "--tolerance nan: give a share"),
        ((None, "5"), "--tolerance 5: give a share"),
        ((None, None, "100%"), "--mde 100%: give a share"),
        (("psnr", "3%"), "--tolerance 3%: is of speedup, which --on leaves out"),
    ],
)
def test_a_metric_or_a_threshold_that_makes_no_sense_is_refused(
    arguments: tuple[str | None, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        choose(*arguments)


@settings(derandomize=True, database=None, deadline=None, max_examples=500)
@given(
    *3
    * [
        st.none()
        | st.text(max_size=20)
        | st.lists(st.sampled_from([*METRICS, "=", "3%", "nan", "1e400", "-1", ",", "%"]), max_size=5).map("".join)
    ]
)
def test_whatever_is_given_is_metrics_or_one_error(on: str | None, tolerance: str | None, mde: str | None) -> None:
    try:
        chosen = choose(on, tolerance, mde)
    except ValueError:
        return
    assert chosen
    assert all(0 <= one.allowed < float("inf") for one in chosen.values())


def test_thresholds_are_each_metrics_own() -> None:
    chosen = choose("speedup, psnr=0.3,time=20%", tolerance="2%", mde="0.1")
    assert {name: one.allowed for name, one in chosen.items()} == {"speedup": 0.02, "psnr": 0.3, "time": 0.2}
    assert isinstance(chosen["speedup"], Sampled)
    assert chosen["speedup"].mde == 0.1


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
    unsure = _steady(make, 1.2, preset="b", samples_s=(0.2, 0.5, 1.0, 1.0, 2.0, 4.0))
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
    assert "too few rounds" in one.reason


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


def test_a_gate_that_compares_nothing_is_unusable_input(make: SimpleNamespace) -> None:
    run = _run(_steady(make, 1.3))
    with pytest.raises(UnusableFile, match="have none of energy to compare, since their machines are not known"):
        judge_runs([run], [run], metrics=choose("energy"))
    full = _run(_steady(make, 1.3), machine=FULL)
    with pytest.raises(UnusableFile, match=r"have none of energy to compare$"):
        judge_runs([full], [full], metrics=choose("energy"))


def test_seconds_of_unlike_machines_are_not_compared_though_forced(make: SimpleNamespace) -> None:
    slow, fast = (
        _run(_steady(make, 1.3, preparation_s=s), machine={**FULL, "threads": n}) for s, n in ((99, 2), (9, 4))
    )
    verdict = judge(slow, fast, force=True)
    assert _code(verdict) == ExitCode.PASS
    assert "dense times, energy and calibration are not compared" in verdict.notes[0]
    same = _run(_steady(make, 1.3, preparation_s=9), machine={**FULL, "threads": 2})
    assert _code(judge(slow, same)) == ExitCode.REGRESSION


def test_another_dense_kernel_excuses_a_speedup_and_no_dense_time(make: SimpleNamespace) -> None:
    def of(dense: float, kernel: str) -> list[Run]:
        arm = _steady(make, dense, 20, prompts=None, baseline=kernel)
        return [_run(arm, machine=FULL) for _ in range(3)]

    verdict = judge_runs(of(2.6, "slow"), of(1.3, "quick"), metrics=choose("time"))
    assert _code(verdict) == ExitCode.REGRESSION
    verdict = judge_runs(of(1.1, "slow"), of(1.3, "quick"), metrics=choose("speedup"))
    assert _code(verdict) == ExitCode.INCONCLUSIVE


@pytest.mark.parametrize("text", ["psnr=3%", "alignment=1%", "recall=1%"])
def test_what_is_no_share_is_allowed_in_its_units_only(text: str) -> None:
    with pytest.raises(ValueError, match=f"--on {text}: is of no share; give a number of its units"):
        choose(text)
    assert choose("memory=20%")["memory"].allowed == 0.2
