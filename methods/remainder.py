"""Any method, with means in place of the blocks that it drops."""

from __future__ import annotations

from dataclasses import replace

from jaxtyping import Float
from torch import Tensor

from calibatt.kernels.plan import Plan, Remainder
from calibatt.methods.around import Around
from calibatt.methods.base import Method
from calibatt.methods.site import Site


class WithRemainder(Around):
    """A method whose masks have a remainder; what it chooses stays its own.

    Args:
        method: is asked for every plan.
        remainder: of plans that have a mask.
    """

    def __init__(self, method: Method | Around, remainder: Remainder) -> None:
        super().__init__(method)
        self._remainder = remainder

    def plan(
        self,
        q: Float[Tensor, "heads tokens head_dim"],
        k: Float[Tensor, "heads tokens head_dim"],
        v: Float[Tensor, "heads tokens head_dim"],
        site: Site,
    ) -> Plan:
        """The method's plan, with the remainder where blocks are left out."""
        plan = self._inner.plan(q, k, v, site)
        return plan if plan.mask is None else replace(plan, remainder=self._remainder)
