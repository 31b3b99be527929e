"""How methods are named, built and shown, whatever they are."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from typing import Any

import pytest
import torch

from calibatt.kernels.geometry import Geometry
from calibatt.kernels.names import UnknownName
from calibatt.methods.base import Method
from calibatt.methods.catalogue import METHODS, build, has_blocks, learner, learns_from, setting_text, settings_from
from calibatt.methods.learning import Learner, Learnt, settings_of
from calibatt.methods.site import Site

# 1000 tokens in blocks of 32 × 16: 32 × 63 blocks, the last of each axis shorter
GEOMETRY = Geometry(grid=(8, 5, 25), heads=3, head_dim=8)
BLOCK = (32, 16)
SITE = Site(geometry=GEOMETRY, step=49, steps=50, sigma=0.5, branch="cond", layer=7, layers=8)
ARMS = [(name, preset) for name, method in METHODS.items() for preset in method.presets]
LEARNING = [arm for arm in ARMS if learns_from(*arm) is not None]
Learn = Callable[..., Learnt]


@pytest.fixture
def calibration(tabled: Learn) -> Learn:
    """An empty calibration of a preset, by the settings it is learnt under."""

    def made(name: str, preset: str = "default", **settings: Any) -> Learnt:
        own = learner(name, preset=preset, **settings)
        assert own is not None
        return tabled(name, SITE, {}, own)

    return made


# --- names and looks -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_its_name_a_default_and_a_knob_that_exists(name: str) -> None:
    method = METHODS[name]
    assert issubclass(method, Method)
    assert method.name == name
    assert "default" in method.presets
    if method.knob is not None:
        assert hasattr(method.presets["default"], method.knob.field)
    for setting in method.without_dense:
        assert hasattr(method.presets["default"], setting)


def test_every_method_has_a_label_of_its_own() -> None:
    assert len({method.label for method in METHODS.values()}) == len(METHODS)


def test_unknown_names_and_settings_are_refused_and_the_known_ones_named() -> None:
    with pytest.raises(UnknownName, match="unknown method 'radail': did you mean radial"):
        build("radail")
    with pytest.raises(UnknownName, match="unknown preset of radial 'defualt': did you mean default"):
        build("radial", preset="defualt")
    with pytest.raises(ValueError, match="radial has no setting decoy: it has decay, "):
        build("radial", decoy=1)
    with pytest.raises(ValueError, match="dense has no setting decay: it has none"):
        build("dense", decay=1)


def test_presets_without_blocks_have_none_to_choose() -> None:
    assert has_blocks("radial")
    assert has_blocks("svg2")
    assert not has_blocks("svg2", preset="clusters")
    assert not has_blocks("dense")


# --- calibrations ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "preset", "source"),
    [
        ("calibatt", "masks-only", "calibatt"), ("random", "default", "calibatt"), ("svg", "default", None),
        ("svg", "learnt", "svg"), ("sparge", "default", None), ("sparge", "tuned", "sparge"),
    ],
)  # fmt: skip
def test_a_preset_learns_from_its_own_method_from_another_or_from_none(
    name: str, preset: str, source: str | None
) -> None:
    assert learns_from(name, preset) == source


def test_a_setting_may_be_what_makes_a_preset_learn() -> None:
    assert learns_from("blasst") is None
    assert learns_from("blasst", threshold=None, sparsity=0.5) == "blasst"


@pytest.mark.parametrize(("name", "preset"), LEARNING)
def test_a_preset_that_learns_says_how_to_calibrate_it(name: str, preset: str) -> None:
    source = learns_from(name, preset)
    with pytest.raises(ValueError, match=f"^{name}/{preset} needs a calibration: .*calibrate --method {source}`"):
        build(name, preset=preset)


def test_a_calibration_that_is_not_needed_is_refused(calibration: Learn) -> None:
    with pytest.raises(ValueError, match=r"^svg/default learns nothing: leave out the calibration of svg$"):
        build("svg", calibration=calibration("svg", "learnt"))


def test_a_calibration_of_another_method_is_refused(calibration: Learn) -> None:
    with pytest.raises(ValueError, match=r"^scaling/default needs a calibration of scaling: this one is of compact$"):
        build("scaling", calibration=calibration("compact"))


def test_the_first_setting_that_was_another_is_named_with_both_values(calibration: Learn) -> None:
    learnt = calibration("sta", "searched", block=(64, 64))
    with pytest.raises(ValueError, match=r"^sta/searched has block \[128, 128\], .* learnt with \[64, 64\]: set"):
        build("sta", preset="searched", calibration=learnt)
    # which has other steps dense, and so looks at others
    with pytest.raises(ValueError, match=r"^sta/searched-no-warmup has dense_steps 0.0, .* learnt with 0.24: set"):
        build("sta", preset="searched-no-warmup", calibration=learnt, block=(64, 64))
    # a setting of another version
    other = replace(learnt, settings={**learnt.settings, "stride": 3})
    with pytest.raises(ValueError, match=r"^sta/searched has stride None, its calibration was learnt with 3"):
        build("sta", preset="searched", calibration=other, block=(64, 64))
    assert build("sta", preset="searched", calibration=learnt, block=(64, 64)).learnt is learnt


def test_settings_that_the_learner_does_not_read_need_no_other_calibration(calibration: Learn) -> None:
    learnt = calibration("compact")
    assert build("compact", preset="hunyuan", calibration=learnt, recall=0.5).learnt is learnt
    windows = calibration("sta", "searched")
    assert build("sta", preset="searched", calibration=windows, reach=2.0).learnt is windows


@pytest.mark.parametrize(("name", "preset"), [arm for arm in LEARNING if learner(arm[0], preset=arm[1]) is not None])
def test_a_learner_is_what_its_settings_say_and_nothing_else(name: str, preset: str) -> None:
    one, other = (learner(name, preset=preset, block=BLOCK) for _ in range(2))
    assert isinstance(one, Learner)
    assert one == other
    assert hash(one) == hash(other)
    assert settings_of(one)


# --- knobs -----------------------------------------------------------------------------------------------------------


# CalibAtt's plans are its calibration's
@pytest.mark.parametrize(
    "name", [name for name, method in METHODS.items() if method.knob is not None and learns_from(name) != "calibatt"]
)
def test_density_is_monotonic_along_the_knob(name: str, learn: Learn) -> None:
    knob = METHODS[name].knob
    assert knob is not None
    q, k, v = torch.randn(3, 3, 1000, 8, generator=torch.Generator().manual_seed(0))
    values = [knob.low + (knob.high - knob.low) * share for share in (0, 0.01, 0.05, 0.2, 0.5, 1)]
    # where a default leaves low blocks to the kernel, these do not
    preset = next((one for one in ("no-warmup", "oracle") if one in METHODS[name].presets), "default")
    given: dict[str, Any] = {}
    if (source := learns_from(name, preset)) is not None:
        # a frame has five rows, of which fewer can be anchors
        own = learner(source, preset=preset, block=BLOCK, **({"anchors": 2} if source == "calibatt" else {}))
        assert own is not None
        given = {"calibration": learn(source, own, {SITE: [(q, k, v)]})}
    built = [build(name, preset=preset, block=BLOCK, **given, **{knob.field: value}) for value in values]
    if knob.over_videos:
        # what was low at a call is left out from the next on
        for method in built:
            method.plan(q, k, v, replace(SITE, step=48))
    found = [method.plan(q, k, v, SITE).density().mean().item() for method in built]
    assert found in (sorted(found), sorted(found, reverse=True))
    assert abs(found[-1] - found[0]) > 0.1


@pytest.mark.parametrize(("name", "preset"), ARMS)
def test_every_preset_can_be_set_from_texts(name: str, preset: str) -> None:
    config = METHODS[name].presets[preset]
    values = {field.name: getattr(config, field.name) for field in fields(config)}
    texts = [f"{field}={json.dumps(value, default=asdict)}" for field, value in values.items()]
    assert settings_from(name, preset, texts) == values
    # and as arms are named
    assert settings_from(name, preset, [setting_text(*one) for one in values.items()]) == values


def test_settings_from_texts_are_of_their_types() -> None:
    texts = ["beside=2", "over_prompts=max", "block=[64, 32]", "weighed=false", "density=1"]
    found = settings_from("budget", "default", texts)
    assert found == {
        "beside": 2, "over_prompts": "max", "block": (64, 32), "weighed": False, "density": 1.0,
    }  # fmt: skip
    shown = ["beside=2", "over_prompts=max", "block=[64,32]", "weighed=false", "density=1.0"]
    assert [setting_text(*one) for one in found.items()] == shown
    # a text that would be read as something else
    assert setting_text("name", "null") == 'name="null"'


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["beside=two"], "beside: Input should be a valid integer"),
        (["beside=2.5"], "beside: Input should be a valid integer"),
        (["over_prompts=most"], "over_prompts: Input should be 'mean' or 'max'"),
        (["density=NaN"], "density: "),
        (["beside=0"], "at least one prompt: got beside=0"),
        (["bside=2"], "budget has no setting bside: it has density, "),
        (["beside"], "setting 'beside': give NAME=VALUE"),
        (["=2"], "setting '=2': give NAME=VALUE"),
        (["beside=2", "beside=3"], "setting beside: give it once"),
    ],
)
def test_what_is_no_setting_is_refused_in_one_line(given: list[str], says: str) -> None:
    with pytest.raises(ValueError, match=says) as caught:
        settings_from("budget", "default", given)
    assert "\n" not in str(caught.value)
