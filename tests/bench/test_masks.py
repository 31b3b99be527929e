"""Masks to time kernels with: of the density that was asked for, and as uneven as they say."""

from __future__ import annotations

import pytest
import torch

from calibatt.bench.masks import (
    MASK_SOURCES,
    MaskSource,
    banded_keep,
    captured_keep,
    even_keep,
    make_mask,
    make_plan,
)
from calibatt.kernels.geometry import Geometry

# 4,000 tokens: the last block of 64 has 32
GEOMETRY = Geometry(grid=(10, 20, 20), heads=6, head_dim=64)


def _energy() -> torch.Tensor:
    """One head that looks everywhere, one that looks along the diagonal."""
    flat = torch.full((48, 48), 1 / 48)
    sharp = torch.softmax(-((torch.arange(48)[:, None] - torch.arange(48)).abs().float()), dim=-1)
    return torch.stack((flat, sharp))


@pytest.mark.parametrize("source", MASK_SOURCES)
@pytest.mark.parametrize("density", [0.5, 0.25, 0.1])
@pytest.mark.parametrize("block", [(128, 64), (64, 64)])
def test_it_has_the_density_that_was_asked_for(source: MaskSource, density: float, block: tuple[int, int]) -> None:
    mask = make_mask(source, density, GEOMETRY, block, _energy)
    assert mask.density().mean().item() == pytest.approx(density, abs=0.03)
    again = make_mask(source, density, GEOMETRY, block, _energy)
    assert torch.equal(mask.bits, again.bits)


def test_the_energy_is_asked_for_only_where_it_is_used() -> None:
    def never() -> torch.Tensor:
        raise AssertionError("nobody needs this")

    make_mask("random", 0.5, GEOMETRY, (64, 64), never)


def test_captured_masks_are_uneven_over_heads() -> None:
    keep = captured_keep(0.3, 6, 63, 63, _energy())
    shares = keep.float().mean((1, 2))
    assert shares.max() > 2 * shares.min()


def test_a_band_lies_along_the_diagonal_whatever_the_blocks() -> None:
    keep = banded_keep(0.3, 1, 16, 32)[0]
    assert keep.float().argmax(1).tolist() == sorted(keep.float().argmax(1).tolist())
    assert keep[torch.arange(16), torch.arange(16) * 2].all()


def test_rows_need_no_blocks_and_compute_their_share() -> None:
    plan = make_plan("rows", 0.25, GEOMETRY, None, _energy)
    assert set(plan.kinds) == {"reused"}
    assert plan.density().tolist() == pytest.approx([0.25] * 6)


def test_every_other_head_of_a_mixed_plan_reuses_rows() -> None:
    plan = make_plan("mixed", 0.25, GEOMETRY, (64, 64), _energy)
    assert plan.kinds == ("masked", "reused") * 3
    assert plan.density().mean().item() == pytest.approx(0.25, abs=0.03)


def test_even_masks_keep_as_many_blocks_in_every_row() -> None:
    keep = even_keep(0.375, 3, 5, 16)
    assert (keep.sum(-1) == 6).all()
    # and not the same ones
    assert len({tuple(row.tolist()) for row in keep.flatten(0, 1)}) > 10
