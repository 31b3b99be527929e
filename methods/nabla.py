"""NABLA: blocks of patches, chosen online by their share of pooled attention.

Follows github.com/gen-ai-team/Wan2.1-NABLA (wan/modules/attention.py), where a block is one patch and the grid is
cropped to whole patches. Here blocks are consecutive tokens of the sequence in patch order, so that any grid and any
block will do. There, pooled attention and its sums are in bf16, here in fp32 and fp64; and of equal blocks the last are
kept there, here the first.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int32
from torch import Tensor

from calibatt.kernels.geometry import Geometry
from calibatt.kernels.mask import BlockMask, block_count
from calibatt.kernels.plan import Plan, TokenOrder
from calibatt.methods.base import Knob, Method
from calibatt.methods.blocks import pooled
from calibatt.methods.patches import patch_of_tokens, patch_order
from calibatt.methods.selection import top_p
from calibatt.methods.site import Site


@dataclass(frozen=True, slots=True, kw_only=True)
class NablaConfig:
    """Settings of the choice.

    Args:
        mass: share of a row's pooled attention that its chosen blocks hold more than; 1 chooses all.
        window: patches (frames, rows, columns) around each patch that are kept whatever their attention: half the
            window, rounded down, to either side. None for no window.
        patch: rows and columns of a patch.
        block: tokens of a query and of a key block.

    Raises:
        ValueError: the mass is outside 0 to 1, or the window has an extent below 1.
    """

    mass: float
    window: tuple[int, int, int] | None = None
    # local_patching(…, 8), and blocks of as many tokens
    patch: tuple[int, int] = (8, 8)
    block: tuple[int, int] = (64, 64)

    def __post_init__(self) -> None:
        if not 0 <= self.mass <= 1:
            raise ValueError(f"mass is a share of the row's attention, 0 to 1: got {self.mass}")
        if self.window is not None and min(self.window) < 1:
            raise ValueError(f"a window holds at least its own patch: got {self.window}")


class Nabla(Method):
    """Pools queries and keys by block at every call, and keeps the heaviest blocks of each row up to a share."""

    name: ClassVar[str] = "nabla"
    label: ClassVar[str] = "NABLA"
    colour: ClassVar[str] = "#56B4E9"
    marker: ClassVar[str] = "P"
    headwise: ClassVar[bool] = True
    presets: ClassVar[Mapping[str, NablaConfig]] = MappingProxyType(
        {
            # generate.py --sparse_algo nabla-0.7: on weights that were not tuned for it, at every step, no window
            "default": NablaConfig(mass=0.7),
            # P of FastVideo's attention/backends/nabla.py; its window is the checkpoint's, and tuned with it
            "fastvideo": NablaConfig(mass=0.9),
        }
    )
    knob: ClassVar[Knob | None] = Knob(field="mass", low=0.0, high=1.0)

    def __init__(self, config: NablaConfig) -> None:
        super().__init__(config)
        self._orders: dict[tuple[Geometry, torch.device], Int32[Tensor, "1 tokens"]] = {}
        self._windows: dict[tuple[Geometry, torch.device], Bool[Tensor, "q_blocks k_blocks"]] = {}

    def plan(
        self,
        q: Float[Tensor, "heads tokens head_dim"],
        k: Float[Tensor, "heads tokens head_dim"],
        v: Float[Tensor, "heads tokens head_dim"],
        site: Site,
    ) -> Plan:
        """Masks of this call's queries and keys; text, which the original's sequence has none of, is not special."""
        block_q, block_k = self.config.block
        key = (site.geometry, q.device)
        if key not in self._orders:
            self._orders[key] = patch_order(site.geometry, *self.config.patch).to(q.device)
        order = self._orders[key]
        places = order[0].long()
        scores = pooled(q[:, places], block_q) @ pooled(k[:, places], block_k).transpose(-1, -2)
        keep = top_p((scores / math.sqrt(q.shape[-1])).softmax(-1), self.config.mass, inclusive=True)
        if self.config.window is not None:
            if key not in self._windows:
                self._windows[key] = window_blocks(
                    site.geometry, window=self.config.window, patch=self.config.patch, block=self.config.block
                ).to(q.device)
            keep |= self._windows[key]
        mask = BlockMask.from_keep(keep, tokens=site.geometry.tokens, block_q=block_q, block_k=block_k)
        return Plan.masked(mask, site.geometry.heads, order=TokenOrder.of_all(order))


def window_blocks(
    geometry: Geometry, *, window: tuple[int, int, int], patch: tuple[int, int], block: tuple[int, int]
) -> Bool[Tensor, "q_blocks k_blocks"]:
    """Blocks with a query and a key whose patches are in each other's window; text is in none.

    Args:
        geometry: the token grid.
        window: extents in patches; two are near if on no axis they are further apart than half of it, rounded down.
        patch: rows and columns of a patch.
        block: tokens of a query and of a key block, of the sequence in patch order.
    """
    frames, rows, columns = geometry.grid
    extents = (frames, block_count(rows, patch[0]), block_count(columns, patch[1]))
    places = torch.cartesian_prod(*(torch.arange(extent) for extent in extents))
    near = ((places[:, None] - places).abs() <= torch.tensor(window) // 2).all(-1)
    patches = patch_of_tokens(geometry, *patch).sort().values
    tokens = torch.arange(geometry.video_tokens) + geometry.video_start
    # which block holds a token of which patch
    in_q, in_k = (torch.zeros(block_count(geometry.tokens, size), len(places)) for size in block)
    in_q[tokens // block[0], patches] = 1
    in_k[tokens // block[1], patches] = 1
    return in_q @ near.float() @ in_k.T > 0
