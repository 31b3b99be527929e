"""Levels of loss against the sets of blocks that they stand for."""

from __future__ import annotations

import pytest
import torch

from calibatt.methods.calibatt.levels import MOST_LEVEL, MOST_LOSS, common_levels, keep_at, loss_levels
from calibatt.methods.selection import mass_before, top_p


def energies(videos: int = 1, seed: int = 0) -> torch.Tensor:
    return torch.randn(videos, 3, 20, 30, generator=torch.Generator().manual_seed(seed)).mul(2).softmax(-1)


@pytest.mark.parametrize("step", [1, 30, 64, 65, 100])
def test_at_every_step_of_loss_a_video_keeps_the_top_p_that_reaches_what_is_left(step: int) -> None:
    energy, mass = energies()[0], 0.9
    loss = (step / 64) ** 2
    expected = top_p(energy, 1 - loss * (1 - mass))
    assert torch.equal(keep_at(loss_levels(1 - mass_before(energy), mass), loss), expected)


def test_no_loss_keeps_every_block_that_has_any_mass_and_the_most_keeps_one_a_row() -> None:
    energy = energies()[0]
    energy[:, :, ::3] = 0
    levels = loss_levels(1 - mass_before(energy), 0.9)
    assert torch.equal(keep_at(levels, 0.0), energy > 0)
    assert (keep_at(levels, MOST_LOSS).sum(-1) == 1).all()


def test_a_schedule_that_loses_nothing_keeps_every_block_that_has_any_mass_at_every_loss() -> None:
    energy = energies()[0]
    energy[:, :, ::3] = 0
    assert torch.equal(keep_at(loss_levels(1 - mass_before(energy), 1.0), 4.0), energy > 0)


@pytest.mark.parametrize("needed", [1, 3, 5])
@pytest.mark.parametrize("loss", [0.25, 1.0, 4.0])
def test_levels_in_common_are_votes_at_every_loss(needed: int, loss: float) -> None:
    energy, mass = energies(videos=5), 0.95
    votes = sum(top_p(video, 1 - loss * (1 - mass)).long() for video in energy)
    levels = [loss_levels(1 - mass_before(video), mass) for video in energy]
    keep = keep_at(common_levels(levels, needed), loss)
    enough = torch.as_tensor(votes >= needed)
    rows = enough.any(-1)
    assert torch.equal(keep[rows], enough[rows])
    # no row is left without keys
    assert keep.any(-1).all()


@pytest.mark.parametrize(("videos", "needed"), [(1, 1), (16, 1), (16, 8), (16, 16), (300, 280)])
def test_levels_in_common_are_the_largest_of_as_many_as_are_needed(videos: int, needed: int) -> None:
    levels = torch.randint(0, 256, (videos, 2, 5, 7), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    levels[:, 0, 0], levels[:, 0, 1] = 0, MOST_LEVEL
    expected = levels.sort(dim=0, descending=True).values[needed - 1]
    assert torch.equal(common_levels(list(levels), needed), expected)


@pytest.mark.parametrize("loss", [-0.1, 15.8, float("nan")])
def test_a_loss_that_a_byte_does_not_reach_is_refused(loss: float) -> None:
    with pytest.raises(ValueError, match=r"from 0 to 15\.75"):
        keep_at(loss_levels(1 - mass_before(energies()[0]), 0.9), loss)
