"""Block energy: how much attention mass falls in each block, without ever holding all of the attention."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from calibatt.kernels.plan import block_count, block_sizes
from calibatt.methods.blocks import block_sums

# attention weights held at a time: 256 MiB in fp32, enough to keep a GPU busy with one launch
CHUNK = 2**26


def block_energy(
    q: Float[Tensor, "heads tokens head_dim"],
    k: Float[Tensor, "heads tokens head_dim"],
    *,
    block_q: int,
    block_k: int,
) -> Float[Tensor, "heads q_blocks k_blocks"]:
    """Softmax mass in each key block, mean over the queries of each query block; every row sums to 1.

    Computed in fp32, some query blocks of one head at a time. A shorter last block is averaged over the queries it has.

    Args:
        q, k: what attention sees.
        block_q, block_k: tokens of a query block and of a key block.
    """
    heads, tokens, _ = q.shape
    energy = q.new_empty(heads, block_count(tokens, block_q), block_count(tokens, block_k), dtype=torch.float32)
    sizes = block_sizes(tokens, block_q, q.device)
    at_once = max(1, CHUNK // (tokens * block_q))
    for head in range(heads):
        for first in range(0, energy.shape[1], at_once):
            rows = q[head, first * block_q : (first + at_once) * block_q]
            mass = block_sums(exponentials(rows, k[head]), block_k)
            mass /= mass.sum(-1, keepdim=True)
            chunk = slice(first, first + at_once)
            energy[head, chunk] = block_sums(mass.T, block_q).T / sizes[chunk, None]
    return energy


def products(
    x: Float[Tensor, "*batch rows channels"], y: Float[Tensor, "*batch columns channels"]
) -> Float[Tensor, "*batch rows columns"]:
    """Inner products of all pairs, in fp32; of one batch dimension at the most."""
    if x.is_cuda and x.dtype in (torch.bfloat16, torch.float16):
        # tensor cores multiply half precision exactly and add in fp32: nothing is rounded on the way
        return (torch.mm if x.ndim == 2 else torch.bmm)(x, y.mT, out_dtype=torch.float32)
    return x.float() @ y.float().mT


def exponentials(
    q: Float[Tensor, "queries head_dim"], k: Float[Tensor, "tokens head_dim"]
) -> Float[Tensor, "queries tokens"]:
    """Attention weights before they are divided by their sum, in fp32; the largest of each query is 1."""
    scores = products(q, k)
    scores -= scores.amax(-1, keepdim=True)
    scores *= 1 / math.sqrt(q.shape[-1])
    return scores.exp_()
