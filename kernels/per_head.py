"""Attention of a mixed plan by kernels that know one kind of head: what is not masked goes through a dense kernel."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from calibatt.kernels.plan import Plan

Dense = Callable[[Tensor, Tensor, Tensor], Tensor]
Masked = Callable[[Tensor, Tensor, Tensor, Plan], Tensor]


def attend_per_head(
    q: Float[Tensor, "batch heads tokens head_dim"],
    k: Float[Tensor, "batch heads tokens head_dim"],
    v: Float[Tensor, "batch heads tokens head_dim"],
    plan: Plan,
    *,
    masked: Masked,
    dense: Dense,
) -> Float[Tensor, "batch heads tokens head_dim"]:
    """Masked and dense heads in one launch, the computed rows of reused heads in another.

    Args:
        q, k, v, plan: that belong together.
        masked: computes masked and dense heads of a plan that has a mask; what it gives for reused heads is not kept.
        dense: computes all queries against all keys, of any number of queries.
    """
    dense_heads = plan.heads_of("dense")
    if plan.mask is not None:
        out = masked(q, k, v, plan)
    elif len(dense_heads) == len(plan.kinds):
        return dense(q, k, v)
    else:
        out = torch.empty_like(q)
        if dense_heads:
            out[:, dense_heads] = dense(q[:, dense_heads], k[:, dense_heads], v[:, dense_heads])
    if plan.reuse is not None:
        reused = plan.heads_of("reused")
        rows = dense(q[:, reused].index_select(2, plan.reuse.computed), k[:, reused], v[:, reused])
        out[:, reused] = rows.index_select(2, plan.reuse.source)
    return out
