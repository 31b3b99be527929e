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
    ordered, order = energy.sort(dim=-1, descending=True, stable=True)
    # a block is needed as long as those before it fall short of the share; fp64, and the total taken from the same
    # running sum, so that a share of 1 is reached at the last block that adds anything
    reached = ordered.double().cumsum(-1)
    needed = reached - ordered.double() < mass * reached[..., -1:]
    needed[..., 0] = True
    return torch.zeros_like(needed).scatter_(-1, order, needed)
