"""DFSAttn: blocks along a 3-D Hilbert curve, scored by attention between parts of them, kept from search to search.

Follows arXiv 2605.23445 and github.com/jessica-hujie/DFSAttn (dfsattn/attention_wan.py, wan21_t2v_720p_dfs.sh). What
differs:

- There a guided model's second pass takes the mask that the first found; here each branch has its own.
- The last part is pooled over its own tokens, there with zeros that fill it up, and those zeros have a share of the
  softmax. Pooled attention is in fp32, there in the model's precision.
- Settings are shares of the schedule; there they are numbers of steps, of 50.
- Text, which Wan's sequence has none of, is kept in both directions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor

from calibatt.kernels.geometry import Geometry
from calibatt.kernels.plan import Plan
from calibatt.methods.base import Knob, Method
from calibatt.methods.blocks import mask_beside_text, pooled, video_blocks
from calibatt.methods.curves import along_curve
from calibatt.methods.energy import block_mass
from calibatt.methods.kept import Keeper, check_searches, outdated, searches_so_far
from calibatt.methods.selection import top_k
from calibatt.methods.site import Site


@dataclass(frozen=True, slots=True, kw_only=True)
class DfsConfig:
    """Settings of the searches and of the choice.

    Args:
        search_steps: when masks are searched, ascending shares of the schedule; before the first all is dense.
        densities: share of the key blocks that each query block keeps from each search on.
        dense_layers: number of first layers that stay dense.
        scale: factor of all densities, none of which becomes more than 1.
        part: tokens of the parts of a block between which attention is estimated.
        block: tokens of a query and of a key block, in whole parts.

    Raises:
        ValueError: the search steps do not ascend within 0 to 1, there is not one density from 0 to 1 for each, the
            scale is negative, or blocks are not in whole parts.
    """

    search_steps: tuple[float, ...]
    # --sparsity 0.3, which the code takes for a density, less --sparsity_dcrt 0.1 a search, and never 0
    densities: tuple[float, ...] = (0.3, 0.2, 0.1)
    # skip_layers of wan21_t2v_inference.py
    dense_layers: int = 1
    scale: float = 1.0
    # --tile_size and --block_size
    part: int = 16
    block: tuple[int, int] = (128, 128)

    def __post_init__(self) -> None:
        check_searches(self.search_steps)
        if len(self.densities) != len(self.search_steps) or not all(0 <= share <= 1 for share in self.densities):
            raise ValueError(f"dfs has one density from 0 to 1 for each of {self.search_steps}: got {self.densities}")
        if not self.scale >= 0:
            raise ValueError(f"dfs's scale of the densities is not negative: got {self.scale}")
        if self.part < 1 or any(size % self.part for size in self.block):
            raise ValueError(f"dfs's blocks are of whole parts of {self.part} tokens: got {self.block}, set `part`")


# --skip_steps 12 and --cache_interval 12 of --num_inference_steps 50
_SEARCHES = (12 / 50, 24 / 50, 36 / 50)
_FROM_THE_FIRST = (0.0, *_SEARCHES[1:])


class Dfs(Method):
    """Searches masks a few times in a video, by attention between parts of blocks, the later the sparser."""

    name: ClassVar[str] = "dfs"
    label: ClassVar[str] = "DFSAttn"
    colour: ClassVar[str] = "#56B4E9"
    marker: ClassVar[str] = "*"
    headwise: ClassVar[bool] = True
    presets: ClassVar[Mapping[str, DfsConfig]] = MappingProxyType(
        {
            # wan21_t2v_720p_dfs.sh; hyvideo_t2v_720p_dfs.sh has the same
            "default": DfsConfig(search_steps=_SEARCHES),
            # the same from the first step on and in every layer, to compare masks rather than dense schedules
            "no-warmup": DfsConfig(search_steps=_FROM_THE_FIRST, dense_layers=0),
        }
    )
    # at 10, the last density too is 1
    knob: ClassVar[Knob | None] = Knob(field="scale", low=0.0, high=10.0)
    without_dense: ClassVar[Mapping[str, Any]] = MappingProxyType({"search_steps": _FROM_THE_FIRST, "dense_layers": 0})

    def __init__(self, config: DfsConfig) -> None:
        super().__init__(config)
        self._masks: Keeper[Plan] = Keeper()

    def plan(
        self,
        q: Float[Tensor, "heads tokens head_dim"],
        k: Float[Tensor, "heads tokens head_dim"],
        v: Float[Tensor, "heads tokens head_dim"],
        site: Site,
    ) -> Plan:
        """Dense before the first search, then the last mask; of this call's queries and keys where a search is due.

        Blocks that hold text are kept, in both directions.
        """
        due = searches_so_far(self.config.search_steps, site)
        if not due or site.layer < self.config.dense_layers:
            return Plan.dense(site.geometry)
        last = self._masks.last(site, q.device)
        if last is not None and not outdated(last, due[-1], site):
            return last.made
        plan = self._search(q, k, site.geometry, self.config.densities[len(due) - 1])
        self._masks.keep(plan, site, q.device)
        return plan

    def reset(self) -> None:
        """Forget all masks."""
        self._masks.clear()

    def _search(
        self,
        q: Float[Tensor, "heads tokens head_dim"],
        k: Float[Tensor, "heads tokens head_dim"],
        geometry: Geometry,
        density: float,
    ) -> Plan:
        """The blocks of each row that hold the most attention between parts, so many of those without text."""
        order = along_curve(geometry, "video", q.device)
        places, part = order.queries[0].long(), self.config.part
        block_q, block_k = (size // part for size in self.config.block)
        # text has its share of the softmax
        mass, _ = block_mass(pooled(q[:, places], part), pooled(k[:, places], part), block=(block_q, block_k))
        rows, columns = (video_blocks(geometry, size) for size in self.config.block)
        among = mass[:, rows, columns]
        count = int(min(1.0, self.config.scale * density) * among.shape[-1])
        mask = mask_beside_text(top_k(among, count), geometry, self.config.block)
        return Plan.masked(mask, geometry.heads, order=order)
