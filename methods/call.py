"""The attention call: a method chooses, a kernel computes, and whoever wants to know is told."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from calibatt.kernels.base import Attender
from calibatt.kernels.ordered import Phase, attend_ordered, untimed
from calibatt.kernels.plan import Plan
from calibatt.methods.base import Planner
from calibatt.methods.site import Site


@runtime_checkable
class Attention(Protocol):
    """Computes the self-attention of a model, call by call, sample by sample."""

    def start_video(self) -> None:
        """Forget the last video. Called before the first call of each."""
        ...

    def __call__(
        self,
        q: Float[Tensor, "1 heads tokens head_dim"],
        k: Float[Tensor, "1 heads tokens head_dim"],
        v: Float[Tensor, "1 heads tokens head_dim"],
        site: Site,
    ) -> Float[Tensor, "1 heads tokens head_dim"]:
        """The attention output of one sample at a site.

        Raises:
            ValueError: the method or the kernel does not take these inputs.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Call:
    """One attention call that is over.

    Args:
        site: where it happened.
        q, k, v: what went in.
        plan: what the method decided; `plan.realised()` is what the kernel computed.
        out: what came out.
    """

    site: Site
    q: Float[Tensor, "1 heads tokens head_dim"]
    k: Float[Tensor, "1 heads tokens head_dim"]
    v: Float[Tensor, "1 heads tokens head_dim"]
    plan: Plan
    out: Float[Tensor, "1 heads tokens head_dim"]


@runtime_checkable
class Observer(Protocol):
    """Is told of every call. It must not change the tensors, and should keep no more of them than it needs."""

    def saw(self, call: Call) -> None:
        """One call is over."""
        ...


class SparseAttention:
    """A method and a kernel, as the attention of a model.

    Args:
        method: asked for a plan at every call; reset at the start of each video.
        kernel: computes attention under that plan.
        observers: told of every call, in this order.
        phase: entered as `plan`, `permute`, `attend` and `unpermute` around each piece of work, to time it; observers
            run outside of every phase.
    """

    def __init__(
        self, method: Planner, kernel: Attender, *, observers: Iterable[Observer] = (), phase: Phase = untimed
    ) -> None:
        self.method = method
        self.kernel = kernel
        self.observers = tuple(observers)
        self._phase = phase

    def start_video(self) -> None:
        """A new video."""
        self.method.reset()

    def __call__(
        self,
        q: Float[Tensor, "1 heads tokens head_dim"],
        k: Float[Tensor, "1 heads tokens head_dim"],
        v: Float[Tensor, "1 heads tokens head_dim"],
        site: Site,
    ) -> Float[Tensor, "1 heads tokens head_dim"]:
        """Plan, compute, tell.

        Raises:
            ValueError: the method or the kernel does not take these inputs.
        """
        return self.under(self.plan(q, k, v, site), q, k, v, site)

    def plan(
        self,
        q: Float[Tensor, "1 heads tokens head_dim"],
        k: Float[Tensor, "1 heads tokens head_dim"],
        v: Float[Tensor, "1 heads tokens head_dim"],
        site: Site,
    ) -> Plan:
        """What the method decides.

        Raises:
            ValueError: the method does not take these inputs.
        """
        with self._phase("plan"):
            return self.method.plan(q[0], k[0], v[0], site)

    def under(
        self,
        plan: Plan,
        q: Float[Tensor, "1 heads tokens head_dim"],
        k: Float[Tensor, "1 heads tokens head_dim"],
        v: Float[Tensor, "1 heads tokens head_dim"],
        site: Site,
    ) -> Float[Tensor, "1 heads tokens head_dim"]:
        """Compute under a plan, tell.

        Raises:
            ValueError: the kernel does not take these inputs.
        """
        out = attend_ordered(self.kernel.attend, q, k, v, plan, self._phase)
        for observer in self.observers:
            observer.saw(Call(site=site, q=q, k=k, v=v, plan=plan, out=out))
        return out
