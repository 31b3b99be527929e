"""Queries and keys in INT8: what the oracle and the kernels multiply under a plan that says so."""

from __future__ import annotations

import torch
from jaxtyping import Float, Float32, Int8
from torch import Tensor

from calibatt.kernels.mask import block_count

# the largest integer that both signs have
_MOST = 127


def quantise(
    q: Float[Tensor, "batch heads tokens head_dim"],
    k: Float[Tensor, "batch heads tokens head_dim"],
    block: tuple[int, int],
) -> tuple[
    Int8[Tensor, "batch heads tokens head_dim"],
    Float32[Tensor, "batch heads q_scales"],
    Int8[Tensor, "batch heads tokens head_dim"],
    Float32[Tensor, "batch heads k_scales"],
]:
    """Queries and their scales, keys and theirs, by the scheme of SageAttention (arXiv 2410.02367, section 4.2).

    Keys lose their mean over all tokens first, which moves all scores of a query alike and nothing in the output. Of
    every block the largest magnitude becomes 127. The original rounds halves away from zero, torch to even.

    Args:
        q, k: what attention sees.
        block: tokens of a query and of a key block that share a scale.
    """
    return *_quantised(q.float(), block[0]), *_quantised(k.float() - key_mean(k), block[1])


def key_mean(k: Float[Tensor, "batch heads tokens head_dim"]) -> Float32[Tensor, "batch heads 1 head_dim"]:
    """What keys lose. Added up in fp64, so that it is the same in whatever order a device adds."""
    return k.mean(2, keepdim=True, dtype=torch.float64).float().contiguous()


def dequantise(
    values: Int8[Tensor, "batch heads tokens head_dim"], scales: Float32[Tensor, "batch heads scales"], block: int
) -> Float[Tensor, "batch heads tokens head_dim"]:
    """The numbers that the integers stand for, exactly, in fp64.

    Args:
        values: the integers.
        scales: of each block of tokens.
        block: tokens that share a scale.
    """
    return values.double() * scales.double().repeat_interleave(block, 2)[:, :, : values.shape[2], None]


def _quantised(x: Tensor, block: int) -> tuple[Tensor, Tensor]:
    tokens = x.shape[2]
    blocks = block_count(tokens, block)
    padded = torch.nn.functional.pad(x, (0, 0, 0, blocks * block - tokens)).unflatten(2, (blocks, block))
    # a block of zeros has a scale too
    scales = (padded.abs().amax((-2, -1)) * (1 / _MOST)).clamp(min=torch.finfo(torch.float32).tiny)
    values = (padded / scales[..., None, None]).round().to(torch.int8)
    return values.flatten(2, 3)[:, :, :tokens], scales
