"""XAttention: blocks chosen online by the sums of the scores' antidiagonals, and the first key block.

Follows github.com/mit-han-lab/x-attention (xattn/src/Xattention.py) as its HunyuanVideo evaluation calls it: without a
causal mask, video and text one sequence. There, the zeros that fill up the sequence are keys of score 0, which take
some of the attention; here they take none. Padded text, which it attends to apart, is no part of our sequences.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from calibatt.kernels.mask import BlockMask
from calibatt.kernels.plan import Plan
from calibatt.methods.base import Knob, Method
from calibatt.methods.energy import block_mass
from calibatt.methods.selection import top_p
from calibatt.methods.site import Site


@dataclass(frozen=True, slots=True, kw_only=True)
class XAttentionConfig:
    """Settings of the choice.

    Args:
        stride: tokens of a group; each tile of stride × stride scores is estimated by its antidiagonal.
        threshold: share of a row's estimated attention that its kept blocks reach, 0 to 1.
        dense_steps: share of the first steps that stay dense.
        block: tokens of a query and of a key block.

    Raises:
        ValueError: a block is not made of whole groups.
    """

    stride: int
    threshold: float
    dense_steps: float
    # the repository asserts 128, the size of its kernel
    block: tuple[int, int] = (128, 128)

    def __post_init__(self) -> None:
        for block in self.block:
            if self.stride < 1 or block % self.stride:
                raise ValueError(f"xattention needs blocks of whole strides: got {block} tokens, stride {self.stride}")


class XAttention(Method):
    """Estimates the attention of blocks from their antidiagonals; keeps the fewest that hold a share, and the first."""

    name: ClassVar[str] = "xattention"
    label: ClassVar[str] = "XAttention"
    colour: ClassVar[str] = "#009E73"
    marker: ClassVar[str] = "P"
    headwise: ClassVar[bool] = True
    presets: ClassVar[Mapping[str, XAttentionConfig]] = MappingProxyType(
        {
            # eval/HunyuanVideo/hyvideo/config.py: what sample_video.py takes when nothing is said
            "default": XAttentionConfig(stride=16, threshold=0.9, dense_steps=0.0),
            # eval/HunyuanVideo/run_vbench.py: 5 of 50 steps dense
            "vbench": XAttentionConfig(stride=8, threshold=0.9, dense_steps=5 / 50),
            # scripts/run_hunyuan.sh, which calls run_vbench.py and leaves its dense steps as they are
            "script": XAttentionConfig(stride=8, threshold=0.95, dense_steps=5 / 50),
        }
    )
    knob: ClassVar[Knob | None] = Knob(field="threshold", low=0.0, high=1.0)
    without_dense: ClassVar[Mapping[str, Any]] = MappingProxyType({"dense_steps": 0.0})

    def plan(
        self,
        q: Float[Tensor, "heads tokens head_dim"],
        k: Float[Tensor, "heads tokens head_dim"],
        v: Float[Tensor, "heads tokens head_dim"],
        site: Site,
    ) -> Plan:
        """Masks of this call's queries and keys, or dense in the first steps; text is not special.

        Raises:
            ValueError: the threshold is outside 0 to 1.
        """
        if site.in_warmup(self.config.dense_steps):
            return Plan.dense(site.geometry)
        block_q, block_k = self.config.block
        energy = antidiagonal_energy(q, k, stride=self.config.stride, block_q=block_q, block_k=block_k)
        keep = top_p(energy, self.config.threshold)
        # the repository writes a dropped block's place as 0 (find_blocks_chunked, not causal): the first is never off
        keep[..., 0] = True
        mask = BlockMask.from_keep(keep, tokens=site.geometry.tokens, block_q=block_q, block_k=block_k)
        return Plan.masked(mask, site.geometry.heads)


def antidiagonal_energy(
    q: Float[Tensor, "heads tokens head_dim"],
    k: Float[Tensor, "heads tokens head_dim"],
    *,
    stride: int,
    block_q: int,
    block_k: int,
) -> Float[Tensor, "heads q_blocks k_blocks"]:
    """Attention that each key block gets by the estimate, summed over the groups of each query block.

    A tile is `stride` consecutive queries by as many keys. Its score is the sum of the scores on its antidiagonal,
    divided by the stride; the softmax of a group of queries goes over all groups of keys. In a shorter last group, the
    tokens that are missing add nothing. Computed as `block_mass`, of groups.

    Args:
        q, k: what attention sees.
        stride: tokens of a group; both blocks are multiples of it.
        block_q, block_k: tokens of a query block and of a key block.
    """
    # with the queries of each group turned round, the product of two groups is the sum along the antidiagonal
    group_q, group_k = _groups(q, stride).flip(2).flatten(2), _groups(k, stride).flatten(2)
    scale = 1 / (math.sqrt(q.shape[-1]) * stride)
    return block_mass(group_q, group_k, block=(block_q // stride, block_k // stride), scale=scale)[0]


def _groups(x: Float[Tensor, "heads tokens head_dim"], stride: int) -> Float[Tensor, "heads groups stride head_dim"]:
    """Tokens by group, the last one filled up with zeros."""
    heads, tokens, channels = x.shape
    if tokens % stride:
        # to pad by nothing is a copy too
        x = torch.nn.functional.pad(x, (0, 0, 0, -tokens % stride))
    return x.reshape(heads, -1, stride, channels)
