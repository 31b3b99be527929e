"""SageAttention: nothing is left out, but queries and keys are multiplied in INT8.

Follows version 1, arXiv 2410.02367 and github.com/thu-ml/SageAttention (sageattention/triton), with scales per block:
the dense rival of every method that leaves something out. What differs:

- Products of weights and values are added up in fp32, in the values' own type; there in fp16, which consumer GPUs do
  twice as fast. Versions 2 and 3 (INT4, FP8, FP4) are other methods.
- Quantisation and smoothing are part of the kernel's call, and of its time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from calibatt.kernels.plan import Plan
from calibatt.methods.base import Method
from calibatt.methods.site import Site


@dataclass(frozen=True, slots=True, kw_only=True)
class SageConfig:
    """Settings of the quantisation.

    Args:
        scales: how many queries, and how many keys, side by side, have one scale.
    """

    # BLKQ and BLKK of sageattention/triton/quant_per_block.py
    scales: tuple[int, int] = (128, 64)


class Sage(Method):
    """Computes everything, scores in INT8."""

    name: ClassVar[str] = "sage"
    label: ClassVar[str] = "SageAttention"
    colour: ClassVar[str] = "#CC79A7"
    marker: ClassVar[str] = "^"
    offline = True
    presets: ClassVar[Mapping[str, SageConfig]] = MappingProxyType({"default": SageConfig()})

    def plan(
        self,
        q: Float[Tensor, "heads tokens head_dim"],
        k: Float[Tensor, "heads tokens head_dim"],
        v: Float[Tensor, "heads tokens head_dim"],
        site: Site,
    ) -> Plan:
        """All blocks of all heads, of queries and keys in INT8."""
        return replace(Plan.dense(site.geometry), int8=self.config.scales)
