"""SpargeAttn: blocks chosen online from pooled queries and keys, where pooling can be trusted.

Follows arXiv 2502.18137 and github.com/thu-ml/SpargeAttn (spas_sage_attn/utils.py, core.py, csrc/qattn). Stage one is
the choice of blocks; stage two leaves out, in the kernel, chosen blocks whose scores turn out low. What differs:

- Stage two is off but in presets that say so, and so is INT8, to tell apart what each of the three does. There, queries
  and keys are always in INT8, and values in FP8 on newer GPUs.
- Stage two decides for all queries of a block at once (`plan.Skip`); there every warp decides for its own, and the last
  block of a list is always computed. As in the repository's kernels, the softmax's sum loses what is left out; in the
  paper's algorithm 1 it does not. Thresholds are powers of two, as the repository's kernels compare them.
- Presets named oracle find the low blocks before the call, so that every kernel can compute what is left. Their times
  are no times of this method: the search costs more than attention.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from calibatt.kernels.base import Unsupported
from calibatt.kernels.geometry import Geometry
from calibatt.kernels.plan import BlockMask, Plan, Skip, block_count, block_sizes
from calibatt.methods.base import Knob, Site
from calibatt.methods.low import without_low


@dataclass(frozen=True, slots=True, kw_only=True)
class SpargeConfig:
    """Settings of the choice.

    Args:
        similarity: blocks whose tokens are less alike than this (mean cosine) cannot be pooled: they stay on.
        topk: share of the key blocks that each query block keeps; None chooses by `cdf`.
        cdf: share of pooled attention that the kept blocks of a row do not pass, except that one is always kept; used
            where topk is None.
        pv_threshold: chosen blocks whose largest weight is at most 2 to minus this, against the largest so far, lose
            their softmax and values in the kernel; None computes all that is chosen.
        oracle: whether those are found before the call, for kernels that leave nothing out by themselves.
        int8: whether queries and keys are multiplied in INT8, a scale a block.
        block: tokens of a query and of a key block.

    Raises:
        ValueError: neither or both of topk and cdf are given, or the threshold is not above 0.
    """

    similarity: float
    topk: float | None = None
    cdf: float | None = None
    pv_threshold: float | None = None
    oracle: bool = False
    int8: bool = False
    # the repository's sizes but for Hopper, which has 64 × 128
    block: tuple[int, int] = (128, 64)

    def __post_init__(self) -> None:
        if (self.topk is None) == (self.cdf is None):
            raise ValueError("sparge chooses either by topk or by cdf: give one of them")
        if self.pv_threshold is not None and not self.pv_threshold > 0:
            raise ValueError(f"sparge's pv_threshold is how many powers of two below: above 0, got {self.pv_threshold}")


class Sparge:
    """Pools queries and keys by block at every call, and keeps the blocks with the most pooled attention."""

    name: ClassVar[str] = "sparge"
    presets: ClassVar[Mapping[str, SpargeConfig]] = MappingProxyType(
        {
            # spas_sage2_attn_meansim_topk_cuda, the call that its README recommends
            "default": SpargeConfig(similarity=-0.1, topk=0.5),
            # spas_sage2_attn_meansim_cuda
            "cdf": SpargeConfig(similarity=0.6, cdf=0.98),
            # pvthreshd of spas_sage_attn/autotune.py where that is not tuned; the recommended call has 50, under which
            # a weight is nothing beside the largest even in fp32
            "pv-skip": SpargeConfig(similarity=-0.1, topk=0.5, pv_threshold=20.0),
            "pv-skip-oracle": SpargeConfig(similarity=-0.1, topk=0.5, pv_threshold=20.0, oracle=True),
            # the default's blocks in INT8, which every call of the repository computes in
            "int8": SpargeConfig(similarity=-0.1, topk=0.5, int8=True),
        }
    )
    offline: ClassVar[bool] = False
    knob: ClassVar[Knob | None] = Knob(field="topk", low=0.0, high=1.0)

    def __init__(self, config: SpargeConfig) -> None:
        self.config = config

    def refusal(self, geometry: Geometry) -> Unsupported | None:
        """Applies to every geometry."""
        return None

    def plan(
        self, q: Float[Tensor, "heads tokens head_dim"], k: Float[Tensor, "heads tokens head_dim"], site: Site
    ) -> Plan:
        """Masks of this call's queries and keys; text is not special."""
        block_q, block_k = self.config.block
        # what all keys have in common moves no score against another
        pooled_q, alike_q = _pool(q, block_q)
        pooled_k, alike_k = _pool(k - k.mean(1, keepdim=True), block_k)
        trusted_q, trusted_k = alike_q > self.config.similarity, alike_k > self.config.similarity
        scores = pooled_q @ pooled_k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        scores = scores.masked_fill(~trusted_k[:, None], -math.inf)
        # a head without any trusted key block keeps them all below, whatever its scores
        weights = scores.softmax(-1).nan_to_num(0.0)
        ordered, order = weights.sort(dim=-1, descending=True, stable=True)
        rank = torch.arange(weights.shape[-1], device=weights.device)
        if self.config.topk is not None:
            chosen = rank < max(1, int(self.config.topk * len(rank)))
        else:
            assert self.config.cdf is not None
            # the repository's searchsorted(…, right=True), then at least one
            chosen = (ordered.cumsum(-1) <= self.config.cdf) | (rank == 0)
        keep = torch.zeros_like(weights, dtype=torch.bool).scatter_(-1, order, chosen.expand_as(order))
        keep |= ~trusted_q[:, :, None] | ~trusted_k[:, None]
        mask = BlockMask.from_keep(keep, tokens=site.geometry.tokens, block_q=block_q, block_k=block_k)
        heads, threshold, skip = site.geometry.heads, self.config.pv_threshold, None
        if threshold is not None and self.config.oracle:
            mask = without_low(q, k, mask, -threshold)
        elif threshold is not None:
            skip = Skip.of(mask, heads, threshold=-threshold, leave=True)
        plan = Plan.masked(mask, heads, skip=skip)
        return replace(plan, int8=self.config.block) if self.config.int8 else plan

    def reset(self) -> None:
        """There is no state."""


def _pool(
    x: Float[Tensor, "heads tokens head_dim"], block: int
) -> tuple[Float[Tensor, "heads blocks head_dim"], Float[Tensor, "heads blocks"]]:
    """Mean token of each block, and how alike its tokens are: the mean cosine over all pairs, each with itself too."""
    heads, tokens, channels = x.shape
    sizes = block_sizes(tokens, block, x.device).to(torch.float32)[None, :, None]
    padded = torch.nn.functional.pad(x.float(), (0, 0, 0, block_count(tokens, block) * block - tokens))
    blocks = padded.view(heads, -1, block, channels)
    # the mean cosine over all pairs is the squared length of the mean unit vector
    units = torch.nn.functional.normalize(blocks, dim=-1)
    return blocks.sum(2) / sizes, (units.sum(2) / sizes).square().sum(-1)
