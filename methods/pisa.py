"""PISA to zeroth order: top-k blocks by pooled scores and by how their keys and values vary together; means elsewhere.

Follows arXiv 2602.01077 and github.com/xie-lab-ml/piecewise-sparse-attention (piecewise_attn/kernels). The original's
remainder has a first-order term, which no kernel here has: q·H̄, with one matrix H̄ for all blocks, weighted by what the
means have of the softmax. So this is what the paper's table 4 has as zeroth order alone: 21.7 dB, where
the whole has 22.7 (Wan 14B). What else differs:

- Means are in fp32, there in the model's precision.
- Text, which Wan's sequence has none of, is kept in both directions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from calibatt.kernels.mask import block_count
from calibatt.kernels.plan import Plan, Remainder
from calibatt.methods.base import Knob, Method
from calibatt.methods.blocks import mask_beside_text, pooled, video_blocks
from calibatt.methods.selection import top_k
from calibatt.methods.site import Site

# added to the deviation before its logarithm: `piecewise_sparse_attention` of the repository
_EPSILON = 1e-5


@dataclass(frozen=True, slots=True, kw_only=True)
class PisaConfig:
    """Settings of the choice.

    Args:
        density: share of the key blocks that each query block computes, rounded down to whole ones; one is always.
        dense_steps: share of the steps that are dense at first, rounded to whole steps.
        dense_layers: number of first layers that stay dense.
        covariance: whether a block counts more whose keys and values vary together in a way of their own.
        block: tokens of a query and of a key block.

    Raises:
        ValueError: a share is outside 0 to 1.
    """

    density: float
    dense_steps: float
    dense_layers: int
    covariance: bool = True
    # block_size of the repository
    block: tuple[int, int] = (64, 64)

    def __post_init__(self) -> None:
        if not (0 <= self.density <= 1 and 0 <= self.dense_steps <= 1):
            raise ValueError(f"pisa's density and dense steps are shares, 0 to 1: got {self}")


class Pisa(Method):
    """Computes as many blocks in every row, those of the highest scores, with means in place of the others."""

    name: ClassVar[str] = "pisa"
    label: ClassVar[str] = "PISA, zeroth order"
    colour: ClassVar[str] = "#009E73"
    marker: ClassVar[str] = "v"
    headwise: ClassVar[bool] = True
    presets: ClassVar[Mapping[str, PisaConfig]] = MappingProxyType(
        {
            # equation 11, at 87.5 % sparsity and the dense schedule of Wan 14B and HunyuanVideo: tables 1 and 5
            "default": PisaConfig(density=0.125, dense_steps=10 / 50, dense_layers=1),
            # table 5
            "wan-1.3b": PisaConfig(density=0.125, dense_steps=15 / 50, dense_layers=1),
            # appendix D: on videos the paper has scores alone, as the repository has by default (use_bias)
            "scores": PisaConfig(density=0.125, dense_steps=10 / 50, dense_layers=1, covariance=False),
            # table 2
            "no-warmup": PisaConfig(density=0.125, dense_steps=0.0, dense_layers=0),
        }
    )
    knob: ClassVar[Knob | None] = Knob(field="density", low=0.0, high=1.0)
    without_dense: ClassVar[Mapping[str, Any]] = MappingProxyType({"dense_steps": 0.0, "dense_layers": 0})
    remainder: ClassVar[Remainder] = "zeroth"

    def plan(
        self,
        q: Float[Tensor, "heads tokens head_dim"],
        k: Float[Tensor, "heads tokens head_dim"],
        v: Float[Tensor, "heads tokens head_dim"],
        site: Site,
    ) -> Plan:
        """Masks of this call's queries, keys and values with the means of the other blocks, or dense at first.

        Blocks that hold text are kept, in both directions, and take no part in the choice.
        """
        config, geometry = self.config, site.geometry
        if site.in_warmup(config.dense_steps) or site.layer < config.dense_layers:
            return Plan.dense(geometry)
        rows, columns = (video_blocks(geometry, size) for size in config.block)
        q_means, k_means = pooled(q, config.block[0])[:, rows], pooled(k, config.block[1])[:, columns]
        scores = q_means @ k_means.mT / math.sqrt(q.shape[-1])
        if config.covariance:
            scores = scores + (deviations(k, v, config.block[1], columns) + _EPSILON).log()[:, None]
        # the softmax of a row would leave their order as it is
        chosen = top_k(scores, int(config.density * scores.shape[-1]))
        mask = mask_beside_text(chosen, geometry, config.block)
        return replace(Plan.masked(mask, geometry.heads), remainder=self.remainder)


def deviations(
    k: Float[Tensor, "heads tokens head_dim"],
    v: Float[Tensor, "heads tokens head_dim"],
    block: int,
    among: slice,
) -> Float[Tensor, "heads some_blocks"]:
    """How far each block's H = Σ (k - k̄) vᵀ, over its tokens, lies from the mean of all H: the Frobenius norm.

    It is what the first-order term would get wrong of the block with one H for all (theorem 3.1 of the paper).

    Args:
        k, v: keys and values.
        block: tokens of a block; a shorter last one sums over its own.
        among: the blocks that are compared.
    """
    return torch.stack([_deviations_of_head(*head, block, among) for head in zip(k, v, strict=True)])


def _deviations_of_head(
    k: Float[Tensor, "tokens head_dim"], v: Float[Tensor, "tokens head_dim"], block: int, among: slice
) -> Float[Tensor, "some_blocks"]:
    # a head at a time: as many matrices as there are blocks
    means = pooled(k[None], block)[0]
    filling = block_count(len(k), block) * block - len(k)
    keys, values = (
        torch.nn.functional.pad(x.float(), (0, 0, 0, filling)).unflatten(0, (-1, block))[among] for x in (k, v)
    )
    # where tokens are filled in values are zeros, whatever their centred keys
    moments = (keys - means[among, None]).mT @ values
    apart: Tensor = torch.linalg.matrix_norm(moments - moments.mean(0))
    return apart
