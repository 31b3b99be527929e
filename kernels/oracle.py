"""The oracle: dense fp64 attention under a plan. Slow, plain, and never optimised."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from calibatt.kernels.base import check
from calibatt.kernels.int8 import dequantise, quantise
from calibatt.kernels.plan import Plan
from calibatt.kernels.remainder import block_means

# query rows computed at a time, so that 118,800 tokens fit in memory
_CHUNK = 1024


def attend(
    q: Float[Tensor, "batch heads tokens head_dim"],
    k: Float[Tensor, "batch heads tokens head_dim"],
    v: Float[Tensor, "batch heads tokens head_dim"],
    plan: Plan,
    *,
    dtype: torch.dtype = torch.float64,
) -> Float[Tensor, "batch heads tokens head_dim"]:
    """Attention under a plan, in fp64, or in another dtype to see what eager arithmetic in it loses.

    A query row with no key block gives zeros, unless the plan has a remainder: then it has the means of all blocks.

    Args:
        q, k, v: inputs of any dtype.
        plan: what is computed.
        dtype: of the arithmetic.

    Raises:
        ValueError: inputs and plan do not belong together.
    """
    check(q, k, v, plan)
    if plan.order is not None:
        queries, keys = (_places(order, q) for order in (plan.order.queries, plan.order.keys))
        out = attend(q.gather(2, queries), k.gather(2, keys), v.gather(2, keys), plan.unordered(), dtype=dtype)
        return torch.empty_like(out).scatter_(2, queries, out)
    if plan.int8 is not None:
        q_int, q_scales, k_int, k_scales = quantise(q, k, plan.int8)
        q, k = dequantise(q_int, q_scales, plan.int8[0]), dequantise(k_int, k_scales, plan.int8[1])
    q, k, v = (x.to(dtype) for x in (q, k, v))
    out = torch.empty_like(q)
    if plan.remainder != "none":
        assert plan.mask is not None
        sizes = plan.mask.sizes()[1]
        k, v = (torch.cat((x, block_means(x, sizes)), 2) for x in (k, v))
    for head, kind in enumerate(plan.kinds):
        for start in range(0, plan.tokens, _CHUNK):
            rows = slice(start, min(start + _CHUNK, plan.tokens))
            # means come after the tokens, and are of masked heads only
            keys, values = (x[:, head, : None if kind == "masked" else plan.tokens] for x in (k, v))
            scores = q[:, head, rows] @ keys.transpose(-1, -2) / math.sqrt(q.shape[-1])
            if kind == "masked":
                assert plan.mask is not None
                queries = torch.arange(rows.start, rows.stop, device=q.device)
                keep = plan.mask.seen(head, queries)
                if plan.remainder != "none":
                    of_head = sizes[head if len(sizes) > 1 else 0]
                    keep = torch.cat((keep, ~plan.mask.seen_blocks(head, queries) & (of_head > 0)), 1)
                    scores[..., plan.tokens :] += of_head.to(dtype).log()
                # the softmax of a row without keys is 0 / 0, and defined as zeros; any other NaN came with the inputs
                weights = torch.softmax(scores.masked_fill(~keep, -math.inf), dim=-1)
                weights = weights.masked_fill(~keep.any(-1, keepdim=True), 0.0)
            else:
                weights = torch.softmax(scores, dim=-1)
            out[:, head, rows] = weights @ values
        if kind == "reused" and plan.reuse is not None:
            out[:, head] = out[:, head, plan.reuse.computed[plan.reuse.source]]
    return out


def _places(order: Tensor, x: Tensor) -> Tensor:
    """An order of tokens as an index of the same shape as the inputs."""
    return order.long()[None, :, :, None].expand(x.shape)


def error_budget(
    q: Float[Tensor, "batch heads tokens head_dim"],
    k: Float[Tensor, "batch heads tokens head_dim"],
    v: Float[Tensor, "batch heads tokens head_dim"],
    plan: Plan,
    oracle: Float[Tensor, "batch heads tokens head_dim"],
) -> float:
    """Largest absolute error a correct kernel may make on these inputs.

    Twice the error that plain eager attention makes in the same dtype, plus one rounding of the largest output:
    derived, so that there is nothing to tune.

    Args:
        q, k, v, plan: as the kernel gets them.
        oracle: their exact output.
    """
    eager = attend(q, k, v, plan, dtype=q.dtype)
    rounding = torch.finfo(q.dtype).eps * oracle.abs().max().item()
    return 2 * (eager.double() - oracle).abs().max().item() + rounding
