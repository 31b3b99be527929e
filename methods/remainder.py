"""Any method, with means in place of the blocks that it drops."""

from __future__ import annotations

from dataclasses import replace
from weakref import WeakKeyDictionary

from jaxtyping import Float
from torch import Tensor

from calibatt.kernels.plan import Plan, Remainder
from calibatt.methods.around import Around
from calibatt.methods.base import Method
from calibatt.methods.site import Site


class WithRemainder(Around):
    """A method that has no remainder, with one; what it chooses stays its own.

    Args:
        method: is asked for every plan.
        remainder: of plans that have a mask.

    Raises:
        ValueError: the method has a remainder of its own.
    """

    def __init__(self, method: Method | Around, remainder: Remainder) -> None:
        super().__init__(method)
        if method.remainder != "none":
            raise ValueError(own_remainder(method.remainder, remainder))
        self._remainder = remainder
        # for as long as the method keeps its own
        self._plans: WeakKeyDictionary[Plan, Plan] = WeakKeyDictionary()

    @property
    def remainder(self) -> Remainder:
        """Of plans that have a mask."""
        return self._remainder

    def plan(
        self,
        q: Float[Tensor, "heads tokens head_dim"],
        k: Float[Tensor, "heads tokens head_dim"],
        v: Float[Tensor, "heads tokens head_dim"],
        site: Site,
    ) -> Plan:
        """The method's plan, with the remainder where blocks are left out."""
        plan = self._inner.plan(q, k, v, site)
        if plan.mask is None:
            return plan
        if plan not in self._plans:
            self._plans[plan] = replace(plan, remainder=self._remainder)
        return self._plans[plan]


def own_remainder(own: Remainder, other: Remainder) -> str:
    """Why a method whose plans have a remainder takes no other: one line that says what to do."""
    if own == other:
        return f"the method itself has the remainder {own!r}: one more says nothing new, leave it out"
    return f"the method itself has the remainder {own!r}, which {other!r} cannot replace: leave it out"
