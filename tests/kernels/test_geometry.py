"""How tokens are laid out, and how names are looked up."""

from __future__ import annotations

from typing import Any

import pytest

from calibatt.kernels.geometry import Geometry
from calibatt.kernels.names import UnknownName, look_up


def test_tokens_are_those_of_the_grid_and_the_text() -> None:
    geometry = Geometry(grid=(21, 45, 80), heads=40, head_dim=128, text_tokens=5, text_side="first")
    assert (geometry.frame_tokens, geometry.video_tokens, geometry.tokens) == (3600, 75600, 75605)
    assert geometry.video_start == 5
    assert str(geometry) == "21×45×80+5 tokens, 40 heads × 128"


def test_video_starts_at_once_where_text_stands_last() -> None:
    assert Geometry(grid=(1, 2, 3), heads=1, head_dim=8, text_tokens=5).video_start == 0


@pytest.mark.parametrize("wrong", [{"grid": (0, 4, 4)}, {"heads": 0}, {"head_dim": 0}, {"text_tokens": -1}])
def test_a_geometry_without_extent_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="three positive grid extents"):
        Geometry(**{"grid": (1, 4, 4), "heads": 1, "head_dim": 8, **wrong})


def test_a_known_name_gives_its_entry() -> None:
    assert look_up({"flex": 1}, "flex", "kernel") == 1


def test_an_unknown_name_names_the_nearest() -> None:
    with pytest.raises(UnknownName, match="unknown kernel 'flax': did you mean flex\\?"):
        look_up({"flex": 1, "sdpa-math": 2}, "flax", "kernel")


def test_a_name_near_to_nothing_names_what_there_is() -> None:
    with pytest.raises(UnknownName, match="unknown kernel 'zzz': there are flex, sdpa-math"):
        look_up({"flex": 1, "sdpa-math": 2}, "zzz", "kernel")
