"""What was learnt: where it holds, and what it says that it was learnt under."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from calibatt.kernels.geometry import Geometry
from calibatt.methods.learning import CalibrationMismatch, Learnt, settings_of
from calibatt.methods.site import Site
from calibatt.methods.sta import WindowSearch

GEOMETRY = Geometry(grid=(2, 4, 4), heads=2, head_dim=8, text_tokens=8)
SITE = Site(geometry=GEOMETRY, step=1, steps=3, sigma=0.5, branch="cond", layer=2, layers=4)


@pytest.fixture
def learnt(tabled: Callable[..., Learnt]) -> Learnt:
    return tabled("sta", SITE, {"distance": torch.arange(12).view(3, 4)})


def elsewhere(**geometry: Any) -> Site:
    return replace(SITE, geometry=replace(GEOMETRY, **geometry))


def test_a_sites_part_is_that_of_its_step_and_layer(learnt: Learnt) -> None:
    assert learnt.at("distance", SITE).item() == 4 * 1 + 2
    assert learnt.at("distance", replace(SITE, branch="uncond")).item() == 4 * 1 + 2


def test_a_prompt_may_have_fewer_text_tokens_and_not_more(learnt: Learnt) -> None:
    learnt.check(elsewhere(text_tokens=0))
    with pytest.raises(CalibrationMismatch, match=r"^what sta learnt is for .*, not for .*: run `calibatt calibrate`"):
        learnt.check(elsewhere(text_tokens=9))


def test_tables_by_token_block_hold_for_one_number_of_text_tokens(learnt: Learnt) -> None:
    learnt.check_blocks(SITE)
    with pytest.raises(CalibrationMismatch, match="is for 8 text tokens, not for 7: run"):
        learnt.check_blocks(elsewhere(text_tokens=7))


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (elsewhere(grid=(4, 2, 4)), "4×2×4|4, 2, 4"),
        (elsewhere(heads=4), "heads=4|4 heads"),
        (replace(SITE, steps=4), "3 steps, not for 4"),
        (replace(SITE, layers=3), "4 layers, not for 3"),
    ],
)
def test_other_videos_are_refused_in_one_line_that_names_both(learnt: Learnt, other: Site, said: str) -> None:
    for check in (learnt.check, learnt.check_blocks):
        with pytest.raises(CalibrationMismatch, match=said) as caught:
            check(other)
        assert "\n" not in str(caught.value)


def test_a_table_without_steps_and_layers_cannot_be_kept(learnt: Learnt) -> None:
    with pytest.raises(ValueError, match=r"sta's table distance is \[4, 3\], for 3 steps and 4 layers"):
        replace(learnt, tables={"distance": torch.zeros(4, 3)})


def test_settings_are_the_learners_fields_as_json_has_them() -> None:
    learner = WindowSearch(candidates=((1, 2, 3),), dense_steps=0.25, tile=(1, 2, 2), block=(16, 8))
    assert settings_of(learner) == {
        "candidates": [[1, 2, 3]], "dense_steps": 0.25, "tile": [1, 2, 2], "block": [16, 8],
    }  # fmt: skip
