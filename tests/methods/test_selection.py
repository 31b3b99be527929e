"""The smallest set of blocks that holds a share of attention, and so many blocks."""

from __future__ import annotations

import itertools

import pytest
import torch

from calibatt.methods.selection import mass_before, top_k, top_p


@pytest.mark.parametrize("mass", [0.1, 0.5, 0.842, 0.99])
def test_no_smaller_set_reaches_the_share(mass: float) -> None:
    energy = torch.rand(20, 7, generator=torch.Generator().manual_seed(0)).double().pow(3)
    for row, kept in zip(energy, top_p(energy, mass), strict=True):
        wanted = mass * row.sum().item()
        assert row[kept].sum().item() >= wanted - 1e-12
        fewer = itertools.combinations(row.tolist(), int(kept.sum()) - 1)
        assert all(sum(some) < wanted for some in fewer)


@pytest.mark.parametrize(
    ("count", "kept"), [(-1, [3]), (0, [3]), (1, [3]), (2, [1, 3]), (3, [1, 2, 3]), (9, [0, 1, 2, 3])]
)
def test_so_many_of_the_highest_are_taken_one_at_least_and_of_equal_ones_the_first(count: int, kept: list[int]) -> None:
    scores = torch.tensor([[[-2.0, 0.5, 0.5, 3.0]]])
    assert top_k(scores, count).nonzero()[:, -1].tolist() == kept
    assert top_k(scores[..., :0], count).shape == (1, 1, 0)


def test_of_equal_blocks_the_first_are_taken() -> None:
    assert top_p(torch.full((1, 4), 0.25), 0.5).tolist() == [[True, True, False, False]]


def test_a_share_that_is_just_reached_needs_no_more() -> None:
    assert top_p(torch.tensor([0.25, 0.5, 0.25]), 0.5).tolist() == [False, True, False]


def test_a_share_of_nothing_keeps_the_largest_block() -> None:
    assert top_p(torch.tensor([[0.1, 0.7, 0.2]]), 0.0).tolist() == [[False, True, False]]


def test_the_whole_is_every_block_that_has_any() -> None:
    energy = torch.tensor([[0.0, 0.3, 0.0, 0.2, 0.5]])
    assert top_p(energy, 1.0).tolist() == [[False, True, False, True, True]]


def test_the_whole_of_many_fp32_blocks_needs_no_empty_one_and_leaves_none_out() -> None:
    # 591 blocks, as at 720p: an fp32 running sum drifts from the total by more than the smallest block
    energy = torch.rand(64, 591, generator=torch.Generator().manual_seed(0)).mul(12).softmax(-1)
    energy[:, ::3] = 0
    assert torch.equal(top_p(energy, 1.0), energy > 0)


def test_a_row_need_not_sum_to_one() -> None:
    energy = torch.rand(5, 9, generator=torch.Generator().manual_seed(0))
    assert torch.equal(top_p(energy, 0.7), top_p(energy * 64, 0.7))


def test_an_empty_row_keeps_one_block() -> None:
    assert top_p(torch.zeros(2, 3), 0.9).sum(-1).tolist() == [1, 1]


def test_a_block_is_needed_above_the_mass_of_those_before_it() -> None:
    energy = torch.tensor([[0.25, 0.5, 0.0, 0.25]])
    assert mass_before(energy).tolist() == [[0.5, 0.0, 1.0, 0.75]]


@pytest.mark.parametrize("mass", [-0.1, 1.1, float("nan")])
def test_a_share_outside_0_to_1_is_refused(mass: float) -> None:
    with pytest.raises(ValueError, match="0 to 1: got"):
        top_p(torch.ones(1, 3), mass)


# shares 0.5, 0.25, 0.125 and 0.125, exact in binary: those before the third hold 0.75
@pytest.mark.parametrize(
    ("mass", "kept"),
    [
        (0.0, [1]),
        (0.49, [1]),
        (0.5, [1, 3]),
        (0.74, [1, 3]),
        (0.75, [0, 1, 3]),
        (0.9, [0, 1, 2, 3]),
        (1.0, [0, 1, 2, 3]),
    ],
)
def test_inclusive_a_mass_that_is_met_exactly_takes_one_block_more(mass: float, kept: list[int]) -> None:
    weights = torch.tensor([[[0.125, 0.5, 0.125, 0.25]]])
    assert top_p(weights, mass, inclusive=True)[0, 0].nonzero().flatten().tolist() == kept


@pytest.mark.parametrize("blocks", [3, 7, 1000])
def test_inclusive_the_whole_is_every_block_whatever_rounding_does_to_its_sum(blocks: int) -> None:
    weights = torch.randn(50, blocks, generator=torch.Generator().manual_seed(0)).softmax(-1)
    assert top_p(weights, 1.0, inclusive=True).all()
    assert top_p(torch.tensor([0.0, 1.0, 0.0]), 1.0, inclusive=True).all()


def test_the_least_is_kept_whatever_the_mass() -> None:
    weights = torch.tensor([0.1, 0.4, 0.2, 0.3]).expand(3, 2, 4)
    assert top_p(weights, 0.0, least=2)[0, 0].tolist() == [False, True, False, True]
    assert top_p(weights, 0.8, least=2)[0, 0].tolist() == [False, True, True, True]
    each = top_p(weights, 0.0, least=torch.tensor([0, 2, 4])[:, None, None])
    assert each[:, 0].int().tolist() == each[:, 1].int().tolist() == [[0, 1, 0, 0], [0, 1, 0, 1], [1, 1, 1, 1]]
