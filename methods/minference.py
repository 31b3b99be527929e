"""MInference: columns and diagonals chosen online from a few probe queries, or blocks from pooled queries and keys.

The bidirectional variant, ours: github.com/microsoft/MInference (minference/modules/minference_forward.py and
ops/block_sparse_flash_attention.py) is for causal language models, and no port to video is published. What differs:

- Probes are spread evenly over the sequence; there they are the last queries, which alone see all keys.
- Diagonals run both ways, and nothing is masked. A diagonal's score is the mean over the probes that have it; there all
  probes have nearly all diagonals, and a sum says the same.
- What is chosen is rounded to blocks; there single columns are gathered, and only diagonals are blocks. The same counts
  are denser here.
- A sequence shorter than the one that the counts were searched on takes them in proportion, or it would be dense.
- A shorter last block is pooled over its own tokens; there it is filled up with zeros.
- All heads have the preset's pattern; there an offline search gives each its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from calibatt.kernels.mask import BlockMask
from calibatt.kernels.plan import Plan
from calibatt.methods.base import Knob, Method
from calibatt.methods.blocks import block_ends, pooled
from calibatt.methods.energy import products
from calibatt.methods.site import Site

Pattern = Literal["vertical-slash", "block-sparse"]

# tokens of the sample that the original searches its patterns on: the paper, and --max_seq_length in experiments/README
_SEARCHED = 30_000


@dataclass(frozen=True, slots=True, kw_only=True)
class MInferenceConfig:
    """Settings of the choice.

    Args:
        pattern: columns and diagonals of tokens, or blocks.
        verticals: columns kept for every query, the forced ones among them; at least one is.
        slashes: diagonals kept, the forced ones among them.
        forced: first columns, and diagonals nearest to the main one, that are kept whatever their score.
        probes: queries that columns and diagonals are scored by.
        key_blocks: key blocks, of whatever size, that each query block keeps if the pattern is block-sparse; at least
            one is.
        scale: factor on the three counts, which then end at what the sequence has.
        length: tokens from which the counts hold as they are; a shorter sequence takes them in proportion.
        block: tokens of a query and of a key block.

    Raises:
        ValueError: a count or the scale is negative, or there is no probe, or no length.
    """

    pattern: Pattern
    # the largest pair of search_pattern_v2
    verticals: int = 1000
    slashes: int = 4096
    # of both in search_pattern_v2; at inference the repository forces 100 diagonals
    forced: int = 30
    # last_q
    probes: int = 64
    # block_sparse_kernel
    key_blocks: int = 100
    # the repository's minference_ratio
    scale: float = 1.0
    length: int = _SEARCHED
    # block_size_M, block_size_N
    block: tuple[int, int] = (64, 64)

    def __post_init__(self) -> None:
        if min(self.verticals, self.slashes, self.forced, self.key_blocks, self.scale) < 0:
            raise ValueError(f"minference keeps a number of columns, diagonals and blocks that is not negative: {self}")
        if min(self.probes, self.length) < 1:
            raise ValueError(f"minference needs at least one probe, and a length of at least one token: {self}")

    def count(self, setting: int, tokens: int) -> int:
        """How many of a setting's count a sequence takes, rounded down as in the repository."""
        return int(setting * self.scale * min(1.0, tokens / self.length))


class MInference(Method):
    """Scores columns and diagonals, or pooled blocks, at every call, and keeps the highest."""

    name: ClassVar[str] = "minference"
    label: ClassVar[str] = "MInference"
    colour: ClassVar[str] = "#E69F00"
    marker: ClassVar[str] = "v"
    headwise: ClassVar[bool] = True
    presets: ClassVar[Mapping[str, MInferenceConfig]] = MappingProxyType(
        {
            # of the pairs that the repository searches, (30, 800), (100, 800), (100, 750), (500, 700), (3500, 100) and
            # (1000, 4096), the one next to its (1000, 6096) for heads without a pattern of their own, as all are here
            "default": MInferenceConfig(pattern="vertical-slash", verticals=1000, slashes=4096),
            # block_sparse_kernel: top 100 key blocks of 64
            "block-sparse": MInferenceConfig(pattern="block-sparse", key_blocks=100),
        }
    )
    # 15 · 4096 are all diagonals, 2L − 1, of any sequence up to the searched length
    knob: ClassVar[Knob | None] = Knob(field="scale", low=0.0, high=15.0)

    def plan(
        self,
        q: Float[Tensor, "heads tokens head_dim"],
        k: Float[Tensor, "heads tokens head_dim"],
        v: Float[Tensor, "heads tokens head_dim"],
        site: Site,
    ) -> Plan:
        """Masks of this call's queries and keys; text is not special."""
        choose = _vertical_slash if self.config.pattern == "vertical-slash" else _block_sparse
        block_q, block_k = self.config.block
        mask = BlockMask.from_keep(
            choose(q, k, self.config), tokens=site.geometry.tokens, block_q=block_q, block_k=block_k
        )
        return Plan.masked(mask, site.geometry.heads)


