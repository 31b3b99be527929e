"""Votes on packed bits, against numbers."""

from __future__ import annotations

import pytest
import torch

from calibatt.kernels.mask import packed, unpacked
from calibatt.methods.calibatt.votes import Votes, ones


def drawn(voters: int, share: float, blocks: int = 37) -> torch.Tensor:
    return torch.rand(voters, 3, 5, blocks, generator=torch.Generator().manual_seed(voters)) < share


@pytest.mark.parametrize("voters", [1, 2, 3, 4, 7, 16, 33])
@pytest.mark.parametrize("share", [0.02, 0.4, 0.95])
def test_majority_and_agreement_are_those_of_counts(voters: int, share: float) -> None:
    masks = drawn(voters, share)
    votes = Votes([packed(mask) for mask in masks])
    counts = masks.sum(0)
    for threshold in {1, (voters + 1) // 2, voters}:
        # in a row without enough votes for any, those with the most; in one without votes, none
        keep = (counts >= counts.amax(-1, keepdim=True).clamp(max=threshold)) & (counts > 0)
        found = votes.majority(threshold)
        assert torch.equal(found, packed(keep))
        common, either = (masks & keep).sum((0, 2, 3)), (masks.sum((0, 2, 3)) + voters * keep.sum((1, 2)))
        assert torch.equal(votes.agreement(found), common / (either - common))


def test_in_a_row_without_enough_votes_those_with_the_most_are_kept() -> None:
    masks = [[1, 1, 0, 0], [1, 0, 0, 0], [1, 0, 1, 0], [0, 0, 0, 1]]
    votes = Votes([packed(torch.tensor(mask, dtype=torch.bool).view(1, 1, 4)) for mask in masks])
    assert unpacked(votes.majority(3), 4).flatten().tolist() == [True, False, False, False]
    assert unpacked(votes.majority(4), 4).flatten().tolist() == [True, False, False, False]
    assert unpacked(votes.majority(1), 4).all()


def test_agreement_is_one_where_all_keep_the_same_and_the_overlap_otherwise() -> None:
    masks = [packed(torch.tensor([[mask]], dtype=torch.bool)) for mask in ([1, 1, 0, 0], [1, 0, 1, 0])]
    common = packed(torch.tensor([[[True, True, True, False]]]))
    # (2 + 2) kept in common, (3 + 3) kept in either
    assert Votes(masks).agreement(common).item() == pytest.approx(4 / 6)
    assert Votes(masks[:1]).agreement(masks[0]).item() == 1.0


def test_all_bits_of_a_word_count() -> None:
    assert ones(torch.full((1, 3, 8), 255, dtype=torch.uint8)).tolist() == [3 * 64]
