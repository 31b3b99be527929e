"""The heaviest blocks of a row: up to a share of its attention (top-p), or so many (top-k)."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def top_p(
    weights: Float[Tensor, "*rows blocks"],
    mass: float,
    *,
    inclusive: bool = False,
    least: int | Int[Tensor, "*#rows 1"] = 1,
) -> Bool[Tensor, "*rows blocks"]:
    """The heaviest blocks of each row: those before which the mass is not reached; of equal blocks the first are taken.

    Args:
        weights: attention of each block, not negative; a row need not sum to 1.
        mass: share of the row's sum, 0 to 1.
        inclusive: whether a block is still taken where those before it hold exactly the mass. Without, it is the
            smallest set that reaches the mass; with, the smallest set that holds more than the mass, or all blocks.
        least: blocks that are kept whatever the mass; one is always.

    Raises:
        ValueError: the share is outside 0 to 1.
    """
    if not 0 <= mass <= 1:
        raise ValueError(f"mass is a share of the row's attention, 0 to 1: got {mass}")
    before, order = _ranked(weights)
    chosen = before <= mass if inclusive else before < mass
    rank = torch.arange(weights.shape[-1], device=weights.device)
    chosen |= rank < (least.clamp(min=1) if isinstance(least, Tensor) else max(1, least))
    return torch.zeros_like(chosen).scatter_(-1, order, chosen)


def top_k(scores: Float[Tensor, "*rows blocks"], count: int) -> Bool[Tensor, "*rows blocks"]:
    """The blocks of each row with the highest scores; of equal ones the first are taken.

    Args:
        scores: of each block.
        count: how many; one is always.
    """
    order = scores.argsort(dim=-1, descending=True, stable=True)[..., : max(1, count)]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, order, True)


def mass_before(energy: Float[Tensor, "*rows blocks"]) -> Float[Tensor, "*rows blocks"]:
    """The share of its row's energy that lies in heavier blocks: `top_p` takes a block at every mass above it.

    Args:
        energy: as for `top_p`, in which every row has some.

    Returns:
        0 to 1, fp64.
    """
    before, order = _ranked(energy)
    return torch.zeros_like(before).scatter_(-1, order, before)


def _ranked(energy: Tensor) -> tuple[Tensor, Tensor]:
    """Blocks from the heaviest to the lightest: the share before each, and which it is."""
    ordered, order = energy.sort(dim=-1, descending=True, stable=True)
    # fp64, and the total taken from the same running sum, so that a share of 1 is reached at the last block that adds
    # anything
    reached = ordered.double().cumsum(-1)
    return (reached - ordered.double()) / reached[..., -1:], order
