"""Radial Attention: a static mask whose band narrows with the distance between frames.

Follows github.com/mit-han-lab/radial-attention (radial_attn/attn_mask.py), with the block size as a setting.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from calibatt.kernels.base import Unsupported
from calibatt.kernels.geometry import Geometry
from calibatt.kernels.plan import BlockMask, Plan, block_count
from calibatt.methods.base import Knob, Site

# a block is kept where more than this share of its non-empty columns …
_COLUMNS = 0.6
# … have more than this share of their rows set: both from the repository's token-to-block rule
_ROWS = 1 / 3


@dataclass(frozen=True, slots=True, kw_only=True)
class RadialConfig:
    """Settings of the mask.

    Args:
        decay: factor on the width of the band between frames two or more apart.
        dense_steps: share of the first steps that stay dense.
        dense_layers: number of first layers that stay dense.
        sink: whether every query sees all of the first frame.
        block: tokens of a query and of a key block.
    """

    decay: float
    dense_steps: float
    dense_layers: int
    sink: bool
    block: tuple[int, int] = (128, 128)


class Radial:
    """One static mask for all heads, layers and steps: attention falls with the distance in time."""

    name: ClassVar[str] = "radial"
    presets: ClassVar[Mapping[str, RadialConfig]] = MappingProxyType(
        {
            # wan_t2v_inference.sh: 12 of 50 steps and one layer dense, decay 0.2; the sink is for Wan only
            "default": RadialConfig(decay=0.2, dense_steps=12 / 50, dense_layers=1, sink=True),
            # the same mask at every step and layer, to compare masks rather than dense schedules
            "no-warmup": RadialConfig(decay=0.2, dense_steps=0.0, dense_layers=0, sink=True),
        }
    )
    offline: ClassVar[bool] = False
    # from the narrowest band to one as wide as a frame at any distance (2¹⁰ frames)
    knob: ClassVar[Knob | None] = Knob(field="decay", low=0.0, high=16.0)

    def __init__(self, config: RadialConfig) -> None:
        self.config = config
        self._masks: dict[tuple[Geometry, torch.device], BlockMask] = {}

    def refusal(self, geometry: Geometry) -> Unsupported | None:
        """Applies to every geometry; on a single frame it is dense."""
        return None

    def plan(
        self, q: Float[Tensor, "heads tokens head_dim"], k: Float[Tensor, "heads tokens head_dim"], site: Site
    ) -> Plan:
        """The mask of the geometry, or dense in the first steps and layers."""
        if site.layer < self.config.dense_layers or site.step < math.floor(self.config.dense_steps * site.steps + 1e-9):
            return Plan.dense(site.geometry)
        key = (site.geometry, q.device)
        if key not in self._masks:
            self._masks[key] = radial_mask(site.geometry, self.config).to(q.device)
        return Plan.masked(self._masks[key], site.geometry.heads)

    def reset(self) -> None:
        """Masks depend on the geometry alone, and stay."""


def radial_mask(geometry: Geometry, config: RadialConfig) -> BlockMask:
    """The mask, shared by all heads.

    Between tokens r and c of frames i and j, d = |i − j| apart, with N tokens a frame: all pairs where d ≤ 1; else
    those with |r − c| ≤ max(w · decay, block), where w = 2^bits(N) / 2^bits(d), and bits counts binary digits. Where w
    is below a block, only every ⌊block / w⌋-th distance is kept. Text tokens see, and are seen by, everything.
    """
    tokens, per_frame = geometry.tokens, geometry.frame_tokens
    block_q, block_k = config.block
    columns = torch.arange(tokens)
    keep = torch.empty(block_count(tokens, block_q), block_count(tokens, block_k), dtype=torch.bool)
    for row in range(len(keep)):
        rows = columns[row * block_q : (row + 1) * block_q]
        keep[row] = _block_row(_token_mask(geometry, config, rows, columns, per_frame), block_k)
    return BlockMask.from_keep(keep[None], tokens=tokens, block_q=block_q, block_k=block_k)


def _token_mask(
    geometry: Geometry, config: RadialConfig, rows: Tensor, columns: Tensor, per_frame: int
) -> Bool[Tensor, "rows tokens"]:
    unit = config.block[1]
    video = columns - geometry.video_start
    is_text = (video < 0) | (video >= geometry.video_tokens)
    frame, place = video.div(per_frame, rounding_mode="floor"), video.remainder(per_frame)
    distance = (frame[rows, None] - frame).abs()
    # bit_length of a distance: frexp's exponent is exact for integers
    width = 2.0 ** (per_frame.bit_length() - torch.frexp(distance.double()).exponent)
    band = torch.where(distance <= 1, float(per_frame), (width * config.decay).clamp(min=unit))
    every = (unit / width).floor().clamp(min=1).long()
    kept = ((place[rows, None] - place).abs() <= band) & ((width >= unit) | (distance % every == 0))
    if config.sink:
        kept |= frame == 0
    return kept | is_text | is_text[rows, None]


def _block_row(mask: Bool[Tensor, "rows tokens"], block: int) -> Bool[Tensor, "k_blocks"]:
    """Which blocks of one block row are kept."""
    share = torch.nn.functional.pad(mask.double().mean(0), (0, -mask.shape[1] % block)).view(-1, block)
    filled, full = (share > 0).sum(-1), (share > _ROWS).sum(-1)
    return full > _COLUMNS * filled
