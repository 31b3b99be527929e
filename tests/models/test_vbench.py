"""VBench's prompts, divided by dimension."""

from __future__ import annotations

import json

import pytest

from calibatt.models import vbench


def test_every_prompt_of_vbench_is_in_one_of_the_halves() -> None:
    groups = json.loads(vbench._FILE.read_text())["groups"]
    prompts = [prompt for group in groups for prompt in group["prompts"]]
    assert len(prompts) == 946
    halves = (*vbench.to_calibrate_on(), *vbench.to_measure_on())
    assert sorted(halves) == sorted(set(prompts))


def test_half_of_the_dimensions_are_calibrated_on_and_none_is_divided() -> None:
    groups = json.loads(vbench._FILE.read_text())["groups"]
    dimensions = {name for group in groups for name in group["dimensions"]}
    assert (len(dimensions), len(vbench.CALIBRATED)) == (16, 8)
    assert dimensions > vbench.CALIBRATED
    for group in groups:
        assert len({name in vbench.CALIBRATED for name in group["dimensions"]}) == 1


def test_more_prompts_than_there_are_is_refused_in_a_line() -> None:
    assert vbench.choose(("a", "b"), 1, "to measure on") == ("a",)
    with pytest.raises(ValueError, match="3 prompts to measure on are needed, and VBench has 2"):
        vbench.choose(("a", "b"), 3, "to measure on")
