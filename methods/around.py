"""A method inside another planner: what it learnt, what it refuses and when a video begins stay its own."""

from __future__ import annotations

from abc import ABC, abstractmethod

from jaxtyping import Float
from torch import Tensor

from calibatt.kernels.base import Unsupported
from calibatt.kernels.geometry import Geometry
from calibatt.kernels.plan import Plan, Remainder
from calibatt.methods.base import Method
from calibatt.methods.learning import Learnt
from calibatt.methods.site import Site


class Around(ABC):
    """Stands in a method's place, and says what becomes of its plans.

    Args:
        inner: the method, or what already stands around it.
    """

    def __init__(self, inner: Method | Around) -> None:
        self._inner = inner

    @property
    def learnt(self) -> Learnt | None:
        """The method's own."""
        return self._inner.learnt

    @property
    def remainder(self) -> Remainder:
        """The method's own."""
        return self._inner.remainder

    @property
    def offline(self) -> bool:
        """The method's own."""
        return self._inner.offline

    @property
    def headwise(self) -> bool:
        """The method's own."""
        return self._inner.headwise

    def refusal(self, geometry: Geometry) -> Unsupported | None:
        """The method's own."""
        return self._inner.refusal(geometry)

    def reset(self) -> None:
        """A new video."""
        self._inner.reset()

    @abstractmethod
    def plan(
        self,
        q: Float[Tensor, "heads tokens head_dim"],
        k: Float[Tensor, "heads tokens head_dim"],
        v: Float[Tensor, "heads tokens head_dim"],
        site: Site,
    ) -> Plan:
        """As `Method.plan`."""
