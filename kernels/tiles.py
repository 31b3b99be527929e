"""What launching Triton's device code needs to know: sizes of tiles, and who copies them to shared memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def tile_of(block: int, most: int) -> int:
    """The largest power of two that divides a block, up to a limit: a block is walked in whole tiles."""
    return min(block & -block, most)


def compute_capability(device: torch.device) -> tuple[int, int]:
    """Compute capability; the interpreter can do what Hopper can."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)


def interpreted() -> bool:
    """Whether Triton runs its interpreter, which computes on a CPU what a GPU would."""
    import triton

    return bool(triton.knobs.runtime.interpret)


def tensor_map_fits(x: Tensor) -> bool:
    """Whether the tensor memory accelerator can copy tiles: addresses and strides are multiples of 16 bytes.

    Source: CUDA's programming guide, on tensor maps.
    """
    return x.data_ptr() % 16 == 0 and all(stride * x.element_size() % 16 == 0 for stride in x.stride()[:-1])


def has_tma(*tensors: Tensor) -> bool:
    """Whether tiles can be copied by a tensor memory accelerator: a unit of Hopper and newer, for aligned tensors."""
    return compute_capability(tensors[0].device) >= (9, 0) and all(map(tensor_map_fits, tensors))


def descriptor(x: Tensor, rows: int, columns: int) -> Any:
    """What the tensor memory accelerator copies tiles by, of the last two dimensions.

    Args:
        x: the tensor.
        rows, columns: of a tile.
    """
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(x, list(x.shape), list(x.stride()), [1] * (x.ndim - 2) + [rows, columns])
