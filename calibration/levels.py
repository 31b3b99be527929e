"""How much loss each block withstands: a byte a block, from which masks follow at every loss."""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from calibatt.methods.selection import mass_before

# Loss is told apart in steps (j / 64)²: 1, what the schedule leaves out, is one of them, steps near it are 3 %, and a
# byte reaches 15.75. A schedule's late masses are lost altogether at 5 to 11 times what it leaves out.
_STEPS = 64
_MOST = torch.iinfo(torch.uint8).max
MOST_LOSS = ((_MOST - 1) / _STEPS) ** 2


def loss_levels(
    energy: Float[Tensor, "heads q_blocks k_blocks"], mass: float
) -> UInt8[Tensor, "heads q_blocks k_blocks"]:
    """Steps of loss at which the smallest set that reaches what is left still has a block.

    Args:
        energy: attention mass of each block.
        mass: share of a row's energy to keep at a loss of 1. At a loss of x that is 1 - x · (1 - mass).
    """
    withstood = (1 - mass_before(energy)) / max(1 - mass, torch.finfo(torch.float64).tiny)
    return withstood.sqrt().mul(_STEPS).ceil().clamp(max=_MOST).to(torch.uint8)


def common_levels(
    levels: UInt8[Tensor, "videos heads q_blocks k_blocks"], needed: int
) -> UInt8[Tensor, "heads q_blocks k_blocks"]:
    """The steps at which this many videos still need a block."""
    return levels.sort(dim=0, descending=True).values[needed - 1]


def keep_at(levels: UInt8[Tensor, "heads q_blocks k_blocks"], loss: float) -> Bool[Tensor, "heads q_blocks k_blocks"]:
    """The blocks that are needed at a loss; in a row that loses all of them, those that withstand most.

    Args:
        levels: of `loss_levels`.
        loss: taken to the nearest step, of some 3 % near 1.

    Raises:
        ValueError: levels do not reach the loss.
    """
    if not 0 <= loss <= MOST_LOSS:
        raise ValueError(f"levels tell losses from 0 to {MOST_LOSS} apart: got {loss}")
    step = round(_STEPS * math.sqrt(loss))
    return levels >= levels.amax(-1, keepdim=True).clamp(max=step + 1)
