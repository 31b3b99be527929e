"""DraftAttention: blocks of patches, chosen online from attention between pooled patches, by one threshold a head.

Follows github.com/shawnricecake/draft-attention (draft_attention.py), where a block is one patch, text comes last, and
grids that patches do not divide are refused. Here blocks are consecutive tokens of the sequence in patch order, so that
any grid and any block will do. Three things differ. A query block that the threshold leaves without any key has zeros
for output there; here it keeps its largest entry. The threshold there is the largest entry meant to be dropped, which
is so kept, one more than asked for; here it is the smallest meant to be kept. And pooled attention is in half
precision there, in fp32 here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int32
from torch import Tensor

from calibatt.kernels.geometry import Geometry
from calibatt.kernels.plan import Plan, TokenOrder
from calibatt.methods.base import Knob, Method
from calibatt.methods.blocks import mask_beside_text, pooled, video_blocks
from calibatt.methods.patches import patch_order
from calibatt.methods.site import Site


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftConfig:
    """Settings of the choice.

    Args:
        sparsity: share of all pairs of video blocks that a head drops.
        dense_sigma: steps with a noise level above this stay dense.
        dense_layers: number of first layers that stay dense.
        patch: rows and columns of a patch.
        block: tokens of a query and of a key block.

    Raises:
        ValueError: the sparsity is outside 0 to 1.
    """

    sparsity: float
    dense_sigma: float
    dense_layers: int
    # pool_h and pool_w, and the block size of the repository's kernel
    patch: tuple[int, int] = (8, 16)
    block: tuple[int, int] = (128, 128)

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity <= 1:
            raise ValueError(f"sparsity is a share of the blocks, 0 to 1: got {self.sparsity}")


class Draft(Method):
    """Pools queries and keys by block at every call, and keeps the pairs of blocks with the most pooled attention."""

    name: ClassVar[str] = "draft"
    label: ClassVar[str] = "DraftAttention"
    colour: ClassVar[str] = "#0072B2"
    marker: ClassVar[str] = "*"
    headwise: ClassVar[bool] = True
    presets: ClassVar[Mapping[str, DraftConfig]] = MappingProxyType(
        {
            # wan/wan/modules/attention.py: dense where the timestep, of 1000, is above 925, and in the first layer
            "default": DraftConfig(sparsity=0.75, dense_sigma=0.925, dense_layers=1),
            # hunyuan/hyvideo: above 945, and in the first two of the double-stream layers, which come first
            "hunyuan": DraftConfig(sparsity=0.9, dense_sigma=0.945, dense_layers=2),
            # Wan's at every step and layer, to compare masks rather than dense schedules
            "no-warmup": DraftConfig(sparsity=0.75, dense_sigma=1.0, dense_layers=0),
        }
    )
    knob: ClassVar[Knob | None] = Knob(field="sparsity", low=0.0, high=1.0)
    without_dense: ClassVar[Mapping[str, Any]] = MappingProxyType({"dense_sigma": 1.0, "dense_layers": 0})

    def __init__(self, config: DraftConfig) -> None:
        super().__init__(config)
        self._orders: dict[tuple[Geometry, torch.device], Int32[Tensor, "1 tokens"]] = {}

    def plan(
        self,
        q: Float[Tensor, "heads tokens head_dim"],
        k: Float[Tensor, "heads tokens head_dim"],
        v: Float[Tensor, "heads tokens head_dim"],
        site: Site,
    ) -> Plan:
        """Masks of this call's queries and keys, or dense in the first steps and layers.

        Blocks that hold text are kept, in both directions, and take no part in the choice. Beside text, a query block
        that gets no video key has the text's all the same, and is given no more than in the original.
        """
        if site.sigma > self.config.dense_sigma or site.layer < self.config.dense_layers:
            return Plan.dense(site.geometry)
        geometry, (block_q, block_k) = site.geometry, self.config.block
        key = (geometry, q.device)
        if key not in self._orders:
            self._orders[key] = patch_order(geometry, *self.config.patch).to(q.device)
        order = self._orders[key]
        places = order[0].long()
        rows, columns = video_blocks(geometry, block_q), video_blocks(geometry, block_k)
        scores = pooled(q[:, places], block_q)[:, rows] @ pooled(k[:, places], block_k)[:, columns].transpose(-1, -2)
        weights = (scores / math.sqrt(q.shape[-1])).softmax(-1)
        chosen = largest(weights, self.config.sparsity, fill=not geometry.text_tokens)
        mask = mask_beside_text(chosen, geometry, self.config.block)
        return Plan.masked(mask, geometry.heads, order=TokenOrder.of_all(order))


def largest(
    weights: Float[Tensor, "heads q_blocks k_blocks"], sparsity: float, *, fill: bool
) -> Bool[Tensor, "heads q_blocks k_blocks"]:
    """The largest entries of each head, all rows together; what equals the smallest of them is kept too.

    Args:
        weights: pooled attention; where the text leaves no block to the video, there is nothing to choose.
        sparsity: share of a head's entries to drop, rounded to whole entries; one is always kept.
        fill: whether a row that gets nothing keeps its largest entry, the first of equal ones.
    """
    entries = weights.flatten(1)
    if not entries.numel():
        return torch.ones_like(weights, dtype=torch.bool)
    budget = max(1, round((1 - sparsity) * entries.shape[1]))
    threshold = entries.topk(budget).values.amin(-1)
    keep = weights >= threshold[:, None, None]
    if fill:
        # a row that has any entry has its largest already
        keep.scatter_(-1, weights.argmax(-1, keepdim=True), True)
    return keep
