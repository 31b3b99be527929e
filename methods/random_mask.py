"""The random control: as many blocks as CalibAtt keeps, anywhere. Every serious method must beat it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from calibatt.kernels.mask import BlockMask, block_count
from calibatt.kernels.plan import Plan
from calibatt.methods.base import Knob, Method
from calibatt.methods.calibatt.method import CalibAtt, CalibAttConfig
from calibatt.methods.learning import Learnt
from calibatt.methods.site import Site


@dataclass(frozen=True, slots=True, kw_only=True)
class RandomMaskConfig:
    """Settings of the control.

    Args:
        seed: of the draws, of which each site has its own.
        density: share of the blocks to keep in every row; None for as many as CalibAtt's plan.
        block: tokens of a query and of a key block.
    """

    seed: int = 0
    density: float | None = None
    block: tuple[int, int] = (128, 128)


class RandomMask(Method):
    """Keeps as many blocks of each row as CalibAtt's plan does, chosen at random.

    Raises:
        ValueError: there is neither a density nor a calibration, or both.
    """

    name: ClassVar[str] = "random"
    label: ClassVar[str] = "Random mask"
    colour: ClassVar[str] = "#6B6B6B"
    marker: ClassVar[str] = "X"
    offline = True
    presets: ClassVar[Mapping[str, RandomMaskConfig]] = MappingProxyType(
        # one draw says little of what the next would have: from several, how far they differ
        {"default": RandomMaskConfig()} | {f"draw-{i + 1}": RandomMaskConfig(seed=i) for i in range(1, 5)}
    )
    knob: ClassVar[Knob | None] = Knob(field="density", low=0.0, high=1.0)

    def __init__(self, config: RandomMaskConfig, learnt: Learnt | None = None) -> None:
        if (config.density is None) == (learnt is None):
            raise ValueError("random masks have either a density of their own or a calibration of CalibAtt")
        super().__init__(config, learnt)
        self._model = None if learnt is None else CalibAtt(CalibAtt.settled(CalibAttConfig(), learnt), learnt)

    @classmethod
    def learns_from(cls, config: RandomMaskConfig) -> str | None:
        """CalibAtt, but for a density of its own."""
        return CalibAtt.name if config.density is None else None

    def plan(
        self,
        q: Float[Tensor, "heads tokens head_dim"],
        k: Float[Tensor, "heads tokens head_dim"],
        v: Float[Tensor, "heads tokens head_dim"],
        site: Site,
    ) -> Plan:
        """A random mask at the density of CalibAtt's plan, head by head, or at its own; the same for both branches.

        Raises:
            CalibrationMismatch: the calibration is for another geometry, number of steps or of layers.
        """
        heads, tokens = site.geometry.heads, site.geometry.tokens
        block_q, block_k = self.config.block
        rows, columns = block_count(tokens, block_q), block_count(tokens, block_k)
        model = None if self._model is None else self._model.plan(q, k, v, site)
        # a head that reuses rows, or is dense, has one density for all rows
        if model is not None:
            wanted = model.density()
        else:
            assert self.config.density is not None
            wanted = torch.full((heads,), self.config.density)
        counts = (wanted[:, None] * columns).round().long().clamp(min=1).expand(heads, rows).clone()
        if model is not None and model.mask is not None and model.mask.block == self.config.block:
            masked = model.heads_of("masked")
            counts[masked] = model.mask.keep().sum(-1).cpu().expand(heads, rows)[masked]
        generator = site.generator(self.config.seed, q.device)
        order = torch.rand(heads, rows, columns, generator=generator, device=q.device).argsort(-1)
        chosen = torch.arange(columns, device=q.device) < counts.to(q.device)[..., None]
        keep = torch.zeros_like(chosen).scatter_(-1, order, chosen)
        mask = BlockMask.from_keep(keep, tokens=tokens, block_q=block_q, block_k=block_k)
        return Plan.masked(mask, heads)
