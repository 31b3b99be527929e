"""Tiles: boxes of frames, rows and columns, whose tokens some methods put side by side to choose them as one."""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float, Int, Int32
from torch import Tensor

from calibatt.kernels.geometry import Geometry
from calibatt.kernels.mask import block_count
from calibatt.methods.blocks import with_text

# frames, rows and columns of a tile, in tokens
Tile = tuple[int, int, int]


def tile_counts(geometry: Geometry, tile: Tile) -> tuple[int, int, int]:
    """Tiles along frames, rows and columns, smaller ones at the ends included."""
    frames, rows, columns = map(block_count, geometry.grid, tile)
    return frames, rows, columns


def tile_of_tokens(geometry: Geometry, tile: Tile) -> Int[Tensor, "tokens"]:
    """The number of each token's tile, in the sequence's own order; text has the one after the last tile's."""
    counts = tile_counts(geometry, tile)
    frame, row, column = (torch.arange(extent) // size for extent, size in zip(geometry.grid, tile, strict=True))
    number = (frame[:, None, None] * counts[1] + row[:, None]) * counts[2] + column
    tile_of = torch.full((geometry.tokens,), math.prod(counts))
    tile_of[geometry.video_start : geometry.video_start + geometry.video_tokens] = number.flatten()
    return tile_of


def tile_order(geometry: Geometry, tile: Tile) -> Int32[Tensor, "1 tokens"]:
    """Tile by tile, row by row of tiles, and so within a tile; text stays where it is."""
    video = slice(geometry.video_start, geometry.video_start + geometry.video_tokens)
    # stable: the tokens of a tile keep the sequence's order
    return with_text(geometry, tile_of_tokens(geometry, tile)[video].argsort(stable=True))


def tile_blocks(
    geometry: Geometry, tile: Tile, block: tuple[int, int], seen: Bool[Tensor, "mask_heads tiles tiles"]
) -> Bool[Tensor, "mask_heads q_blocks k_blocks"]:
    """The blocks, of tokens in the order of tiles, with a query and a key of tiles that see each other.

    Those that hold text are kept, in both directions.

    Args:
        geometry: the token grid.
        tile: frames, rows and columns of a tile.
        block: tokens of a query and of a key block.
        seen: which tiles, in columns, each tile sees.
    """
    # text is one more tile, which sees and is seen by all
    pairs = torch.nn.functional.pad(seen.float(), (0, 1, 0, 1), value=1.0)
    order = tile_order(geometry, tile)[0].long()
    tile_of = tile_of_tokens(geometry, tile)[order].to(seen.device)
    # how many of the tiles' pairs in a pair of blocks are seen; all pairs of tokens would not fit in memory
    return _held(tile_of, pairs.shape[-1], block[0]) @ pairs @ _held(tile_of, pairs.shape[-1], block[1]).T > 0


def _held(tile_of: Int[Tensor, "tokens"], tiles: int, block: int) -> Float[Tensor, "blocks tiles"]:
    """Which tiles have tokens in each block: 1 or 0."""
    held = torch.zeros(block_count(len(tile_of), block), tiles, device=tile_of.device)
    held[torch.arange(len(tile_of), device=tile_of.device) // block, tile_of] = 1.0
    return held
