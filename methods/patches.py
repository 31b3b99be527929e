"""Patches: small rectangles of one frame, whose tokens some methods put side by side to make blocks of them."""

from __future__ import annotations

import torch
from jaxtyping import Int, Int32
from torch import Tensor

from calibatt.kernels.geometry import Geometry
from calibatt.kernels.mask import block_count
from calibatt.methods.blocks import with_text


def patch_of_tokens(geometry: Geometry, rows: int, columns: int) -> Int[Tensor, "video_tokens"]:
    """In which patch each video token lies: patches are counted frame by frame, row-major within a frame.

    Args:
        geometry: the token grid.
        rows, columns: tokens of a patch; those at the lower and right ends of a frame may be smaller.
    """
    frame, row, column = torch.meshgrid(*(torch.arange(extent) for extent in geometry.grid), indexing="ij")
    _, all_rows, all_columns = geometry.grid
    patch = frame * block_count(all_rows, rows) + row // rows
    return (patch * block_count(all_columns, columns) + column // columns).flatten()


def patch_order(geometry: Geometry, rows: int, columns: int) -> Int32[Tensor, "1 tokens"]:
    """The video tokens patch by patch, row-major within a patch, and the text where it is.

    Args:
        geometry: the token grid.
        rows, columns: tokens of a patch; those at the lower and right ends of a frame may be smaller.
    """
    # stable: the tokens of a patch stay in the order that they have in the frame
    return with_text(geometry, patch_of_tokens(geometry, rows, columns).argsort(stable=True))
