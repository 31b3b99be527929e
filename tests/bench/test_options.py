"""From the command line's text to cells."""

from __future__ import annotations

import itertools
import os
from argparse import ArgumentParser, Namespace
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from calibatt.bench.cells import DENSE, Arm, Cell, PermutationArm, Workload
from calibatt.bench.offline import CALIBRATION_SEED, run_settings
from calibatt.bench.options import Options, add_options, check_gate, check_output, deciding, refuse_pytest_options
from calibatt.bench.record import SUITES
from calibatt.bench.session import Settings, prompts_for
from calibatt.bench.suites.catalogue import SUITES as CATALOGUE
from calibatt.bench.tuning import TUNING_SEED
from calibatt.kernels.catalogue import KERNELS
from calibatt.kernels.names import UnknownName
from calibatt.methods.catalogue import METHODS
from calibatt.models import vbench
from calibatt.models.catalogue import MODELS
from calibatt.models.device import pick_device


def given(**texts: str) -> Namespace:
    """What pytest hands over, for options of which some are given."""
    return Namespace(**{one.name: texts.get(one.name, one.metadata["default"]) for one in fields(Options)})


def cells(suite: str, **texts: str) -> list[str]:
    return [str(cell) for cell in CATALOGUE[suite].cells(Options.read(given(**texts)))]  # type: ignore[index]


def test_arms_are_named_by_method_preset_and_mode() -> None:
    arm = Arm.parse("radial/no-warmup=density", "flex")
    assert (arm.method, arm.preset, arm.mode, arm.kernel) == ("radial", "no-warmup", "equal_density", "flex")
    assert str(arm) == "radial/no-warmup=density"
    assert str(Arm.parse("sparge", "flex")) == "sparge"
    wanted = Arm.parse("sparge=0.35", "flex")
    assert (wanted.preset, wanted.mode, wanted.target_density) == ("default", "equal_density", 0.35)
    assert str(wanted) == "sparge=0.35"
    near = Arm.parse("sparge/cdf=27.5dB", "flex", (0.1, 0.05))
    assert (near.mode, near.target_psnr_db, near.target_density) == ("equal_fidelity", 27.5, None)
    assert (near.dense_steps, near.dense_layers) == (0.1, 0.05)
    assert str(near) == "sparge/cdf=27.5dB-dense0.1x0.05"
    assert Arm.parse("radial", "flex", (0.0, 0.0)).mode == "matched"
    tail = Arm.parse("sparge/cdf+tail=0.35", "flex", (0.1, 0.05))
    assert (tail.method, tail.preset, tail.remainder, tail.target_density) == ("sparge", "cdf", "zeroth", 0.35)
    assert str(tail) == "sparge/cdf+tail=0.35-dense0.1x0.05"
    assert str(Arm.parse("svg2/clusters+tail", "flex")) == "svg2/clusters+tail"
    assert (tail.facts()["remainder"], near.facts()["remainder"]) == ("zeroth", None)
    # a method that has means of itself is the same arm with and without its remainder in the record
    own = Arm.parse("sol=0.35", "flex")
    assert (str(own), own.remainder) == ("sol=0.35", "none")
    assert (own.facts()["remainder"], own.facts()["own_remainder"]) == ("zeroth", True)
    assert tail.facts()["own_remainder"] is None
    # whatever the sparse kernel is, dense runs on the fastest dense one
    assert Arm.parse("dense", "flex") == DENSE


def test_settings_stand_in_an_arms_name_and_in_its_record() -> None:
    arm = Arm.parse("sparge/cdf[sink=true, cdf=0.90]+tail", "flex", (0.1, 0.0))
    assert str(arm) == "sparge/cdf[cdf=0.9,sink=true]+tail-dense0.1x0"
    assert (arm.method, arm.preset, arm.remainder, arm.mode) == ("sparge", "cdf", "zeroth", "matched")
    assert arm.facts()["settings"] == "cdf=0.9,sink=true"
    assert dict(run_settings(arm)) == {"cdf": 0.9, "sink": True}
    # the target turns another setting
    near = Arm.parse("sparge[similarity=0.2]=0.35", "flex")
    assert (str(near), near.target_density) == ("sparge[similarity=0.2]=0.35", 0.35)
    assert near.untuned == Arm.parse("sparge[similarity=0.2]", "flex")
    # what the preset has is nothing of its own
    assert Arm.parse("sparge[topk=0.5]", "flex") == Arm.parse("sparge", "flex")
    assert Arm.parse("sparge", "flex").facts()["settings"] is None


