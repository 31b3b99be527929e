"""Sliding Tile Attention: every tile of the video sees a window of tiles around it.

Follows github.com/hao-ai-lab/FastVideo before fc80d95, which took the method out: the order of tokens from
fastvideo/attention/backends/sliding_tile_attn.py, the window from fastvideo-kernel/tests/support_flex_sta.py. What
differs:

- The search is that of fastvideo/pipelines/stages/denoising.py: for each step, layer and head, the candidate whose
  output is nearest to full attention's by L2 distance, mean over prompts. There, outputs are compared whole; here at up
  to 4,096 queries of a call, the same for all candidates and prompts. A candidate that leaves nothing out at a geometry
  is chosen only where all are such. What the search found for Wan is not public.
- Presets without a search give every head one window.
- A grid that tiles do not divide has smaller tiles at its ends; there it is refused, as is any but three grids.
- Masks are of blocks, which are kept where any of their pairs of tokens is. That is the mask of tiles itself where
  tiles divide the grid and blocks divide a tile; elsewhere it is denser.
- Text stays where it is in the sequence, of any length; there it stands last, and fills up to 256 tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from calibatt.kernels.geometry import Geometry
from calibatt.kernels.mask import BlockMask
from calibatt.kernels.plan import Plan, TokenOrder
from calibatt.methods.ahead import sent
from calibatt.methods.base import Knob, Method
from calibatt.methods.energy import CHUNK, exponentials
from calibatt.methods.learning import Learnt
from calibatt.methods.site import Site
from calibatt.methods.tiles import Tile, tile_blocks, tile_counts, tile_order

# tiles along frames, rows and columns
Window = tuple[int, int, int]

# what the original's search for Wan chooses among, in fastvideo/pipelines/stages/denoising.py, without full attention;
# of the 3 × 6 × 10 tiles of 69 frames at 768 × 1280
WAN_CANDIDATES: tuple[Window, ...] = ((3, 1, 10), (1, 5, 7), (3, 3, 3), (1, 6, 5), (1, 3, 10), (3, 6, 1))
# 75,600 queries, of Wan at 720p, take seconds for each of 2,000 calls of a video; 4,096 are as many as tell means apart
# to 1/64 of their spread
_QUERIES = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class SlidingTileConfig:
    """Settings of the mask. It has either one window for all heads, or candidates to search each head's among.

    Args:
        window: tiles that a tile sees, along frames, rows and columns; an even number sees as many as the next odd one.
        candidates: such windows; each head has that which was found best for it at this step and layer.
        dense_steps: share of the first steps that stay dense.
        reach: factor on the window, which is then rounded, and has one tile at least and all of the axis at most. Found
            windows may be scaled without another search: heads keep the shape of theirs.
        tile: frames, rows and columns of a tile, in tokens.
        block: tokens of a query and of a key block.

    Raises:
        ValueError: a window or a tile has no extent, the reach is negative, or there is not either a window or
            candidates.
    """

    window: Window | None = None
    candidates: tuple[Window, ...] = ()
    dense_steps: float
    reach: float = 1.0
    # STA_base_tile_size
    tile: Tile = (6, 8, 8)
    # three blocks are a tile of 384 tokens
    block: tuple[int, int] = (128, 128)

    def __post_init__(self) -> None:
        if (self.window is None) != bool(self.candidates):
            raise ValueError("sta needs either one window or candidates to search among: give one of them")
        if min(*self.tile, *(extent for window in self.windows for extent in window)) < 1:
            raise ValueError(f"sta needs windows of at least one tile, and tiles of at least one token: got {self}")
        if self.reach < 0:
            raise ValueError(f"sta needs a reach that is not negative: got {self.reach}")

    @property
    def windows(self) -> tuple[Window, ...]:
        """The window, or all candidates."""
        return self.candidates if self.window is None else (self.window,)

    def reached(self) -> tuple[Window, ...]:
        """The windows scaled by the reach, and rounded."""
        return tuple(
            (round(self.reach * frames), round(self.reach * rows), round(self.reach * columns))
            for frames, rows, columns in self.windows
        )


class SlidingTile(Method):
    """Static masks: a window of tiles that slides over frames, rows and columns, one for all heads or each head's own.

    Both branches have the same masks; windows are found on the conditional one.
    """

    name: ClassVar[str] = "sta"
    label: ClassVar[str] = "STA"
    colour: ClassVar[str] = "#E69F00"
    marker: ClassVar[str] = "s"
    offline = True
    presets: ClassVar[Mapping[str, SlidingTileConfig]] = MappingProxyType(
        {
            # one of WAN_CANDIDATES for all: that which favours no axis; skip_time_steps: 12 of 50 steps dense
            "default": SlidingTileConfig(window=(3, 3, 3), dense_steps=12 / 50),
            # the same mask at every step, to compare masks rather than dense schedules
            "no-warmup": SlidingTileConfig(window=(3, 3, 3), dense_steps=0.0),
            # the candidate that sees the most of a frame: 35 of its 60 tiles at 768 × 1280
            "wide": SlidingTileConfig(window=(1, 5, 7), dense_steps=12 / 50),
            # the original's search, and the same at every step
            "searched": SlidingTileConfig(candidates=WAN_CANDIDATES, dense_steps=12 / 50),
            "searched-no-warmup": SlidingTileConfig(candidates=WAN_CANDIDATES, dense_steps=0.0),
        }
    )
    # from a tile that sees itself to a window of 1 that is all of 11 tiles: the 85 columns of CogVideoX 1.5, the most
    # that an axis of the catalogue's models has
    knob: ClassVar[Knob | None] = Knob(field="reach", low=0.0, high=11.0)
    without_dense: ClassVar[Mapping[str, Any]] = MappingProxyType({"dense_steps": 0.0})

    def __init__(self, config: SlidingTileConfig, learnt: Learnt | None = None) -> None:
        super().__init__(config, learnt)
        self._made: dict[tuple[Geometry, torch.device], tuple[Plan, BlockMask]] = {}

    @classmethod
    def learner(cls, config: SlidingTileConfig) -> WindowSearch | None:
        """The search, where there are candidates."""
        if not config.candidates:
            return None
        return WindowSearch(
            candidates=config.candidates, dense_steps=config.dense_steps, tile=config.tile, block=config.block
        )

    def plan(
        self,
        q: Float[Tensor, "heads tokens head_dim"],
        k: Float[Tensor, "heads tokens head_dim"],
        v: Float[Tensor, "heads tokens head_dim"],
        site: Site,
    ) -> Plan:
        """The mask of the geometry, or each head's own, over tokens in the order of tiles; dense in the first steps.

        Raises:
            ValueError: windows were found for another geometry or number of steps.
        """
        if self.learnt is not None:
            self.learnt.check(site)
        if site.in_warmup(self.config.dense_steps):
            return Plan.dense(site.geometry)
        key = (site.geometry, q.device)
        if key not in self._made:
            order = TokenOrder.of_all(tile_order(site.geometry, self.config.tile).to(q.device))
            masks = tile_mask(site.geometry, self.config.reached(), self.config.tile, self.config.block).to(q.device)
            first = _chosen(masks, torch.zeros(1, dtype=torch.long, device=q.device))
            self._made[key] = (Plan.masked(first, site.geometry.heads, order=order), masks)
        plan, masks = self._made[key]
        if self.learnt is None:
            return plan
        found = self.learnt.at("distance", site).argmin(0)
        return replace(plan, mask=_chosen(masks, sent(found, q.device)))


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowSearch:
    """Compares the output under each candidate with that of full attention.

    Costs about what full attention of 4,096 queries does in fp32: the parts that key blocks add to an output are
    computed once, and each candidate sums its own. Steps that stay dense cost no time.

    Args:
        candidates: the windows, as they are: a reach scales what was found.
        dense_steps: share of the first steps that are not looked at.
        tile: frames, rows and columns of a tile, in tokens.
        block: tokens of a query and of a key block.
    """

    candidates: tuple[Window, ...]
    dense_steps: float
    tile: Tile
    block: tuple[int, int]

    def note(
        self,
        q: Float[Tensor, "heads tokens head_dim"],
        k: Float[Tensor, "heads tokens head_dim"],
        v: Float[Tensor, "heads tokens head_dim"],
        site: Site,
        prompt: int,
    ) -> Mapping[str, Tensor]:
        """`distance` of each candidate at each head: infinite where it is full attention, zeros in a dense step."""
        if site.in_warmup(self.dense_steps):
            return {"distance": torch.zeros(len(self.candidates), len(q), device=q.device)}
        keep = tile_mask(site.geometry, self.candidates, self.tile, self.block).keep().float().to(q.device)
        order = tile_order(site.geometry, self.tile)[0].to(q.device).long()
        distance = window_distance(q[:, order], k[:, order], v[:, order], keep, self.block, _queries(site).to(q.device))
        full = keep.flatten(1).all(-1)
        if not full.all():
            distance[full] = math.inf
        return {"distance": distance}

    def merge(self, notes: Sequence[Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
        """`distance`: the mean over the prompts."""
        return {"distance": torch.stack([note["distance"] for note in notes]).mean(0)}


def window_distance(
    q: Float[Tensor, "heads tokens head_dim"],
    k: Float[Tensor, "heads tokens head_dim"],
    v: Float[Tensor, "heads tokens head_dim"],
    keep: Float[Tensor, "candidates q_blocks k_blocks"],
    block: tuple[int, int],
    queries: Int[Tensor, "queries"],
) -> Float[Tensor, "candidates heads"]:
    """Root mean square distance of the output under each mask to that of full attention, over some queries.

    Computed in fp32, some queries of one head at a time.

    Args:
        q, k, v: what attention sees, in the order of the masks.
        keep: 1 where a block is kept, else 0; no row of queries is without a block.
        block: tokens of a query and of a key block.
        queries: places of the queries to compare.
    """
    heads, tokens, channels = q.shape
    blocks = keep.shape[-1]
    rest = blocks * block[1] - tokens
    squares = torch.zeros(len(keep), heads, device=q.device)
    for head in range(heads):
        values = torch.nn.functional.pad(v[head].float(), (0, 0, 0, rest)).view(blocks, block[1], channels)
        for some in queries.split(max(1, CHUNK // (blocks * max(block[1], channels)))):
            weights = torch.nn.functional.pad(exponentials(q[head, some], k[head]), (0, rest))
            weights = weights.view(-1, blocks, block[1])
            sums = weights.sum(-1)
            # what each key block adds to an output, before it is divided by the sum of the weights
            parts = torch.einsum("qbt,btc->qbc", weights, values)
            seen = keep[:, some // block[0]]
            # weights are relative to the query's largest: all that a mask keeps may have vanished beside that
            kept = torch.einsum("mqb,qb->mq", seen, sums).clamp(min=torch.finfo(torch.float32).tiny)
            outputs = torch.einsum("mqb,qbc->mqc", seen, parts) / kept[..., None]
            squares[:, head] += (outputs - parts.sum(1) / sums.sum(-1, keepdim=True)).square().sum((-2, -1))
    return (squares / (len(queries) * channels)).sqrt()


def _queries(site: Site) -> Int[Tensor, "queries"]:
    """Places of the video queries that a site's candidates are compared on: all of them, or some, drawn."""
    count, start = site.geometry.video_tokens, site.geometry.video_start
    if count <= _QUERIES:
        return torch.arange(count) + start
    # the same for every prompt, others at every site
    return torch.randperm(count, generator=site.generator(0, torch.device("cpu")))[:_QUERIES].sort().values + start


