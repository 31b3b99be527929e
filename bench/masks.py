"""Plans to time kernels with: random masks, in a band, or as uneven as the embedded model's; row reuse; both."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from calibatt.bench.record import Pattern
from calibatt.kernels.geometry import Geometry
from calibatt.kernels.mask import BlockMask, block_count
from calibatt.kernels.plan import HeadKind, Plan, RowReuse, anchor_rows

MaskSource = Literal["random", "even", "banded", "captured"]


def random_keep(density: float, heads: int, rows: int, columns: int) -> Bool[Tensor, "heads rows columns"]:
    """Every block kept or not at random, the same at every call.

    Args:
        density: share of the blocks to keep, between 0 and 1.
        heads, rows, columns: size of the mask, in blocks.
    """
    return torch.rand((heads, rows, columns), generator=torch.Generator().manual_seed(0)) < density


def even_keep(density: float, heads: int, rows: int, columns: int) -> Bool[Tensor, "heads rows columns"]:
    """As many blocks of every row, at random, so that all rows take a kernel equally long.

    Args:
        density: share of the blocks to keep, between 0 and 1; every row keeps at least one.
        heads, rows, columns: size of the mask, in blocks.
    """
    drawn = torch.rand((heads, rows, columns), generator=torch.Generator().manual_seed(0))
    return drawn.argsort(-1).argsort(-1) < max(1, round(density * columns))


def banded_keep(density: float, heads: int, rows: int, columns: int) -> Bool[Tensor, "heads rows columns"]:
    """A band along the diagonal, as wide as the density asks for.

    Args:
        density: share of the blocks to keep, between 0 and 1.
        heads, rows, columns: size of the mask, in blocks.
    """
    # a band of half-width w on the unit square covers 1 - (1 - w)²
    width = 1 - math.sqrt(1 - density)
    down = (torch.arange(rows)[:, None] + 0.5) / rows
    right = (torch.arange(columns) + 0.5) / columns
    return ((down - right).abs() < width).expand(heads, -1, -1)


def captured_keep(
    density: float, heads: int, rows: int, columns: int, energy: Float[Tensor, "maps side side"]
) -> Bool[Tensor, "heads rows columns"]:
    """The blocks with the most attention, over all heads together: so heads and rows differ as they do in a model.

    Args:
        energy: attention mass a block, of heads of a real generation; taken in turns, and resampled to this size.
    """
    maps = torch.nn.functional.interpolate(energy[None].float(), (rows, columns), mode="bilinear")[0]
    tiled = maps[torch.arange(heads) % len(maps)].flatten()
    keep = torch.zeros_like(tiled, dtype=torch.bool)
    keep[tiled.topk(round(density * len(tiled)), sorted=False).indices] = True
    return keep.view(heads, rows, columns)


_Maker = Callable[[float, int, int, int], Bool[Tensor, "heads rows columns"]]
_MAKERS: Mapping[MaskSource, _Maker] = MappingProxyType(
    {"random": random_keep, "even": even_keep, "banded": banded_keep}
)
MASK_SOURCES: tuple[MaskSource, ...] = get_args(MaskSource)
PATTERNS: tuple[Pattern, ...] = get_args(Pattern)


def make_mask(
    source: MaskSource,
    density: float,
    geometry: Geometry,
    block: tuple[int, int],
    energy: Callable[[], Float[Tensor, "maps side side"]],
) -> BlockMask:
    """A mask of about this density, on the CPU.

    Args:
        source: how blocks are chosen.
        density: share of the blocks to keep, between 0 and 1.
        geometry, block: of the attention call.
        energy: gives what `captured` masks are made of; called only for them.
    """
    size = (geometry.heads, block_count(geometry.tokens, block[0]), block_count(geometry.tokens, block[1]))
    keep = captured_keep(density, *size, energy()) if source == "captured" else _MAKERS[source](density, *size)
    return BlockMask.from_keep(keep, tokens=geometry.tokens, block_q=block[0], block_k=block[1])


def make_plan(
    pattern: Pattern,
    density: float,
    geometry: Geometry,
    block: tuple[int, int] | None,
    energy: Callable[[], Float[Tensor, "maps side side"]],
) -> Plan:
    """A plan of about this density, on the CPU.

    Args:
        pattern: what its heads do.
        density: share of the blocks, or of the rows of a frame, to compute.
        geometry, block: of the attention call; `rows` needs no block.
        energy: as for `make_mask`.
    """
    reuse = mask = None
    if pattern in ("rows", "mixed"):
        rows = geometry.grid[1]
        reuse = RowReuse.of_anchor_rows(geometry, anchor_rows(rows, max(1, round(density * rows))))
    if pattern != "rows":
        assert block is not None
        mask = make_mask("random" if pattern == "mixed" else pattern, density, geometry, block, energy)
    cycles: Mapping[Pattern, tuple[HeadKind, ...]] = {"rows": ("reused",), "mixed": ("masked", "reused")}
    of_heads = cycles.get(pattern, ("masked",))
    kinds = tuple(of_heads[head % len(of_heads)] for head in range(geometry.heads))
    return Plan(tokens=geometry.tokens, kinds=kinds, mask=mask, reuse=reuse)
