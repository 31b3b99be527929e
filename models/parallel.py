"""Attention of a pipeline whose tokens several processes share (Diffusers' context parallelism, by Ulysses).

Each rank holds an equal part of the tokens of all heads. Around attention they exchange: each rank has all tokens of
some heads, and computes these. DeepSpeed-Ulysses, arXiv 2309.14509. Which heads a rank has is chosen by what they
cost, where that is known.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from jaxtyping import Float, Int, Int64
from torch import Tensor

from calibatt.kernels.plan import Plan
from calibatt.methods.call import Attention, SparseAttention
from calibatt.methods.site import Site
from calibatt.models.entry import Family


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranks:
    """The processes that share a pipeline's tokens.

    Args:
        group: their process group.
        size: how many there are.
        rank: this one's index among them.
    """

    group: Any
    size: int
    rank: int


def ranks_of(family: Family, transformers: Sequence[Any]) -> Ranks | None:
    """Who shares the tokens of a pipeline's transformers; None where each process has them all.

    Raises:
        ValueError: they are shared in a way, or in a model, that plans cannot be split by head for.
    """
    configs = [getattr(transformer, "_parallel_config", None) for transformer in transformers]
    if not any(configs):
        return None
    shared: list[Any] = [None if config is None else config.context_parallel_config for config in configs]
    config = shared[0]
    if None in shared or len({(one.ulysses_degree, one.ring_degree) for one in shared}) > 1:
        raise ValueError("calibatt runs in parallel where each transformer has the same ContextParallelConfig")
    if config.ring_degree > 1 or config.ulysses_anything:
        raise ValueError("calibatt runs in parallel by ContextParallelConfig(ulysses_degree=N): no ring, no `anything`")
    # LTX-Video has no text there either, but Diffusers 0.42 fails on the mask of its text
    if not family.parallel:
        raise ValueError(
            f"calibatt does not run {family.transformer} in parallel, only Wan's transformers, in whose self-attention "
            "no text stands"
        )
    heads = family.attentions(transformers[0])[0].heads
    if heads % config.ulysses_degree:
        raise ValueError(
            f"{heads} heads cannot be shared equally by {config.ulysses_degree} processes: "
            "take a ulysses_degree that divides them"
        )
    # nothing public of Diffusers 0.42 has it
    mesh = config._ulysses_mesh
    return Ranks(group=mesh.get_group(), size=config.ulysses_degree, rank=mesh.get_local_rank())


def imbalance(work: Float[Tensor, "heads"], shares: Int[Tensor, "ranks share"]) -> float:
    """The work of the rank that has most, over the mean: the others wait for it."""
    loads = work[shares].sum(-1)
    return float(loads.max() / loads.mean())


def in_order(heads: int, ranks: int) -> Int[Tensor, "ranks share"]:
    """Heads of each rank, as they come."""
    return torch.arange(heads).view(ranks, -1)


def balanced(work: Float[Tensor, "heads"], ranks: int) -> Int[Tensor, "ranks share"]:
    """Heads of each rank, as many of each: the longest first, each to the rank with the least work that has room.

    As they come where that is no less even. The same work gives the same shares in every process.

    Args:
        work: of each head, in any unit.
        ranks: how many share it; a divisor of the heads.
    """
    room, loads = len(work) // ranks, [0.0] * ranks
    taken: list[list[int]] = [[] for _ in range(ranks)]
    for head in work.argsort(descending=True, stable=True).tolist():
        least = min((rank for rank in range(ranks) if len(taken[rank]) < room), key=loads.__getitem__)
        taken[least].append(head)
        loads[least] += float(work[head])
    by_work = torch.tensor([sorted(own) for own in taken])
    return min((in_order(len(work), ranks), by_work), key=partial(imbalance, work))


def among(ranks: Ranks, attention: Attention) -> ParallelAttention:
    """An attention of whole sequences, as that of one rank.

    Raises:
        ValueError: it cannot be computed by some heads at a time.
    """
    if not isinstance(attention, SparseAttention):
        raise ValueError("only a method's attention is split by head: switch context parallelism off for this")
    method = attention.method
    offline = getattr(method, "offline", False)
    if not offline and not (getattr(method, "headwise", False) and getattr(method, "learnt", None) is None):
        name = getattr(method, "name", type(method).__name__)
        raise ValueError(
            f"{name} does not plan heads by themselves (Method.offline, Method.headwise), and a process of a parallel "
            "pipeline has some heads only: take another method, such as calibatt or radial"
        )
    return ParallelAttention(ranks, attention, offline=offline)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Own:
    """What a rank has to do under a plan.

    Args:
        shares: heads of each rank, where the queries are.
        plan: that of this rank's heads.
    """

    shares: Int[Tensor, "ranks share"]
    plan: Plan


class ParallelAttention:
    """The attention of a model of which each process holds a part of the tokens.

    Plans of an offline method are made before the exchange, and their heads assigned by how much is computed of each.
    An online one plans after it, on heads as they come; observers are told of this rank's heads.

    Args:
        ranks: who takes part.
        attention: computes some heads of whole sequences.
        offline: whether its method is.
    """

    def __init__(self, ranks: Ranks, attention: SparseAttention, *, offline: bool) -> None:
        self._ranks = ranks
        self._attention = attention
        self._offline = offline
        # for as long as the method keeps the plan
        self._own: WeakKeyDictionary[Plan, _Own] = WeakKeyDictionary()

    def start_video(self) -> None:
        """A new video."""
        self._attention.start_video()

    def __call__(
        self,
        q: Float[Tensor, "1 heads part head_dim"],
        k: Float[Tensor, "1 heads part head_dim"],
        v: Float[Tensor, "1 heads part head_dim"],
        site: Site,
    ) -> Float[Tensor, "1 heads part head_dim"]:
        """Exchange, compute this rank's heads, exchange back.

        Args:
            q, k, v: of this rank's part of the tokens.
            site: of the whole call.

        Raises:
            ValueError: as the attention; processes have different plans.
        """
        own = self._foreseen(q, site) if self._offline else None
        shares = in_order(q.shape[1], self._ranks.size).to(q.device) if own is None else own.shares
        # all three are under way before the first is waited for
        pending = [self._sent(x, shares) for x in (q, k, v)]
        q_own, k_own, v_own = (_received(*one) for one in pending)
        at = replace(site, geometry=replace(site.geometry, heads=shares.shape[1]))
        plan = self._attention.plan(q_own, k_own, v_own, at) if own is None else own.plan
        return self._back(self._attention.under(plan, q_own, k_own, v_own, at), shares)

    def _foreseen(self, q: Tensor, site: Site) -> _Own:
        # what an offline method may look at: where and how large they are
        unseen = q.new_empty(()).expand(1, q.shape[1], site.geometry.tokens, q.shape[3])
        plan = self._attention.plan(unseen, unseen, unseen, site)
        if plan not in self._own:
            self._check_agreed(plan, q.device, site)
            shares = balanced(plan.density(), self._ranks.size)
            own = plan.of_heads(shares[self._ranks.rank].tolist())
            self._own[plan] = _Own(shares=shares.to(q.device), plan=own)
        return self._own[plan]

    def _check_agreed(self, plan: Plan, device: torch.device, site: Site) -> None:
        """Refuse, in all processes, plans that differ: of each head a part would be computed by another mask."""
        own = _fingerprint(plan, device)
        most = torch.stack([own, -own])
        dist.all_reduce(most, dist.ReduceOp.MAX, group=self._ranks.group)
        if not torch.equal(most[0], -most[1]):
            raise ValueError(
                f"processes have different plans at step {site.step}, layer {site.layer}: give all the same method, "
                "settings and calibration"
            )

    def _sent(self, x: Tensor, shares: Tensor) -> tuple[Tensor, Any, Tensor]:
        """This rank's tokens on their way to whoever has their heads; what will come in, and what has to be kept."""
        tokens = x[0].transpose(0, 1)
        outgoing = x.new_empty(len(shares), len(tokens), shares.shape[1], x.shape[3])
        for rank, heads in enumerate(shares):
            torch.index_select(tokens, 1, heads, out=outgoing[rank])
        incoming = torch.empty_like(outgoing)
        work = dist.all_to_all_single(incoming, outgoing, group=self._ranks.group, async_op=True)
        return incoming, work, outgoing

    def _back(
        self, out: Float[Tensor, "1 share tokens head_dim"], shares: Int[Tensor, "ranks share"]
    ) -> Float[Tensor, "1 heads part head_dim"]:
        outgoing = out[0].transpose(0, 1).contiguous()
        incoming = torch.empty_like(outgoing)
        dist.all_to_all_single(incoming, outgoing, group=self._ranks.group)
        of_ranks = incoming.unflatten(0, (len(shares), -1))
        whole = out.new_empty(of_ranks.shape[1], shares.numel(), out.shape[3])
        for heads, of_rank in zip(shares, of_ranks, strict=True):
            whole.index_copy_(1, heads, of_rank)
        return whole.transpose(0, 1)[None]


def _fingerprint(plan: Plan, device: torch.device) -> Int64[Tensor, ""]:
    """A number that plans with other kinds or tensors hardly share, found where the plan is."""
    kinds = repr((plan.kinds, plan.tokens, plan.remainder, plan.int8))
    found = torch.tensor(zlib.crc32(kinds.encode()), device=device)
    for part in plan.tensors():
        content = part.contiguous().view(torch.uint8).flatten().long()
        found = found * 31 + (content * torch.arange(1, len(content) + 1, device=device)).sum()
    # never negative, so that its opposite is as exact
    return found & (2**62 - 1)


def _received(
    incoming: Float[Tensor, "ranks part share head_dim"], work: Any, outgoing: Tensor
) -> Float[Tensor, "1 share tokens head_dim"]:
    work.wait()
    return incoming.flatten(0, 1).transpose(0, 1)[None]
