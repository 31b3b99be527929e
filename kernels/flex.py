"""FlexAttention, compiled: the portable block-sparse kernel, on CPU and GPU."""

from __future__ import annotations

import functools
import math
import os
import shutil
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from calibatt.kernels.base import Task, Unsupported, check, check_accepted, triton_only, variable_refusal
from calibatt.kernels.dense import Dense
from calibatt.kernels.flex_code import weighted
from calibatt.kernels.mask import BlockMask, block_count, listed
from calibatt.kernels.ordered import in_order
from calibatt.kernels.per_head import attend_per_head
from calibatt.kernels.plan import Plan
from calibatt.kernels.remainder import block_means
from calibatt.kernels.tiles import tile_of

# a suite that walks over geometries compiles more variants than Dynamo's default limit of 8, past which it would
# give up; fullgraph makes it raise instead of running eager in silence
_RECOMPILE_LIMIT = 1024


class Flex:
    """torch's FlexAttention under torch.compile.

    Every masked head is computed in one launch of fixed shape; the rows of reused heads, and plans that are wholly
    dense, go through scaled_dot_product_attention, which is faster where nothing is skipped.
    """

    name = "flex"

    def refusal(self, task: Task) -> Unsupported | None:
        """Why this kernel cannot do the task on this machine, or None when it can."""
        if task.device.type == "cpu" and _cpp_compiler() is None:
            return Unsupported("FlexAttention on a CPU needs a C++ compiler: install g++ (Debian: apt-get install g++)")
        if task.device.type not in ("cpu", "cuda"):
            return Unsupported(f"FlexAttention runs on cpu and cuda, not on {task.device.type}")
        if task.block is not None and any(size % 16 for size in task.block):
            return Unsupported(f"FlexAttention needs blocks that are multiples of 16: got {task.block}")
        if task.variable:
            return variable_refusal("FlexAttention")
        return triton_only("FlexAttention", task)

    @in_order
    def attend(
        self,
        q: Float[Tensor, "batch heads tokens head_dim"],
        k: Float[Tensor, "batch heads tokens head_dim"],
        v: Float[Tensor, "batch heads tokens head_dim"],
        plan: Plan,
    ) -> Float[Tensor, "batch heads tokens head_dim"]:
        """Attention under a plan; a row with no block gives zeros.

        Raises:
            ValueError: inputs and plan do not belong together, or the kernel does not have the plan's blocks.
        """
        check(q, k, v, plan)
        check_accepted(self, q, plan)
        return attend_per_head(q, k, v, plan, masked=_launch, dense=scaled_dot_product_attention)


def _launch(q: Tensor, k: Tensor, v: Tensor, plan: Plan) -> Tensor:
    from torch.nn.attention.flex_attention import BlockMask as FlexMask

    mask = plan.launch_mask()
    assert isinstance(mask, BlockMask)
    shares = _shares(q, mask)
    keep, score_mod = mask.keep(), None
    if plan.remainder != "none":
        k, v, keep, weights = _with_means(k, v, mask)
        weights = weights.unflatten(1, (shares, -1)).transpose(0, 1).expand(max(shares, len(q)), -1, -1, -1)
        score_mod = weighted(weights.contiguous(), plan.tokens, mask.block_q)
    if shares > 1:
        # queries in the place of the batch, all of them with the same keys
        q = q[0].unflatten(1, (shares, -1)).transpose(0, 1)
        k, v = (x.expand(shares, -1, -1, -1) for x in (k, v))
    # share × heads × query blocks of the share
    indices, counts = (x.unflatten(1, (shares, -1)).transpose(0, 1).contiguous() for x in listed(keep))
    # all kept blocks are "full": nothing inside a block is masked, so no mask function is evaluated
    blocks = FlexMask.from_kv_blocks(
        torch.zeros_like(counts),
        torch.zeros_like(indices),
        counts,
        indices,
        BLOCK_SIZE=(mask.block_q, mask.block_k),
        seq_lengths=(mask.tokens // shares, k.shape[2]),
    )
    options: dict[str, Any] = {}
    if q.is_cuda:
        # 64 keys a tile is what Flex itself takes at head dim 128
        options = {"kernel_options": {"BLOCK_M": tile_of(mask.block_q, 128), "BLOCK_N": tile_of(mask.block_k, 64)}}
    out = _flex(q, k, v, score_mod=score_mod, block_mask=blocks, **options)
    return out if shares == 1 else out.transpose(0, 1).flatten(1, 2)[None]


def _with_means(k: Tensor, v: Tensor, mask: BlockMask) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Keys and values with the means of their blocks behind them, in blocks of their own, which all are kept.

    Returns:
        Keys, values, kept blocks, and what is added to the scores with keys that are no tokens, by query block: the
        logarithm of a mean's tokens; -inf where its block is kept, and where keys only fill a block up.
    """
    columns = mask.k_blocks * mask.block_k - mask.tokens, -mask.k_blocks % mask.block_k
    sizes = mask.sizes()[1]

    def extended(x: Tensor) -> Tensor:
        return torch.cat((pad(x, (0, 0, 0, columns[0])), pad(block_means(x, sizes), (0, 0, 0, columns[1]))), 2)

    keep = mask.keep()
    weights = pad(sizes.float().log()[:, None].masked_fill(keep, -math.inf), columns, value=-math.inf)
    keep = pad(keep, (0, block_count(mask.k_blocks, mask.block_k)), value=True)
    return extended(k), extended(v), keep, weights


def _shares(q: Tensor, mask: BlockMask) -> int:
    """Into how many equal parts the queries are cut, so that the threads of a CPU have about the same work.

    torch gives every thread the same number of query blocks, one head after the other: a thread whose heads keep few
    blocks, or none as those that reuse rows, would wait for the others. Cut by queries, each has a part of every head.
    """
    threads = torch.get_num_threads()
    even = q.shape[0] == 1 and mask.tokens % (threads * mask.block_q) == 0
    return threads if q.device.type == "cpu" and even else 1


def _flex(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    with torch._dynamo.config.patch(recompile_limit=_RECOMPILE_LIMIT):
        return _compiled()(q, k, v, **options)


@functools.cache
def _compiled() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    compiled: Callable[..., Tensor] = torch.compile(flex_attention, dynamic=False, fullgraph=True)
    return compiled


def _cpp_compiler() -> str | None:
    """The compiler that torch.compile would use for CPU code."""
    candidates = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++"]
    return next(filter(None, map(shutil.which, candidates)), None)


def _dense_objection(task: Task) -> str | None:
    # on a CPU it would be compiled for every geometry, to take twice as long as torch's tiled kernel
    return None if task.device.type == "cuda" else f"flex-dense runs on cuda, not on {task.device.type}"


FLEX_DENSE = Dense("flex-dense", _flex, _dense_objection)
