"""LoSA: key blocks that hold nearly all of a query block's exact attention mass at one early step, kept from then on.

Follows the paper, arXiv 2608.12032; its code is not public. There one kernel computes that step's dense attention and
the mass of the blocks. Here a plan is made before attention: blocks are weighed in a pass of their own, and the step is
dense as it is there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor

from calibatt.kernels.mask import BlockMask
from calibatt.kernels.plan import Plan
from calibatt.methods.base import Knob, Method
from calibatt.methods.energy import block_mass
from calibatt.methods.kept import Keeper
from calibatt.methods.selection import top_p
from calibatt.methods.site import Site

# t0 = 3 (Methodology), of the 50 steps of figure 2
_BEFORE = 3 / 50


@dataclass(frozen=True, slots=True, kw_only=True)
class LosaConfig:
    """Settings of the look and of the choice.

    Args:
        mass: least share of a query block's attention that its kept blocks hold.
        dense_steps: share of the steps that are dense before the one that is looked at, rounded to whole steps.
        dense_look: whether the step that is looked at is dense too; without, its mask serves from that step on.
        block: tokens of a query and of a key block.

    Raises:
        ValueError: a share is outside 0 to 1.
    """

    mass: float
    dense_steps: float
    dense_look: bool = True
    # Experiments, Implementation
    block: tuple[int, int] = (128, 32)

    def __post_init__(self) -> None:
        if not (0 <= self.mass <= 1 and 0 <= self.dense_steps <= 1):
            raise ValueError(f"losa's mass and dense steps are shares, 0 to 1: got {self}")


class Losa(Method):
    """Weighs every block exactly at one step, and keeps for the rest of the video the fewest that hold the mass.

    The choice is that of each layer, branch, head and query block; nothing is kept besides, text included.
    """

    name: ClassVar[str] = "losa"
    label: ClassVar[str] = "LoSA"
    colour: ClassVar[str] = "#009E73"
    marker: ClassVar[str] = "D"
    headwise: ClassVar[bool] = True
    presets: ClassVar[Mapping[str, LosaConfig]] = MappingProxyType(
        {
            # θ of Methodology
            "default": LosaConfig(mass=0.99, dense_steps=_BEFORE),
            # the other two of table 3
            "careful": LosaConfig(mass=0.999, dense_steps=_BEFORE),
            "fast": LosaConfig(mass=0.95, dense_steps=_BEFORE),
            # looks at the first step, which alone is dense, to compare masks rather than dense schedules
            "no-warmup": LosaConfig(mass=0.99, dense_steps=0.0),
        }
    )
    # the step that is looked at counts, and the others have its mask
    knob: ClassVar[Knob | None] = Knob(field="mass", low=0.0, high=1.0, over_videos=True)
    without_dense: ClassVar[Mapping[str, Any]] = MappingProxyType({"dense_steps": 0.0, "dense_look": False})

    def __init__(self, config: LosaConfig) -> None:
        super().__init__(config)
        self._frozen: Keeper[Plan] = Keeper()

    def plan(
        self,
        q: Float[Tensor, "heads tokens head_dim"],
        k: Float[Tensor, "heads tokens head_dim"],
        v: Float[Tensor, "heads tokens head_dim"],
        site: Site,
    ) -> Plan:
        """Dense up to the call that is looked at, then that call's mask; a second call at its step has it too.

        Where the step to look at was not asked for, as when a schedule is entered midway, the first later one is.
        """
        if site.in_warmup(self.config.dense_steps):
            return Plan.dense(site.geometry)
        last = self._frozen.last(site, q.device)
        plan = self._look(q, k) if last is None else last.made
        # at every call, so that a step before the last one is seen to be another video's
        self._frozen.keep(plan, site, q.device)
        return Plan.dense(site.geometry) if last is None and self.config.dense_look else plan

    def reset(self) -> None:
        """Forget all masks."""
        self._frozen.clear()

    def _look(self, q: Float[Tensor, "heads tokens head_dim"], k: Float[Tensor, "heads tokens head_dim"]) -> Plan:
        """The fewest key blocks that hold the mass, for each head and query block."""
        mass, _ = block_mass(q, k, block=self.config.block)
        keep = top_p(mass, self.config.mass)
        block_q, block_k = self.config.block
        return Plan.masked(BlockMask.from_keep(keep, tokens=q.shape[1], block_q=block_q, block_k=block_k), len(q))
