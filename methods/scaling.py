"""ScalingAttention: a map, learnt offline, of the density from which on each block is computed.

Follows the paper, arXiv 2606.23019; its code is not public. What differs, or what we read into it:

- The paper's fidelity target is not known to us, only the density of 45 % that it led to. So the density is given, and
  the target is the one that leads to it, mean over all sites that were watched.
- Fidelity is 1 minus the Hellinger distance between a row's attention over blocks and what the mask leaves of it, as
  shares of its sum; mean over rows, and over heads. Where a share m of a row's attention is kept, that is
  1 − √(1 − √m): shares within what is kept cancel out.
- The fidelity curve is the mean of all prompts' own: what each prompt's heaviest blocks preserve of it. The map's mask
  holds these blocks of every prompt, so it preserves at least as much. The paper's curve is that of one prompt; with
  one, both are the same.
- Densities are multiples of 1/255, so that a block's fits in a byte. The heaviest block of each row is in every mask,
  and so is text, which the paper's model (Wan) has none of.
- One density for each step and layer. The paper's abstract speaks of tuning by head: a preset does that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from calibatt.kernels.geometry import Geometry
from calibatt.kernels.mask import BlockMask, block_count
from calibatt.kernels.plan import Plan
from calibatt.methods.ahead import SitePlans, sent
from calibatt.methods.base import Knob, Method
from calibatt.methods.blocks import check_query_stride, text_blocks, video_blocks, video_queries
from calibatt.methods.energy import block_energy, mean_mass
from calibatt.methods.learning import Learnt
from calibatt.methods.site import Site
from calibatt.methods.transfer import Blocks, transferred

# densities in steps of 1/255: from 0, the first block of a row alone, to 255, all
LEVELS = 256
# halvings of the range of fidelity: to fp32's own steps
_HALVINGS = 24


@dataclass(frozen=True, slots=True, kw_only=True)
class ScalingConfig:
    """Settings of the choice.

    Args:
        density: wanted share of the blocks, mean over all steps that are not dense, layers and heads; the fidelity
            target follows from it.
        granularity: what shares one density, the smallest at which its mean fidelity reaches the target: each head
            alone, all heads of a step and layer (site), or all.
        dense_steps: share of the first steps that stay dense.
        block: tokens of a query and of a key block.
        query_stride: as in `ScalingLearner`.

    Raises:
        ValueError: the density is outside 0 to 1, or the learner refuses the stride.
    """

    density: float
    granularity: Literal["head", "site", "all"]
    dense_steps: float
    # the paper's
    block: tuple[int, int] = (128, 128)
    query_stride: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.density <= 1:
            raise ValueError(f"density is a share of the blocks, 0 to 1: got {self.density}")
        check_query_stride(self.query_stride, self.block[0])


class Scaling(Method):
    """Computes the blocks whose threshold in the map is at most the density of the site; no input is looked at.

    Masks are made when first asked for, and kept; both branches have the same, learnt on the conditional one.
    """

    name: ClassVar[str] = "scaling"
    label: ClassVar[str] = "ScalingAttention"
    colour: ClassVar[str] = "#E69F00"
    marker: ClassVar[str] = "o"
    offline = True
    presets: ClassVar[Mapping[str, ScalingConfig]] = MappingProxyType(
        {
            # the paper's comparison at 45 % density; no step is dense
            "default": ScalingConfig(density=0.45, granularity="site", dense_steps=0.0),
            # by head, as in the abstract
            "head-wise": ScalingConfig(density=0.45, granularity="head", dense_steps=0.0),
            # what the paper compares with: one density for all, after 30 % of the steps
            "uniform": ScalingConfig(density=0.45, granularity="all", dense_steps=0.3),
        }
    )
    knob: ClassVar[Knob | None] = Knob(field="density", low=0.0, high=1.0)
    without_dense: ClassVar[Mapping[str, Any]] = MappingProxyType({"dense_steps": 0.0})
    learnt: Learnt

    def __init__(self, config: ScalingConfig, learnt: Learnt) -> None:
        super().__init__(config, learnt)
        self._levels = levels(learnt.tables["fidelity"], learnt.tables["share"], config).cpu()
        self._plans = SitePlans(self._made)

    @classmethod
    def learner(cls, config: ScalingConfig) -> ScalingLearner:
        """Learns the map."""
        return ScalingLearner(dense_steps=config.dense_steps, block=config.block, query_stride=config.query_stride)

    @classmethod
    def transferred_part(cls, learnt: Learnt, name: str, index: tuple[int, ...], source: Blocks, to: Blocks) -> Tensor:
        """The map by place, and its shares; fidelity as it was.

        Raises:
            ValueError: the first steps stay dense, of which nothing was learnt.
        """
        if learnt.settings["dense_steps"]:
            raise ValueError("a map that some steps are missing in cannot be transferred: learn with dense_steps=0")
        if name == "fidelity":
            return learnt.parts.part(name, index)
        entered = _transferred_map(learnt.parts.part("map", index), source, to)
        return entered if name == "map" else shares(entered)

    def plan(
        self,
        q: Float[Tensor, "heads tokens head_dim"],
        k: Float[Tensor, "heads tokens head_dim"],
        v: Float[Tensor, "heads tokens head_dim"],
        site: Site,
    ) -> Plan:
        """The site's mask.

        Raises:
            ValueError: the map was learnt for another geometry or number of steps.
        """
        self.learnt.check_blocks(site)
        if site.in_warmup(self.config.dense_steps):
            return Plan.dense(site.geometry)
        return self._plans.at(site, q.device)

    def _made(self, step: int, layer: int, geometry: Geometry, device: torch.device) -> Plan:
        keep = sent(self.learnt.part("map", step, layer), device) <= sent(self._levels[step, layer], device)
        block_q, block_k = self.config.block
        mask = BlockMask.from_keep(keep, tokens=geometry.tokens, block_q=block_q, block_k=block_k)
        return Plan.masked(mask, geometry.heads)


@dataclass(frozen=True, slots=True, kw_only=True)
class ScalingLearner:
    """Learns from which density on each block is among the heaviest of its row, and what each density preserves.

    The order of the prompts plays no part: the map is the least of their entry levels, and the fidelity at a level is
    the mean of what each prompt keeps by its own levels, which is a lower bound of what the common mask keeps.

    The map has a byte a block, and so has each prompt's note: 28 GB for Wan 14B at 720p and 50 steps. Steps that stay
    dense cost no time.

    Args:
        dense_steps: share of the first steps that are not looked at.
        block: tokens of a query and of a key block.
        query_stride: above 1, look at the video's queries in one of so many columns only, which saves time.

    Raises:
        ValueError: by the stride a block may have no query.
    """

    dense_steps: float
    block: tuple[int, int]
    query_stride: int

    def __post_init__(self) -> None:
        check_query_stride(self.query_stride, self.block[0])

    def note(
        self,
        q: Float[Tensor, "heads tokens head_dim"],
        k: Float[Tensor, "heads tokens head_dim"],
        v: Float[Tensor, "heads tokens head_dim"],
        site: Site,
        prompt: int,
    ) -> Mapping[str, Tensor]:
        """`map`: the entry level of each block; `fidelity`: at each level, zeros in a dense step."""
        block_q, block_k = self.block
        if site.in_warmup(self.dense_steps):
            heads, tokens, _ = q.shape
            shape = (heads, block_count(tokens, block_q), block_count(tokens, block_k))
            full = torch.full(shape, LEVELS - 1, dtype=torch.uint8, device=q.device)
            return {"map": full, "fidelity": torch.zeros(heads, LEVELS, device=q.device)}
        places = None if self.query_stride == 1 else video_queries(site.geometry, self.query_stride, q.device)
        queries = q if places is None else q[:, places]
        return self._noted(block_energy(queries, k, block_q=block_q, block_k=block_k, places=places), site)

    def weighed(self, site: Site, prompt: int) -> tuple[int, int] | None:
        """The blocks, where all queries are looked at."""
        return None if self.query_stride > 1 or site.in_warmup(self.dense_steps) else self.block

    def note_weighed(self, mass: Float[Tensor, "heads q_blocks k_blocks"], site: Site) -> Mapping[str, Tensor]:
        """As `note`."""
        return self._noted(mean_mass(mass, site.geometry.tokens, self.block[0], None), site)

    def _noted(self, energy: Float[Tensor, "heads q_blocks k_blocks"], site: Site) -> Mapping[str, Tensor]:
        entered = entry_levels(energy).masked_fill(text_blocks(site.geometry, self.block, energy.device), 0)
        return {"map": entered, "fidelity": fidelities(energy, entered)}

    def merge(self, notes: Sequence[Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
        """`map`: the least of all prompts; `fidelity`: their mean; `share`: of blocks, at each level of the map.

        Raises:
            ValueError: prompts differ in their number of blocks.
        """
        if len({note["map"].shape for note in notes}) > 1:
            raise ValueError("scaling's map is of token blocks: give prompts of one number of text tokens")
        least = torch.stack([note["map"] for note in notes]).amin(0)
        fidelity = torch.stack([note["fidelity"] for note in notes]).mean(0)
        return {"map": least, "fidelity": fidelity, "share": shares(least)}


def entry_levels(energy: Float[Tensor, "heads q_blocks k_blocks"]) -> UInt8[Tensor, "heads q_blocks k_blocks"]:
    """The smallest level, in 255ths, at which a block is among the heaviest of its row.

    A share p of n blocks is the heaviest ⌊p·n⌋, and at least one; of equal blocks the first are heavier.
    """
    order = energy.argsort(dim=-1, descending=True, stable=True)
    blocks = energy.shape[-1]
    # the block at place i, counted from 0, is among ⌊p·n⌋ from p = (i + 1) / n on; whole numbers, rounded up exactly
    of_place = -(-(LEVELS - 1) * torch.arange(1, blocks + 1, device=energy.device) // blocks)
    of_place[0] = 0
    return torch.zeros_like(order).scatter_(-1, order, of_place.expand_as(order)).to(torch.uint8)


def _transferred_map(
    entered: UInt8[Tensor, "heads q_blocks k_blocks"], source: Blocks, to: Blocks
) -> UInt8[Tensor, "heads other_q_blocks other_k_blocks"]:
    """The map for other blocks: the level from which on at least half of a block is kept; text is at level 0."""
    (rows, columns), (to_rows, to_columns) = (
        [video_blocks(blocks.geometry, size) for size in blocks.block] for blocks in (source, to)
    )
    whole = entered.new_zeros(len(entered), *(block_count(to.geometry.tokens, size) for size in to.block))
    # the earlier a block enters, the more it counts
    kept = transferred(LEVELS - 1 - entered[:, rows, columns], source, to, always=LEVELS - 1)
    whole[:, to_rows, to_columns] = LEVELS - 1 - kept
    return whole


def fidelities(
    energy: Float[Tensor, "heads q_blocks k_blocks"], entered: UInt8[Tensor, "heads q_blocks k_blocks"]
) -> Float[Tensor, "heads levels"]:
    """At each level the mean fidelity of a head's rows.

    Args:
        energy: attention in each block; rows sum to 1.
        entered: from which level on each block is kept; every row has one at 0.
    """
    kept = energy.new_zeros(*energy.shape[:2], LEVELS).scatter_add_(-1, entered.long(), energy).cumsum(-1)
    # as a share of the row's own sum, which rounding may leave beside 1
    mass = (kept / kept[..., -1:]).clamp(0, 1)
    return (1 - (1 - mass.sqrt()).sqrt()).mean(1)


def shares(entered: UInt8[Tensor, "heads q_blocks k_blocks"]) -> Float[Tensor, "heads levels"]:
    """At each level the share of a head's blocks that are kept."""
    counts = torch.stack([head.flatten().bincount(minlength=LEVELS) for head in entered])
    return (counts.cumsum(-1).double() / entered[0].numel()).float()


