"""What every kernel is asked to compute: plans that kernels have got wrong, and inputs to compute them on.

FlexAttention compiles anew for every shape, so all but blocks of many sizes share two: 63 tokens × 64 channels, and
1000 × 128.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from types import MappingProxyType
from typing import get_args

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from calibatt.kernels.geometry import Geometry
from calibatt.kernels.mask import BlockMask, VariableBlockMask, block_count
from calibatt.kernels.plan import HeadKind, Plan, Remainder, RowReuse, TokenOrder

Keep = Bool[Tensor, "mask_heads q_blocks k_blocks"]

HEADS = 3
# not square, so that queries taken for keys show
BLOCK = (32, 16)
# neither length is a multiple of a block, no grid one of anything
SMALL = Geometry(grid=(1, 7, 9), heads=HEADS, head_dim=64)
GEOMETRIES: Mapping[str, Geometry] = MappingProxyType(
    {
        "1000": Geometry(grid=(5, 8, 25), heads=HEADS, head_dim=128),
        "1000-text-first": Geometry(grid=(6, 6, 27), heads=HEADS, head_dim=128, text_tokens=28, text_side="first"),
        "1000-text-last": Geometry(grid=(6, 6, 27), heads=HEADS, head_dim=128, text_tokens=28, text_side="last"),
    }
)
LARGE, _TEXT = GEOMETRIES["1000"], GEOMETRIES["1000-text-first"]
# for blocks of many sizes, which kernels have for some numbers of channels; the last two divide by no power of two
WIDTHS: Mapping[str, Geometry] = MappingProxyType(
    {"128": GEOMETRIES["1000-text-last"], "64": Geometry(grid=(8, 5, 25), heads=HEADS, head_dim=64)}
)
SIZES = ((128, 128), (128, 64), (64, 64), (256, 128), (64, 128), (128, 80), (192, 48))

_Kinds = tuple[HeadKind, ...]
_ALL_DENSE: _Kinds = ("dense", "dense", "dense")
_ALL_MASKED: _Kinds = ("masked", "masked", "masked")
_ALL_REUSED: _Kinds = ("reused", "reused", "reused")
_BESIDE: _Kinds = ("masked", "dense", "masked")
_EACH: _Kinds = ("masked", "reused", "dense")
_MIXED: Sequence[_Kinds] = (
    _ALL_DENSE, _ALL_REUSED, ("dense", "reused", "dense"), _BESIDE, ("reused", "masked", "masked"), _EACH,
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A plan, made when it is asked for, and what is special about the inputs.

    Args:
        geometry: of the inputs.
        plan: makes what is to be computed.
        batch: samples.
        scale: of the queries; at 50, scores of several hundreds overflow exp unless their maximum is taken off.
        views: whether tokens stand before heads in memory, as models hand them over.
        twice: whether it is computed twice, to the same output.
    """

    geometry: Geometry
    plan: Callable[[], Plan]
    batch: int = 1
    scale: float = 1.0
    views: bool = False
    twice: bool = False


def _one(heads: int, rows: int, columns: int, row: int | slice, column: int | slice) -> Keep:
    keep = torch.zeros(heads, rows, columns, dtype=torch.bool)
    keep[:, row, column] = True
    return keep