def tile_mask(geometry: Geometry, windows: Sequence[Window], tile: Tile, block: tuple[int, int]) -> BlockMask:
    """The mask of each window, over blocks of tokens in the order of tiles.

    On an axis of n tiles, with a window of w = 2h or 2h + 1, the tile at q sees those at most h away from q, or from
    the nearest place to q that is h away from both ends: |clamp(q, h, n − 1 − h) − k| ≤ h; where w ≥ n, all. A tile is
    seen that is seen on all three axes. Blocks are kept that hold a pair of tokens of such tiles, and those that hold
    text, in both directions.

    Args:
        geometry: the token grid.
        windows: tiles that a tile sees, along frames, rows and columns.
        tile: frames, rows and columns of a tile, in tokens.
        block: tokens of a query and of a key block.
    """
    counts = tile_counts(geometry, tile)
    seen = [reduce(torch.kron, map(_seen, counts, window)) for window in windows]
    keep = tile_blocks(geometry, tile, block, torch.stack(seen) > 0)
    return BlockMask.from_keep(keep, tokens=geometry.tokens, block_q=block[0], block_k=block[1])


def _chosen(masks: BlockMask, which: Int[Tensor, "mask_heads"]) -> BlockMask:
    """For each head one of the masks."""
    return BlockMask(bits=masks.bits[which], tokens=masks.tokens, block_q=masks.block_q, block_k=masks.block_k)


def _seen(tiles: int, window: int) -> Float[Tensor, "tiles tiles"]:
    """Which tiles, in columns, each tile of an axis sees: 1 or 0."""
    # the bounds of the clamp cross in a window that is wider, or even and just as wide
    if window >= tiles:
        return torch.ones(tiles, tiles)
    half, place = window // 2, torch.arange(tiles)
    return ((place.clamp(half, tiles - 1 - half)[:, None] - place).abs() <= half).float()
