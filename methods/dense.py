"""Dense attention, as the method that every other one is compared with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from calibatt.kernels.plan import Plan
from calibatt.methods.base import Method
from calibatt.methods.site import Site


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseConfig:
    """There is nothing to set."""


class Dense(Method):
    """Computes everything."""

    name: ClassVar[str] = "dense"
    label: ClassVar[str] = "Dense"
    colour: ClassVar[str] = "#6B6B6B"
    marker: ClassVar[str] = "o"
    offline = True
    presets: ClassVar[Mapping[str, DenseConfig]] = MappingProxyType({"default": DenseConfig()})

    def plan(
        self,
        q: Float[Tensor, "heads tokens head_dim"],
        k: Float[Tensor, "heads tokens head_dim"],
        v: Float[Tensor, "heads tokens head_dim"],
        site: Site,
    ) -> Plan:
        """All blocks of all heads."""
        return Plan.dense(site.geometry)