# what to keep, given the number of query and of key blocks
_ADVERSARIES: Mapping[str, Callable[[int, int], Keep]] = MappingProxyType(
    {
        "all-blocks": lambda rows, columns: torch.ones(HEADS, rows, columns, dtype=torch.bool),
        "nothing-at-all": lambda rows, columns: torch.zeros(HEADS, rows, columns, dtype=torch.bool),
        "one-block": lambda rows, columns: _one(HEADS, rows, columns, rows // 2, columns // 2),
        "first-block-of-each-row": lambda rows, columns: _one(HEADS, rows, columns, slice(None), 0),
        "last-block-of-each-row": lambda rows, columns: _one(HEADS, rows, columns, slice(None), -1),
        "first-row-empty": lambda rows, columns: ~_one(HEADS, rows, columns, 0, slice(None)),
        "last-row-empty": lambda rows, columns: ~_one(HEADS, rows, columns, -1, slice(None)),
        "one-head-empty": lambda rows, columns: torch.arange(HEADS)[:, None, None].expand(-1, rows, columns) != 1,
        "shared-by-all-heads": lambda rows, columns: _one(1, rows, columns, slice(None), slice(1, 3)),
        "some-blocks": lambda rows, columns: _some(rows, columns),
    }
)


def _some(rows: int, columns: int, seed: int = 0) -> Keep:
    """Two in five blocks, in a third row none, and in every other row the first one."""
    keep = torch.rand((HEADS, rows, columns), generator=torch.Generator().manual_seed(seed)) < 0.4
    keep[..., 0] = True
    keep[:, 2:3] = False
    return keep


def _blocks(geometry: Geometry) -> tuple[int, int]:
    rows, columns = (block_count(geometry.tokens, size) for size in BLOCK)
    return rows, columns


def _mask(keep: Keep, geometry: Geometry, block: tuple[int, int] = BLOCK) -> BlockMask:
    return BlockMask.from_keep(keep, tokens=geometry.tokens, block_q=block[0], block_k=block[1])


def _kept(name: str, geometry: Geometry, remainder: Remainder = "none") -> Plan:
    """All heads masked, as an adversary has it."""
    mask = _mask(_ADVERSARIES[name](*_blocks(geometry)), geometry)
    return replace(Plan.masked(mask, HEADS), remainder=remainder)


def _kinds(
    geometry: Geometry, kinds: _Kinds, *, seed: int = 0, remainder: Remainder = "none",
    order: TokenOrder | None = None,
) -> Plan:  # fmt: skip
    """Some blocks for masked heads, and the first and the third row of tokens for those that reuse rows."""
    keep = _some(*_blocks(geometry), seed)[: len(kinds)]
    return Plan(
        tokens=geometry.tokens, kinds=kinds, remainder=remainder, order=order,
        mask=_mask(keep, geometry) if "masked" in kinds else None,
        reuse=RowReuse.of_anchor_rows(geometry, (0, 2)) if "reused" in kinds else None,
    )  # fmt: skip


def _orders(tokens: int) -> Int[Tensor, "2 heads tokens"]:
    """A random order of the queries and one of the keys, for every head."""
    return torch.rand((2, HEADS, tokens), generator=torch.Generator().manual_seed(0)).argsort(-1).int()


def _ordered(geometry: Geometry, kinds: _Kinds, which: str, remainder: Remainder = "none") -> Plan:
    """The same for tokens that lie apart: in one order, in two, or in one of the queries and one of all heads' keys."""
    queries, keys = _orders(geometry.tokens)
    order = {
        "one-order": TokenOrder.of_all(queries),
        "queries-apart": TokenOrder(queries=queries, keys=keys),
        "keys-shared": TokenOrder(queries=queries, keys=keys[:1]),
    }[which]
    return _kinds(geometry, kinds, remainder=remainder, order=order)


def _parted(tokens: int, blocks: int, heads: int) -> Int[Tensor, "mask_heads blocks"]:
    """Random sizes of so many blocks, some of them empty or of one token."""
    if blocks == 1:
        return torch.full((heads, 1), tokens)
    generator = torch.Generator().manual_seed(blocks)
    ends = torch.randint(0, tokens + 1, (heads, blocks - 1), generator=generator).sort(-1).values
    ends[:, 1], ends[:, 2] = ends[:, 0], ends[:, 0] + 1
    ends = torch.cat((ends, torch.full((heads, 1), tokens)), 1).clamp(max=tokens).sort(-1).values
    return ends.diff(dim=-1, prepend=torch.zeros(heads, 1, dtype=ends.dtype))


def _variable(
    name: str, geometry: Geometry, shape: tuple[int, int], kinds: _Kinds = _ALL_MASKED, *,
    ordered: bool = False, remainder: Remainder = "none",
) -> Plan:  # fmt: skip
    """So many blocks of any size, as an adversary has it, of tokens that lie apart where they are ordered."""
    keep = _ADVERSARIES[name](*shape)
    q_sizes, k_sizes = (_parted(geometry.tokens, count, len(keep)) for count in shape)
    mask = VariableBlockMask.from_keep(keep, q_sizes=q_sizes, k_sizes=k_sizes, tokens=geometry.tokens)
    queries, keys = _orders(geometry.tokens)
    order = TokenOrder(queries=queries, keys=keys) if ordered else None
    return Plan(tokens=geometry.tokens, kinds=kinds, mask=mask, order=order, remainder=remainder)


def sized_cases(geometry: Geometry, size: tuple[int, int]) -> Iterator[Case]:
    """Blocks of so many tokens, with all that a kernel may be asked for beside them."""
    reuse = RowReuse.of_anchor_rows(geometry, (0, 2))
    for adversary in _ADVERSARIES.values():
        rows, columns = (block_count(geometry.tokens, block) for block in size)
        mask = _mask(adversary(rows, columns), geometry, size)
        for kinds, remainder in product((_ALL_MASKED, _EACH), get_args(Remainder)):
            plan = Plan(tokens=geometry.tokens, kinds=kinds, mask=mask, reuse=reuse if "reused" in kinds else None)
            yield Case(geometry=geometry, plan=partial(replace, plan, remainder=remainder))


# fewer blocks than a tile of means has, and than a word of a mask has bits; and more
_FEW, _MANY = (6, 9), (9, 71)


def _named(*parts: object) -> str:
    return "-".join(map(str, parts))


# by what a kernel is to do, in words that go after its name
CASES: Mapping[str, Mapping[str, Case]] = MappingProxyType(
    {
        "computes the blocks that it is given and no others": {
            _named(name, at.tokens): Case(geometry=at, plan=partial(_kept, name, at))
            for at in (SMALL, LARGE)
            for name in _ADVERSARIES
        },
        "mixes the kinds of heads": {
            _named(*kinds, at.tokens): Case(geometry=at, plan=partial(_kinds, at, kinds))
            for at in (SMALL, _TEXT)
            for kinds in _MIXED
        },
        "takes blocks of tokens that lie apart": {
            _named(*kinds, which): Case(geometry=SMALL, plan=partial(_ordered, SMALL, kinds, which))
            for kinds in (_ALL_MASKED, _BESIDE)
            for which in ("one-order", "queries-apart", "keys-shared")
        },
        "computes variable blocks as they are": {
            _named(name, *shape, at.tokens): Case(geometry=at, plan=partial(_variable, name, at, shape))
            for at, shapes in ((SMALL, [_FEW]), (LARGE, [(9, 21)]))
            for name in _ADVERSARIES
            for shape in (shapes if name != "all-blocks" else [*shapes, (1, 1)])
        },
        "takes variable blocks of tokens that lie apart, beside dense heads": {
            _named(*kinds, batch, scale): Case(
                geometry=SMALL, plan=partial(_variable, "some-blocks", SMALL, _FEW, kinds, ordered=True), batch=batch,
                scale=scale,
            )
            for kinds in (_ALL_MASKED, _BESIDE)
            for batch in (1, 2)
            for scale in (1, 50)
        },
        "approximates the blocks that it does not compute": {
            _named(name, at.tokens): Case(geometry=at, plan=partial(_kept, name, at, "zeroth"))
            for name, at in [*product(_ADVERSARIES, [SMALL]), ("some-blocks", LARGE), ("all-blocks", LARGE)]
        },
        "approximates masked heads alone, in the plan's order": {
            _named(*kinds, which, scale): Case(geometry=SMALL, plan=plan, batch=2, scale=scale)
            for scale in (1, 50)
            for kinds, which, plan in [
                *((kinds, "in-place", partial(_kinds, SMALL, kinds, remainder="zeroth")) for kinds in _MIXED[3:]),
                # heads that reuse rows have no order
                (_BESIDE, "ordered", partial(_ordered, SMALL, _BESIDE, "queries-apart", "zeroth")),
            ]
        },
        "approximates variable blocks": {
            _named(name, at.tokens): Case(
                geometry=at,
                plan=partial(
                    _variable, name, at, shape, _BESIDE if name == "some-blocks" else _ALL_MASKED, ordered=True,
                    remainder="zeroth",
                ),
            )
            for name, at, shape in [*product(_ADVERSARIES, [SMALL], [_FEW]), ("some-blocks", LARGE, _MANY)]
        },
        "neither overflows nor vanishes at large logits": {
            _named(*kinds): Case(geometry=SMALL, plan=partial(_kinds, SMALL, kinds), scale=50)
            for kinds in (_ALL_DENSE, _EACH)
        },
        "takes one head and a batch": {
            _named(kind, heads, batch): Case(
                geometry=replace(SMALL, heads=heads), plan=partial(_kinds, SMALL, (kind,) * heads), batch=batch
            )
            for kind in ("dense", "masked")
            for heads, batch in ((1, 1), (HEADS, 2))
        },
        "takes views": {
            _named(*kinds): Case(geometry=SMALL, plan=partial(_kinds, SMALL, kinds), views=True)
            for kinds in (_ALL_DENSE, _EACH)
        },
        "gives the same output twice": {
            _named(*kinds): Case(geometry=LARGE, plan=partial(_kinds, LARGE, kinds), twice=True)
            for kinds in (_ALL_DENSE, _EACH)
        },
    }
)  # fmt: skip
