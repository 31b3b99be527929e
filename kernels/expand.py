"""From bits to lists, on the mask's device: masks are kept as bits, and kernels walk lists."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from jaxtyping import Float32, Int8, Int32
from torch import Tensor

from calibatt.kernels.mask import BlockMask, VariableBlockMask, block_count
from calibatt.kernels.plan import HeadKind, Plan

# as the device code counts them
KINDS: tuple[HeadKind, ...] = ("masked", "dense", "reused")


def block_lists(
    plan: Plan, *, every_head: bool = False
) -> tuple[Int32[Tensor, "heads q_blocks k_blocks"], Int32[Tensor, "heads q_blocks"]]:
    """Kept key blocks of every query block, ascending, and how many; what comes after a row's count is not written.

    Args:
        plan: one with a mask of blocks of one size.
        every_head: whether dense heads get all blocks and reused heads none; otherwise their rows are not written.
    """
    import triton

    from calibatt.kernels import triton_code

    mask = plan.mask
    assert isinstance(mask, BlockMask)
    kinds = kinds_on(plan.kinds, mask.bits.device)
    indices = torch.empty((len(kinds), mask.q_blocks, mask.k_blocks), dtype=torch.int32, device=mask.bits.device)
    counts = torch.empty((len(kinds), mask.q_blocks), dtype=torch.int32, device=mask.bits.device)
    words = mask.bits.view(torch.int32)
    triton_code.expand[(mask.q_blocks, len(kinds))](
        words, kinds, indices, counts, mask.k_blocks, words.stride(0) if mask.heads > 1 else 0, words.stride(1),
        BLOCKS=triton.next_power_of_2(mask.k_blocks), EVERY_HEAD=every_head,
    )  # fmt: skip
    return indices, counts


def query_tiles(mask: VariableBlockMask, tile: int) -> Int32[Tensor, "mask_heads most 3"]:
    """Tiles of queries, none of more than one block: the block, the first query, and the one after the last.

    As many as there can be, so that the host need not wait for how many there are; the last ones may be empty.
    """
    most = mask.tokens // tile + mask.q_blocks
    # a block more, without tokens: tiles past the last one are of that
    sizes = torch.nn.functional.pad(mask.q_sizes, (0, 1))
    each = (sizes + tile - 1) // tile
    ends, behind = sizes.cumsum(-1), each.cumsum(-1)
    number = torch.arange(most, device=sizes.device).expand(mask.heads, -1).contiguous()
    block = torch.searchsorted(behind, number, right=True).clamp(max=mask.q_blocks)
    first = (ends - sizes - tile * (behind - each)).gather(1, block) + tile * number
    return torch.stack((block, first, torch.minimum(first + tile, ends.gather(1, block))), -1).to(torch.int32)


def key_tiles(
    mask: VariableBlockMask, tile: int
) -> tuple[Int32[Tensor, "mask_heads q_blocks most"], Int32[Tensor, "mask_heads q_blocks 2"]]:
    """Tiles of keys of every query block, and how many of them are whole, and how many there are.

    What comes after is not written. Kept blocks that lie side by side are one range, cut into tiles; whole tiles come
    first, as `triton_code.expand_variable` lists them.
    """
    import triton

    from calibatt.kernels import triton_code

    # every other block at the most ends a range
    most = mask.tokens // tile + block_count(mask.k_blocks, 2)
    words = mask.bits.view(torch.int32)
    tiles, counts = (words.new_empty((mask.heads, mask.q_blocks, count)) for count in (most, 2))
    starts = torch.nn.functional.pad(mask.k_sizes.cumsum(-1, dtype=torch.int32), (1, 0))
    triton_code.expand_variable[(mask.q_blocks, mask.heads)](
        words, starts, tiles, counts, mask.k_blocks, words.shape[2], most,
        BLOCKS=triton.next_power_of_2(mask.k_blocks), TILE=tile,
    )  # fmt: skip
    return tiles, counts


@functools.lru_cache(maxsize=256)
def floats_on(values: tuple[float, ...], device: torch.device) -> Float32[Tensor, "heads"]:
    """A number for each head; copied to a device once."""
    return torch.tensor(values, dtype=torch.float32, device=device)


@functools.lru_cache(maxsize=256)
def kinds_on(kinds: Sequence[HeadKind], device: torch.device) -> Int8[Tensor, "heads"]:
    """The kinds as numbers, places in KINDS; copied to a device once."""
    return torch.tensor([KINDS.index(kind) for kind in kinds], dtype=torch.int8, device=device)
