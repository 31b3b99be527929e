"""Our own block-sparse kernel, in Triton: for GPUs where FlashAttention-4 is absent or ignores sparsity."""

from __future__ import annotations

import importlib.util
import math

import torch
from torch import Tensor

from calibatt.kernels.base import Task, Unsupported, dtype_name
from calibatt.kernels.expand import floats_on, key_tiles, query_tiles
from calibatt.kernels.fused import FusedKernel, Launch, means_of_blocks
from calibatt.kernels.int8 import key_mean
from calibatt.kernels.mask import VariableBlockMask, block_count
from calibatt.kernels.plan import Plan
from calibatt.kernels.tiles import compute_capability, descriptor, has_tma, interpreted, tile_of

# the most queries of a tile: more do not fit the registers
_MOST_QUERIES = 128
# tokens of a block that may be left out, which is one tile
_MOST_SKIPPED = 128
# Blocks that differ in size are cut into tiles as if they were of this one. k-means leaves 250 queries and 76 keys in a
# cluster of Wan's 75,600 tokens: two tiles of queries a cluster, and a tile of keys that most ranges of clusters fill
_VARIABLE = (128, 64)
# tl.dot multiplies tiles of at least 16 × 16
_LEAST_TILE = 16


class Triton(FusedKernel):
    """For any NVIDIA GPU: masked heads walk their lists, dense ones all keys, reused ones compute a few rows.

    Blocks that differ in size (`plan.VariableBlockMask`) have device code of their own. Where a plan has a remainder,
    means of key blocks are made in a launch before, and walked like keys after the kept ones.
    """

    name = "triton"

    def refusal(self, task: Task) -> Unsupported | None:
        """Why this kernel cannot do the task on this machine, or None when it can."""
        if importlib.util.find_spec("triton") is None:
            return Unsupported("the Triton kernel needs Triton, which exists for Linux only: pip install triton")
        if task.device.type != "cuda" and not interpreted():
            return Unsupported(f"the Triton kernel needs a CUDA GPU, not {task.device.type}")
        halves = (torch.bfloat16, torch.float16)
        # the interpreter multiplies bf16 wrongly, and a GPU's tensor cores would round fp32
        known = (torch.float32, torch.float16) if interpreted() else halves
        if task.dtype not in known:
            return Unsupported(
                f"the Triton kernel computes {' and '.join(map(dtype_name, known))}, not {dtype_name(task.dtype)}"
            )
        if task.head_dim not in (64, 128):
            return Unsupported(f"the Triton kernel supports head dims 64 and 128, not {task.head_dim}")
        if task.block is not None and any(size % _LEAST_TILE for size in task.block):
            return Unsupported(f"the Triton kernel needs blocks that are multiples of {_LEAST_TILE}: got {task.block}")
        if task.skips and task.block is not None and any(tile_of(size, _MOST_SKIPPED) != size for size in task.block):
            return Unsupported(
                f"the Triton kernel leaves out whole tiles, powers of two up to {_MOST_SKIPPED}: got {task.block}"
            )
        if task.approximates and (task.skips or task.int8 is not None):
            return Unsupported(
                "the Triton kernel approximates neither blocks that it leaves out by itself nor any beside keys in INT8"
            )
        # a low block is one tile
        least = task.block[1] if task.skips and task.block is not None else _LEAST_TILE
        if task.int8 is not None and task.int8[1] % least:
            return Unsupported(
                f"the Triton kernel has a scale for every multiple of {least} keys: not for {task.int8[1]}"
            )
        return None

    def _launch(self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor | None, plan: Plan) -> None:
        from calibatt.kernels import triton_code

        if isinstance(plan.mask, VariableBlockMask):
            _launch_variable(q, k, v, out, lse, plan)
            return
        batch, heads, tokens, head_dim = q.shape
        given = Launch.of(plan, q.device)
        block = given.block_q, given.block_k
        # q and k stand for scales that are not there
        q_scales, k_scales, walked = q, k, block
        if plan.int8 is not None:
            mean = key_mean(k)
            (q, q_scales), (k, k_scales) = _quantised(q, plan.int8[0], None), _quantised(k, plan.int8[1], mean)
            # the keys of a tile have one scale
            walked = (block[0], math.gcd(block[1], plan.int8[1]))
        tma = has_tma(k, v)
        tile_q, tile_k, warps, stages = launch_shape(
            compute_capability(q.device), walked, head_dim, tma=tma, int8=plan.int8 is not None
        )
        low = thresholds = given.kinds
        if plan.skip is not None:
            low, thresholds = plan.skip.low.bits.view(torch.int32), floats_on(plan.skip.thresholds, q.device)
            # a block is left out as a whole; one of 128 × 128 needs the registers of eight warps
            tile_q, tile_k = block
            warps = 8 if tile_q * tile_k == _MOST_SKIPPED**2 else warps
        means = means_of_blocks(k, v, plan, plan.mask)
        keys, values = (descriptor(x, tile_k, head_dim) for x in (k, v)) if tma else (k, v)
        triton_code.attend[(block_count(tokens, tile_q), heads, batch)](
            q, keys, values, q_scales, k_scales, out, q if lse is None else lse, given.indices, given.counts,
            given.kinds, given.computed, given.served, low, thresholds, *means,
            int(plan.mask is not None and plan.mask.heads > 1),
            math.log2(math.e) / math.sqrt(head_dim), tokens, len(given.computed),
            given.served_most, given.q_blocks, given.k_blocks, heads,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3],
            BLOCK_Q=block[0], BLOCK_K=block[1], TILE_Q=tile_q, TILE_K=tile_k, HEAD_DIM=head_dim,
            REUSE=plan.reuse is not None, WITH_LSE=lse is not None, NOTE=plan.skip is not None,
            LEAVE=plan.skip is not None and plan.skip.leave, TMA=tma, INT8=plan.int8 is not None,
            SCALE_Q=(plan.int8 or block)[0], SCALE_K=(plan.int8 or block)[1], REMAINDER=plan.remainder != "none",
            num_warps=warps, num_stages=stages,
        )  # fmt: skip


