"""FlashAttention-3, dense, and FlashAttention-4, dense and block sparse: optional packages for Hopper and newer."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from calibatt.kernels.base import (
    Task,
    Unsupported,
    check,
    check_accepted,
    dtype_name,
    remainder_refusal,
    triton_only,
    variable_refusal,
)
from calibatt.kernels.dense import Dense
from calibatt.kernels.expand import block_lists
from calibatt.kernels.mask import BlockMask
from calibatt.kernels.ordered import in_order
from calibatt.kernels.per_head import attend_per_head
from calibatt.kernels.plan import Plan

_HEAD_DIMS = (64, 128)
_HALVES = (torch.bfloat16, torch.float16)
# Block sizes that FlashAttention-4 walks on sm90, flash_attn/cute/interface.py of 4.0.0b36: query tiles of 128 or 64
# divide a query block, and a key block is one tile, of at most 128 keys in steps of 16.
_SM90_QUERIES, _SM90_MOST_KEYS, _SM90_KEY_STEP = 64, 128, 16
# on sm100 two tiles of 128 queries are in flight, and key tiles have 128
_SM100_QUERIES, _SM100_KEYS = 256, 128


def _objection(
    name: str,
    package: str,
    extra: str,
    least: tuple[int, int],
    most: tuple[int, int],
    dtypes: Sequence[torch.dtype],
    task: Task,
) -> str | None:
    """What keeps FlashAttention from a dense task: the GPU, the package, the dtype or the head dim."""
    if task.device.type != "cuda":
        return f"{name} runs on cuda, not on {task.device.type}"
    capability = torch.cuda.get_device_capability(task.device)
    if not least <= capability <= most:
        return f"{name} runs on sm{least[0]}{least[1]} to sm{most[0]}{most[1]}, not on sm{capability[0]}{capability[1]}"
    if not _installed(package):
        return f"{name} is not installed: pip install 'calibatt[{extra}]'"
    if task.dtype not in dtypes:
        return f"{name} computes {' and '.join(map(dtype_name, dtypes))} here, not {dtype_name(task.dtype)}"
    if task.head_dim not in _HEAD_DIMS:
        return f"{name} is used at head dims {' and '.join(map(str, _HEAD_DIMS))} here, not {task.head_dim}"
    return None


def _installed(package: str) -> bool:
    # a parent that is missing raises; FlashAttention-4 shares the parent of FlashAttention-2
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:
        return False


def _tokens_first(compute: Callable[[Tensor, Tensor, Tensor], Any], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Call with [batch, tokens, heads, head_dim], FlashAttention's layout; strides are free but for the channels."""
    out = compute(*(_channels_last(x).transpose(1, 2) for x in (q, k, v)))
    # with or without the log-sum-exp, by version
    first: Tensor = out[0] if isinstance(out, tuple) else out
    return first.transpose(1, 2)


