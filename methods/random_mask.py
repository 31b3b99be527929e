"""The random control: as many blocks as CalibAtt keeps, anywhere. Every serious method must beat it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from calibatt.kernels.base import Unsupported
from calibatt.kernels.geometry import Geometry
from calibatt.kernels.plan import BlockMask, Plan, block_count
from calibatt.methods.base import Knob, PlanSource, Site


@dataclass(frozen=True, slots=True, kw_only=True)
class RandomMaskConfig:
    """Settings of the control.

    Args:
        seed: of the draw; the site adds to it.
        block: tokens of a query and of a key block.
    """

    seed: int = 0
    block: tuple[int, int] = (128, 128)


class RandomMask:
    """Keeps as many blocks of each row as the source's plan does, chosen at random."""

    name: ClassVar[str] = "random"
    presets: ClassVar[Mapping[str, RandomMaskConfig]] = MappingProxyType({"default": RandomMaskConfig()})
    offline: ClassVar[bool] = True
    knob: ClassVar[Knob | None] = None

    def __init__(self, config: RandomMaskConfig, source: PlanSource) -> None:
        self.config = config
        self._source = source
        # a site's draw is always the same, so it may outlive a video
        self._drawn: dict[tuple[int, int], Plan] = {}

    def refusal(self, geometry: Geometry) -> Unsupported | None:
        """Applies wherever its source does."""
        return None

    def plan(
        self, q: Float[Tensor, "heads tokens head_dim"], k: Float[Tensor, "heads tokens head_dim"], site: Site
    ) -> Plan:
        """A random mask at the density of the source's plan, head by head, the same for both branches."""
        where = (site.step, site.layer)
        if where not in self._drawn:
            self._drawn[where] = self._draw(site, q.device)
        return self._drawn[where]

    def reset(self) -> None:
        """What was drawn stays: it depends on the site alone."""

    def _draw(self, site: Site, device: torch.device) -> Plan:
        model = self._source.plan(site)
        tokens, heads = model.tokens, len(model.kinds)
        block_q, block_k = self.config.block
        rows, columns = block_count(tokens, block_q), block_count(tokens, block_k)
        # a head that reuses rows, or is dense, has one density for all rows
        counts = (model.density()[:, None] * columns).round().long().clamp(min=1).expand(heads, rows).clone()
        if model.mask is not None and (model.mask.block_q, model.mask.block_k) == self.config.block:
            kept = model.mask.keep().sum(-1).cpu().expand(heads, rows)
            masked = model.heads_of("masked")
            counts[masked] = kept[masked]
        generator = torch.Generator().manual_seed(self.config.seed + site.step * site.layers + site.layer)
        rank = torch.rand(heads, rows, columns, generator=generator).argsort(-1).argsort(-1)
        mask = BlockMask.from_keep(rank < counts[..., None], tokens=tokens, block_q=block_q, block_k=block_k)
        return Plan.masked(mask.to(device), heads)
