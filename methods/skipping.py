"""Reference for online skipping: the blocks a skip-softmax kernel would drop, computed before the call.

Slow, and exact.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from calibatt.kernels.mask import BlockMask, block_count

# the range of thresholds: from the least power of two in fp32, whose weights are nothing beside 1, to just below 1
LEAST, MOST = -126.0, math.log2(0.999)
# scores held at a time: 256 MiB in fp32
_CHUNK = 2**26


def score_gaps(
    q: Float[Tensor, "heads tokens head_dim"], k: Float[Tensor, "heads tokens head_dim"], mask: BlockMask
) -> Float[Tensor, "heads q_blocks k_blocks"]:
    """How far each kept block lies below what a kernel has seen when it comes to it, in powers of two; never above 0.

    Of each query: its largest score in the block, less the largest in the kept blocks up to there, that one included.
    Of the block: the largest of its queries. A block is low at a threshold (`plan.Skip`) where this is not above it. A
    block that is not kept has none, -inf.

    Args:
        q, k: what attention sees.
        mask: the blocks that a kernel would compute.
    """
    heads, tokens, channels = q.shape
    keep = mask.keep().expand(heads, -1, -1)
    found = q.new_empty(keep.shape, dtype=torch.float32)
    at_once = max(1, _CHUNK // (tokens * mask.block_q))
    past_end = mask.k_blocks * mask.block_k - tokens
    for head in range(heads):
        for first in range(0, mask.q_blocks, at_once):
            chunk = slice(first, first + at_once)
            rows = q[head, first * mask.block_q : (first + at_once) * mask.block_q].float()
            scores = rows @ k[head].float().T * (math.log2(math.e) / math.sqrt(channels))
            largest = torch.nn.functional.pad(scores, (0, past_end), value=-math.inf)
            largest = largest.unflatten(1, (mask.k_blocks, mask.block_k)).amax(-1)
            kept = keep[head, chunk].repeat_interleave(mask.block_q, 0)[: len(rows)]
            below = below_largest(largest, kept)
            below = torch.nn.functional.pad(below, (0, 0, 0, -len(rows) % mask.block_q), value=-math.inf)
            found[head, chunk] = below.unflatten(0, (-1, mask.block_q)).amax(1)
    return found


def below_largest(
    largest: Float[Tensor, "*masks queries k_blocks"], kept: Bool[Tensor, "*masks queries k_blocks"]
) -> Float[Tensor, "*masks queries k_blocks"]:
    """How far the largest score of each kept block lies below that of all kept blocks up to there; others have -inf."""
    largest = largest.masked_fill(~kept, -math.inf)
    return (largest - largest.cummax(-1).values).masked_fill(~kept, -math.inf)


def without_low(
    q: Float[Tensor, "heads tokens head_dim"],
    k: Float[Tensor, "heads tokens head_dim"],
    mask: BlockMask,
    threshold: float | Sequence[float],
) -> BlockMask:
    """The mask without its low blocks, of every head: what a kernel computes that leaves them out by itself.

    Args:
        q, k: what attention sees.
        mask: the blocks it would compute.
        threshold: in powers of two, of all heads or of each.
    """
    thresholds = torch.tensor(threshold, device=q.device).view(-1, 1, 1)
    return BlockMask.from_keep(
        score_gaps(q, k, mask) > thresholds, tokens=mask.tokens, block_q=mask.block_q, block_k=mask.block_k
    )


def all_blocks(tokens: int, block: tuple[int, int], device: torch.device) -> BlockMask:
    """Every block, shared by all heads.

    Args:
        tokens: of the sequence.
        block: tokens of a query and of a key block.
        device: of the mask.
    """
    rows, columns = (block_count(tokens, size) for size in block)
    keep = torch.ones((1, rows, columns), dtype=torch.bool, device=device)
    return BlockMask.from_keep(keep, tokens=tokens, block_q=block[0], block_k=block[1])
