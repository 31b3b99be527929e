"""Space-filling curves through the token grid, along which some methods take the tokens, so that blocks are compact."""

from __future__ import annotations

import functools
from typing import Literal

import torch
from jaxtyping import Int, Int32
from torch import Tensor

from calibatt.kernels.geometry import Geometry
from calibatt.kernels.plan import TokenOrder
from calibatt.methods.blocks import with_text

Curve = Literal["frame", "video", "morton"]


def curve_order(geometry: Geometry, curve: Curve) -> Int32[Tensor, "1 tokens"]:
    """The video tokens along a curve, and the text where it is.

    Args:
        geometry: the token grid.
        curve: "frame" is Hilbert's, frame after frame, every other one backwards, so that it starts where the last one
            ended; "video" is Hilbert's through all three axes, "morton" Morton's.
    """
    cells = torch.cartesian_prod(*(torch.arange(extent) for extent in geometry.grid)).T
    if curve == "video":
        along = hilbert_index(cells, _bits(geometry.grid))
    elif curve == "morton":
        along = morton_index(cells, _bits(geometry.grid))
    else:
        frame, bits = cells[0], _bits(geometry.grid[1:])
        within, last = hilbert_index(cells[1:], bits), 4**bits - 1
        along = frame * 4**bits + torch.where(frame % 2 == 0, within, last - within)
    return with_text(geometry, along.argsort())


@functools.lru_cache(maxsize=4)
def along_curve(geometry: Geometry, curve: Curve, device: torch.device) -> TokenOrder:
    """All heads' queries and keys along a curve, as `curve_order` has them; found once for a size and device."""
    return TokenOrder.of_all(curve_order(geometry, curve).to(device))


def hilbert_index(cells: Int[Tensor, "axes cells"], bits: int) -> Int[Tensor, "cells"]:
    """How far along the classic Hilbert curve each cell lies, of a square, a cube or the like with 2^bits cells a side.

    By the transform of J. Skilling, "Programming the Hilbert curve", AIP Conference Proceedings 707 (2004).

    Args:
        cells: coordinates along each axis, 0 to 2^bits - 1.
        bits: binary digits of a coordinate.
    """
    axes = list(cells)
    # from the largest halves to the smallest, undo the turns that the curve makes within each
    for bit in range(bits - 1, 0, -1):
        lower = 2**bit - 1
        for axis in range(len(axes)):
            upper = (axes[axis] >> bit & 1).bool()
            exchanged = torch.where(upper, 0, (axes[0] ^ axes[axis]) & lower)
            axes[axis] = axes[axis] ^ exchanged
            axes[0] = axes[0] ^ torch.where(upper, lower, exchanged)
    # what is left is a Gray code, in which neighbours differ by one bit
    for axis in range(1, len(axes)):
        axes[axis] = axes[axis] ^ axes[axis - 1]
    turned = torch.zeros_like(axes[0])
    for bit in range(bits - 1, 0, -1):
        turned = turned ^ ((axes[-1] >> bit & 1) * (2**bit - 1))
    return morton_index(torch.stack([places ^ turned for places in axes]), bits)


def morton_index(cells: Int[Tensor, "axes cells"], bits: int) -> Int[Tensor, "cells"]:
    """How far along Morton's curve, also called Z-order, each cell lies: the binary digits of its coordinates in turn.

    Args:
        cells: coordinates along each axis, 0 to 2^bits - 1; the first axis has the highest digit.
        bits: binary digits of a coordinate.
    """
    index = torch.zeros_like(cells[0])
    for bit in range(bits - 1, -1, -1):
        for places in cells:
            index = 2 * index + (places >> bit & 1)
    return index


def _bits(extents: tuple[int, ...]) -> int:
    """Binary digits of the largest coordinate."""
    return (max(extents) - 1).bit_length()
