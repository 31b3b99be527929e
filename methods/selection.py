"""Choosing the fewest blocks that hold a given share of attention."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def smallest_set(energy: Float[Tensor, "*rows blocks"], mass: float) -> Bool[Tensor, "*rows blocks"]:
    """The smallest set of blocks whose energy reaches a share of the row's; of equal blocks the first are taken.

    Args:
        energy: attention mass of each block, not negative; a row need not sum to 1.
        mass: wanted share of the row's sum, 0 to 1. At least one block is always kept.

    Raises:
        ValueError: the share is outside 0 to 1.
    """
    if not 0 <= mass <= 1:
        raise ValueError(f"mass is a share of the row's energy, 0 to 1: got {mass}")
    before, order = _ranked(energy)
    needed = before < mass
    needed[..., 0] = True
    return torch.zeros_like(needed).scatter_(-1, order, needed)


def mass_before(energy: Float[Tensor, "*rows blocks"]) -> Float[Tensor, "*rows blocks"]:
    """The share of its row's energy that lies in blocks which are taken before a block: any above it needs the block.

    Args:
        energy: as for `smallest_set`, in which every row has some.

    Returns:
        0 to 1, fp64.
    """
    before, order = _ranked(energy)
    return torch.zeros_like(before).scatter_(-1, order, before)


def _ranked(energy: Tensor) -> tuple[Tensor, Tensor]:
    """Blocks from the largest to the smallest: the share before each, and which it is."""
    ordered, order = energy.sort(dim=-1, descending=True, stable=True)
    # fp64, and the total taken from the same running sum, so that a share of 1 is reached at the last block that adds
    # anything
    reached = ordered.double().cumsum(-1)
    return (reached - ordered.double()) / reached[..., -1:], order
