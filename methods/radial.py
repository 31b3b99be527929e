"""Radial Attention: a static mask whose band narrows with the distance between frames.

Follows github.com/mit-han-lab/radial-attention (radial_attn/attn_mask.py) as it treats Wan, with the block size as a
setting. There the rule for blocks is applied to one pair of frames at a time, here to all tokens at once, which differs
only where frames are not whole blocks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from calibatt.kernels.base import Unsupported
from calibatt.kernels.geometry import Geometry
from calibatt.kernels.mask import BlockMask, block_count
from calibatt.kernels.plan import Plan
from calibatt.methods.base import Knob, Method
from calibatt.methods.site import Site

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


class Radial(Method):
    """One static mask for all heads, layers and steps: attention falls with the distance in time."""

    name: ClassVar[str] = "radial"
    label: ClassVar[str] = "Radial"
    colour: ClassVar[str] = "#D55E00"
    marker: ClassVar[str] = "^"
    presets: ClassVar[Mapping[str, RadialConfig]] = MappingProxyType(
        {
            # wan_t2v_inference.sh: 12 of 50 steps and one layer dense, decay 0.2; the sink is for Wan only
            "default": RadialConfig(decay=0.2, dense_steps=12 / 50, dense_layers=1, sink=True),
            # the same mask at every step and layer, to compare masks rather than dense schedules
            "no-warmup": RadialConfig(decay=0.2, dense_steps=0.0, dense_layers=0, sink=True),
        }
    )
    # from the narrowest band to one as wide as the frame up to 63 frames apart, past any model of the catalogue
    knob: ClassVar[Knob | None] = Knob(field="decay", low=0.0, high=64.0)
    without_dense: ClassVar[Mapping[str, Any]] = MappingProxyType({"dense_steps": 0.0, "dense_layers": 0})

    def __init__(self, config: RadialConfig) -> None:
        super().__init__(config)
        self._masks: dict[tuple[Geometry, torch.device], BlockMask] = {}

    def refusal(self, geometry: Geometry) -> Unsupported | None:
        """Applies where a frame fills a block: among smaller frames, the rules would leave queries without any key."""
        if geometry.frame_tokens < max(self.config.block):
            block_q, block_k = self.config.block
            return Unsupported(
                f"radial needs frames of at least a block: got {geometry.frame_tokens} tokens a frame "
                f"and blocks of {block_q}×{block_k}"
            )
        return None

    def plan(
        self,
        q: Float[Tensor, "heads tokens head_dim"],
        k: Float[Tensor, "heads tokens head_dim"],
        v: Float[Tensor, "heads tokens head_dim"],
        site: Site,
    ) -> Plan:
        """The mask of the geometry, or dense in the first steps and layers."""
        # rounding gives what the scripts of the few-step models set: 2 of 8 steps, 1 of 4
        if site.layer < self.config.dense_layers or site.in_warmup(self.config.dense_steps):
            return Plan.dense(site.geometry)
        key = (site.geometry, q.device)
        if key not in self._masks:
            self._masks[key] = radial_mask(site.geometry, self.config, q.device)
        return Plan.masked(self._masks[key], site.geometry.heads)


def radial_mask(geometry: Geometry, config: RadialConfig, device: torch.device | str = "cpu") -> BlockMask:
    """The mask, shared by all heads.

    Between tokens r and c of frames i and j, d = |i − j| apart, with N tokens a frame, positions counted within the
    frames: all pairs where d = 0; those with |r − c| ≤ ⌊N / 2⌋ where d = 1; else those with
    |r − c| ≤ max(w · decay, block), where w = 2^bits(N) / 2^bits(d), and bits counts binary digits. Where w is below a
    block, only every ⌊block / w⌋-th distance is kept. Blocks that hold text are kept, in both directions.
    """
    tokens, (block_q, block_k) = geometry.tokens, config.block
    video = torch.arange(tokens, device=device) - geometry.video_start
    is_text = (video < 0) | (video >= geometry.video_tokens)
    # text is clamped to a frame only so that it has one: its blocks are kept below
    frame = video.div(geometry.frame_tokens, rounding_mode="floor").clamp(0, geometry.grid[0] - 1)
    place = video.remainder(geometry.frame_tokens)
    reach = torch.tensor([_reach(d, geometry.frame_tokens, config) for d in range(geometry.grid[0])], device=device)
    keep = torch.empty(block_count(tokens, block_q), block_count(tokens, block_k), dtype=torch.bool, device=device)
    # one block row at a time: all pairs of a real video would not fit in memory
    for row, rows in enumerate(torch.arange(tokens, device=device).split(block_q)):
        pairs = (place[rows, None] - place).abs() <= reach[(frame[rows, None] - frame).abs()]
        if config.sink:
            pairs |= frame == 0
        keep[row] = _block_row(pairs, block_k)
    keep[_blocks(is_text, block_q).any(-1)] = True
    keep[:, _blocks(is_text, block_k).any(-1)] = True
    return BlockMask.from_keep(keep[None], tokens=tokens, block_q=block_q, block_k=block_k)


def _reach(distance: int, frame_tokens: int, config: RadialConfig) -> float:
    """How far apart in their frames two tokens may stand, for frames at a distance; negative: no pair is kept."""
    block = config.block[1]
    width = 2.0 ** (frame_tokens.bit_length() - distance.bit_length())
    if width < block and distance % int(block / width):
        return -1.0
    if distance <= 1:
        return float(frame_tokens // (1 + distance))
    return max(width * config.decay, float(block))


def _block_row(pairs: Bool[Tensor, "rows tokens"], block: int) -> Bool[Tensor, "k_blocks"]:
    """Which blocks of one block row are kept."""
    rows_set = _blocks(pairs.sum(0), block)
    filled, full = (rows_set > 0).sum(-1), (rows_set > _ROWS * len(pairs)).sum(-1)
    return full > _COLUMNS * filled


def _blocks(x: Shaped[Tensor, "tokens"], block: int) -> Shaped[Tensor, "blocks block"]:
    """Tokens by block, the last one filled up with zeros."""
    return torch.nn.functional.pad(x, (0, -len(x) % block)).view(-1, block)
