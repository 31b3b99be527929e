"""SpargeAttn: blocks chosen online from pooled queries and keys, where pooling can be trusted.

Follows arXiv 2502.18137 and github.com/thu-ml/SpargeAttn (utils.py, core.py and autotune.py of spas_sage_attn,
csrc/qattn). Stage one is the choice of blocks; stage two leaves out, in the kernel, chosen blocks whose scores turn out
low. The preset `tuned` searches the settings of both for each layer and head. What differs:

- Stage two is off but in presets that say so, and so is INT8, to tell apart what each of the three does. There, queries
  and keys are always in INT8, and values in FP8 on newer GPUs.
- Stage two decides for all queries of a block at once (`plan.Skip`); there every warp decides for its own, and the last
  block of a list is always computed. As in the repository's kernels, the softmax's sum loses what is left out; in the
  paper's algorithm 1 it does not. Thresholds are powers of two, as the repository's kernels compare them.
- Presets named oracle find the low blocks before the call, so that every kernel can compute what is left. Their times
  are no times of this method: the search costs more than attention. Their density is: scores of low blocks count.
- The search tries a grid, on some query blocks of a call; there it bisects, on all of them. It watches the conditional
  branch alone, sees no error of INT8, and judges whether a head is sparse when all is watched; there a head that once
  was not is given up for good. It joins no neighbouring thresholds of similarity, which lie further apart here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from calibatt.kernels.mask import BlockMask, block_count
from calibatt.kernels.plan import Plan, Skip
from calibatt.methods.ahead import sent
from calibatt.methods.base import Knob, Method
from calibatt.methods.blocks import self_similarity
from calibatt.methods.energy import products
from calibatt.methods.learning import Learnt, Tables
from calibatt.methods.site import Site
from calibatt.methods.skipping import below_largest, without_low

# what the search tries, ascending. There, similarity runs from -1 to 1 (below 0 all are one), cdf from 0 to 1, and
# pvthreshd from 0 to 50. The steps are ours; the last cdf and the last pv_threshold leave nothing out.
SIMILARITIES = (-0.1, 0.25, 0.5, 0.75)
CDFS = (0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999, math.inf)
PV_THRESHOLDS = (1.0, 2.0, 4.0, 6.0, 8.0, 10.0, 15.0, 20.0, math.inf)
# heads of which no more is left out stay dense: autotune.py
_LEAST_SPARSITY = 0.1
# query blocks of a call that are compared: ours. Errors of a layer are compared in every call, and the worst one counts
_ROWS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class SpargeConfig:
    """Settings of the choice. Blocks are chosen by topk, by cdf, or by what was found for each layer and head.

    Args:
        similarity: blocks of less self-similarity (mean cosine of their tokens) cannot be pooled: they stay on.
        topk: share of the key blocks that each query block keeps.
        cdf: share of pooled attention that the kept blocks of a row do not pass, except that one is always kept.
        l1, l2: largest relative L1 error of a head's output under which similarity and cdf are searched, and after
            that pv_threshold.
        sink: whether the first key block is always kept.
        pv_threshold: chosen blocks whose largest weight is at most 2 to minus this, against the largest so far, lose
            their softmax and values in the kernel; None computes all that is chosen.
        oracle: whether those are found before the call, for kernels that leave nothing out by themselves.
        int8: whether queries and keys are multiplied in INT8, a scale a block.
        block: tokens of a query and of a key block.

    Raises:
        ValueError: not exactly one of topk, cdf and both bounds is given, settings are given beside bounds or missing
            without, the second bound is not above the first, or the threshold is not above 0.
    """

    similarity: float | None = None
    topk: float | None = None
    cdf: float | None = None
    l1: float | None = None
    l2: float | None = None
    sink: bool = False
    pv_threshold: float | None = None
    oracle: bool = False
    int8: bool = False
    # the repository's sizes but for Hopper, which has 64 × 128
    block: tuple[int, int] = (128, 64)

    def __post_init__(self) -> None:
        if [self.topk, self.cdf, self.l1].count(None) != 2:
            raise ValueError("sparge chooses by topk, by cdf, or within searched bounds l1 and l2: give one of them")
        if self.l1 is None and (self.similarity is None or self.l2 is not None):
            raise ValueError("sparge without a search needs a similarity and no l2")
        if self.l1 is not None and not (self.l2 is not None and self.l1 < self.l2):
            raise ValueError(f"sparge's bound l2 is above l1: got {self.l1} and {self.l2}")
        if self.l1 is not None and (self.similarity is not None or self.pv_threshold is not None):
            raise ValueError("sparge searches similarity and pv_threshold where bounds are given: leave them out")
        if self.pv_threshold is not None and not self.pv_threshold > 0:
            raise ValueError(f"sparge's pv_threshold is how many powers of two below: above 0, got {self.pv_threshold}")


class Sparge(Method):
    """Pools queries and keys by block at every call, and keeps the blocks with the most pooled attention."""

    name: ClassVar[str] = "sparge"
    label: ClassVar[str] = "SpargeAttn"
    colour: ClassVar[str] = "#009E73"
    marker: ClassVar[str] = "s"
    headwise: ClassVar[bool] = True
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
            # l1 and pv_l1 of evaluate/wan_example.py and evaluate/cogvideo_example.py; autotune.py has the sink
            "tuned": SpargeConfig(l1=0.06, l2=0.065, sink=True),
            "tuned-oracle": SpargeConfig(l1=0.06, l2=0.065, sink=True, oracle=True),
        }
    )
    knob: ClassVar[Knob | None] = Knob(field="topk", low=0.0, high=1.0)

    def __init__(self, config: SpargeConfig, learnt: Learnt | None = None) -> None:
        super().__init__(config, learnt)
        self._found = None if learnt is None else Found.of(learnt.tables)

    @classmethod
    def learner(cls, config: SpargeConfig) -> SpargeSearch | None:
        """The search, where there are bounds."""
        if config.l1 is None:
            return None
        assert config.l2 is not None
        return SpargeSearch(l1=config.l1, l2=config.l2, block=config.block)

    def plan(
        self,
        q: Float[Tensor, "heads tokens head_dim"],
        k: Float[Tensor, "heads tokens head_dim"],
        v: Float[Tensor, "heads tokens head_dim"],
        site: Site,
    ) -> Plan:
        """Masks of this call's queries and keys; text is not special.

        Raises:
            ValueError: what was found is for another geometry, or for other steps or layers.
        """
        config, heads = self.config, site.geometry.heads
        pooled = Pooled.of(q, k, config.block)
        thresholds = None if config.pv_threshold is None else -config.pv_threshold
        if self.learnt is None or self._found is None:
            assert config.similarity is not None
            keep = pooled.kept(config.similarity, topk=config.topk, cdf=config.cdf)
        else:
            self.learnt.check(site)
            similarity, cdf = (sent(found[site.layer], q.device) for found in (self._found.similarity, self._found.cdf))
            keep = pooled.kept(similarity[:, None], cdf=cdf[:, None, None])
            thresholds = self._found.thresholds[site.layer]
        if config.sink:
            keep[..., 0] = True
        block_q, block_k = config.block
        mask = BlockMask.from_keep(keep, tokens=site.geometry.tokens, block_q=block_q, block_k=block_k)
        if thresholds is None:
            plan = Plan.masked(mask, heads)
        elif config.oracle:
            plan = Plan.masked(without_low(q, k, mask, thresholds), heads, scored=mask)
        else:
            plan = Plan.masked(mask, heads, skip=Skip.of(mask, heads, threshold=thresholds, leave=True))
        return replace(plan, int8=config.block) if config.int8 else plan


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Pooled:
    """What blocks are chosen by.

    Args:
        scores: of the mean queries and keys of blocks, scaled.
        similarity_q, similarity_k: self-similarity of each block: the mean cosine of its tokens.
    """

    scores: Float[Tensor, "heads q_blocks k_blocks"]
    similarity_q: Float[Tensor, "heads q_blocks"]
    similarity_k: Float[Tensor, "heads k_blocks"]

    @classmethod
    def of(
        cls,
        q: Float[Tensor, "heads tokens head_dim"],
        k: Float[Tensor, "heads tokens head_dim"],
        block: tuple[int, int],
    ) -> Pooled:
        """From what attention sees.

        Args:
            q, k: what attention sees.
            block: tokens of a query and of a key block.
        """
        # what all keys have in common moves no score against another
        pooled_q, similarity_q = self_similarity(q, block[0], torch.zeros_like(q[:, 0], dtype=torch.float32))
        pooled_k, similarity_k = self_similarity(k, block[1], k.mean(1, dtype=torch.float32))
        scores = pooled_q @ pooled_k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        return cls(scores=scores, similarity_q=similarity_q, similarity_k=similarity_k)

    def of_rows(self, rows: Int[Tensor, "rows"]) -> Pooled:
        """Some query blocks alone."""
        return replace(self, scores=self.scores[:, rows], similarity_q=self.similarity_q[:, rows])

    def kept(
        self,
        similarity: float | Float[Tensor, "heads 1"],
        *,
        topk: float | None = None,
        cdf: float | Float[Tensor, "heads 1 1"] | None = None,
    ) -> Bool[Tensor, "heads q_blocks k_blocks"]:
        """The blocks that are chosen, by topk or by cdf.

        Args:
            similarity: self-similarity above which a block is trusted.
            topk: share of the key blocks to keep in each row; None to choose by cdf.
            cdf: share of the pooled attention to keep; None to choose by topk.
        """
        trusted_q, trusted_k = self.similarity_q > similarity, self.similarity_k > similarity
        scores = self.scores.masked_fill(~trusted_k[:, None], -math.inf)
        # a head without any trusted key block keeps them all below, whatever its scores
        weights = scores.softmax(-1).nan_to_num(0.0)
        ordered, order = weights.sort(dim=-1, descending=True, stable=True)
        rank = torch.arange(weights.shape[-1], device=weights.device)
        if topk is not None:
            chosen = rank < max(1, int(topk * len(rank)))
        else:
            assert cdf is not None
            # the repository's searchsorted(…, right=True), then at least one
            chosen = (ordered.cumsum(-1) <= cdf) | (rank == 0)
        keep = torch.zeros_like(weights, dtype=torch.bool).scatter_(-1, order, chosen.expand_as(order))
        return keep | ~trusted_q[:, :, None] | ~trusted_k[:, None]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Found:
    """The settings of each layer and head, at every step the same.

    The threshold of similarity under which the most blocks are left out, over all steps, is taken, with the largest cdf
    and pv_threshold that any call has for it.

    Args:
        similarity, cdf: as in `SpargeConfig`; no similarity is enough where nothing is worth leaving out.
        thresholds: by layer and head, minus the pv_threshold; on the host, where plans hold them.
    """

    similarity: Float[Tensor, "layers heads"]
    cdf: Float[Tensor, "layers heads"]
    thresholds: list[list[float]]

    @classmethod
    def of(cls, tables: Tables | Mapping[str, Float[Tensor, "steps layers similarities heads"]]) -> Found:
        """From what the search learnt."""
        most, best = tables["sparsity"].mean(0).max(1)
        cdf, pv_threshold = (tables[name].amax(0).gather(1, best[:, None])[:, 0] for name in ("cdf", "pv_threshold"))
        similarity = torch.tensor(SIMILARITIES, device=best.device)[best]
        return cls(
            similarity=similarity.masked_fill(most <= _LEAST_SPARSITY, math.inf),
            cdf=cdf,
            thresholds=(-pv_threshold).tolist(),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class SpargeSearch:
    """Searches the settings that leave out the most within the bounds.

    At every call, each threshold of similarity gets the smallest cdf whose error is below the first bound, and then the
    smallest pv_threshold whose error is below the second.

    Args:
        l1, l2: the bounds, relative L1 errors of a head's output.
        block: tokens of a query and of a key block.
    """

    l1: float
    l2: float
    block: tuple[int, int]

    def note(
        self,
        q: Float[Tensor, "heads tokens head_dim"],
        k: Float[Tensor, "heads tokens head_dim"],
        v: Float[Tensor, "heads tokens head_dim"],
        site: Site,
        prompt: int,
    ) -> Mapping[str, Tensor]:
        """`sparsity`, `cdf` and `pv_threshold` of one call, for each threshold of similarity and head."""
        found = search(q, k, v, _rows(site, self.block[0]).to(q.device), self)
        return dict(zip(("sparsity", "cdf", "pv_threshold"), found, strict=True))

    def merge(self, notes: Sequence[Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
        """`sparsity`: the mean over the prompts; `cdf` and `pv_threshold`: the largest of any prompt."""
        sparsity, cdf, pv_threshold = (
            torch.stack([note[name] for note in notes]) for name in ("sparsity", "cdf", "pv_threshold")
        )
        return {"sparsity": sparsity.mean(0), "cdf": cdf.amax(0), "pv_threshold": pv_threshold.amax(0)}


def search(
    q: Float[Tensor, "heads tokens head_dim"],
    k: Float[Tensor, "heads tokens head_dim"],
    v: Float[Tensor, "heads tokens head_dim"],
    rows: Int[Tensor, "rows"],
    bounds: SpargeSearch,
) -> tuple[
    Float[Tensor, "similarities heads"], Float[Tensor, "similarities heads"], Float[Tensor, "similarities heads"]
]:
    """Share of blocks that are not chosen, cdf and pv_threshold, for each threshold of similarity at one call.

    Computed in fp32, one query block of one head at a time: the parts that key blocks add to an output are computed
    once, and every mask sums its own.

    Args:
        q, k, v: what attention sees.
        rows: query blocks to compare.
        bounds: the bounds, and the blocks.
    """
    pooled = Pooled.of(q, k, bounds.block).of_rows(rows)
    keep = torch.stack([torch.stack([pooled.kept(one, cdf=cdf) for cdf in CDFS]) for one in SIMILARITIES])
    errors = torch.stack(
        [_errors(q[head], k[head], v[head], rows, keep[:, :, head], bounds.block) for head in range(len(q))], -1
    )
    # the first that is within the bound: the last, which leaves nothing out, always is
    first = (errors[:, :, -1] < bounds.l1).int().argmax(1)
    second = (errors.gather(1, first[:, None, None].expand(-1, 1, *errors.shape[2:]))[:, 0] < bounds.l2).int().argmax(1)
    sparsity = 1 - keep.float().mean((-2, -1)).gather(1, first[:, None])[:, 0]
    cdfs, thresholds = (torch.tensor(tried, device=q.device) for tried in (CDFS, PV_THRESHOLDS))
    return sparsity, cdfs[first], thresholds[second]


def _errors(
    q: Float[Tensor, "tokens head_dim"],
    k: Float[Tensor, "tokens head_dim"],
    v: Float[Tensor, "tokens head_dim"],
    rows: Int[Tensor, "rows"],
    keep: Bool[Tensor, "similarities cdfs rows k_blocks"],
    block: tuple[int, int],
) -> Float[Tensor, "similarities cdfs thresholds"]:
    """Relative L1 error of one head's output: sums over all compared queries and channels of difference and output."""
    blocks = keep.shape[-1]
    rest = blocks * block[1] - len(k)
    # a channel of ones adds up the weights
    values = torch.nn.functional.pad(torch.cat((v.float(), torch.ones_like(v[:, :1]).float()), 1), (0, 0, 0, rest))
    values = values.unflatten(0, (blocks, block[1]))
    thresholds = torch.tensor(PV_THRESHOLDS, device=q.device)[:, None]
    errors = torch.zeros(*keep.shape[:2], len(PV_THRESHOLDS), device=q.device)
    size = torch.zeros((), device=q.device)
    for place, row in enumerate(rows.tolist()):
        scores = products(q[row * block[0] : (row + 1) * block[0]], k) * (math.log2(math.e) / math.sqrt(q.shape[-1]))
        scores = torch.nn.functional.pad(scores, (0, rest), value=-math.inf).unflatten(1, (blocks, block[1]))
        largest = scores.amax(-1)
        parts = torch.einsum("qbt,btc->qbc", (scores - largest.amax(-1)[:, None, None]).exp2(), values)
        chosen = keep[:, :, place]
        gaps = below_largest(
            largest.expand(*chosen.shape[:2], -1, -1), chosen[:, :, None].expand(-1, -1, len(scores), -1)
        )
        # of each block that of its nearest query
        left = chosen[:, :, None] & (gaps.amax(-2)[:, :, None] > -thresholds)
        outputs = torch.einsum("scpb,qbd->scpqd", left.float(), parts)
        # weights are relative to the query's largest: all that a mask keeps may have vanished beside that
        outputs = outputs[..., :-1] / outputs[..., -1:].clamp(min=torch.finfo(torch.float32).tiny)
        dense = parts.sum(1)
        dense = dense[:, :-1] / dense[:, -1:]
        errors += (outputs - dense).abs().sum((-2, -1))
        size += dense.abs().sum()
    return errors / size


def _rows(site: Site, block_q: int) -> Int[Tensor, "rows"]:
    """The query blocks that are compared at a site: all of them, or some, drawn."""
    count = block_count(site.geometry.tokens, block_q)
    # the same for every prompt, others at every site
    return torch.randperm(count, generator=site.generator(0, torch.device("cpu")))[:_ROWS].sort().values
