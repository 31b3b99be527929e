"""Tensors on their way to the host: side by side in one copy, which nobody waits for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import UInt8
from torch import Tensor


class InFlight:
    """Tensors of one device, those of a GPU on their way to pinned memory while it goes on; what is here already stays.

    Args:
        tensors: of any shapes and dtypes; they may be changed and freed afterwards where they lie on a GPU.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = list(tensors)
        # by their places: what lies on a GPU
        self._places = [place for place, tensor in enumerate(tensors) if tensor.is_cuda]
        self._copied: Any = None
        if self._places:
            there = [tensors[place] for place in self._places]
            self._tensors = [torch.empty_like(one, device="meta") if one.is_cuda else one for one in tensors]
            flat = joined(there)
            self._flat = torch.empty(flat.shape, dtype=torch.uint8, pin_memory=True)
            self._flat.copy_(flat, non_blocking=True)
            self._copied = torch.cuda.current_stream(flat.device).record_event()

    @property
    def arrived(self) -> bool:
        """Whether nothing would be waited for."""
        return self._copied is None or bool(self._copied.query())

    def received(self) -> list[Tensor]:
        """The tensors on the host, in their order; waits for them."""
        if self._copied is not None:
            self._copied.synchronize()
            found = parted(self._flat, [self._tensors[place] for place in self._places])
            for place, tensor in zip(self._places, found, strict=True):
                self._tensors[place] = tensor
            self._copied = None
        return self._tensors


def joined(tensors: Sequence[Tensor]) -> UInt8[Tensor, "bytes"]:
    """The bytes of tensors of one device, those of large elements first, so that each is aligned."""
    return torch.cat([tensors[place].reshape(-1).view(torch.uint8) for place in _in_order(tensors)])


def parted(flat: UInt8[Tensor, "bytes"], like: Sequence[Tensor]) -> list[Tensor]:
    """Views of such bytes.

    Args:
        flat: of `joined`.
        like: tensors of the shapes and dtypes that were joined; their values are not read.
    """
    found: dict[int, Tensor] = {}
    start = 0
    for place in _in_order(like):
        shape, dtype = like[place].shape, like[place].dtype
        end = start + math.prod(shape) * dtype.itemsize
        found[place] = flat[start:end].view(dtype).view(shape)
        start = end
    return [found[place] for place in range(len(like))]


def _in_order(tensors: Sequence[Tensor]) -> list[int]:
    return sorted(range(len(tensors)), key=lambda place: -tensors[place].element_size())
