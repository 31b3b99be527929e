"""The schedule against the numbers the paper prints."""

import math

import pytest

from calibatt.methods.calibatt.schedule import Schedule


@pytest.mark.parametrize(("tokens", "late"), [(32_760, 0.842), (75_600, 0.903)])
def test_the_late_mass_of_wan_is_the_papers(tokens: int, late: float) -> None:
    assert Schedule.many_step(tokens).late == pytest.approx(late, abs=5e-4)


def test_the_first_step_keeps_the_early_mass() -> None:
    assert Schedule.many_step(32_760).mass(0, 50) == pytest.approx(0.99)
    assert Schedule.distilled().mass(0, 4) == pytest.approx(0.863)


def test_the_mass_falls_by_the_decay_over_the_whole_generation() -> None:
    schedule = Schedule(early=0.9, late=0.5, decay=2.0)
    assert schedule.mass(25, 50) == pytest.approx(0.5 + 0.4 * math.exp(-1))
    assert schedule.mass(1, 2) == schedule.mass(25, 50)


def test_the_fit_of_the_distilled_model_is_taken_for_as_few_steps_as_it_has() -> None:
    taken = [Schedule.published(32_760, steps) for steps in (1, 4, 5, 6, 50)]
    assert taken == [Schedule.distilled()] * 2 + [Schedule.many_step(32_760)] * 3


@pytest.mark.parametrize("wrong", [{"early": 0.0}, {"late": 1.1}, {"decay": -1.0}, {"late": math.nan}])
def test_an_impossible_schedule_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="masses in"):
        Schedule(**{"early": 0.9, "late": 0.8, "decay": 1.0, **wrong})
