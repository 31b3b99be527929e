"""LiteAttention: blocks that were low at one step are left out from the next step on, until the video ends.

Follows github.com/moonmath-ai/LiteAttention (hopper/lite_attention.py, hopper/_internal/cpp/softmax.h), a fork of
FlashAttention-3. Nothing is estimated: the kernel computes all scores of a kept block anyway, and notes at the same
time whether they were low. What differs:

- Blocks are 128 × 64 in place of its 128 × 176, which is no power of two; with an oracle preset any size works.
- Low blocks are noted as bits, one each, where it has lists of ranges of blocks that it reads and writes in turns.
- Presets named oracle find the low blocks before the call, so that every kernel can compute what is left. Their
  estimate is no cost of this method: it takes longer than attention.
- Text has no list of its own: its blocks are kept or lost by the same rule.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from calibatt.kernels.mask import BlockMask
from calibatt.kernels.plan import Plan, Skip
from calibatt.methods.base import Knob, Method
from calibatt.methods.site import Branch, Site
from calibatt.methods.skipping import LEAST, MOST, all_blocks, without_low


@dataclass(frozen=True, slots=True, kw_only=True)
class LiteConfig:
    """Settings of the choice.

    Args:
        threshold: blocks whose largest weight is at most 2 to this, against the largest so far, are low.
        oracle: whether low blocks are found before the call, for kernels that note nothing.
        block: tokens of a query and of a key block.

    Raises:
        ValueError: the threshold is not below 0.
    """

    threshold: float
    oracle: bool = False
    block: tuple[int, int] = (128, 64)

    def __post_init__(self) -> None:
        if not self.threshold < 0:
            raise ValueError(f"lite's threshold is a power of two, below 0: got {self.threshold}")


class Lite(Method):
    """Starts a video with every block; each step leaves out what was low at an earlier step."""

    name: ClassVar[str] = "lite"
    label: ClassVar[str] = "LiteAttention"
    colour: ClassVar[str] = "#009E73"
    marker: ClassVar[str] = "*"
    headwise: ClassVar[bool] = True
    presets: ClassVar[Mapping[str, LiteConfig]] = MappingProxyType(
        {
            # the threshold of its README and constructor
            "default": LiteConfig(threshold=-10.0),
            "oracle": LiteConfig(threshold=-10.0, oracle=True),
        }
    )
    # density at a step depends on the steps before
    knob: ClassVar[Knob | None] = Knob(field="threshold", low=LEAST, high=MOST, over_videos=True)

    def __init__(self, config: LiteConfig) -> None:
        super().__init__(config)
        # what was computed last, and what that call finds low, by layer, branch and sample
        self._last: dict[tuple[int, Branch, int], Plan | BlockMask] = {}

    def plan(
        self,
        q: Float[Tensor, "heads tokens head_dim"],
        k: Float[Tensor, "heads tokens head_dim"],
        v: Float[Tensor, "heads tokens head_dim"],
        site: Site,
    ) -> Plan:
        """What was not low so far, of this layer, branch and sample."""
        key = (site.layer, site.branch, site.sample)
        mask, heads = self._kept(key, site.geometry.tokens, q.device), site.geometry.heads
        if self.config.oracle:
            self._last[key] = without_low(q, k, mask, self.config.threshold)
            return Plan.masked(mask, heads)
        plan = Plan.masked(mask, heads, skip=Skip.of(mask, heads, threshold=self.config.threshold, leave=False))
        self._last[key] = plan
        return plan

    def _kept(self, key: tuple[int, Branch, int], tokens: int, device: torch.device) -> BlockMask:
        last = self._last.get(key)
        if isinstance(last, Plan):
            # by now the kernel has noted what was low
            assert isinstance(last.mask, BlockMask)
            assert last.skip is not None
            last = last.mask.without(last.skip.low)
        return last if last is not None and last.tokens == tokens else all_blocks(tokens, self.config.block, device)

    def reset(self) -> None:
        """A new video starts with every block."""
        self._last.clear()