def _vertical_slash(
    q: Float[Tensor, "heads tokens head_dim"], k: Float[Tensor, "heads tokens head_dim"], config: MInferenceConfig
) -> Bool[Tensor, "heads q_blocks k_blocks"]:
    """Blocks that hold a token of a chosen column or diagonal."""
    tokens = q.shape[1]
    places = _spread(config.probes, tokens)
    scores = products(q[:, places], k) / math.sqrt(q.shape[-1])
    weights = scores.softmax(-1)

    verticals = weights.sum(1)
    verticals[:, : config.forced] = math.inf
    # one at least, so that every query has a key where nothing is forced
    columns = _highest(verticals, max(1, config.forced, config.count(config.verticals, tokens)))

    slashes = _diagonal_means(weights, places)
    # of an even number one more lies on the side of earlier keys, which is all that the original has
    first = tokens - 1 - (config.forced - 1) // 2
    slashes[:, max(0, first) : first + config.forced] = math.inf
    diagonals = _highest(slashes, max(config.forced, config.count(config.slashes, tokens)))

    block_q, block_k = config.block
    return _crossed(diagonals, tokens, block_q, block_k) | _blocks(columns, block_k)[:, None]


def _block_sparse(
    q: Float[Tensor, "heads tokens head_dim"], k: Float[Tensor, "heads tokens head_dim"], config: MInferenceConfig
) -> Bool[Tensor, "heads q_blocks k_blocks"]:
    """The key blocks of each query block whose pooled scores are highest."""
    block_q, block_k = config.block
    # softmax would leave the order as it is
    scores = pooled(q, block_q) @ pooled(k, block_k).transpose(-1, -2)
    return _highest(scores, max(1, config.count(config.key_blocks, q.shape[1])))


def _spread(probes: int, tokens: int) -> list[int]:
    """Places of the probes, as far apart as they can be: with the first and the last, every diagonal has a probe."""
    count = min(probes, tokens)
    return [probe * (tokens - 1) // max(1, count - 1) for probe in range(count)]


def _highest(scores: Float[Tensor, "*rows places"], count: int) -> Bool[Tensor, "*rows places"]:
    """The places with the highest scores, all where there are fewer than count; of equal ones the first."""
    order = scores.argsort(dim=-1, descending=True, stable=True)
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, order[..., :count], True)


def _diagonal_means(
    weights: Float[Tensor, "heads probes tokens"], places: Sequence[int]
) -> Float[Tensor, "heads diagonals"]:
    """Mean weight of each diagonal over the probes that have it, 0 without any.

    Diagonals are ordered by query minus key, from 1 − tokens to tokens − 1. A sum would hold their length against them:
    few probes have the long ones.
    """
    heads, _, tokens = weights.shape
    sums = weights.new_zeros(heads, 2 * tokens - 1)
    counts = weights.new_zeros(2 * tokens - 1)
    # one probe after the other: scattered sums would depend on the order in which a GPU adds
    for probe, place in enumerate(places):
        # from the last key to the first, a probe's diagonals follow each other
        sums[:, place : place + tokens] += weights[:, probe].flip(-1)
        counts[place : place + tokens] += 1
    return sums / counts.clamp(min=1)


def _crossed(
    diagonals: Bool[Tensor, "heads diagonals"], tokens: int, block_q: int, block_k: int
) -> Bool[Tensor, "heads q_blocks k_blocks"]:
    """Blocks that a chosen diagonal crosses: those of a block lie side by side, and a running sum counts the chosen."""
    first_q, last_q = block_ends(tokens, block_q, diagonals.device)
    first_k, last_k = block_ends(tokens, block_k, diagonals.device)
    before = torch.nn.functional.pad(diagonals.cumsum(-1, dtype=torch.int32), (1, 0))
    lowest, highest = first_q[:, None] - last_k, last_q[:, None] - first_k
    return before[:, highest + tokens] > before[:, lowest + tokens - 1]


def _blocks(columns: Bool[Tensor, "heads tokens"], block: int) -> Bool[Tensor, "heads blocks"]:
    """Blocks that hold a chosen column."""
    padded = torch.nn.functional.pad(columns, (0, -columns.shape[1] % block))
    return padded.view(len(columns), -1, block).any(-1)
