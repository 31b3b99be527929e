"""What some methods learn from dense videos before they make any plan: tables over steps, layers and heads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from calibatt.kernels.geometry import Geometry
from calibatt.methods.base import Site


@runtime_checkable
class Learner(Protocol):
    """Watches the self-attention of dense videos and sums up at once, so that memory does not grow with the videos."""

    def watch(
        self,
        q: Float[Tensor, "heads tokens head_dim"],
        k: Float[Tensor, "heads tokens head_dim"],
        v: Float[Tensor, "heads tokens head_dim"],
        site: Site,
    ) -> None:
        """One call of the conditional branch; the calls of a video come in order, videos one after the other."""
        ...

    def tables(self) -> Mapping[str, Tensor]:
        """What was learnt so far, on the CPU; the first two dimensions of every table are steps and layers."""
        ...


@runtime_checkable
class Learning(Protocol):
    """A method with presets that learn. Those are built as `cls(config, learnt)`, all others as `cls(config)`."""

    @classmethod
    def learner(cls, config: Any) -> Learner | None:
        """A new learner for these settings; None where they need none."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Learnt:
    """What a learner learnt, and from what.

    Args:
        method, preset: names in the catalogue; presets differ in what they watch.
        geometry, steps, layers: of the videos watched.
        tables: by name; the first two dimensions of each are steps and layers.
        model, weights: name in the catalogue, and digest of the weights.
        prompts: of the videos, in order; prompt i started from noise of seed + i.
        seed: of the first prompt's noise.
        guidance: of the videos.
        cost_ratio: time of the videos with the learner watching over that without it, same kernel; None where that was
            not measured.

    Raises:
        ValueError: a table has other dimensions.
    """

    method: str
    preset: str
    geometry: Geometry
    steps: int
    layers: int
    tables: Mapping[str, Tensor]
    model: str = ""
    weights: str = ""
    prompts: tuple[str, ...] = ()
    seed: int = 0
    guidance: float = 0.0
    cost_ratio: float | None = None

    def __post_init__(self) -> None:
        for name, table in self.tables.items():
            if tuple(table.shape[:2]) != (self.steps, self.layers):
                raise ValueError(
                    f"{self.method}'s table {name} is {list(table.shape)}, for {self.steps} steps and "
                    f"{self.layers} layers"
                )
        object.__setattr__(self, "tables", MappingProxyType(dict(self.tables)))

    def check(self, site: Site) -> None:
        """Refuse a site of other videos than were watched.

        Raises:
            ValueError: geometry, steps or layers differ.
        """
        if (site.geometry, site.steps, site.layers) != (self.geometry, self.steps, self.layers):
            raise ValueError(
                f"{self.method} learnt for {self.geometry}, {self.steps} steps, {self.layers} layers: "
                f"not for {site.geometry}, {site.steps} steps, {site.layers} layers"
            )

    def check_model(self, model: str, weights: str) -> None:
        """Refuse another model, or other weights of the same.

        Raises:
            ValueError: it is another.
        """
        if (model, weights) != (self.model, self.weights):
            raise ValueError(
                f"{self.method} learnt from {self.model} with weights {self.weights}, "
                f"not from {model} with weights {weights}: run `calibatt calibrate` for that"
            )

    def at(self, name: str, site: Site) -> Tensor:
        """A table's part for one site.

        Raises:
            ValueError: the site is of other videos than were watched.
        """
        self.check(site)
        return self.tables[name][site.step, site.layer]

    def to(self, device: torch.device | str) -> Learnt:
        """The same tables on another device."""
        return replace(self, tables={name: table.to(device) for name, table in self.tables.items()})

    def nbytes(self) -> int:
        """Bytes of all tables."""
        return sum(table.nbytes for table in self.tables.values())
