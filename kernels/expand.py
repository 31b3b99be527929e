"""From bits to lists, on the mask's device: masks are kept as bits, and kernels walk lists."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from jaxtyping import Float32, Int8, Int32
from torch import Tensor

from calibatt.kernels.plan import HeadKind, Plan

# as the device code counts them
KINDS: tuple[HeadKind, ...] = ("masked", "dense", "reused")


def block_lists(
    plan: Plan, *, every_head: bool = False
) -> tuple[Int32[Tensor, "heads q_blocks k_blocks"], Int32[Tensor, "heads q_blocks"]]:
    """Kept key blocks of every query block, ascending, and how many; what lies behind a row's count is not written.

    Args:
        plan: one with a mask.
        every_head: whether dense heads get all blocks and reused heads none; otherwise their rows are not written.
    """
    import triton

    from calibatt.kernels import triton_code

    mask = plan.mask
    assert mask is not None
    kinds = kinds_on(plan.kinds, mask.bits.device)
    indices = torch.empty((len(kinds), mask.q_blocks, mask.k_blocks), dtype=torch.int32, device=mask.bits.device)
    counts = torch.empty((len(kinds), mask.q_blocks), dtype=torch.int32, device=mask.bits.device)
    words = mask.bits.view(torch.int32)
    triton_code.expand[(mask.q_blocks, len(kinds))](
        words, kinds, indices, counts, mask.k_blocks, words.stride(0) if mask.heads > 1 else 0, words.stride(1),
        BLOCKS=triton.next_power_of_2(mask.k_blocks), EVERY_HEAD=every_head,
    )  # fmt: skip
    return indices, counts


@functools.lru_cache(maxsize=256)
def floats_on(values: tuple[float, ...], device: torch.device) -> Float32[Tensor, "heads"]:
    """A number for each head; copied to a device once."""
    return torch.tensor(values, dtype=torch.float32, device=device)


@functools.lru_cache(maxsize=256)
def kinds_on(kinds: Sequence[HeadKind], device: torch.device) -> Int8[Tensor, "heads"]:
    """The kinds as numbers, places in KINDS; copied to a device once."""
    return torch.tensor([KINDS.index(kind) for kind in kinds], dtype=torch.int8, device=device)
