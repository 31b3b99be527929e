"""What is kept of a call holds for its own place and video alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from calibatt.kernels.geometry import Geometry
from calibatt.methods.kept import Keeper, check_searches, outdated, searches_so_far
from calibatt.methods.site import Site

CPU = torch.device("cpu")


def site(step: int = 5, *, grid: tuple[int, int, int] = (2, 3, 4), **where: Any) -> Site:
    chosen: dict[str, Any] = {"branch": "cond", "layer": 0, "layers": 2}
    return Site(
        geometry=Geometry(grid=grid, heads=1, head_dim=8), step=step, steps=10, sigma=0.5, **(chosen | where)
    )  # fmt: skip


@pytest.fixture
def keeper() -> Keeper[str]:
    made: Keeper[str] = Keeper()
    made.keep("first", site(), CPU)
    return made


@pytest.mark.parametrize("step", [5, 6, 9])
def test_it_holds_from_its_own_step_on(keeper: Keeper[str], step: int) -> None:
    last = keeper.last(site(step), CPU)
    assert last is not None
    assert (last.made, last.step) == ("first", 5)


@pytest.mark.parametrize(
    "where",
    [{"step": 4}, {"branch": "uncond"}, {"layer": 1}, {"sample": 1}, {"grid": (4, 3, 2)}],
    ids=["step-before", "branch", "layer", "sample", "geometry"],
)
def test_it_does_not_hold_elsewhere(keeper: Keeper[str], where: dict[str, Any]) -> None:
    assert keeper.last(site(**where), CPU) is None


def test_it_does_not_hold_on_another_device(keeper: Keeper[str]) -> None:
    assert keeper.last(site(), torch.device("meta")) is None


def test_the_last_takes_the_place_of_what_was_kept_there_and_of_nothing_else(keeper: Keeper[str]) -> None:
    keeper.keep("other", site(branch="uncond"), CPU)
    keeper.keep("second", site(7), CPU)
    second, other = keeper.last(site(8), CPU), keeper.last(site(8, branch="uncond"), CPU)
    assert second is not None
    assert other is not None
    assert (second.made, second.step, other.made) == ("second", 7, "other")
    assert keeper.last(site(6), CPU) is None


def test_it_forgets_everything_when_told(keeper: Keeper[str]) -> None:
    keeper.keep("other", site(branch="uncond"), CPU)
    keeper.clear()
    assert keeper.last(site(), CPU) is None
    assert keeper.last(site(branch="uncond"), CPU) is None


def test_searches_are_rounded_to_whole_steps_and_known_from_their_own_on() -> None:
    # of ten steps
    assert [searches_so_far((0.0, 0.24, 0.66), site(step)) for step in (0, 1, 2, 6, 7)] == [
        [0], [0], [0, 2], [0, 2], [0, 2, 7]
    ]  # fmt: skip
    assert searches_so_far((0.24,), site(1)) == []


@pytest.mark.parametrize(("search", "step", "due"), [(5, 5, True), (5, 6, False), (7, 7, True), (7, 9, True)])
def test_a_search_is_made_at_its_step_and_later_where_it_was_missed(
    keeper: Keeper[str], search: int, step: int, due: bool
) -> None:
    last = keeper.last(site(step), CPU)
    assert last is not None
    assert outdated(last, search, site(step)) == due


@pytest.mark.parametrize("steps", [(0.4, 0.2), (0.2, 0.2), (-0.1,), (0.5, 1.1)])
def test_searches_that_do_not_ascend_within_the_schedule_are_refused(steps: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="search steps are ascending shares of the schedule, 0 to 1"):
        check_searches(steps)