def levels(
    fidelity: Float[Tensor, "steps layers heads levels"],
    share: Float[Tensor, "steps layers heads levels"],
    config: ScalingConfig,
) -> Int[Tensor, "steps layers heads 1 1"]:
    """The level of each head, such that the mean share of blocks comes nearest to the wanted density.

    Each group that shares a density has the smallest level at which its fidelity reaches a target; the target is found
    by halving. Dense steps have level 0, and count nowhere.

    Args:
        fidelity, share: at each level, rising along it; a fidelity of zeros in dense steps.
        config: the wanted density, and what shares one.
    """
    # all blocks preserve all
    watched = fidelity[..., -1] > 0
    if config.granularity == "head":
        curve = fidelity
    elif config.granularity == "site":
        curve = fidelity.mean(2, keepdim=True)
    else:
        curve = fidelity[watched].mean(0).view(1, 1, 1, -1)
    # rounding may let a sum of equal terms fall
    curve = curve.cummax(-1).values.contiguous()

    def at(target: float) -> Int[Tensor, "steps layers heads"]:
        found = torch.searchsorted(curve, curve.new_full((*curve.shape[:-1], 1), target))[..., 0]
        return found.clamp(max=LEVELS - 1).expand(watched.shape)

    def density(target: float) -> float:
        return share.gather(-1, at(target)[..., None])[..., 0][watched].double().mean().item()

    low, high = 0.0, 1.0
    if config.density >= density(high):
        low = high
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if density(middle) <= config.density else (low, middle)
    best = min((low, high), key=lambda target: abs(density(target) - config.density))
    return at(best)[..., None, None]
