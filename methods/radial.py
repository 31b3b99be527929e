"""Radial Attention: a static mask whose band narrows with the distance between frames.

Follows github.com/mit-han-lab/radial-attention (radial_attn/attn_mask.py) as it treats Wan, with the block size as a
setting. What differs: a shorter last block is judged by its own rows; and where frames are not whole blocks, the
repository cuts off what a frame has beyond ⌈frame / block⌉ blocks, which can leave a block of queries without any key:
here such a block keeps what was cut off.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from calibatt.kernels.base import Unsupported
from calibatt.kernels.geometry import Geometry
from calibatt.kernels.mask import BlockMask, block_count, block_sizes
from calibatt.kernels.plan import Plan
from calibatt.methods.base import Knob, Method
from calibatt.methods.blocks import text_blocks
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
    offline = True
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
        self._plans: dict[tuple[Geometry, torch.device], Plan] = {}

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
        if key not in self._plans:
            self._plans[key] = Plan.masked(radial_mask(site.geometry, self.config, q.device), site.geometry.heads)
        return self._plans[key]


def radial_mask(geometry: Geometry, config: RadialConfig, device: torch.device | str = "cpu") -> BlockMask:
    """The mask, shared by all heads.

    Between tokens r and c of frames i and j, d = |i − j| apart, with N tokens a frame, positions counted within the
    frames: all pairs where d = 0; those with |r − c| ≤ ⌊N / 2⌋ where d = 1; else those with
    |r − c| ≤ max(w · decay, block), where w = 2^bits(N) / 2^bits(d), and bits counts binary digits. Where w is below a
    block, only every ⌊block / w⌋-th distance is kept. With a sink, all pairs of the first frame's keys.

    A block is kept where any pair of frames by itself sets enough of it; blocks that hold text are, in both directions.

    Args:
        geometry: layout of the tokens.
        config: decay, sink and block.
        device: of the mask.
    """
    block_q, block_k = config.block
    text = text_blocks(geometry, config.block, device)
    keep, cut_off = torch.zeros_like(text), torch.zeros_like(text)
    frames, frame_tokens = geometry.grid[0], geometry.frame_tokens
    places = torch.arange(frame_tokens, device=device)
    reach = [_reach(distance, frame_tokens, config) for distance in range(frames)]
    parts_q, parts_k = ([_Part.of(geometry, frame, size, device) for frame in range(frames)] for size in config.block)
    for i, rows in enumerate(parts_q):
        sizes = block_sizes(geometry.tokens, block_q, device)[rows.blocks, None]
        for j, columns in enumerate(parts_k):
            within = frame_tokens if config.sink and j == 0 else reach[abs(i - j)]
            if within < 0:
                continue
            # of each block of rows, how many rows a column sees: those of an interval around its place
            last = torch.minimum(rows.last[:, None], (places + within).floor())
            first = torch.maximum(rows.first[:, None], (places - within).ceil())
            seen = (last - first + 1).clamp(min=0)
            filled, full = (columns.sums(part.float()) for part in (seen > 0, seen > _ROWS * sizes))
            chosen = full > _COLUMNS * filled
            cut_off[rows.blocks, columns.blocks] |= chosen
            # as the repository does: of each frame no more blocks than its length fills
            chosen[block_count(frame_tokens, block_q) :] = False
            chosen[:, block_count(frame_tokens, block_k) :] = False
            keep[rows.blocks, columns.blocks] |= chosen
    keep |= cut_off & ~keep.any(-1, keepdim=True)
    return BlockMask.from_keep((keep | text)[None], tokens=geometry.tokens, block_q=block_q, block_k=block_k)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Part:
    """The blocks that hold tokens of a frame, and the frame's first and last place in each."""

    blocks: slice
    first: Int[Tensor, "blocks"]
    last: Int[Tensor, "blocks"]

    @classmethod
    def of(cls, geometry: Geometry, frame: int, block: int, device: torch.device | str) -> _Part:
        start = geometry.video_start + frame * geometry.frame_tokens
        end = start + geometry.frame_tokens
        blocks = slice(start // block, block_count(end, block))
        first = torch.arange(blocks.start, blocks.stop, device=device) * block - start
        return cls(
            blocks=blocks, first=first.clamp(min=0), last=(first + block - 1).clamp(max=geometry.frame_tokens - 1)
        )

    def sums(self, x: Float[Tensor, "rows frame_tokens"]) -> Float[Tensor, "rows blocks"]:
        """Sums over the places of each block."""
        sums = torch.nn.functional.pad(x.cumsum(-1), (1, 0))
        return sums[:, self.last + 1] - sums[:, self.first]


def _reach(distance: int, frame_tokens: int, config: RadialConfig) -> float:
    """How far apart in their frames two tokens may stand, for frames at a distance; negative: no pair is kept."""
    block = config.block[1]
    width = 2.0 ** (frame_tokens.bit_length() - distance.bit_length())
    if width < block and distance % int(block / width):
        return -1.0
    if distance <= 1:
        return float(frame_tokens // (1 + distance))
    return max(width * config.decay, float(block))
