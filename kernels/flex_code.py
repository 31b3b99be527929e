"""What FlexAttention traces into its own kernel."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor


def weighted(weights: Float[Tensor, "batch heads q_blocks behind"], tokens: int, block_q: int) -> Callable[..., Tensor]:
    """What adds weights to the scores with keys that come after the tokens.

    Args:
        weights: of each query block; heads may be shared (1).
        tokens: how many keys have no weight.
        block_q: queries of a block.
    """
    own = int(weights.shape[1] > 1)

    def score_mod(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        behind = (key - tokens).clamp(min=0)
        return score + torch.where(key < tokens, 0.0, weights[batch, head * own, query // block_q, behind])

    return score_mod