def _launch_variable(q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor | None, plan: Plan) -> None:
    from calibatt.kernels import triton_code

    mask = plan.launch_mask()
    assert isinstance(mask, VariableBlockMask)
    batch, heads, tokens, head_dim = q.shape
    tma = has_tma(k, v)
    tile_q, tile_k, warps, stages = launch_shape(compute_capability(q.device), _VARIABLE, head_dim, tma=tma)
    queries, (listed, counts) = query_tiles(mask, tile_q), key_tiles(mask, tile_k)
    means = means_of_blocks(k, v, plan, mask)
    keys, values = (descriptor(x, tile_k, head_dim) for x in (k, v)) if tma else (k, v)
    triton_code.attend_variable[(queries.shape[1], heads, batch)](
        q, keys, values, out, q if lse is None else lse, queries, listed, counts, *means,
        math.log2(math.e) / math.sqrt(head_dim), tokens, mask.q_blocks, mask.k_blocks, listed.shape[2], heads,
        int(mask.heads > 1),
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3],
        TILE_Q=tile_q, TILE_K=tile_k, HEAD_DIM=head_dim, WITH_LSE=lse is not None, TMA=tma,
        REMAINDER=plan.remainder != "none", num_warps=warps, num_stages=stages,
    )  # fmt: skip


def launch_shape(
    capability: tuple[int, int], block: tuple[int, int], head_dim: int, *, tma: bool, int8: bool = False
) -> tuple[int, int, int, int]:
    """Queries and keys of a tile, warps, and tiles loaded ahead.

    On sm90 the fastest that was measured on an H200 (docs/kernels.md): four warps leave room for a second tile on the
    same multiprocessor, whose products hide this one's softmax. Elsewhere the most that fits at head dim 128: shared
    memory has at most 163 KiB for a block of threads on sm80, 99 on sm86, sm89 and sm120 (CUDA's programming guide),
    and tiles of twice as many keys would spill registers.

    Args:
        capability: compute capability.
        block: tokens of a query block and of a key block, which is walked in whole tiles.
        head_dim: channels of one head.
        tma: whether keys are loaded by TMA.
        int8: whether queries and keys are in INT8.
    """
    if capability == (9, 0):
        most_queries, most_keys = (64, 128 if tma else 64) if head_dim == 64 else (_MOST_QUERIES, 64)
        # keys in INT8 leave room for one more: 181 ms in place of 194 at 75,600 tokens × 40 heads × 128 on an H100
        return tile_of(block[0], most_queries), tile_of(block[1], most_keys), 4, 3 if int8 else 2
    tile_q, tile_k = tile_of(block[0], _MOST_QUERIES), tile_of(block[1], 64 if capability == (8, 0) else 32)
    return tile_q, tile_k, 8 if tile_q == _MOST_QUERIES else 4, 3


def _quantised(x: Tensor, block: int, mean: Tensor | None) -> tuple[Tensor, Tensor]:
    """What `int8.quantise` makes of queries or keys, bit by bit, in one pass over them."""
    import triton

    from calibatt.kernels import triton_code

    batch, heads, tokens, head_dim = x.shape
    values = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    scales = torch.empty((batch, heads, block_count(tokens, block)), dtype=torch.float32, device=x.device)
    triton_code.quantise[(scales.shape[2], heads, batch)](
        x, scales if mean is None else mean, values, scales, tokens, *x.stride()[:3],
        BLOCK=block, ROWS=triton.next_power_of_2(block), HEAD_DIM=head_dim, CENTRED=mean is not None,
    )  # fmt: skip
    return values, scales
