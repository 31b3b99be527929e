"""Jenga: blocks along a space-filling curve, chosen online by pooled attention, and their neighbours in the video.

Follows github.com/dvlab-research/Jenga (jenga_wan.py, wan/modules, and hyvideo where it differs). Only what it calls
attention carving is this method. The rest of its speed is not part of it: skipped steps (TeaCache for Wan, a fixed list
for HunyuanVideo), and the lower resolution of the first stage with its bias on text. What differs:

- The original's curve is a generalised Hilbert curve, made for extents of any size. Here it is the classic curve of the
  smallest square or cube with a power of two a side, without what lies outside the grid. The two have the same locality
  where extents are powers of two; elsewhere this one leaves the grid and comes back, so that a block may fall in parts,
  and has more neighbours: for Wan at 720p 17.8 of 591 blocks on average, itself included, where a generalised curve
  gives 16.5.
- Frame by frame, the original mirrors the curve so that a frame starts near where the last one ended. Here every other
  frame is walked backwards: mirroring does the same to a curve that is its own mirror image, as the classic one is.
- There, the last block is pooled with the zeros that fill it up, here over its own tokens; and pooled attention is in
  the model's precision there, in fp32 here.
- Blocks of text are all that hold any of it, wherever it stands; there they are the last two.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import product
from types import MappingProxyType
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from calibatt.kernels.geometry import Geometry
from calibatt.kernels.mask import BlockMask, block_count
from calibatt.kernels.plan import Plan, TokenOrder
from calibatt.methods.base import Knob, Method
from calibatt.methods.blocks import pooled, video_blocks
from calibatt.methods.curves import curve_order
from calibatt.methods.selection import top_p
from calibatt.methods.site import Site

# the share dropped rises over a tenth of the schedule: step_normed in jenga_wan.py
_RAMP = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class JengaConfig:
    """Settings of the choice.

    Args:
        drop: share of the key blocks that each query block drops in the later half of the schedule.
        early_drop: the same in the first half; None for one share in both, which the knob then turns in both.
        mass: a row keeps one block more than those whose pooled attention, heaviest first, does not pass this share,
            where that is more than `drop` leaves.
        curve: the order of tokens, a curve through each frame or through the whole video.
        ramp: whether the share dropped rises from 0 over the first tenth of the schedule.
        dense_below: steps that drop this share or less are dense.
        first_frame: whether the blocks of the first frame keep each other.
        block: tokens of a query and of a key block.

    Raises:
        ValueError: a share is outside 0 to 1.
    """

    drop: float
    early_drop: float | None = None
    mass: float
    curve: Literal["frame", "video"]
    ramp: bool
    dense_below: float
    first_frame: bool
    # per_block_tokens, and the block size of the repository's kernel
    block: tuple[int, int] = (128, 128)

    def __post_init__(self) -> None:
        for name in ("drop", "early_drop", "mass", "dense_below"):
            share = getattr(self, name)
            if share is not None and not 0 <= share <= 1:
                raise ValueError(f"{name} is a share, 0 to 1: got {share}")

    def drop_at(self, step: int, steps: int) -> float:
        """Share of the key blocks that a step drops."""
        # step 25 of 50 still belongs to the first half: idx <= 25 in jenga_wan.py
        share = self.drop if self.early_drop is None or 2 * step > steps else self.early_drop
        # a schedule of one step is the ramp's first
        return min(share, _RAMP * step / max(1, steps - 1) * share) if self.ramp else share


# scripts/wan_14B_jenga_base.sh; sliced_gilbert_mapping, sa_drop_rate <= 0.25 and first_frame_blocks of Wan's code
_WAN = JengaConfig(drop=0.8, early_drop=0.7, mass=0.8, curve="frame", ramp=True, dense_below=0.25, first_frame=True)


class Jenga(Method):
    """Pools queries and keys by block at every call; keeps the heaviest blocks, neighbours, and all that hold text."""

    name: ClassVar[str] = "jenga"
    label: ClassVar[str] = "Jenga"
    colour: ClassVar[str] = "#D55E00"
    marker: ClassVar[str] = "P"
    headwise: ClassVar[bool] = True
    presets: ClassVar[Mapping[str, JengaConfig]] = MappingProxyType(
        {
            "default": _WAN,
            # scripts/wan_14B_jenga_turbo.sh, whose first half has 0.75 of the rows and columns besides
            "turbo": replace(_WAN, drop=0.9, early_drop=0.5, mass=0.9),
            # scripts/hyvideo_multigpu_jenga_base.sh; hyvideo/ has one curve for all, no ramp, and sa_drop_rate == 0.0
            "hunyuan": JengaConfig(
                drop=0.85, early_drop=0.75, mass=0.3, curve="video", ramp=False, dense_below=0.0, first_frame=False
            ),
            # Wan's without the dense first steps, to compare masks rather than dense schedules
            "no-warmup": replace(_WAN, ramp=False),
            # and one share at all steps, which the knob turns as a whole
            "one-drop": replace(_WAN, ramp=False, early_drop=None),
        }
    )
    knob: ClassVar[Knob | None] = Knob(field="drop", low=0.0, high=1.0)
    without_dense: ClassVar[Mapping[str, Any]] = MappingProxyType({"ramp": False})

    def __init__(self, config: JengaConfig) -> None:
        super().__init__(config)
        self._layouts: dict[tuple[Geometry, torch.device], _Layout] = {}

    def plan(
        self,
        q: Float[Tensor, "heads tokens head_dim"],
        k: Float[Tensor, "heads tokens head_dim"],
        v: Float[Tensor, "heads tokens head_dim"],
        site: Site,
    ) -> Plan:
        """Masks of this call's queries and keys, or dense where the step drops too little.

        Blocks that hold text are kept, in both directions, and take no part in the choice.
        """
        geometry, (block_q, block_k) = site.geometry, self.config.block
        drop = self.config.drop_at(site.step, site.steps)
        if drop <= self.config.dense_below:
            return Plan.dense(geometry)
        key = (geometry, q.device)
        if key not in self._layouts:
            self._layouts[key] = _layout(geometry, self.config, q.device)
        layout = self._layouts[key]
        places = layout.order.queries[0].long()
        pooled_q, pooled_k = pooled(q[:, places], block_q), pooled(k[:, places], block_k)
        scores = pooled_q[:, layout.rows] @ pooled_k[:, layout.columns].transpose(-1, -2) / math.sqrt(q.shape[-1])
        keep = layout.always.expand(geometry.heads, -1, -1).clone()
        # the original takes the ceiling after int(), which is too late to round anything up
        least = int(scores.shape[-1] * (1 - drop))
        keep[:, layout.rows, layout.columns] |= top_p(scores.softmax(-1), self.config.mass, inclusive=True, least=least)
        mask = BlockMask.from_keep(keep, tokens=geometry.tokens, block_q=block_q, block_k=block_k)
        return Plan.masked(mask, geometry.heads, order=layout.order)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Layout:
    """What depends on the geometry alone: the order, the blocks kept whatever is chosen, and those without any text."""

    order: TokenOrder
    always: Bool[Tensor, "q_blocks k_blocks"]
    rows: slice
    columns: slice


def _layout(geometry: Geometry, config: JengaConfig, device: torch.device) -> _Layout:
    order = curve_order(geometry, config.curve)
    rows, columns = (video_blocks(geometry, size) for size in config.block)
    among_video = adjacent_blocks(geometry, order, config.block)
    if config.first_frame:
        in_q, in_k = (first_frame_blocks(geometry, order, size) for size in config.block)
        among_video |= in_q[:, None] & in_k
    always = torch.ones_like(among_video)
    always[rows, columns] = among_video[rows, columns]
    return _Layout(order=TokenOrder.of_all(order.to(device)), always=always.to(device), rows=rows, columns=columns)


def adjacent_blocks(
    geometry: Geometry, order: Int[Tensor, "1 tokens"], block: tuple[int, int]
) -> Bool[Tensor, "q_blocks k_blocks"]:
    """Blocks with a query and a key at the same place of the video or at most one step apart on each axis.

    Args:
        geometry: the token grid; text is next to nothing.
        order: which token stands at each place of the sequence that the blocks divide.
        block: tokens of a query and of a key block.
    """
    place = order[0].argsort()[geometry.video_start : geometry.video_start + geometry.video_tokens]
    of_q, of_k = (place.view(geometry.grid) // size for size in block)
    near = torch.zeros([block_count(geometry.tokens, size) for size in block], dtype=torch.bool)
    # the whole grid against itself moved by each step: all pairs of tokens would not fit
    for step in product((-1, 0, 1), repeat=3):
        here = tuple(slice(max(0, -d), extent - max(0, d)) for d, extent in zip(step, geometry.grid, strict=True))
        there = tuple(slice(max(0, d), extent - max(0, -d)) for d, extent in zip(step, geometry.grid, strict=True))
        near[of_q[here], of_k[there]] = True
    return near


def first_frame_blocks(geometry: Geometry, order: Int[Tensor, "1 tokens"], block: int) -> Bool[Tensor, "blocks"]:
    """Blocks that hold tokens of the first frame and no others.

    The original counts blocks // frames from the first on, which are the same for Wan at 480p and 720p.

    Args:
        geometry: the token grid.
        order: which token stands at each place of the sequence that the blocks divide.
        block: tokens of a block.
    """
    token = order[0] - geometry.video_start
    inside = (token >= 0) & (token < geometry.frame_tokens)
    return torch.stack([part.all() for part in inside.split(block)])
