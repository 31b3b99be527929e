"""The remainder of a plan to zeroth order: one mean key and one mean value stand for each block that is not computed.

As if every key and value of such a block were the mean, a query q gains |B| exp(q·k̄ / √head_dim) in the softmax's sum
and as much times v̄ in its output: the zeroth-order terms of Sol-Attn (arXiv 2607.24027) and of PISA (arXiv
2602.01077). So a block is one more key, whose score has the logarithm of the block's size added.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor


def block_means(
    x: Float[Tensor, "batch heads tokens head_dim"], sizes: Int[Tensor, "size_heads blocks"]
) -> Float[Tensor, "batch heads blocks head_dim"]:
    """The mean of each block's tokens, added up in fp32 at the least; zeros for an empty block.

    Args:
        x: keys or values, in the order in which blocks lie side by side.
        sizes: tokens of each block, of each head or for all (1).
    """
    token = torch.arange(x.shape[2], device=x.device).expand(len(sizes), -1).contiguous()
    # a token is in the first block that ends after it
    block = torch.searchsorted(sizes.cumsum(-1), token, right=True)[None, :, :, None].expand(x.shape)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    sums = wide.new_zeros((*x.shape[:2], sizes.shape[1], x.shape[3])).scatter_add_(2, block, wide)
    return (sums / sizes.clamp(min=1)[:, :, None]).to(x.dtype)