def test_arms_that_differ_by_a_setting_are_cells_of_their_own() -> None:
    found = cells("attention", methods="sparge,sparge[topk=0.3],sparge[topk=0.30],sparge[topk=null,cdf=0.9]")
    arms = ("sparge", "sparge[topk=0.3]", "sparge[cdf=0.9,topk=null]")
    assert found == [f"shapes-quick-6-{arm}-default" for arm in arms]


def test_a_stride_is_given_by_the_run_or_by_the_arm() -> None:
    assert cells("calibration", methods="calibatt[query_stride=4]") == [
        "shapes-quick-6-calibatt[query_stride=4]-default"
    ]
    with pytest.raises(ValueError, match="--query-strides gives query_stride: leave out one of both"):
        cells("calibration", methods="calibatt[query_stride=4]", query_strides="1,2")


def test_guidance_is_one_for_all_videos_of_a_run() -> None:
    options = Options.read(given(guidance="1", methods="dense"))
    (workload,) = options.workloads()
    assert workload.entry.guidance == workload.guidance == 1.0
    assert str(workload) == "shapes-quick-6-guidance1"
    assert Options.read(given()).workloads()[0].entry.guidance == MODELS["shapes"].guidance
    for wrong in ("0.5", "nan", "inf", "two"):
        with pytest.raises(ValueError, match="at least 1"):
            Options.read(given(guidance=wrong))


def test_remainders_are_arms_of_their_own_where_a_mask_leaves_blocks_out() -> None:
    found = cells("kernel", masks="random,rows", remainders="none,zeroth", densities="0.25,1")
    arms = ("random-0.25-64x64", "random+tail-0.25-64x64", "rows-0.25", "all")
    assert found == ["shapes-quick-dense-fastest", *(f"shapes-quick-{arm}-default" for arm in arms)]


def test_an_arm_without_its_target_is_what_learns_for_it() -> None:
    assert Arm.parse("sparge=0.35", "flex").untuned == Arm.parse("sparge", "flex")
    assert Arm.parse("sparge+tail=0.35", "flex").untuned == Arm.parse("sparge", "flex")
    assert Arm.parse("sparge=30dB", "flex", (0.5, 0.0)).untuned == Arm.parse("sparge", "flex", (0.5, 0.0))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("radail", "did you mean radial"),
        ("radial/nowarmup", "did you mean no-warmup"),
        ("calibatt/", "after '/' give a preset"),
        ("dense=density", "no knob"),
        ("dense+tail", "dense leaves no block out"),
        ("sol+tail=0.35", r"sol\+tail=0.35: the method itself has the remainder 'zeroth': one more says nothing new"),
        ("sparge+", "after '\\+' give 'tail'"),
        ("sparge+rest=0.5", "after '\\+' give 'tail'"),
        ("sparge+tail/cdf", "after '\\+' give 'tail'"),
        ("sage=0.5", "no knob"),
        ("sage=30dB", "no knob"),
        ("sparge=", "after '=' give 'density'"),
        ("sparge=1.5", r"a density in \(0, 1\]"),
        ("sparge=half", "a PSNR such as 30dB"),
        ("sparge=infdB", "a PSNR such as 30dB"),
        ("calibatt=1e9dB", "at most 120dB"),
        ("sparge=nan", "a PSNR such as 30dB"),
        ("sparge[topk]", r"^sparge\[topk\]: setting 'topk': give NAME=VALUE$"),
        ("sparge[topk=0.3", r"give settings as METHOD\[NAME=VALUE"),
        ("sparge[]", r"give settings as METHOD\[NAME=VALUE"),
        ("sparge=0.35[sink=true]", "before \\+ and = of the arm"),
        ("sparge[sink=true]/cdf", "before \\+ and = of the arm"),
        ("sparge[tokp=0.3]", r"^sparge\[tokp=0.3\]: sparge has no setting tokp: it has similarity, topk"),
        ("sparge[topk=half]", "topk: Input should be a valid number"),
        ("sparge[cdf=0.9]", "give one of them"),
        ("sparge[topk=0.3]=0.35", "=0.35 gives topk: leave out one of both"),
        ("sparge[block=[64,64]]", r"the choice of blocks \(--blocks\) gives block: leave out one of both"),
        ("dense[topk=0.3]", "dense has no setting topk: it has none"),
        (f"calibatt[{','.join(f'{name}={1 / 3}' for name in 'abcdefg')}]", "calibatt has no setting a, b, c"),
        (f"sparge[similarity={1 / 3},topk={1 / 3},pv_threshold={1 / 3},sink=true,int8=true]", "more than 100 letters"),
    ],
)
def test_an_arm_that_does_not_exist_is_refused_in_a_line(text: str, message: str) -> None:
    with pytest.raises((UnknownName, ValueError), match=message):
        Arm.parse(text, "flex")


