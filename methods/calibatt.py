"""CalibAtt: block masks and row reuse learnt offline for every step, layer and head (arXiv 2603.05503)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor

from calibatt.kernels.base import Unsupported
from calibatt.kernels.geometry import Geometry
from calibatt.kernels.plan import Plan
from calibatt.methods.base import Knob, PlanSource
from calibatt.methods.site import Site


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibAttConfig:
    """Settings at generation time; what was learnt, and how, is the calibration's.

    Args:
        repetition: repetitive heads compute their anchor rows only; without it they have a block mask like the others.
        loss: attention mass that masks may lose, in multiples of what the schedule that was calibrated with leaves out.
            Another than 1 needs a calibration with levels.

    Raises:
        ValueError: the loss is negative.
    """

    repetition: bool = True
    loss: float = 1.0

    def __post_init__(self) -> None:
        # written so that NaN fails too
        if not self.loss >= 0:
            raise ValueError(f"calibatt's loss is a multiple, 0 or more: got {self.loss}")


class CalibAtt:
    """Looks every plan up in a calibration; nothing is estimated while a video is made."""

    name: ClassVar[str] = "calibatt"
    label: ClassVar[str] = "CalibAtt"
    colour: ClassVar[str] = "#0072B2"
    marker: ClassVar[str] = "o"
    presets: ClassVar[Mapping[str, CalibAttConfig]] = MappingProxyType(
        {
            # the paper's method
            "default": CalibAttConfig(),
            # block masks alone: shows what repetition adds
            "masks-only": CalibAttConfig(repetition=False),
        }
    )
    offline: ClassVar[bool] = True
    # nearly all that a calibration's levels tell apart
    knob: ClassVar[Knob | None] = Knob(field="loss", low=0.0, high=15.0)
    without_dense: ClassVar[Mapping[str, Any]] = MappingProxyType({})

    def __init__(self, config: CalibAttConfig, source: PlanSource) -> None:
        self.config = config
        self._source = source if config.loss == 1 else source.at(config.loss)

    def refusal(self, geometry: Geometry) -> Unsupported | None:
        """Applies wherever there is a calibration, which itself refuses another geometry."""
        return None

    def plan(
        self, q: Float[Tensor, "heads tokens head_dim"], k: Float[Tensor, "heads tokens head_dim"], site: Site
    ) -> Plan:
        """The calibration's plan for the site, the same for both branches.

        Raises:
            ValueError: the calibration is for another model, geometry or number of steps.
        """
        return self._source.plan(site, repetition=self.config.repetition)

    def mean_density(self) -> float:
        """Of all plans of a video."""
        return self._source.density(repetition=self.config.repetition).mean().item()

    def reset(self) -> None:
        """There is no state."""
