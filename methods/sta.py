"""Sliding Tile Attention: every tile of the video sees a window of tiles around it.

Follows github.com/hao-ai-lab/FastVideo before fc80d95, which took the method out: the order of tokens from
fastvideo/attention/backends/sliding_tile_attn.py, the window from fastvideo-kernel/tests/support_flex_sta.py. What
differs:

- Every head has the preset's window; the offline search of a window for each head, by L2 distance over prompts, comes
  with a store for it.
- A grid that tiles do not divide has smaller tiles at its ends; there it is refused, as is any but three grids.
- Masks are of blocks, which are kept where any of their pairs of tokens is. That is the mask of tiles itself where
  tiles divide the grid and blocks divide a tile; elsewhere it is denser.
- Text stays where it is in the sequence, of any length; there it stands last, and fills up to 256 tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from types import MappingProxyType
from typing import ClassVar

import torch
from jaxtyping import Float, Int, Int32
from torch import Tensor

from calibatt.kernels.base import Unsupported
from calibatt.kernels.geometry import Geometry
from calibatt.kernels.plan import BlockMask, Plan, TokenOrder, block_count
from calibatt.methods.base import Knob, Site
from calibatt.methods.blocks import with_text


@dataclass(frozen=True, slots=True, kw_only=True)
class SlidingTileConfig:
    """Settings of the mask.

    Args:
        window: tiles that a tile sees, along frames, rows and columns; an even number sees as many as the next odd one.
        dense_steps: share of the first steps that stay dense.
        reach: factor on the window, which is then rounded, and has one tile at least and all of the axis at most.
        tile: frames, rows and columns of a tile, in tokens.
        block: tokens of a query and of a key block.

    Raises:
        ValueError: a window or a tile has no extent, or the reach is negative.
    """

    window: tuple[int, int, int]
    dense_steps: float
    reach: float = 1.0
    # STA_base_tile_size
    tile: tuple[int, int, int] = (6, 8, 8)
    # three blocks are a tile of 384 tokens
    block: tuple[int, int] = (128, 128)

    def __post_init__(self) -> None:
        if min(*self.window, *self.tile) < 1:
            raise ValueError(f"sta needs windows of at least one tile, and tiles of at least one token: got {self}")
        if self.reach < 0:
            raise ValueError(f"sta needs a reach that is not negative: got {self.reach}")


class SlidingTile:
    """One static mask for all heads, layers and steps: a window of tiles that slides over frames, rows and columns."""

    name: ClassVar[str] = "sta"
    # the windows are candidates of the search for Wan, (3,1,10), (1,5,7), (3,3,3), (1,6,5), (1,3,10) and (3,6,1) in
    # fastvideo/pipelines/stages/denoising.py; what it found for each head is not public
    presets: ClassVar[Mapping[str, SlidingTileConfig]] = MappingProxyType(
        {
            # the candidate that favours no axis; skip_time_steps: 12 of 50 steps dense
            "default": SlidingTileConfig(window=(3, 3, 3), dense_steps=12 / 50),
            # the same mask at every step, to compare masks rather than dense schedules
            "no-warmup": SlidingTileConfig(window=(3, 3, 3), dense_steps=0.0),
            # the candidate that sees the most of a frame: 35 of its 60 tiles at 768 × 1280
            "wide": SlidingTileConfig(window=(1, 5, 7), dense_steps=12 / 50),
        }
    )
    offline: ClassVar[bool] = False
    # from a tile that sees itself to a window of 1 that is all of 11 tiles: the 85 columns of CogVideoX 1.5, the most
    # that an axis of the catalogue's models has
    knob: ClassVar[Knob | None] = Knob(field="reach", low=0.0, high=11.0)

    def __init__(self, config: SlidingTileConfig) -> None:
        self.config = config
        self._plans: dict[tuple[Geometry, torch.device], Plan] = {}

    def refusal(self, geometry: Geometry) -> Unsupported | None:
        """Applies to every geometry."""
        return None

    def plan(
        self, q: Float[Tensor, "heads tokens head_dim"], k: Float[Tensor, "heads tokens head_dim"], site: Site
    ) -> Plan:
        """The mask of the geometry over tokens in the order of tiles, or dense in the first steps."""
        if site.step < round(self.config.dense_steps * site.steps):
            return Plan.dense(site.geometry)
        key = (site.geometry, q.device)
        if key not in self._plans:
            order = TokenOrder.of_all(tile_order(site.geometry, self.config.tile))
            mask = tile_mask(site.geometry, self.config)
            self._plans[key] = Plan.masked(mask, site.geometry.heads, order=order).to(q.device)
        return self._plans[key]

    def reset(self) -> None:
        """Plans depend on the geometry alone, and stay."""


def tile_order(geometry: Geometry, tile: tuple[int, int, int]) -> Int32[Tensor, "1 tokens"]:
    """Tile by tile, row by row of tiles, and so within a tile; text stays where it is."""
    video = slice(geometry.video_start, geometry.video_start + geometry.video_tokens)
    # stable: the tokens of a tile keep the sequence's order
    return with_text(geometry, _tile_of(geometry, tile)[video].argsort(stable=True))


def tile_mask(geometry: Geometry, config: SlidingTileConfig) -> BlockMask:
    """The mask, shared by all heads, over blocks of tokens in the order of tiles.

    On an axis of n tiles, with a window of w = 2h or 2h + 1, the tile at q sees those at most h away from q, or from
    the nearest place to q that is h away from both ends: |clamp(q, h, n − 1 − h) − k| ≤ h; where w ≥ n, all. A tile is
    seen that is seen on all three axes. Blocks are kept that hold a pair of tokens of such tiles, and those that hold
    text, in both directions.
    """
    counts = _tiles(geometry, config.tile)
    windows = (round(config.reach * window) for window in config.window)
    seen = reduce(torch.kron, map(_seen, counts, windows))
    # text is one more tile, which sees and is seen by all
    seen = torch.nn.functional.pad(seen, (0, 1, 0, 1), value=1.0)
    tile_of = _tile_of(geometry, config.tile)[tile_order(geometry, config.tile)[0].long()]
    block_q, block_k = config.block
    # how many of the tiles' pairs in a pair of blocks are seen; all pairs of tokens would not fit in memory
    pairs = _held(tile_of, len(seen), block_q) @ seen @ _held(tile_of, len(seen), block_k).T
    return BlockMask.from_keep(pairs[None] > 0, tokens=geometry.tokens, block_q=block_q, block_k=block_k)


def _seen(tiles: int, window: int) -> Float[Tensor, "tiles tiles"]:
    """Which tiles, in columns, each tile of an axis sees: 1 or 0."""
    # the bounds of the clamp cross in a window that is wider, or even and just as wide
    if window >= tiles:
        return torch.ones(tiles, tiles)
    half, place = window // 2, torch.arange(tiles)
    return ((place.clamp(half, tiles - 1 - half)[:, None] - place).abs() <= half).float()


def _held(tile_of: Int[Tensor, "tokens"], tiles: int, block: int) -> Float[Tensor, "blocks tiles"]:
    """Which tiles have tokens in each block: 1 or 0."""
    held = torch.zeros(block_count(len(tile_of), block), tiles)
    held[torch.arange(len(tile_of)) // block, tile_of] = 1.0
    return held


def _tile_of(geometry: Geometry, tile: tuple[int, int, int]) -> Int[Tensor, "tokens"]:
    """The number of each token's tile, in the sequence's own order; text has the one after the last tile's."""
    counts = _tiles(geometry, tile)
    frame, row, column = (torch.arange(extent) // size for extent, size in zip(geometry.grid, tile, strict=True))
    number = (frame[:, None, None] * counts[1] + row[:, None]) * counts[2] + column
    tile_of = torch.full((geometry.tokens,), math.prod(counts))
    tile_of[geometry.video_start : geometry.video_start + geometry.video_tokens] = number.flatten()
    return tile_of


def _tiles(geometry: Geometry, tile: tuple[int, int, int]) -> tuple[int, int, int]:
    """Tiles along frames, rows and columns, smaller ones at the ends included."""
    frames, rows, columns = map(block_count, geometry.grid, tile)
    return frames, rows, columns