def test_dense_steps_are_given_by_the_run_or_by_the_arm() -> None:
    assert Arm.parse("radial[dense_steps=0.5]", "flex").settings == "dense_steps=0.5"
    with pytest.raises(ValueError, match="what the run keeps dense in all arms gives dense_steps: leave out one"):
        Arm.parse("radial[dense_steps=0.5]", "flex", (0.1, 0.0))


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ({"models": ""}, "--models : give at least one"),
        ({"models": " , "}, "give at least one"),
        ({"methods": ""}, "--methods : give at least one"),
        ({"kernels": "flx"}, "--kernels flx: unknown kernel 'flx': did you mean flex"),
        ({"steps": "ten"}, "--steps ten: give a whole number from 1 up"),
        ({"steps": "0"}, "whole number from 1 up"),
        ({"max_time": "0"}, "--max-time 0: give seconds, more than 0"),
        ({"max_time": "nan"}, "--max-time nan: give seconds"),
        ({"rounds": "0"}, "--rounds 0: give a whole number from 1 to 10,000"),
        *(
            ({"interval": text}, f"--interval {text}: give a percentage above 0 % and below 100 %, such as 1%")
            for text in ("0%", "0.01", "100%", "-1%", "nan%", "%")
        ),
        ({"rounds": "1000000000"}, "from 1 to 10,000"),
        ({"calibration_prompts": "-1"}, "--calibration-prompts -1: give a whole number"),
        ({"densities": "1.5"}, "--densities 1.5: give a density above 0 and up to 1"),
        ({"densities": "0.5,0"}, "above 0"),
        ({"densities": "nan"}, "above 0"),
        ({"blocks": "64"}, "--blocks 64: give QUERIESxKEYS"),
        ({"dense_steps": "1.5"}, "--dense-steps 1.5: give a share, from 0 to 1"),
        ({"dense_layers": "nan"}, "--dense-layers nan: give a share"),
        ({"masks": "randm"}, "did you mean random"),
        ({"orders": "tyle"}, "did you mean tile"),
        ({"inputs": "others"}, "--inputs others: unknown choice"),
        ({"device": "tpu"}, "--device tpu: device 'tpu': this machine has"),
        ({"prompts": "nowhere.txt"}, "nowhere.txt"),
        ({"calibration": "nowhere.safetensors"}, "no such file"),
    ],
)
def test_a_value_that_makes_no_sense_is_refused_in_a_line_that_names_it(texts: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("(", r"\(")) as raised:
        Options.read(given(**texts))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ({"resolutions": "quik"}, "did you mean quick"),
        ({"methods": "calibat"}, "did you mean calibatt"),
        ({"inputs": "resampled", "models": "cogvideox-5b"}, "without text"),
        ({"weights": "planted"}, "weights can be planted in wan2.1-1.3b, wan2.1-14b, mochi-1: not in shapes"),
        ({"weights": "planted", "inputs": "resampled"}, "leave out --inputs"),
    ],
)
def test_what_a_model_or_a_method_does_not_have_is_refused(texts: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cells("attention", **texts)


def test_what_is_asked_for_twice_is_measured_once() -> None:
    once = cells("kernel", densities="0.25", masks="random", kernels="flex", blocks="64x64", orders="tile")
    twice = cells(
        "kernel", densities="0.25,0.250,0.2500001", masks="random,random", kernels="flex,flex", blocks="64x64,64x64",
        orders="tile,tile", models="shapes,shapes", resolutions="quick,quick", steps="6,6",
    )  # fmt: skip
    assert twice == once
    methods = "dense,sparge=0.35,sparge/default=0.350000001,sparge=.35,dense"
    assert cells("denoise", methods=methods, kernels="flex,flex") == [
        "shapes-quick-6-dense-fastest", "shapes-quick-6-sparge=0.35-flex",
    ]  # fmt: skip


def test_whole_videos_are_made_eager_and_compiled_where_both_are_asked_for() -> None:
    options = {"methods": "sparge", "kernels": "flex", "compile": "no,blocks"}
    assert cells("denoise", **options) == ["shapes-quick-6-sparge-flex", "shapes-quick-6-compiled-sparge-flex"]
    # a call of attention is in no graph
    assert cells("attention", **options) == ["shapes-quick-6-sparge-flex"]


def test_what_cannot_be_loaded_has_its_place_in_the_kernel_suite_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    # as one of another package may be
    theirs = replace(MODELS["ltx-video-2b"], name="theirs", loader=None, family=None)
    monkeypatch.setitem(MODELS._loaded, "theirs", theirs)
    only = {"models": "theirs", "methods": "sparge"}
    assert [bool(cells(suite, **only)) for suite in SUITES] == [suite == "kernel" for suite in SUITES]
    resampled = {**only, "inputs": "resampled"}
    assert [suite for suite in SUITES if cells(suite, **resampled)] == ["attention"]


def test_planted_weights_are_workloads_of_their_own_in_the_suites_that_need_weights() -> None:
    planted = {"models": "wan2.1-14b", "methods": "calibatt", "kernels": "flex", "weights": "planted", "layers": "2"}
    assert [suite for suite in SUITES if cells(suite, **planted)] == ["forward", "calibration", "attention", "denoise"]
    assert cells("denoise", **planted) == ["wan2.1-14b-480p-50-2layers-planted-calibatt-flex"]
    assert all("-planted-" in name for name in cells("forward", **planted))


def test_a_model_without_prompts_has_vbenchs_and_measures_on_none_that_is_learnt_from() -> None:
    cell = CATALOGUE["denoise"].cells(Options.read(given(models="wan2.1-14b", methods="sparge=0.35", kernels="flex")))[
        0
    ]
    settings = Settings(rounds=3, calibration_prompts=2, calibration=None, prompts=None, artifacts=None)
    prompts = prompts_for(cell.workload, settings, [cell.arm])
    assert (len(prompts.calibration), len(prompts.rounds), len(prompts.tuning)) == (2, 3, 2)
    assert {*prompts.rounds} <= {*vbench.to_measure_on()}
    assert {*prompts.calibration, *prompts.tuning} <= {*vbench.to_calibrate_on()}


def test_arms_that_learn_the_same_are_one_cell_of_the_calibration_suite() -> None:
    methods = "dense,sparge,random,calibatt=0.5,calibatt/masks-only,svg/learnt=30dB,svg/learnt"
    assert cells("calibration", methods=methods, kernels="flex,triton") == [
        "shapes-quick-6-calibatt-flex", "shapes-quick-6-svg/learnt-flex",
    ]  # fmt: skip
    # another size of blocks is something else to learn
    assert len(cells("calibration", methods="calibatt", blocks="64x64,32x32")) == 2


def test_every_stride_of_queries_is_a_cell_of_what_is_learnt_by_one() -> None:
    own = {"methods": "calibatt,calibatt/masks-only,scaling,budget", "kernels": "flex", "query_strides": "1,4"}
    assert cells("calibration", **own) == [
        "shapes-quick-6-calibatt-flex", "shapes-quick-6-calibatt-stride4-flex", "shapes-quick-6-scaling-flex",
        "shapes-quick-6-scaling-stride4-flex", "shapes-quick-6-budget-flex",
    ]  # fmt: skip
    assert not any("stride" in name for name in cells("denoise", **own))
    with pytest.raises(ValueError, match="half a block's 64"):
        cells("calibration", methods="calibatt", query_strides="33")


def test_whole_videos_of_planted_weights_have_as_many_layers_as_asked() -> None:
    own = {"models": "wan2.1-14b", "methods": "calibatt", "steps": "4", "layers": "2"}
    (planted,) = Options.read(given(**own, weights="planted")).workloads()
    (trained,) = Options.read(given(**own)).workloads()
    assert (planted.entry.layers, trained.entry.layers) == (2, MODELS["wan2.1-14b"].layers)
    assert str(planted) == "wan2.1-14b-480p-4-2layers-planted"
    assert (planted.facts()["layers"], planted.facts()["steps"]) == (2, 4)
    assert "layers" not in trained.facts()


def test_the_name_of_no_cell_has_the_word_for_another_suite() -> None:
    arms: list[Any] = [PermutationArm(order="token-major")]
    arms += [
        Arm(method=name, preset=preset, mode="native", kernel=kernel)
        for name, method in METHODS.items()
        for preset in method.presets
        for kernel in KERNELS
    ]
    workload = Workload(model="shapes", resolution="quick", steps=6, device=pick_device("cpu"))
    for arm in arms:
        name = str(Cell(workload=workload, arm=arm))
        assert not [suite for suite in SUITES if suite in name], name


def test_every_suite_has_its_file_and_its_place() -> None:
    assert tuple(CATALOGUE) == SUITES
    assert all(name == suite.NAME for name, suite in CATALOGUE.items())


def test_an_interval_is_a_percentage() -> None:
    assert [Options.read(given(interval=text)).interval for text in ("1%", "0.5 %", "12%")] == [0.01, 0.005, 0.12]


def test_every_option_is_declared_with_its_default() -> None:
    declared: dict[str, Any] = {}
    add_options(lambda flag, **how: declared.update({flag: how}))
    assert declared["--calibration-prompts"]["default"] == "4"
    assert len(declared) == len(fields(Options))
    # what is declared can be read
    Options.read(given())


def test_the_help_of_every_option_can_be_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    # so wide that no line is broken at a hyphen
    monkeypatch.setenv("COLUMNS", "2000")
    parser = ArgumentParser()
    add_options(parser.add_argument)
    shown = " ".join(parser.format_help().split())
    for one in fields(Options):
        assert " ".join(one.metadata["help"].split()) in shown


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"numprocesses": 2, "dist": "load"}, "-n"),
        ({"numprocesses": None, "dist": "each", "tx": ["2*popen"]}, "-n"),
        ({"benchmark_disable": True}, "--benchmark-disable"),
        ({"benchmark_skip": True}, "--benchmark-skip"),
    ],
)
def test_options_of_others_that_spoil_a_run_are_refused(
    more: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # these tests may run in a worker themselves
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    usual = {"benchmark_disable": False, "benchmark_enable": False, "benchmark_skip": False}
    refuse_pytest_options(Namespace(**usual))
    # xdist is there, and has no workers
    refuse_pytest_options(Namespace(**usual, numprocesses=0, dist="no", tx=[]))
    with pytest.raises(ValueError, match=message):
        refuse_pytest_options(Namespace(**{**usual, **more}))
    monkeypatch.setenv("PYTEST_XDIST_WORKER", "gw0")
    with pytest.raises(ValueError, match="unset it"):
        refuse_pytest_options(Namespace(**usual))


def test_an_output_that_cannot_be_written_is_refused_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # in a folder that is not there yet
    check_output(tmp_path / "out" / "bench.json")
    assert list((tmp_path / "out").iterdir()) == []
    there = tmp_path / "there.json"
    there.write_text("{}")
    check_output(there)
    assert there.read_text() == "{}"
    for path in (tmp_path, Path(os.devnull)):
        with pytest.raises(ValueError, match="is not a regular file"):
            check_output(path)
    with pytest.raises(ValueError, match="cannot be written"):
        check_output(there / "bench.json")

    def full(self: Path, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(ValueError, match="No space left on device"):
        check_output(tmp_path / "bench.json")


@pytest.mark.parametrize(("methods", "tuned"), [("dense,radial", 0), ("sparge=0.35,radial", 2), ("sparge=30dB", 2)])
def test_knobs_are_turned_on_prompts_that_are_neither_learnt_from_nor_measured(methods: str, tuned: int) -> None:
    options = Options.read(given(methods=methods, kernels="flex"))
    found = CATALOGUE["denoise"].cells(options)
    settings = Settings(rounds=3, calibration_prompts=2, calibration=None, prompts=None, artifacts=None)
    prompts = prompts_for(found[0].workload, settings, [cell.arm for cell in found])
    parts = (prompts.calibration, prompts.rounds, prompts.tuning)
    assert tuple(map(len, parts)) == (2, 3, tuned)
    assert len({prompt for part in parts for prompt in part}) == 5 + tuned
    # whoever asks for no target has the same captions
    assert prompts_for(found[0].workload, settings, []).rounds == prompts.rounds


def test_too_few_prompts_are_refused_in_a_line_that_counts_them() -> None:
    cell = CATALOGUE["denoise"].cells(Options.read(given(methods="sparge=0.35", kernels="flex")))[0]
    prompts = ("a red circle, still, over dots",) * 6
    settings = Settings(rounds=3, calibration_prompts=2, calibration=None, prompts=prompts, artifacts=None)
    said = "2 prompts to calibrate on, 2 to turn knobs on and 3 rounds need 7 prompts: --prompts has 6"
    with pytest.raises(ValueError, match=f"^{said}$"):
        prompts_for(cell.workload, settings, [cell.arm])
    assert prompts_for(cell.workload, settings, []).tuning == ()


def test_how_long_a_run_may_take_and_what_it_is_compared_with_do_not_make_it_another_one() -> None:
    for limit in (["--max-time", "60"], ["--max-time=60"], ["--gate=a.json", "--max-time", "60"], ["--gate", "a"], []):
        assert deciding(["bench", *limit, "--rounds", "8"]) == ["bench", "--rounds", "8"]


def test_a_gate_needs_a_file_to_judge_that_is_none_of_its_baselines(tmp_path: Path) -> None:
    before = tmp_path / "before.json"
    before.write_text("{}")
    assert Options.read(given(gate=str(before))).gate == (before,)
    check_gate([before], tmp_path / "now.json")
    for out, said in ((None, "give --benchmark-json=FILE too"), (before, "name another one")):
        with pytest.raises(ValueError, match=said):
            check_gate([before], out)
    with pytest.raises(ValueError, match=r"--gate x\.json: no such file"):
        Options.read(given(gate="x.json"))


def test_a_seed_is_another_workload_whose_noise_no_other_one_has() -> None:
    assert cells("denoise", methods="radial", seeds="0,3") == [
        "shapes-quick-6-radial-default", "shapes-quick-6-seed3-radial-default",
    ]  # fmt: skip
    assert cells("kernel", seeds="3")[0] == "shapes-quick-seed3-dense-fastest"
    first, other = Options.read(given(seeds="0,1")).workloads()
    assert (first.facts()["seed"], other.facts()["seed"]) == (0, 1)
    # videos that are measured, learnt from and tuned on, of as many rounds as there may be
    starts = sorted([first.noise, other.noise, CALIBRATION_SEED, TUNING_SEED])
    assert starts[0] == 0
    assert min(after - before for before, after in itertools.pairwise(starts)) >= 10_000
    with pytest.raises(ValueError, match="--seeds -1: give a whole number from 0 up"):
        Options.read(given(seeds="-1"))