def _channels_last(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _fa3(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from fa3_fwd_interface import flash_attn_func

    return _tokens_first(flash_attn_func, q, k, v)


FA3 = Dense(
    "fa3",
    _fa3,
    # fa3-fwd 0.0.3 is built without fp16, and says so when called
    functools.partial(_objection, "FlashAttention-3", "fa3_fwd_interface", "fa3", (9, 0), (9, 0), [torch.bfloat16]),
)


class Flash4:
    """FlashAttention-4: masked and dense heads of a plan in one launch, the rows of reused heads in another."""

    name = "fa4"

    def refusal(self, task: Task) -> Unsupported | None:
        """Why this kernel cannot do the task on this machine, or None when it can."""
        objection = _objection("FlashAttention-4", "flash_attn.cute", "fa4", (8, 0), (12, 1), _HALVES, task)
        if objection is None and task.block is not None:
            objection = _block_objection(torch.cuda.get_device_capability(task.device), task.block)
        if objection is None and task.variable:
            return variable_refusal("FlashAttention-4")
        if objection is None and task.approximates:
            return remainder_refusal("FlashAttention-4")
        return triton_only("FlashAttention-4", task) if objection is None else Unsupported(objection)

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
            ValueError: inputs and plan do not belong together, or the kernel does not have their dtype or sizes.
        """
        check(q, k, v, plan)
        check_accepted(self, q, plan)
        return attend_per_head(q, k, v, plan, masked=fa4_blocks, dense=_fa4_dense)


def _block_objection(capability: tuple[int, int], block: tuple[int, int]) -> str | None:
    """What keeps FlashAttention-4 from blocks of this size; other GPUs ignore its lists and compute everything."""
    if capability == (9, 0):
        queries, keys = _SM90_QUERIES, _SM90_KEY_STEP
        fits = block[0] % queries == 0 and block[1] % keys == 0 and block[1] <= _SM90_MOST_KEYS
        wanted = f"multiples of {queries} queries × up to {_SM90_MOST_KEYS} keys in steps of {keys}"
    elif capability[0] == 10:
        fits = block[0] % _SM100_QUERIES == 0 and block[1] % _SM100_KEYS == 0
        wanted = f"multiples of {_SM100_QUERIES} queries × {_SM100_KEYS} keys"
    else:
        return f"FlashAttention-4 is block sparse on sm90 and sm100, not on sm{capability[0]}{capability[1]}"
    return None if fits else f"FlashAttention-4 has blocks of {wanted} here: got {block}"


def _fa4_dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return _operators()[0](q, k, v)


def fa4_blocks(q: Tensor, k: Tensor, v: Tensor, plan: Plan) -> Tensor:
    """Masked and dense heads of a plan with a mask, by FlashAttention-4; what it gives for reused heads means nothing.

    Args:
        q, k, v: [batch, heads, tokens, head_dim], that the plan is for.
        plan: with blocks of one size.
    """
    assert isinstance(plan.mask, BlockMask)
    indices, counts = block_lists(plan, every_head=True)
    return _operators()[1](q, k, v, indices, counts, plan.mask.block_q, plan.mask.block_k)


def _interface() -> Any:
    """FlashAttention-4's module, which keeps on disk what it compiles: off by default, and read when it is imported.

    In a folder of the user's: what lies there is loaded and run, and its own default is one that all users share. Where
    there can be no such folder, nothing is kept.
    """
    if "FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED" not in os.environ:
        try:
            cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
            own = os.environ.setdefault(
                "FLASH_ATTENTION_CUTE_DSL_CACHE_DIR", str(cache / "calibatt" / "flash-attention-4")
            )
            Path(own).mkdir(parents=True, exist_ok=True)
            os.environ["FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED"] = "1"
        # no home, or none to write to
        except (OSError, RuntimeError):
            pass
    return importlib.import_module("flash_attn.cute")


@functools.cache
def _operators() -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """FlashAttention-4 as operators that torch.compile leaves whole: dense, and block sparse."""

    def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return _tokens_first(_interface().flash_attn_func, q, k, v)

    def blocks(q: Tensor, k: Tensor, v: Tensor, indices: Tensor, counts: Tensor, block_q: int, block_k: int) -> Tensor:
        attend = _interface().flash_attn_func
        from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch

        # All blocks are "full": none is masked inside. The other list must be there, though nothing is on it.
        lists = BlockSparseTensorsTorch(
            mask_block_cnt=torch.zeros_like(counts)[None],
            mask_block_idx=torch.zeros_like(indices[..., :1])[None],
            full_block_cnt=counts[None],
            full_block_idx=indices[None],
            block_size=(block_q, block_k),
        )
        return _tokens_first(functools.partial(attend, block_sparse_tensors=lists), q, k, v)

    def alike(q: Tensor, *_: Any) -> Tensor:
        # what _tokens_first returns: tokens before heads in memory
        return torch.empty_like(q.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)

    def operator(name: str, function: Callable[..., Tensor], schema: str) -> Callable[..., Tensor]:
        made = torch.library.custom_op(
            f"calibatt::{name}", function, mutates_args=(), device_types="cuda", schema=schema
        )
        made.register_fake(alike)
        return made

    lists = "Tensor indices, Tensor counts, int block_q, int block_k"
    return (
        operator("fa4_dense", dense, "(Tensor q, Tensor k, Tensor v) -> Tensor"),
        operator("fa4_blocks", blocks, f"(Tensor q, Tensor k, Tensor v, {lists}) -> Tensor"),
    )
