"""Our own block-sparse kernel, in Triton: for GPUs where FlashAttention-4 is absent or ignores sparsity."""

from __future__ import annotations

import importlib.util
import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from calibatt.kernels.base import Task, Unsupported, check, check_accepted
from calibatt.kernels.expand import block_lists, kinds_on
from calibatt.kernels.plan import Plan, block_count

# tokens of a block where a plan has none, and of a tile of queries at the most: larger ones do not fit the registers
_BLOCK = 128
# tl.dot multiplies tiles of at least 16 × 16
_LEAST_TILE = 16


class Triton:
    """One launch for all heads: masked ones walk their lists, dense ones all keys, reused ones their computed rows.

    A reused head's rows are gathered when they are loaded, and each is written to every token that takes its output:
    there is no pass over the output besides.
    """

    name = "triton"

    def refusal(self, task: Task) -> Unsupported | None:
        """Why this kernel cannot do the task on this machine, or None when it can."""
        if importlib.util.find_spec("triton") is None:
            return Unsupported("the Triton kernel needs Triton, which is there for Linux: pip install triton")
        if task.device.type != "cuda" and not _interpreted():
            return Unsupported(f"the Triton kernel needs a CUDA GPU, not {task.device.type}")
        halves = (torch.bfloat16, torch.float16)
        # the interpreter multiplies bf16 wrongly, and a GPU's tensor cores would round fp32
        known = (torch.float32, torch.float16) if _interpreted() else halves
        if task.dtype not in known:
            return Unsupported(
                f"the Triton kernel computes {' and '.join(map(_short, known))}, not {_short(task.dtype)}"
            )
        if task.head_dim not in (64, 128):
            return Unsupported(f"the Triton kernel has head dims 64 and 128, not {task.head_dim}")
        if task.block is not None and any(size % _LEAST_TILE for size in task.block):
            return Unsupported(f"the Triton kernel needs blocks that are multiples of {_LEAST_TILE}: got {task.block}")
        return None

    def attend(
        self,
        q: Float[Tensor, "batch heads tokens head_dim"],
        k: Float[Tensor, "batch heads tokens head_dim"],
        v: Float[Tensor, "batch heads tokens head_dim"],
        plan: Plan,
    ) -> Float[Tensor, "batch heads tokens head_dim"]:
        """Attention under a plan; a row with no block gives zeros.

        Raises:
            ValueError: inputs and plan do not belong together, or the kernel does not have their dtype or sizes.
        """
        return self._launch(q, k, v, plan, None)

    def attend_with_lse(
        self,
        q: Float[Tensor, "batch heads tokens head_dim"],
        k: Float[Tensor, "batch heads tokens head_dim"],
        v: Float[Tensor, "batch heads tokens head_dim"],
        plan: Plan,
    ) -> tuple[Float[Tensor, "batch heads tokens head_dim"], Float[Tensor, "batch heads tokens"]]:
        """The same, and the logarithm of the sum of exponentials of each query's scores, in fp32.

        A query with no key has -inf; one that takes another's output has that one's.

        Raises:
            ValueError: as `attend`.
        """
        lse = q.new_empty(q.shape[:3], dtype=torch.float32)
        return self._launch(q, k, v, plan, lse), lse

    def _launch(self, q: Tensor, k: Tensor, v: Tensor, plan: Plan, lse: Tensor | None) -> Tensor:
        from calibatt.kernels import triton_code

        check(q, k, v, plan)
        check_accepted(self, q, plan)
        # the device code steps over tokens, heads and batch by their strides, but over channels by one
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
        batch, heads, tokens, head_dim = q.shape
        out = torch.empty_like(q)
        kinds = kinds_on(plan.kinds, q.device)
        block_q, block_k = (_BLOCK, _BLOCK) if plan.mask is None else (plan.mask.block_q, plan.mask.block_k)
        tma = _has_tma(k, v)
        tile_q, tile_k, warps, stages = launch_shape(_capability(q.device), (block_q, block_k), tma=tma)
        q_blocks, k_blocks = block_count(tokens, block_q), block_count(tokens, block_k)
        # an argument that nothing reads must still be a tensor
        indices = counts = computed = served = kinds
        served_most = 1
        if plan.mask is not None:
            indices, counts = block_lists(plan)
        if plan.reuse is not None:
            computed, served = plan.reuse.computed, plan.reuse.served
            served_most = served.shape[1]
        keys, values = (_descriptor(x, tile_k) for x in (k, v)) if tma else (k, v)
        triton_code.attend[(block_count(tokens, tile_q), heads, batch)](
            q, keys, values, out, q if lse is None else lse, indices, counts, kinds, computed, served,
            math.log2(math.e) / math.sqrt(head_dim), tokens, len(computed), served_most, q_blocks, k_blocks, heads,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3],
            BLOCK_Q=block_q, BLOCK_K=block_k, TILE_Q=tile_q, TILE_K=tile_k, HEAD_DIM=head_dim,
            REUSE=plan.reuse is not None, WITH_LSE=lse is not None,
            TMA=tma, num_warps=warps, num_stages=stages,
        )  # fmt: skip
        return out


def _tile(block: int, most: int) -> int:
    """The largest power of two that divides a block, up to a limit: a block is walked in whole tiles."""
    return min(block & -block, most)


def launch_shape(capability: tuple[int, int], block: tuple[int, int], *, tma: bool) -> tuple[int, int, int, int]:
    """Queries and keys of a tile, warps, and tiles loaded ahead: the most that fits a GPU at head dim 128.

    A block of threads has at most 227 KiB of shared memory on sm90, 163 on sm80, 99 on sm86, sm89 and sm120 (CUDA's
    programming guide). Tiles of twice as many keys would spill registers; on sm90 those of 128 only without TMA, which
    keeps no addresses in them.

    Args:
        capability: compute capability.
        block: tokens of a query block and of a key block, which is walked in whole tiles.
        tma: whether keys are loaded by TMA.
    """
    roomy = capability in ((8, 0), (9, 0))
    most_keys = 128 if capability == (9, 0) and tma else 64 if roomy else 32
    tile_q, tile_k = _tile(block[0], _BLOCK), _tile(block[1], most_keys)
    return tile_q, tile_k, 8 if tile_q == _BLOCK else 4, 3


def _capability(device: torch.device) -> tuple[int, int]:
    # the interpreter can do what Hopper can
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)


def _has_tma(*tensors: Tensor) -> bool:
    """Whether tiles can be copied by a tensor memory accelerator: a unit of Hopper and newer, for aligned tensors."""
    # addresses and strides in multiples of 16 bytes: CUDA's programming guide on tensor maps
    aligned = all(
        x.data_ptr() % 16 == 0 and all(stride * x.element_size() % 16 == 0 for stride in x.stride()[:3])
        for x in tensors
    )
    return aligned and _capability(tensors[0].device) >= (9, 0)


def _descriptor(x: Tensor, tile: int) -> Any:
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, 1, tile, x.shape[-1]])


def _interpreted() -> bool:
    """Whether Triton runs its interpreter, which computes on a CPU what a GPU would."""
    import triton

    return bool(triton.knobs.runtime.interpret)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
