"""Any method, with means in place of the blocks that it drops."""

from __future__ import annotations

from dataclasses import replace

from jaxtyping import Float
from torch import Tensor

from calibatt.kernels.base import Unsupported
from calibatt.kernels.geometry import Geometry
from calibatt.kernels.plan import Plan, Remainder
from calibatt.methods.base import Method
from calibatt.methods.learning import Learnt
from calibatt.methods.scheduled import Scheduled
from calibatt.methods.site import Site


class WithRemainder:
    """A method whose masks have a remainder; what it chooses, and what it learnt, stay its own.

    Args:
        method: is asked for every plan.
        remainder: of plans that have a mask.
    """

    def __init__(self, method: Method | Scheduled, remainder: Remainder) -> None:
        self._method = method
        self._remainder = remainder

    @property
    def learnt(self) -> Learnt | None:
        """The method's own."""
        return self._method.learnt

    def refusal(self, geometry: Geometry) -> Unsupported | None:
        """The method's own."""
        return self._method.refusal(geometry)

    def plan(
        self,
        q: Float[Tensor, "heads tokens head_dim"],
        k: Float[Tensor, "heads tokens head_dim"],
        v: Float[Tensor, "heads tokens head_dim"],
        site: Site,
    ) -> Plan:
        """The method's plan, with the remainder where blocks are left out."""
        plan = self._method.plan(q, k, v, site)
        return plan if plan.mask is None else replace(plan, remainder=self._remainder)

    def reset(self) -> None:
        """A new video."""
        self._method.reset()
