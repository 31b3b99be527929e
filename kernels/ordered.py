"""Plans whose blocks hold the tokens in another order: move them there, compute, move the output back."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

from torch import Tensor

from calibatt.kernels.base import check
from calibatt.kernels.permute import permute, unpermute
from calibatt.kernels.plan import Plan

Attend = Callable[[Tensor, Tensor, Tensor, Plan], Tensor]
# stands around a piece of work that is to be timed apart
Phase = Callable[[str], AbstractContextManager[None]]
_F = TypeVar("_F", bound=Callable[..., Any])


def untimed(name: str) -> AbstractContextManager[None]:
    """A phase that nobody times."""
    return nullcontext()


def attend_ordered(attend: Attend, q: Tensor, k: Tensor, v: Tensor, plan: Plan, phase: Phase = untimed) -> Tensor:
    """Attention under a plan, by what computes it on tokens that stand in the plan's order.

    Args:
        attend: a kernel's.
        q, k, v: [batch, heads, tokens, head_dim], in the sequence's order.
        plan: with an order or without.
        phase: entered as `permute`, `attend` and `unpermute`, the first and last where there is an order.

    Raises:
        ValueError: inputs and plan do not belong together.
    """
    order = plan.order
    if order is None:
        with phase("attend"):
            return attend(q, k, v, plan)
    check(q, k, v, plan)
    with phase("permute"):
        if order.shared and q.stride() == k.stride() == v.stride():
            q, k, v = permute((q, k, v), order.queries)
        else:
            (q,), (k,), (v,) = (permute((x,), of) for x, of in ((q, order.queries), (k, order.keys), (v, order.keys)))
    with phase("attend"):
        out = attend(q, k, v, plan.unordered())
    with phase("unpermute"):
        return unpermute(out, order.queries)


def in_order(attend: _F) -> _F:
    """Lets a kernel's `attend`, which knows nothing of orders, take plans that have one."""

    @functools.wraps(attend)
    def ordered(self: Any, q: Tensor, k: Tensor, v: Tensor, plan: Plan) -> Tensor:
        return attend_ordered(functools.partial(attend, self), q, k, v, plan)

    return ordered  # type: ignore[return-value]
