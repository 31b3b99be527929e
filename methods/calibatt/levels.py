"""Loss thresholds: the largest loss at which each block is still needed, one byte, so that any loss has its mask."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

# Losses are quantised to (j / 64)²: 1, what the schedule leaves out, is one of them, steps near it are 3 % apart, and a
# byte reaches 15.75. At a schedule's late steps nothing is left at 5 to 11 times what it leaves out.
_STEPS = 64
MOST_LEVEL = torch.iinfo(torch.uint8).max
MOST_LOSS = ((MOST_LEVEL - 1) / _STEPS) ** 2


def loss_levels(
    withstood: Float[Tensor, "heads q_blocks k_blocks"], mass: float
) -> UInt8[Tensor, "heads q_blocks k_blocks"]:
    """For each block, the largest step of loss at which the smallest set that reaches the remaining mass contains it.

    Args:
        withstood: share of its row's energy that is not in heavier blocks (1 − `mass_before`).
        mass: share of a row's energy to keep at a loss of 1. At a loss of x that is 1 - x · (1 - mass).
    """
    losses = withstood / max(1 - mass, torch.finfo(torch.float64).tiny)
    return losses.sqrt().mul(_STEPS).ceil().clamp(max=MOST_LEVEL).to(torch.uint8)


def common_levels(
    levels: Sequence[UInt8[Tensor, "heads q_blocks k_blocks"]], needed: int
) -> UInt8[Tensor, "heads q_blocks k_blocks"]:
    """The largest step at which at least `needed` videos need a block.

    Found binary digit by digit, by votes on each: on one core 64 ms in place of 595, for 16 videos' levels of
    4 × 256 × 256 blocks.

    Args:
        levels: of `loss_levels`, of each video.
        needed: votes, from 1 to the number of videos.
    """
    found = torch.zeros_like(levels[0])
    for digit in reversed(range(MOST_LEVEL.bit_length())):
        larger = found | (1 << digit)
        votes = torch.zeros_like(found, dtype=torch.uint8 if len(levels) <= MOST_LEVEL else torch.int32)
        for video in levels:
            votes += video >= larger
        found = torch.where(votes >= needed, larger, found)
    return found


def keep_at(levels: UInt8[Tensor, "heads q_blocks k_blocks"], loss: float) -> Bool[Tensor, "heads q_blocks k_blocks"]:
    """The blocks that are needed at a loss; in a row that would lose all of them, those with the largest level.

    Args:
        levels: of `loss_levels`.
        loss: as for `level_of`.

    Raises:
        ValueError: as `level_of`.
    """
    return levels >= levels.amax(-1, keepdim=True).clamp(max=level_of(loss) + 1)


def level_of(loss: float) -> int:
    """The step of loss, of some 3 % near 1, that is nearest.

    Raises:
        ValueError: the loss is negative, or beyond what a byte holds.
    """
    if not 0 <= loss <= MOST_LOSS:
        raise ValueError(f"a loss is a multiple from 0 to {MOST_LOSS}: got {loss}")
    return round(_STEPS * math.sqrt(loss))
