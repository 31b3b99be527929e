"""Spending the budget: which blocks are computed, of which only levels of importance are known."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from calibatt.kernels.mask import block_sizes
from calibatt.methods.blocks import video_blocks, video_part
from calibatt.methods.budget.importance import ALWAYS, LEVELS, PER_OCTAVE
from calibatt.methods.budget.learner import BudgetLearner
from calibatt.methods.facts import read_settings
from calibatt.methods.learning import Learnt

# multiples of the golden ratio, modulo 1, are spread more evenly than those of any other number
_GOLDEN = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Cut:
    """Where the budget ends: what is computed of each level of a site.

    Levels are coarse, so at the level where the budget ends only a share is computed, spread evenly over its blocks.
    Masks only grow with the budget.

    Args:
        above: whether all blocks of a level are computed.
        edge: whether a share of them is.
        share: that share.
        before: blocks at the edge in all sites before.
    """

    above: Bool[Tensor, "steps layers levels"]
    edge: Bool[Tensor, "steps layers levels"]
    share: Float[Tensor, "steps layers"]
    before: Int[Tensor, "steps layers"]

    @classmethod
    def of(cls, learnt: Learnt, *, density: float, together: bool, weighed: bool) -> Cut:
        """Spend the budget of a video, with as much text as the calibration allows.

        Args:
            learnt: by a `BudgetLearner`.
            density: share of all query-key products.
            together: whether all sites share one budget.
            weighed: whether steps count by how far their errors move the video.
        """
        counts, cost = tallies(learnt)
        sensitivity = learnt.tables["sensitivity"][:, 0].double()
        score = scores(sensitivity if weighed else torch.ones_like(sensitivity))
        return cls.at(counts, cost, score, density=density, together=together)

    @classmethod
    def at(
        cls,
        counts: Int[Tensor, "steps layers levels"],
        cost: Float[Tensor, "steps layers levels"],
        score: Float[Tensor, "steps levels"],
        *,
        density: float,
        together: bool,
    ) -> Cut:
        """Spend a share of all costs on the levels with the largest scores.

        Args:
            counts, cost: blocks of each level, and what they cost together; whole numbers, which fp64 adds exactly.
            score: of each level; infinity for what is always computed, within the budget or not.
            density: the share.
            together: whether all sites share one budget.
        """
        flat = (1, -1) if together else (-1, cost.shape[-1])
        scored = score[:, None].expand(cost.shape).reshape(flat)
        costs = cost.reshape(flat)
        order = scored.argsort(dim=-1, descending=True, stable=True)
        reached = costs.gather(-1, order).cumsum(-1)
        always = (costs * (scored == torch.inf)).sum(-1, keepdim=True)
        budget = (density * reached[:, -1:]).maximum(always)
        last = order.gather(-1, torch.searchsorted(reached, budget))
        bound = scored.gather(-1, last)
        above, edge = scored > bound, scored == bound
        # a site that was not watched costs nothing
        share = (budget - (costs * above).sum(-1, keepdim=True)) / (costs * edge).sum(-1, keepdim=True).clamp(min=1)
        at_edge = (counts * edge.view(cost.shape)).sum(-1)
        return cls(
            above=above.view(cost.shape),
            edge=edge.view(cost.shape),
            share=share.expand(-1, at_edge.numel() // len(share)).reshape(at_edge.shape),
            before=at_edge.flatten().cumsum(0).view(at_edge.shape) - at_edge,
        )

    def left_out(
        self, counts: Int[Tensor, "steps layers levels"], importance: Float[Tensor, "levels"]
    ) -> Float[Tensor, "steps"]:
        """Importance of what is left out at each step, added up.

        Args:
            counts: blocks of each level.
            importance: of a block of each level.
        """
        left_out = counts * (~self.above * (1 - self.edge * self.share[..., None]))
        # what is always computed is infinitely important
        return (left_out * importance.nan_to_num(posinf=0.0)).sum((1, 2))

    def chosen(
        self, levels: UInt8[Tensor, "heads q_blocks k_blocks"], step: int, layer: int
    ) -> Bool[Tensor, "heads q_blocks k_blocks"]:
        """The blocks of a site that are computed.

        Args:
            levels: of its blocks.
            step, layer: the site.
        """
        above, edge = (of_level[step, layer].to(levels.device)[levels.int()] for of_level in (self.above, self.edge))
        # blocks at the edge are numbered through all sites, so that what is rounded evens out
        number = self.before[step, layer].item() + edge.flatten().cumsum(0).view(edge.shape)
        return above | (edge & (_spread(number) < self.share[step, layer].item()))


def tallies(
    learnt: Learnt,
) -> tuple[Int[Tensor, "steps layers levels"], Float[Tensor, "steps layers levels"]]:
    """How many blocks of each level there are at every site, and their query-key products, blocks of text as ALWAYS.

    Memory is that of one site.

    Args:
        learnt: by a `BudgetLearner`.
    """
    block = read_settings(BudgetLearner, learnt.settings).block
    own, geometry = learnt.provenance, learnt.provenance.geometry
    rows, columns = (video_blocks(geometry, size) for size in block)
    sizes_q, sizes_k = (
        block_sizes(geometry.tokens, size)[part] for size, part in zip(block, (rows, columns), strict=True)
    )
    counts = torch.zeros(own.steps, own.layers, LEVELS, dtype=torch.int64)
    cost = torch.zeros(counts.shape, dtype=torch.float64)
    cost[..., ALWAYS] = geometry.heads * (geometry.tokens**2 - float(sizes_q.sum() * sizes_k.sum()))
    # all blocks but the last of each axis are whole
    parts = [(down, across) for down in (slice(-1), slice(-1, None)) for across in (slice(-1), slice(-1, None))]
    for step in range(len(counts)):
        for layer in range(counts.shape[1]):
            site = video_part(learnt.part("levels", step, layer), geometry, block)
            for down, across in parts:
                some = site[:, down, across].flatten().bincount(minlength=LEVELS)
                counts[step, layer] += some
                if len(sizes_q[down]) and len(sizes_k[across]):
                    cost[step, layer] += some * (sizes_q[down][0] * sizes_k[across][0])
    return counts, cost


def scores(sensitivity: Float[Tensor, "steps"]) -> Float[Tensor, "steps levels"]:
    """What blocks of each level are compared by: the logarithm of their importance, in units of a level.

    Args:
        sensitivity: what importances of each step are multiplied by.
    """
    score = torch.arange(LEVELS, dtype=torch.float64) + PER_OCTAVE * sensitivity.log2()[:, None]
    score[:, 0], score[:, ALWAYS] = -torch.inf, torch.inf
    return score


def alike_rows(
    levels: UInt8[Tensor, "heads q_blocks k_blocks"], sizes: Int[Tensor, "k_blocks"], keys: float
) -> Bool[Tensor, "heads q_blocks k_blocks"]:
    """As many keys in every row, of the most important blocks, and at least those that are always computed.

    What is left of the last block is rounded up or down, from row to row, such that the mean is met.

    Args:
        levels: of each block.
        sizes: keys of each block.
        keys: wanted in a row.
    """
    order = levels.argsort(dim=-1, descending=True, stable=True)
    ordered = sizes[order]
    before = ordered.cumsum(-1) - ordered
    heads, rows, _ = levels.shape
    number = torch.arange(1, heads * rows + 1, device=levels.device).view(heads, rows, 1)
    chosen = before + _spread(number) * ordered < keys
    return torch.zeros_like(chosen).scatter_(-1, order, chosen) | (levels == ALWAYS)


def _spread(number: Int[Tensor, "*numbers"]) -> Float[Tensor, "*numbers"]:
    """A place from 0 to 1 for each whole number, so that any run of numbers is spread evenly."""
    return number.double().mul(_GOLDEN).remainder(1)
