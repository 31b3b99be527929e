"""How much each block matters to the output, in a byte."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor
from torch.nn.functional import pad

from calibatt.kernels.mask import block_count, block_sizes
from calibatt.methods.energy import CHUNK, exponentials

# Importances are bytes: 0 is nothing, 1 to 254 are powers of two in quarters, 255 is a block that is always computed.
LEVELS = 256
ALWAYS = LEVELS - 1
# a byte is off by 2^(1/8), 9 %, at most: less than what looking at some queries only makes of it (see the tests)
PER_OCTAVE = 4
# level 1 is 2⁻⁴⁸, the square of fp32's rounding: smaller changes of an output are lost in it; level 254 is 2^15.25
_LEAST = -48.0


def importance(
    q: Float[Tensor, "heads tokens head_dim"],
    k: Float[Tensor, "heads tokens head_dim"],
    v: Float[Tensor, "heads tokens head_dim"],
    *,
    block: tuple[int, int],
    queries: int,
) -> Float[Tensor, "heads q_blocks k_blocks"]:
    """How much outputs move without each block: squared, mean over its queries, and relative to the layer's outputs.

    Computed in fp32, some query blocks of one head at a time.

    Args:
        q, k, v: what attention sees.
        block: tokens of a query and of a key block.
        queries: of each query block that are looked at.
    """
    (heads, tokens, channels), (block_q, block_k) = q.shape, block
    place, real = looked_at(tokens, block_q, queries, q.device)
    blocks, left_over = block_count(tokens, block_k), -tokens % block_k
    moved = q.new_empty(heads, len(place), blocks, dtype=torch.float32)
    squares = q.new_zeros((), dtype=torch.float32)
    at_once = max(1, CHUNK // (place.shape[1] * blocks * max(block_k, channels)))
    for head in range(heads):
        values = pad(v[head].float(), (0, 0, 0, left_over)).view(blocks, block_k, channels)
        for some in torch.arange(len(place), device=q.device).split(at_once):
            weights = exponentials(q[head, place[some].flatten()], k[head])
            weights /= weights.sum(-1, keepdim=True)
            by_block = pad(weights, (0, left_over)).view(-1, blocks, block_k).transpose(0, 1)
            parts = by_block @ values
            out = parts.sum(0)
            # in place, since the parts are as large as the weights
            parts.addcmul_(by_block.sum(-1, keepdim=True), out, value=-1)
            counted = real[some]
            of_query = parts.square_().sum(-1).view(blocks, *counted.shape) * counted
            moved[head, some] = (of_query.sum(-1) / counted.sum(-1)).T
            squares += (out.square().sum(-1) * counted.flatten()).sum()
    mean = squares / (heads * real.sum())
    return moved / mean.clamp(min=torch.finfo(mean.dtype).tiny)


def looked_at(
    tokens: int, block: int, queries: int, device: torch.device | str = "cpu"
) -> tuple[Int[Tensor, "blocks queries"], Bool[Tensor, "blocks queries"]]:
    """Evenly spaced tokens of each block, the middles of equal parts of it, and which of them are there.

    Args:
        tokens: of the sequence.
        block: tokens of a block.
        queries: wanted of each block; one that is shorter has all of its own, and fills up with its last.
        device: of the result.
    """
    sizes = block_sizes(tokens, block, device)[:, None]
    count = sizes.clamp(max=queries)
    number = torch.arange(min(queries, block), device=device)
    within = (2 * number + 1) * sizes // (2 * count)
    first = torch.arange(0, tokens, block, device=device)[:, None]
    return first + within.minimum(sizes - 1), number < count


def to_levels(importance: Float[Tensor, "heads q_blocks k_blocks"]) -> UInt8[Tensor, "heads q_blocks k_blocks"]:
    """The nearest level: 0 below the least that counts, ALWAYS for what is infinitely important."""
    level = ((importance.log2() - _LEAST) * PER_OCTAVE).round() + 1
    return level.clamp(0, ALWAYS - 1).masked_fill(importance.isinf(), ALWAYS).to(torch.uint8)


def to_importance(levels: UInt8[Tensor, "heads q_blocks k_blocks"]) -> Float[Tensor, "heads q_blocks k_blocks"]:
    """What levels stand for, in fp64; infinity for ALWAYS."""
    of_level = torch.exp2(torch.arange(-1, LEVELS - 1, dtype=torch.float64) / PER_OCTAVE + _LEAST)
    of_level[0], of_level[ALWAYS] = 0, torch.inf
    return of_level.to(levels.device)[levels.int()]
