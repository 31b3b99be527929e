"""Budget, our own: one budget of blocks for a whole video, spent where leaving one out would change outputs the most.

What a query loses by a block is not its attention mass but what that mass carries: leave key block c out and weigh the
rest anew, and to first order in the mass p_c the output o moves by Σ_{j∈c} P_j (v_j − o). Its square, over the layer's
mean ‖o‖², compares blocks of any step, layer, head and row, so that one threshold serves the whole video: early steps
and layers whose heads look everywhere get more of the budget by themselves, and no schedule has to be given.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Float64, Int, UInt8
from torch import Tensor

from calibatt.kernels.mask import BlockMask, block_count, block_sizes
from calibatt.kernels.plan import Plan
from calibatt.methods.base import Knob, Method
from calibatt.methods.blocks import text_blocks
from calibatt.methods.energy import CHUNK, exponentials
from calibatt.methods.facts import read_facts
from calibatt.methods.learning import Learnt
from calibatt.methods.site import Site

# An importance is a byte: sixths of an octave, so that rounding errs by 6 %, from 2^-32, far below what fp32 can tell
# of an output, up to 2^10.
_A_OCTAVE, _LOWEST = 6, -32
LEVELS = 256
# blocks that every mask has: those with text, and the most important of each row
ALWAYS = LEVELS - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class BudgetConfig:
    """Settings of the choice.

    Args:
        density: share of the query-key products of a video that is computed.
        scope: what shares one budget: all steps, layers, heads and rows; each site (a step of a layer) by itself; or
            each row of blocks.
        queries: of each block, how many are looked at when importances are learnt, evenly spaced.
        block: tokens of a query and of a key block.

    Raises:
        ValueError: the density is outside 0 to 1, or no query is looked at.
    """

    density: float = 0.35
    scope: Literal["all", "site", "row"] = "all"
    queries: int = 8
    block: tuple[int, int] = (128, 128)

    def __post_init__(self) -> None:
        # written so that NaN fails too
        if not 0 <= self.density <= 1:
            raise ValueError(f"density is a share of the products, 0 to 1: got {self.density}")
        if self.queries < 1:
            raise ValueError(f"at least one query of a block is looked at: got queries={self.queries}")


class Budget(Method):
    """Computes the most important blocks of a video, as far as the budget goes; no input is looked at.

    Masks are made when first asked for, and kept; both branches have the same, learnt on the conditional one.
    """

    name: ClassVar[str] = "budget"
    label: ClassVar[str] = "Budget (ours)"
    colour: ClassVar[str] = "#0072B2"
    marker: ClassVar[str] = "s"
    presets: ClassVar[Mapping[str, BudgetConfig]] = MappingProxyType(
        {
            # one budget for all; a density that rivals are compared at
            "default": BudgetConfig(),
            # ablations: what it gains to share the budget
            "site": BudgetConfig(scope="site"),
            "rows": BudgetConfig(scope="row"),
        }
    )
    knob: ClassVar[Knob | None] = Knob(field="density", low=0.0, high=1.0)
    learnt: Learnt

    def __init__(self, config: BudgetConfig, learnt: Learnt) -> None:
        super().__init__(config, learnt)
        self._cuts = self._budgets()
        self._plans: dict[tuple[int, int, torch.device], Plan] = {}

    @classmethod
    def learner(cls, config: BudgetConfig) -> BudgetLearner:
        """Learns importances; the same for all presets."""
        return BudgetLearner(queries=config.queries, block=config.block)

    @classmethod
    def check_tables(cls, learnt: Learnt) -> None:
        """Refuse tables that Budget cannot have learnt.

        Raises:
            ValueError: one line that names the table.
        """
        learner = read_facts(BudgetLearner, json.dumps(dict(learnt.settings)))
        if learnt.tables.keys() != {"importance"}:
            raise ValueError(f"tables: Budget has importance, not {', '.join(learnt.tables) or 'none'}")
        geometry, table = learnt.provenance.geometry, learnt.tables["importance"]
        shape = (geometry.heads, *(block_count(geometry.tokens, size) for size in learner.block))
        if table.dtype != torch.uint8 or tuple(table.shape[2:]) != shape:
            raise ValueError(
                f"importance: {list(shape)} of torch.uint8 at every site, not {list(table.shape[2:])} of {table.dtype}"
            )
        for step, importance in enumerate(table):
            if not bool((importance == ALWAYS).any(-1).all()):
                raise ValueError(f"importance: a row at step {step} has no block that is always kept")

    def plan(
        self,
        q: Float[Tensor, "heads tokens head_dim"],
        k: Float[Tensor, "heads tokens head_dim"],
        v: Float[Tensor, "heads tokens head_dim"],
        site: Site,
    ) -> Plan:
        """The site's mask.

        Raises:
            CalibrationMismatch: the importances are of another geometry, number of steps or of layers.
        """
        self.learnt.check_blocks(site)
        key = (site.step, site.layer, q.device)
        if key not in self._plans:
            keep = self._keep(site.step, site.layer).to(q.device)
            block_q, block_k = self.config.block
            mask = BlockMask.from_keep(keep, tokens=site.geometry.tokens, block_q=block_q, block_k=block_k)
            self._plans[key] = Plan.masked(mask, site.geometry.heads)
        return self._plans[key]

    def mean_density(self) -> float:
        """Of all plans of a video."""
        area = self._areas()
        kept = [(self._keep(*site).cpu() * area).sum() for site in self._sites()]
        return (torch.stack(kept).mean() / (area.sum() * self.learnt.provenance.geometry.heads)).item()

    def _keep(self, step: int, layer: int) -> Bool[Tensor, "heads q_blocks k_blocks"]:
        importance = self.learnt.tables["importance"][step, layer]
        if self.config.scope == "row":
            return most_of_each_row(importance, self.config.density)
        return within(importance, self._cuts[step, layer])

    def _budgets(self) -> Mapping[tuple[int, int], Cut]:
        """Where the budget of each site ends; none by rows."""
        if self.config.scope == "row":
            return {}
        area = self._areas()
        shares = {site: level_shares(self.learnt.tables["importance"][site].cpu(), area) for site in self._sites()}
        if self.config.scope == "site":
            return {site: cut_at(share, self.config.density) for site, share in shares.items()}
        common = cut_at(torch.stack(list(shares.values())).mean(0), self.config.density)
        return dict.fromkeys(shares, common)

    def _sites(self) -> list[tuple[int, int]]:
        own = self.learnt.provenance
        return list(itertools.product(range(own.steps), range(own.layers)))

    def _areas(self) -> Float64[Tensor, "q_blocks k_blocks"]:
        """Query-key products of each block."""
        tokens = self.learnt.provenance.geometry.tokens
        rows, columns = (block_sizes(tokens, size).double() for size in self.config.block)
        return rows[:, None] * columns


@dataclass(frozen=True, slots=True, kw_only=True)
class BudgetLearner:
    """Learns how important each block is to the output.

    The table has a byte a block, and so has each prompt's note.

    Args:
        queries: of each block, that are looked at.
        block: tokens of a query and of a key block.
    """

    queries: int
    block: tuple[int, int]

    def note(
        self,
        q: Float[Tensor, "heads tokens head_dim"],
        k: Float[Tensor, "heads tokens head_dim"],
        v: Float[Tensor, "heads tokens head_dim"],
        site: Site,
        prompt: int,
    ) -> Mapping[str, Tensor]:
        """`importance`: of each block, as a level."""
        found = to_levels(output_importance(q, k, v, block=self.block, queries=self.queries))
        return {"importance": found.masked_fill(text_blocks(site.geometry, self.block, q.device), ALWAYS)}

    def merge(self, notes: Sequence[Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
        """`importance`: the mean of all prompts; the most important block of each row is always kept.

        Raises:
            ValueError: prompts differ in their number of blocks.
        """
        if len({note["importance"].shape for note in notes}) > 1:
            raise ValueError("Budget's importances are of token blocks: give prompts of one number of text tokens")
        levels = torch.stack([note["importance"] for note in notes])
        mean = to_levels(torch.stack([from_levels(one) for one in levels]).mean(0))
        mean.scatter_(-1, mean.argmax(-1, keepdim=True), ALWAYS)
        return {"importance": mean.masked_fill(levels[0] == ALWAYS, ALWAYS)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """Where a budget ends.

    Args:
        level: blocks above it are kept.
        share: of the blocks at it, how many are.
    """

    level: int
    share: float


def output_importance(
    q: Float[Tensor, "heads tokens head_dim"],
    k: Float[Tensor, "heads tokens head_dim"],
    v: Float[Tensor, "heads tokens head_dim"],
    *,
    block: tuple[int, int],
    queries: int,
) -> Float[Tensor, "heads q_blocks k_blocks"]:
    """Squared change of the output by each block's being left out, over the layer's mean squared output.

    To first order in the block's attention mass; mean over some queries of each query block. In fp32.

    Args:
        q, k, v: what attention sees.
        block: tokens of a query and of a key block.
        queries: of each query block, evenly spaced; of a block that has fewer, some more than once.
    """
    heads, tokens, head_dim = q.shape
    block_q, block_k = block
    q_blocks, k_blocks = block_count(tokens, block_q), block_count(tokens, block_k)
    padded = k_blocks * block_k - tokens
    looked_at = _spaced(tokens, block_q, min(queries, block_q), q.device)
    importance = q.new_empty(heads, q_blocks, k_blocks, dtype=torch.float32)
    scale = q.new_zeros((), dtype=torch.float64)
    at_once = max(1, CHUNK // (looked_at.shape[1] * max(tokens, k_blocks * head_dim)))
    for head in range(heads):
        values = torch.nn.functional.pad(v[head].float(), (0, 0, 0, padded)).view(k_blocks, block_k, head_dim)
        for first in range(0, q_blocks, at_once):
            rows = looked_at[first : first + at_once]
            weights = exponentials(q[head, rows.flatten()], k[head])
            weights /= weights.sum(-1, keepdim=True)
            by_block = torch.nn.functional.pad(weights, (0, padded)).view(-1, k_blocks, block_k).transpose(0, 1)
            carried = by_block @ values
            output = carried.sum(0)
            change = carried - by_block.sum(-1, keepdim=True) * output
            importance[head, first : first + at_once] = change.square().sum(-1).view(k_blocks, *rows.shape).mean(-1).T
            scale += output.double().square().sum()
    mean: Tensor = scale / (heads * looked_at.numel())
    # outputs of nothing but zeros have nothing to lose
    return importance / mean.clamp(min=torch.finfo(torch.float32).tiny)


def _spaced(tokens: int, block: int, count: int, device: torch.device) -> Int[Tensor, "blocks count"]:
    """So many tokens of each block, in the middle of equal parts of it."""
    sizes = block_sizes(tokens, block, device)
    middle = (torch.arange(count, device=device) + 0.5) / count
    within_block = (middle * sizes[:, None]).long()
    return torch.arange(0, tokens, block, device=device)[:, None] + within_block


def to_levels(importance: Float[Tensor, "*blocks"]) -> UInt8[Tensor, "*blocks"]:
    """The nearest level of each importance, below the one that is always kept; nothing is 0."""
    octaves = importance.log2() - _LOWEST
    return (octaves * _A_OCTAVE).round().clamp(0, ALWAYS - 1).to(torch.uint8)


def from_levels(levels: UInt8[Tensor, "*blocks"]) -> Float[Tensor, "*blocks"]:
    """What levels stand for; 0 is nothing."""
    return torch.where(levels > 0, (levels.float() / _A_OCTAVE + _LOWEST).exp2(), 0)


def level_shares(
    levels: UInt8[Tensor, "heads q_blocks k_blocks"], area: Float64[Tensor, "q_blocks k_blocks"]
) -> Float64[Tensor, "levels"]:
    """The share of the products that lies in blocks of each level."""
    weights = area.expand(levels.shape).flatten()
    return levels.flatten().long().bincount(weights, minlength=LEVELS) / weights.sum()


def cut_at(share: Float64[Tensor, "levels"], density: float) -> Cut:
    """Where the most important blocks come to a density; those that are always kept are, whatever it is."""
    at_or_above = share.flip(0).cumsum(0).flip(0)
    reached = (at_or_above >= density).nonzero()
    # rounding may leave the sum of all below 1
    level = int(reached.max()) if len(reached) else 0
    if level == ALWAYS:
        return Cut(level=ALWAYS, share=1.0)
    rest = density - at_or_above[level + 1].item()
    return Cut(level=level, share=min(1.0, max(0.0, rest / max(share[level].item(), torch.finfo(torch.float64).tiny))))


def within(levels: UInt8[Tensor, "heads q_blocks k_blocks"], cut: Cut) -> Bool[Tensor, "heads q_blocks k_blocks"]:
    """The blocks that a budget reaches; of equals at its end, a share that is spread over heads and rows."""
    equal = levels == cut.level
    number = equal.flatten().cumsum(0).view_as(levels).double()
    chosen = (number * cut.share).floor() > ((number - 1) * cut.share).floor()
    return (levels > cut.level) | (equal & chosen)


def most_of_each_row(
    levels: UInt8[Tensor, "heads q_blocks k_blocks"], density: float
) -> Bool[Tensor, "heads q_blocks k_blocks"]:
    """As many blocks in every row, but for one that makes the density come out; of equals the first."""
    wanted = density * levels.shape[-1]
    ends = (torch.arange(levels[..., 0].numel() + 1, device=levels.device).double() * wanted).floor()
    counts = ends.diff().view(levels.shape[:-1])
    rank = levels.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    return (rank < counts[..., None]) | (levels == ALWAYS)
