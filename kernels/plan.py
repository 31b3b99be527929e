"""The plan, which is all that a method tells a kernel: masks, row reuse, an order of tokens, what is skipped."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, get_args

import torch
from jaxtyping import Float, Int, Int32
from torch import Tensor

from calibatt.kernels.geometry import Geometry
from calibatt.kernels.mask import BlockMask, Mask

HeadKind = Literal["dense", "masked", "reused"]
Remainder = Literal["none", "zeroth"]


def anchor_rows(rows: int, count: int) -> tuple[int, ...]:
    """Equidistant rows of a frame: the middle rows of `count` equal bands, the lower one where two are in the middle.

    Args:
        rows: rows of a frame.
        count: anchor rows.

    Raises:
        ValueError: there is no anchor row, or no other row.
    """
    if not 1 <= count < rows:
        raise ValueError(f"a frame of {rows} rows can have 1 to {rows - 1} anchor rows: got {count}, set `anchors`")
    return tuple((2 * band + 1) * rows // (2 * count) for band in range(count))


# without slots: cached_property keeps its values in the instance's dictionary
@dataclass(frozen=True, kw_only=True, eq=False)
class RowReuse:
    """Which queries a head computes, against all keys, and whose output every token takes.

    Args:
        computed: ascending indices of the tokens whose query is computed.
        source: for every token, the position in `computed` of the query whose output it takes.

    Raises:
        ValueError: a computed token would not take its own output, or a source points outside.
    """

    computed: Int[Tensor, "computed"]
    source: Int[Tensor, "tokens"]

    def __post_init__(self) -> None:
        parts = ((self.source, len(self.computed)), (self.computed, len(self.source)))
        inside = all(bool(((indices >= 0) & (indices < count)).all()) for indices, count in parts)
        if not inside or not torch.equal(self.computed[self.source[self.computed]], self.computed):
            raise ValueError("row reuse: every source must be a computed query, and a computed token its own source")

    @classmethod
    def of_anchor_rows(cls, geometry: Geometry, anchors: Sequence[int]) -> RowReuse:
        """Compute the tokens of the given rows of every frame; every other row copies the nearest of them.

        Text tokens compute their own. Of two anchors equally near, the upper one is copied.

        Args:
            geometry: the token grid.
            anchors: ascending row indices within a frame.
        """
        frames, rows, columns = geometry.grid
        nearest = (torch.arange(rows)[:, None] - torch.tensor(anchors)).abs().argmin(-1)
        anchor_of_row = torch.tensor(anchors)[nearest]
        token = torch.arange(geometry.video_tokens).view(frames, rows, columns)
        source_token = torch.arange(geometry.tokens)
        video = slice(geometry.video_start, geometry.video_start + geometry.video_tokens)
        source_token[video] = token[:, anchor_of_row].flatten() + geometry.video_start
        computed = source_token.unique()
        return cls(computed=computed, source=torch.searchsorted(computed, source_token))

    @property
    def tokens(self) -> int:
        """Length of the sequence."""
        return len(self.source)

    @property
    def density(self) -> float:
        """Computed fraction of the query-key products."""
        return len(self.computed) / len(self.source)

    @cached_property
    def served(self) -> Int32[Tensor, "computed most"]:
        """For every computed query, ascending, the tokens that take its output; rows are filled up with -1."""
        order = self.source.argsort(stable=True)
        counts = torch.bincount(self.source, minlength=len(self.computed))
        turn = torch.arange(len(order), device=order.device) - (counts.cumsum(0) - counts)[self.source[order]]
        served = torch.full((len(counts), int(counts.max())), -1, dtype=torch.int32, device=order.device)
        served[self.source[order], turn] = order.to(torch.int32)
        return served

    def to(self, device: torch.device | str) -> RowReuse:
        """The same reuse on another device."""
        return RowReuse(computed=self.computed.to(device), source=self.source.to(device))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TokenOrder:
    """Blocks of tokens that do not lie side by side: the order in which they do.

    Args:
        queries, keys: a permutation of the tokens for each head, or one row that all heads share; at place i of the
            order stands token `queries[head, i]`. Keys stand for keys and values.

    Raises:
        ValueError: queries and keys are of another length.
    """

    queries: Int32[Tensor, "order_heads tokens"]
    keys: Int32[Tensor, "key_heads key_tokens"]

    def __post_init__(self) -> None:
        if self.queries.shape[-1] != self.keys.shape[-1]:
            raise ValueError(f"an order has {self.queries.shape[-1]} queries and {self.keys.shape[-1]} keys")

    @classmethod
    def of_all(cls, order: Int[Tensor, "order_heads tokens"]) -> TokenOrder:
        """Queries and keys in the same order."""
        order = order.to(torch.int32)
        return cls(queries=order, keys=order)

    @property
    def tokens(self) -> int:
        """Length of the sequence."""
        return self.queries.shape[-1]

    @property
    def shared(self) -> bool:
        """Whether queries and keys stand in the same order."""
        return self.queries is self.keys

    def each(self, change: Callable[[Tensor], Tensor]) -> TokenOrder:
        """Queries and keys changed alike; one order stays one."""
        queries = change(self.queries)
        return TokenOrder(queries=queries, keys=queries if self.shared else change(self.keys))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Skip:
    """What a kernel finds out while it computes: which kept blocks are low, and whether it leaves them out at once.

    A kernel walks the kept blocks of a query block in ascending order. A block is low where no query of it has a score
    there that is above the largest of its scores so far, this block's included, plus the threshold. The first is never.

    Args:
        thresholds: of each head, in powers of two, below 0: 2 to it is the largest share of the largest weight that
            counts as low.
        leave: whether softmax and values of low blocks are left out in this call; otherwise they are only noted.
        low: where the kernel notes them, starting from none.

    Raises:
        ValueError: a threshold is not below 0, or they are not as many as the heads.
    """

    thresholds: tuple[float, ...]
    leave: bool
    low: BlockMask

    def __post_init__(self) -> None:
        if not max(self.thresholds) < 0:
            raise ValueError(f"a threshold for low blocks is a power of two, below 0: got {self.thresholds}")
        if len(self.thresholds) != self.low.heads:
            raise ValueError(f"low blocks of {self.low.heads} heads have {len(self.thresholds)} thresholds")

    @classmethod
    def of(cls, mask: BlockMask, heads: int, *, threshold: float | Sequence[float], leave: bool) -> Skip:
        """Nothing noted yet; one threshold is that of all heads.

        Args:
            mask: blocks among which some may be left out.
            heads: how many there are.
            threshold: in powers of two, of all heads or of each.
            leave: whether the kernel leaves low blocks out, or only notes them.
        """
        thresholds = (threshold,) * heads if isinstance(threshold, (int, float)) else tuple(threshold)
        bits = torch.zeros((heads, *mask.bits.shape[1:]), dtype=torch.uint8, device=mask.bits.device)
        return cls(thresholds=thresholds, leave=leave, low=replace(mask, bits=bits))

    def of_heads(self, heads: Sequence[int]) -> Skip:
        """What is noted of some heads alone, in this order."""
        thresholds = tuple(self.thresholds[head] for head in heads)
        return replace(self, thresholds=thresholds, low=self.low.of_heads(heads))


# without slots: kernels refer to it weakly, to keep what they make of it for as long as it lives
@dataclass(frozen=True, kw_only=True, eq=False)
class Plan:
    """What a method decides at one site: per head a block mask, row reuse, or dense.

    Args:
        tokens: length of the sequence.
        kinds: what each head does.
        mask: the blocks of the masked heads; rows of the mask that belong to other heads are not read. Blocks that
            differ in size stand beside neither row reuse nor `skip` nor `int8`.
        reuse: what the reused heads compute.
        order: in which the mask's blocks hold the tokens; None for the sequence's own.
        skip: what the kernel notes and leaves out of the mask by itself; None for nothing. Every head is masked then.
        int8: how many queries, and how many keys, side by side, have one scale where they are multiplied in INT8
            (`kernels/int8.py`); None where they are multiplied as they are.
        scored: blocks whose scores the method computes to find the mask, as a kernel that skips would; None for none.
            No kernel reads it: it counts in the density.
        remainder: what stands for the blocks of masked heads that are not computed: nothing, or to zeroth order the
            mean of each (`kernels/remainder.py`). Blocks are those of the mask, in the plan's order.

    Raises:
        ValueError: a part is missing, or belongs to another sequence or number of heads.
    """

    tokens: int
    kinds: tuple[HeadKind, ...]
    mask: Mask | None = None
    reuse: RowReuse | None = None
    order: TokenOrder | None = None
    skip: Skip | None = None
    int8: tuple[int, int] | None = None
    scored: BlockMask | None = None
    remainder: Remainder = "none"

    def __post_init__(self) -> None:
        if self.remainder not in get_args(Remainder):
            raise ValueError(f"a remainder is one of {', '.join(get_args(Remainder))}: got {self.remainder!r}")
        if self.remainder != "none" and self.mask is None:
            raise ValueError(f"a plan without a mask leaves no block out: it has no remainder {self.remainder!r}")
        if ("masked" in self.kinds) != (self.mask is not None) or ("reused" in self.kinds) != (self.reuse is not None):
            raise ValueError(
                "a plan carries a mask where a head is masked, row reuse where one is reused, else neither"
            )
        if self.mask is not None and self.mask.heads not in (1, len(self.kinds)):
            raise ValueError(f"the mask has {self.mask.heads} heads, the plan {len(self.kinds)}")
        for part in (self.mask, self.reuse, self.order, self.scored):
            if part is not None and part.tokens != self.tokens:
                raise ValueError(f"the plan is for {self.tokens} tokens, its {type(part).__name__} for {part.tokens}")
        if self.order is not None:
            if self.reuse is not None:
                raise ValueError("row reuse counts tokens in the sequence's own order: such a plan has no other")
            rows = {len(self.order.queries), len(self.order.keys)}
            if not rows <= {1, len(self.kinds)}:
                raise ValueError(f"the order has {max(rows)} heads, the plan {len(self.kinds)}")
        others = (self.reuse, self.skip, self.int8)
        if self.mask is not None and self.mask.block is None and others != (None, None, None):
            raise ValueError(
                "blocks that differ in size go with no row reuse, no INT8, nothing that a kernel leaves out"
            )
        if self.skip is not None:
            every_head = set(self.kinds) == {"masked"} and self.skip.low.heads == len(self.kinds)
            if not isinstance(self.mask, BlockMask) or not every_head:
                raise ValueError("what a kernel leaves out by itself is noted for every head, and every head is masked")
            self.mask.check_alike(self.skip.low)

    @classmethod
    def dense(cls, geometry: Geometry) -> Plan:
        """Every head computes everything; the same plan every time, since kernels and ranks keep things by plan."""
        return cls.all_dense(geometry.tokens, geometry.heads)

    @staticmethod
    @functools.lru_cache(maxsize=64)
    def all_dense(tokens: int, heads: int) -> Plan:
        """The same for so many tokens and heads."""
        return Plan(tokens=tokens, kinds=_alike("dense", heads))

    @classmethod
    def masked(
        cls,
        mask: Mask,
        heads: int,
        order: TokenOrder | None = None,
        skip: Skip | None = None,
        scored: BlockMask | None = None,
    ) -> Plan:
        """Every head computes the blocks of the mask, which may hold the tokens in another order.

        Args:
            mask: the blocks to compute.
            heads: how many there are.
            order: of the tokens; None for the sequence's own.
            skip: what the kernel may leave out by itself; None for nothing.
            scored: blocks whose scores the method computes to find the mask; None for none.
        """
        kinds = _alike("masked", heads)
        return cls(tokens=mask.tokens, kinds=kinds, mask=mask, order=order, skip=skip, scored=scored)

    def realised(self) -> Plan:
        """What a kernel that has computed this plan did compute: what it left out by itself is gone from the mask."""
        if self.skip is None:
            return self
        assert isinstance(self.mask, BlockMask)
        return replace(self, mask=self.mask.without(self.skip.low) if self.skip.leave else self.mask, skip=None)

    def unordered(self) -> Plan:
        """The plan for tokens that stand in its order already."""
        return self if self.order is None else replace(self, order=None)

    def to(self, device: torch.device | str) -> Plan:
        """The same plan on another device."""
        return replace(
            self,
            mask=None if self.mask is None else self.mask.to(device),
            reuse=None if self.reuse is None else self.reuse.to(device),
            order=None if self.order is None else self.order.each(lambda order: order.to(device)),
            skip=None if self.skip is None else replace(self.skip, low=self.skip.low.to(device)),
            scored=None if self.scored is None else self.scored.to(device),
        )

    def of_heads(self, heads: Sequence[int]) -> Plan:
        """The plan of some heads alone, in this order."""
        kinds = tuple(self.kinds[head] for head in heads)
        mask = None if self.mask is None or "masked" not in kinds else self.mask.of_heads(heads)
        skip = self.skip and self.skip.of_heads(heads)
        order = self.order and self.order.each(lambda order: order if len(order) == 1 else order[list(heads)])
        reuse = self.reuse if "reused" in kinds else None
        scored = self.scored and self.scored.of_heads(heads)
        return replace(
            self, kinds=kinds, mask=mask, reuse=reuse, order=order, skip=skip, scored=scored,
            remainder="none" if mask is None else self.remainder,
        )  # fmt: skip

    def heads_of(self, kind: HeadKind) -> list[int]:
        """Indices of the heads of one kind."""
        return [head for head, own in enumerate(self.kinds) if own == kind]

    def launch_mask(self) -> Mask | None:
        """The mask of one launch over all heads: reused heads have no block, dense heads all; None without a mask.

        Kernels that compute every masked head in one launch of fixed shape take this; what they leave out (the rows
        that reused heads compute) is theirs to add.
        """
        if self.mask is None or set(self.kinds) == {"masked"}:
            return self.mask
        mask = self.mask.each(lambda part: part.expand(len(self.kinds), *part.shape[1:]).clone())
        # the bits after the last block, which nothing reads, are set too
        mask.bits[self.heads_of("dense")] = 255
        mask.bits[self.heads_of("reused")] = 0
        return mask

    def density(self) -> Float[Tensor, "heads"]:
        """Computed fraction of each head's products, of queries with keys and of weights with values.

        Means that stand for other blocks do not count: one key more for each block.
        What a kernel leaves out by itself counts for half, since it needs the scores to know; once it has run. So does
        what the method scored to find the mask.
        """
        if self.scored is not None:
            left = replace(self, scored=None)
            return (replace(left, mask=self.scored).density() + left.density()) / 2
        if self.skip is not None and self.skip.leave:
            return (replace(self, skip=None).density() + self.realised().density()) / 2
        density = torch.ones(len(self.kinds), dtype=torch.float64)
        if self.mask is not None:
            masked = self.heads_of("masked")
            density[masked] = self.mask.density().cpu().expand(len(self.kinds))[masked]
        if self.reuse is not None:
            density[self.heads_of("reused")] = self.reuse.density
        return density

    def tensors(self) -> list[Tensor]:
        """What it is made of."""
        parts = [] if self.mask is None else self.mask.tensors()
        parts += [] if self.reuse is None else [self.reuse.computed, self.reuse.source]
        if self.order is not None:
            parts += [self.order.queries] if self.order.shared else [self.order.queries, self.order.keys]
        for noted in (None if self.skip is None else self.skip.low, self.scored):
            parts += [] if noted is None else noted.tensors()
        return parts

    def nbytes(self) -> int:
        """Memory of the plan, in bytes."""
        return sum(part.nbytes for part in self.tensors())


def _alike(kind: HeadKind, heads: int) -> tuple[HeadKind, ...]:
    return (kind,) * heads
