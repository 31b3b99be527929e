"""One dense schedule for every method: full attention in the first steps and layers, in place of the method's own."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from calibatt.kernels.plan import Plan
from calibatt.methods.around import Around
from calibatt.methods.base import Method
from calibatt.methods.site import Site


class Scheduled(Around):
    """A method that is not asked in the first steps and layers.

    Build the method with its `without_dense` settings, so that this schedule is the only one.

    Args:
        method: asked from then on; its state begins there.
        steps, layers: shares of the steps and of the layers that are dense, rounded to whole ones.
    """

    def __init__(self, method: Method, *, steps: float, layers: float) -> None:
        super().__init__(method)
        self._steps = steps
        self._layers = layers

    def plan(
        self,
        q: Float[Tensor, "heads tokens head_dim"],
        k: Float[Tensor, "heads tokens head_dim"],
        v: Float[Tensor, "heads tokens head_dim"],
        site: Site,
    ) -> Plan:
        """Dense, or the method's plan."""
        if site.in_warmup(self._steps, self._layers):
            return Plan.dense(site.geometry)
        return self._inner.plan(q, k, v, site)
