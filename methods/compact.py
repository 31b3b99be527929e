"""Compact Attention: for each head, how far tiles see, by how far apart their frames are; searched offline.

Follows the paper, arXiv 2508.12969; its code is not public, and the paper leaves much open. Our reading:

- Tiles of frames, rows and columns are put side by side, and see each other or not. Pairs of tiles are grouped by how
  many tiles of frames they are apart: 0, 1, 2 to 3, 4 to 7, and so on.
- In each group a tile sees two windows around its place: |rows| ≤ r₁ and |columns| ≤ c₁, or |rows| ≤ r₂ and
  |columns| ≤ c₂, with r₁ ≥ r₂ and c₁ ≤ c₂: a box where they are the same, else a cross.
- The search starts from windows that see all, and draws in one boundary of one group at a time: that with the least of
  lost recall − λ · saved computation, both as shares of the whole. It ends before recall would fall below τ. Recall is
  exact, mean over the video's queries, text included. No window loses its middle.
- λ is called a threshold as well; it would then end the search where the next boundary costs too much. In which units
  is not known to us, so that it only decides what goes first.
- A head's mask is the union of those of all prompts. τ and λ are applied after learning: what is learnt is attention by
  group, rows and columns apart.

The paper keeps one mask for some steps in a row; here each step has its own. Masks are of blocks, which are kept where
any of their pairs of tokens is, and text is kept both ways.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from calibatt.kernels.geometry import Geometry
from calibatt.kernels.mask import BlockMask
from calibatt.kernels.plan import Plan, TokenOrder
from calibatt.methods.ahead import SitePlans, sent
from calibatt.methods.base import Knob, Method
from calibatt.methods.energy import CHUNK, exponentials
from calibatt.methods.learning import Learnt
from calibatt.methods.site import Site
from calibatt.methods.tiles import Tile, tile_blocks, tile_counts, tile_of_tokens, tile_order


@dataclass(frozen=True, slots=True, kw_only=True)
class CompactConfig:
    """Settings of the search.

    Args:
        recall: τ, share of a head's attention that its windows keep at least.
        cost_weight: λ, how much recall the saving of all computation would be worth.
        dense_steps: share of the first steps that stay dense.
        tile: frames, rows and columns of a tile, in tokens.
        block: tokens of a query and of a key block.

    Raises:
        ValueError: the recall is outside 0 to 1, the weight is negative, or a tile has no extent.
    """

    recall: float
    cost_weight: float
    dense_steps: float
    # Sliding Tile Attention's rows and columns, and as many frames as make a tile one block of 128 tokens
    tile: Tile = (2, 8, 8)
    block: tuple[int, int] = (128, 128)

    def __post_init__(self) -> None:
        if not 0 <= self.recall <= 1:
            raise ValueError(f"recall is a share of attention, 0 to 1: got {self.recall}")
        if self.cost_weight < 0 or min(self.tile) < 1:
            raise ValueError(
                f"compact needs a weight that is not negative, and tiles of at least one token: got {self}"
            )


class Compact(Method):
    """Computes, for each head, windows of tiles that were found large enough offline; no input is looked at.

    Masks are made when first asked for, and kept; both branches have the same, learnt on the conditional one.
    """

    name: ClassVar[str] = "compact"
    label: ClassVar[str] = "Compact Attention"
    colour: ClassVar[str] = "#56B4E9"
    marker: ClassVar[str] = "o"
    offline = True
    presets: ClassVar[Mapping[str, CompactConfig]] = MappingProxyType(
        {
            # the paper's for Wan: τ 0.9, λ 0.011, 15 of 50 steps dense
            "default": CompactConfig(recall=0.9, cost_weight=0.011, dense_steps=15 / 50),
            # for HunyuanVideo
            "hunyuan": CompactConfig(recall=0.9, cost_weight=0.04, dense_steps=15 / 50),
            # the same masks as the default's at every step, to compare masks rather than dense schedules
            "no-warmup": CompactConfig(recall=0.9, cost_weight=0.011, dense_steps=0.0),
        }
    )
    knob: ClassVar[Knob | None] = Knob(field="recall", low=0.0, high=1.0)
    without_dense: ClassVar[Mapping[str, Any]] = MappingProxyType({"dense_steps": 0.0})
    learnt: Learnt

    def __init__(self, config: CompactConfig, learnt: Learnt) -> None:
        super().__init__(config, learnt)
        self._plans = SitePlans(self._made)
        self._orders: dict[tuple[Geometry, torch.device], TokenOrder] = {}

    @classmethod
    def learner(cls, config: CompactConfig) -> CompactLearner:
        """Sums attention up by how far apart tiles are."""
        return CompactLearner(tile=config.tile, dense_steps=config.dense_steps)

    def plan(
        self,
        q: Float[Tensor, "heads tokens head_dim"],
        k: Float[Tensor, "heads tokens head_dim"],
        v: Float[Tensor, "heads tokens head_dim"],
        site: Site,
    ) -> Plan:
        """The site's mask, over tokens in the order of tiles.

        Raises:
            ValueError: windows were found for another geometry or number of steps.
        """
        self.learnt.check(site)
        if site.in_warmup(self.config.dense_steps):
            return Plan.dense(site.geometry)
        return self._plans.at(site, q.device)

    def _made(self, step: int, layer: int, geometry: Geometry, device: torch.device) -> Plan:
        of_tokens = (geometry, device)
        if of_tokens not in self._orders:
            self._orders[of_tokens] = TokenOrder.of_all(tile_order(geometry, self.config.tile).to(device))
        mask = self._mask(self.learnt.part("attention", step, layer), geometry, device)
        return Plan.masked(mask, geometry.heads, order=self._orders[of_tokens])

    def _mask(
        self, learnt: Float[Tensor, "prompts heads *cells"], geometry: Geometry, device: torch.device
    ) -> BlockMask:
        block_q, block_k = self.config.block
        cells = cells_of_pairs(geometry, self.config.tile).to(device)
        # a share of all pairs of video tokens
        cost = by_cell(token_pairs(geometry, self.config.tile).to(device)[None], cells, geometry, self.config.tile)[0]
        attention = sent(learnt, device)
        seen = windows(attention, cost, recall=self.config.recall, cost_weight=self.config.cost_weight).any(0)
        keep = tile_blocks(geometry, self.config.tile, self.config.block, seen.flatten(1)[:, cells])
        return BlockMask.from_keep(keep, tokens=geometry.tokens, block_q=block_q, block_k=block_k)


@dataclass(frozen=True, slots=True, kw_only=True)
class CompactLearner:
    """Sums up, for each prompt, attention by how many tiles of frames (in groups), rows and columns it goes.

    That is some hundred numbers a head and prompt: 3 MB a layer and step for 16 prompts of Wan 14B at 720p. Steps that
    stay dense cost no time.

    Args:
        tile: frames, rows and columns of a tile, in tokens.
        dense_steps: share of the first steps that are not looked at.
    """

    tile: Tile
    dense_steps: float

    def note(
        self,
        q: Float[Tensor, "heads tokens head_dim"],
        k: Float[Tensor, "heads tokens head_dim"],
        v: Float[Tensor, "heads tokens head_dim"],
        site: Site,
        prompt: int,
    ) -> Mapping[str, Tensor]:
        """`attention`: of each head, by groups of frames, and rows and columns apart; zeros in a dense step."""
        if site.in_warmup(self.dense_steps):
            return {"attention": q.new_zeros(len(q), *cell_counts(site.geometry, self.tile), dtype=torch.float32)}
        return {"attention": attention_by_distance(q, k, site.geometry, self.tile)}

    def merge(self, notes: Sequence[Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
        """`attention` of each prompt."""
        return {"attention": torch.stack([note["attention"] for note in notes])}


def cell_counts(geometry: Geometry, tile: Tile) -> tuple[int, int, int]:
    """Groups of tiles of frames, and tiles of rows and columns: the shape of a table of cells."""
    frames, rows, columns = tile_counts(geometry, tile)
    return (frames - 1).bit_length() + 1, rows, columns


def cells_of_pairs(geometry: Geometry, tile: Tile) -> Int[Tensor, "tiles tiles"]:
    """How far apart two tiles are: the index of their cell in a table of groups × rows × columns.

    The group is the number of binary digits of the tiles of frames between them: 0, 1, 2 to 3, 4 to 7.
    """
    counts = tile_counts(geometry, tile)
    places = torch.cartesian_prod(*map(torch.arange, counts)).view(-1, 3)
    frames, rows, columns = (places[:, None] - places).abs().unbind(-1)
    # frexp's exponent is the number of binary digits of a whole number
    group = torch.frexp(frames.float()).exponent.long()
    return (group * counts[1] + rows) * counts[2] + columns


def token_pairs(geometry: Geometry, tile: Tile) -> Float[Tensor, "tiles tiles"]:
    """Share of all pairs of video tokens that each pair of tiles has."""
    video = slice(geometry.video_start, geometry.video_start + geometry.video_tokens)
    sizes = torch.bincount(tile_of_tokens(geometry, tile)[video]).float() / geometry.video_tokens
    return sizes[:, None] * sizes


def by_cell(
    pairs: Float[Tensor, "heads tiles tiles"], cells: Int[Tensor, "tiles tiles"], geometry: Geometry, tile: Tile
) -> Float[Tensor, "heads groups rows columns"]:
    """Sums over the pairs of tiles that are equally far apart."""
    sums = pairs.new_zeros(len(pairs), *cell_counts(geometry, tile))
    sums.flatten(1).index_add_(1, cells.flatten(), pairs.flatten(1))
    return sums


def attention_by_distance(
    q: Float[Tensor, "heads tokens head_dim"],
    k: Float[Tensor, "heads tokens head_dim"],
    geometry: Geometry,
    tile: Tile,
) -> Float[Tensor, "heads groups rows columns"]:
    """Share of the video queries' attention that goes so far, in tiles; what goes to text is missing from the sum.

    Computed in fp32, some tiles of queries of one head at a time.

    Args:
        q, k: what attention sees.
        geometry: the token grid.
        tile: frames, rows and columns of a tile.
    """
    start, end = geometry.video_start, geometry.video_start + geometry.video_tokens
    tile_of = tile_of_tokens(geometry, tile)[start:end]
    tiles, size = math.prod(tile_counts(geometry, tile)), math.prod(tile)
    # all tiles as large as a whole one: those at the ends are filled up with their first token, which then counts once
    order, sizes = tile_of.argsort(stable=True), torch.bincount(tile_of)
    place = torch.arange(size).expand(tiles, -1)
    real = (place < sizes[:, None]).to(q.device)
    tokens = order[(sizes.cumsum(0) - sizes)[:, None] + place.where(place < sizes[:, None], 0)].to(q.device) + start
    text = torch.cat((torch.arange(start), torch.arange(end, geometry.tokens))).to(q.device)
    cells = cells_of_pairs(geometry, tile).to(q.device)
    pairs = torch.zeros(tiles, tiles, device=q.device)
    at_once = max(1, CHUNK // (size * (tiles * size + len(text))))
    attention = []
    for head in range(len(q)):
        keys = k[head, torch.cat((tokens.flatten(), text))]
        for some in torch.arange(tiles, device=q.device).split(at_once):
            weights = exponentials(q[head, tokens[some].flatten()], keys)
            seen = (weights[:, : tiles * size].view(-1, tiles, size) * real).sum(-1)
            seen /= seen.sum(-1, keepdim=True) + weights[:, tiles * size :].sum(-1, keepdim=True)
            pairs[some] = (seen.view(-1, size, tiles) * real[some, :, None]).sum(1) / geometry.video_tokens
        attention.append(by_cell(pairs[None], cells, geometry, tile)[0])
    return torch.stack(attention)


def windows(
    attention: Float[Tensor, "prompts heads groups rows columns"],
    cost: Float[Tensor, "groups rows columns"],
    *,
    recall: float,
    cost_weight: float,
) -> Bool[Tensor, "prompts heads groups rows columns"]:
    """Which cells are seen, for each prompt and head by itself.

    The order in which boundaries are drawn in does not depend on the wanted recall: with less, masks only lose cells.

    Args:
        attention: in each cell; together 1, less what is always kept.
        cost: computation of each cell; together 1.
        recall: not more than 1 less this is left out.
        cost_weight: how much of attention the saving of all computation is worth.
    """
    _, _, _, rows, columns = attention.shape
    # sums up to each row and column: of a window, and so of two of them less what they share
    lost_by, saved_by = (table.double().cumsum(-1).cumsum(-2) for table in (attention, cost))
    saved_by = saved_by.expand_as(lost_by)
    # last row of the tall window and of the wide one, last column of the tall one and of the wide one
    state = torch.tensor([rows - 1, rows - 1, columns - 1, columns - 1], device=attention.device)
    state = state.expand(*attention.shape[:3], 4).clone()
    lost = torch.zeros(attention.shape[:2], dtype=torch.float64, device=attention.device)
    going = torch.ones_like(lost, dtype=torch.bool)
    while True:
        moved = _moves(state)
        before = (_area(lost_by, state[..., None, :]), _area(saved_by, state[..., None, :]))
        loss, saving = before[0] - _area(lost_by, moved), before[1] - _area(saved_by, moved)
        price = loss - cost_weight * saving
        # a boundary at the middle stays
        price = price.masked_fill((moved == state[..., None, :]).all(-1) | (moved < 0).any(-1), math.inf).flatten(2)
        best = price.argmin(-1, keepdim=True)
        lost_then = lost + loss.flatten(2).gather(-1, best)[..., 0]
        going &= price.gather(-1, best)[..., 0].isfinite() & (lost_then <= 1 - recall)
        if not going.any():
            break
        lost = torch.where(going, lost_then, lost)
        group, move = best // moved.shape[-2], best % moved.shape[-2]
        chosen = moved.take_along_dim(move[..., None, None], -2)[..., 0, :]
        here = torch.arange(state.shape[2], device=state.device) == group
        state = torch.where((here & going[..., None])[..., None], chosen, state)
    row, column = torch.meshgrid(
        *(torch.arange(extent, device=state.device) for extent in (rows, columns)), indexing="ij"
    )
    tall_rows, wide_rows, tall_columns, wide_columns = state[..., None, None].unbind(-3)
    return ((row <= tall_rows) & (column <= tall_columns)) | ((row <= wide_rows) & (column <= wide_columns))


def _moves(state: Int[Tensor, "*groups four"]) -> Int[Tensor, "*groups moves four"]:
    """The windows with one boundary drawn in: the outermost rows, the outermost columns, or the corner between.

    Where both windows are the same, the corner opens by one cell; where they are not, it grows by rows or by columns.
    A corner that has grown through leaves one window, of which both are made.
    """
    tall_rows, wide_rows, tall_columns, wide_columns = state.unbind(-1)
    same = tall_rows == wide_rows
    fewer_rows = torch.stack((tall_rows - 1, wide_rows.minimum(tall_rows - 1), tall_columns, wide_columns), -1)
    fewer_columns = torch.stack((tall_rows, wide_rows, tall_columns.minimum(wide_columns - 1), wide_columns - 1), -1)
    by_rows = torch.stack((tall_rows, wide_rows - 1, tall_columns - same.long(), wide_columns), -1)
    by_columns = torch.stack((tall_rows, wide_rows - same.long(), tall_columns - 1, wide_columns), -1)
    moved = torch.stack((fewer_rows, fewer_columns, by_rows, by_columns), -2)
    # one window within the other is that other alone
    one = (moved[..., 0] == moved[..., 1]) | (moved[..., 2] == moved[..., 3])
    box = moved[..., [0, 0, 3, 3]]
    return torch.where(one[..., None], box, moved)


def _area(
    sums: Float[Tensor, "*groups rows columns"], state: Int[Tensor, "*groups moves four"]
) -> Float[Tensor, "*groups moves"]:
    """What both windows hold together, by sums up to each row and column; any number where a window has no middle."""
    columns = sums.shape[-1]
    flat = sums.flatten(-2)
    tall_rows, wide_rows, tall_columns, wide_columns = state.clamp(min=0).unbind(-1)
    corners = ((tall_rows, tall_columns), (wide_rows, wide_columns), (wide_rows, tall_columns))
    tall, wide, shared = (flat.gather(-1, row * columns + column) for row, column in corners)
    return tall + wide - shared
