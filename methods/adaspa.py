"""AdaSpa: blocks chosen online by their exact attention mass, at a few steps, and kept for the steps between.

Follows the paper, arXiv 2502.21079 (section 4); its code is not public. There a search is fused with attention, in two
passes: the first search's own step stays dense, and its mask serves from the next step on. Here a plan is made before
attention, so the mask serves from its own step on. The number of dense steps is the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from calibatt.kernels.mask import BlockMask
from calibatt.kernels.plan import Plan
from calibatt.methods.base import Knob, Method
from calibatt.methods.blocks import text_blocks
from calibatt.methods.energy import block_mass
from calibatt.methods.kept import Keeper, check_searches, outdated, searches_so_far
from calibatt.methods.site import Site


@dataclass(frozen=True, slots=True, kw_only=True)
class AdaSpaConfig:
    """Settings of the search.

    Args:
        sparsity: share of the key blocks that each query block drops, mean over the heads.
        search_steps: when masks are searched, ascending shares of the schedule; before the first all is dense.
        head_adaptive: whether heads that lose little at this sparsity drop more, for others to drop less.
        good_recall: least share of attention that such a head keeps.
        block: tokens of a query and of a key block.

    Raises:
        ValueError: the sparsity is outside 0 to 1, or the search steps do not ascend within 0 to 1.
    """

    sparsity: float
    search_steps: tuple[float, ...]
    head_adaptive: bool
    # section 4.2: "a well-known fine Recall"
    good_recall: float = 0.8
    # section 4.3
    block: tuple[int, int] = (64, 64)

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity <= 1:
            raise ValueError(f"sparsity is a share of the blocks, 0 to 1: got {self.sparsity}")
        check_searches(self.search_steps)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Search:
    """What one layer, branch and sample keeps between calls: the last mask, and the first LSE with its step."""

    mask: BlockMask
    lse: Float[Tensor, "heads tokens"]
    lse_step: int


class AdaSpa(Method):
    """Weighs every block exactly at the search steps, and keeps the heaviest of each row until the next search.

    Searches after the first divide by the softmax sums (log-sum-exp, LSE) of the first, as the paper's do: it halves
    their cost there, and changes the scores slightly: queries whose sums have grown since weigh more in their block.
    The sums take four bytes a token and head for each layer and branch.
    """

    name: ClassVar[str] = "adaspa"
    label: ClassVar[str] = "AdaSpa"
    colour: ClassVar[str] = "#CC79A7"
    marker: ClassVar[str] = "X"
    headwise: ClassVar[bool] = True
    presets: ClassVar[Mapping[str, AdaSpaConfig]] = MappingProxyType(
        {
            # section 4.3: sparsity 0.8, searches at steps 10 and 30, of 50 in section 5
            "default": AdaSpaConfig(sparsity=0.8, search_steps=(10 / 50, 30 / 50), head_adaptive=True),
            # the same from the first step on, to compare masks rather than dense schedules; searches at 0 and 30 are
            # those of section 5.3
            "no-warmup": AdaSpaConfig(sparsity=0.8, search_steps=(0.0, 30 / 50), head_adaptive=True),
        }
    )
    knob: ClassVar[Knob | None] = Knob(field="sparsity", low=0.0, high=1.0)
    without_dense: ClassVar[Mapping[str, Any]] = MappingProxyType({"search_steps": (0.0, 30 / 50)})

    def __init__(self, config: AdaSpaConfig) -> None:
        super().__init__(config)
        self._searches: Keeper[_Search] = Keeper()

    def plan(
        self,
        q: Float[Tensor, "heads tokens head_dim"],
        k: Float[Tensor, "heads tokens head_dim"],
        v: Float[Tensor, "heads tokens head_dim"],
        site: Site,
    ) -> Plan:
        """Dense before the first search, then the last mask; of this call's queries and keys where a search is due."""
        due = searches_so_far(self.config.search_steps, site)
        if not due:
            return Plan.dense(site.geometry)
        last = self._searches.last(site, q.device)
        if last is None or outdated(last, due[-1], site):
            search = self._search(q, k, site, None if last is None else last.made)
            self._searches.keep(search, site, q.device)
        else:
            search = last.made
        return Plan.masked(search.mask, site.geometry.heads)

    def reset(self) -> None:
        """Forget all masks and sums."""
        self._searches.clear()

    def _search(
        self,
        q: Float[Tensor, "heads tokens head_dim"],
        k: Float[Tensor, "heads tokens head_dim"],
        site: Site,
        last: _Search | None,
    ) -> _Search:
        # asked twice at one step, a search answers the same: its own sums are not those of an earlier one
        earlier = last if last is not None and last.lse_step < site.step else None
        mass, lse = block_mass(q, k, block=self.config.block, lse=None if earlier is None else earlier.lse)
        block_q, block_k = self.config.block
        keep = self._choose(mass, text_blocks(site.geometry, self.config.block, q.device))
        return _Search(
            mask=BlockMask.from_keep(keep, tokens=site.geometry.tokens, block_q=block_q, block_k=block_k),
            lse=lse,
            lse_step=site.step if earlier is None else earlier.lse_step,
        )

    def _choose(
        self, mass: Float[Tensor, "heads q_blocks k_blocks"], text: Bool[Tensor, "q_blocks k_blocks"]
    ) -> Bool[Tensor, "heads q_blocks k_blocks"]:
        """The heaviest blocks of each row, equally many in all rows of a head, and all text on top."""
        heads, _, blocks = mass.shape
        order = mass.argsort(dim=-1, descending=True, stable=True)
        budget = max(1, round((1 - self.config.sparsity) * blocks))
        budgets = torch.full((heads,), budget, device=mass.device)
        keep = _first(order, budgets) | text
        if not self.config.head_adaptive:
            return keep
        shares = mass.where(keep, 0.0).sum(-1) / mass.sum(-1)
        # sums too far from those of an earlier step leave a row with no mass or an infinite one: it tells nothing
        recall = shares.nan_to_num(0.0).mean(-1)
        return _first(order, head_budgets(recall, budget, blocks, good=self.config.good_recall)) | text


def head_budgets(recall: Float[Tensor, "heads"], budget: int, blocks: int, *, good: float) -> Int[Tensor, "heads"]:
    """How many blocks each head keeps a row: half as many in the n best heads, as many more in the n worst.

    At sparsity s that is the paper's (1 + s) / 2 and (3s − 1) / 2. Where s is below 1/3 the latter would be negative:
    the worst then keep everything, and the best give only what those take. The mean stays the budget throughout.

    Args:
        recall: share of attention that each head keeps at the budget; of equal heads the first count as better.
        budget: blocks that a head keeps a row, mean over the heads.
        blocks: blocks of a row.
        good: n is the number of heads above this recall, but never more than half of all heads.
    """
    heads = len(recall)
    rank = recall.argsort(descending=True, stable=True).argsort()
    adapted = (recall > good).sum().clamp(max=heads // 2)
    shift = min(budget // 2, blocks - budget)
    return budget - shift * (rank < adapted).long() + shift * (rank >= heads - adapted).long()


def _first(
    order: Int[Tensor, "heads q_blocks k_blocks"], budgets: Int[Tensor, "heads"]
) -> Bool[Tensor, "heads q_blocks k_blocks"]:
    """The blocks that stand first in each row's order, as many as the head's budget."""
    chosen = torch.arange(order.shape[-1], device=order.device) < budgets[:, None, None]
    return torch.zeros_like(order, dtype=torch.bool).scatter_(-1, order, chosen.expand_as(order))
