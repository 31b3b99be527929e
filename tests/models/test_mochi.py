"""Mochi: one sequence of video and text without padding, and both branches of guidance in one batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from calibatt.kernels.catalogue import KERNELS
from calibatt.models.adapter import attached

SDPA = KERNELS["sdpa-flash"]


@pytest.fixture
def mochi(tiny: Callable[[str], Any]) -> Any:
    return tiny("mochi-1")


def test_rows_of_the_batch_are_samples_of_both_branches_without_their_padding(mochi: Any, note: Any) -> None:
    with attached(mochi.pipe, note, SDPA):
        mochi.run()
    first = note.sites[:4]
    assert [(site.branch, site.sample) for site in first] == [("uncond", 0), ("uncond", 1), ("cond", 0), ("cond", 1)]
    # an empty prompt is its end alone
    assert [site.geometry.text_tokens for site in first] == [1, 1, 6, 12]
    assert {(site.geometry.grid, site.geometry.text_side) for site in note.sites} == {((3, 4, 6), "last")}


def test_without_guidance_all_rows_are_conditional(mochi: Any, note: Any) -> None:
    with attached(mochi.pipe, note, SDPA):
        mochi.run(guidance_scale=1.0)
    assert {site.branch for site in note.sites} == {"cond"}
