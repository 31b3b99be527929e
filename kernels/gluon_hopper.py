"""Our own block-sparse kernel for Hopper, in Gluon: a warp loads, one or two warpgroups multiply."""

from __future__ import annotations

import functools
import importlib.metadata
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int, Int32
from torch import Tensor

from calibatt.kernels.base import Task, Unsupported, dtype_name, triton_only, variable_refusal
from calibatt.kernels.expand import KINDS, kinds_on
from calibatt.kernels.fused import FusedKernel, Launch, bonuses_of_blocks, means_of_blocks
from calibatt.kernels.mask import block_count
from calibatt.kernels.plan import HeadKind, Plan
from calibatt.kernels.tiles import tensor_map_fits

# queries of a warpgroup: the rows of one wgmma
_ROWS = 64
_WARPS = 4
# the most keys of a tile, and those of one where a plan has no mask
_MOST_KEYS = GROUP = 128
# the fewest tiles of keys in a share: to begin and end a tile of queries costs two or three of them (docs/kernels.md)
_LEAST_SHARE = 8
# queries that `triton_code.merge` puts together at a time
_MERGED = 16
# Gluon's structures have had constructors that run while compiling since then
_LEAST_TRITON = (3, 6)
# the most items of work that are kept with a plan, 64 KiB: where there are more, a call takes so long that the host is
# far ahead, and thousands of plans would fill the memory
_MOST_KEPT = 2**14
_WORK: WeakKeyDictionary[Plan, dict[Any, Tensor]] = WeakKeyDictionary()
# registers of a thread of the warp that loads, the fewest there can be, and of those that compute, the most that
# leave room for it: (65,536 - 128 × 24) / 256 threads, in steps of 8
_PRODUCER_REGISTERS, _CONSUMER_REGISTERS = 24, 240


class Gluon(FusedKernel):
    """For Hopper: tiles of queries are computed head by head, those with the longest lists of a head first.

    Where a plan has a remainder, means of key blocks are made in a launch before, and walked like keys before the kept
    ones.
    """

    name = "gluon"

    def refusal(self, task: Task) -> Unsupported | None:
        """Why this kernel cannot do the task on this machine, or None when it can."""
        if task.device.type != "cuda":
            return Unsupported(f"the Gluon kernel needs a CUDA GPU, not {task.device.type}")
        capability = torch.cuda.get_device_capability(task.device)
        if capability != (9, 0):
            return Unsupported(f"the Gluon kernel is for sm90, not sm{capability[0]}{capability[1]}")
        if (version := _triton_version()) < _LEAST_TRITON:
            has = "none" if version == (0, 0) else ".".join(map(str, version))
            return Unsupported(f"the Gluon kernel needs Triton 3.6 or newer, found {has}: pip install -U triton")
        if task.dtype not in (torch.bfloat16, torch.float16):
            return Unsupported(f"the Gluon kernel computes bfloat16 and float16, not {dtype_name(task.dtype)}")
        if task.head_dim not in (64, 128):
            return Unsupported(f"the Gluon kernel supports head dims 64 and 128, not {task.head_dim}")
        if task.block is not None and any(size % _ROWS for size in task.block):
            return Unsupported(f"the Gluon kernel needs blocks that are multiples of {_ROWS}: got {task.block}")
        if task.variable:
            return variable_refusal("the Gluon kernel")
        return triton_only("the Gluon kernel", task)

    def add_reused(self, q: Tensor, k: Tensor, v: Tensor, plan: Plan, out: Tensor) -> None:
        """Write the reused heads of a plan into an output, and leave its other heads as they are.

        Args:
            q, k, v, out: [batch, heads, tokens, head_dim].
            plan: that they belong to.
        """
        kinds: tuple[HeadKind, ...] = tuple("reused" if kind == "reused" else "dense" for kind in plan.kinds)
        self._launch(q, k, v, out, None, Plan(tokens=plan.tokens, kinds=kinds, reuse=plan.reuse), only="reused")

    def attend_with_logsums(
        self,
        q: Float[Tensor, "1 heads tokens head_dim"],
        k: Float[Tensor, "1 heads tokens head_dim"],
        v: Float[Tensor, "1 heads tokens head_dim"],
        out: Float[Tensor, "1 heads tokens head_dim"],
        lse: Float[Tensor, "1 heads tokens"],
        logsums: Float[Tensor, "heads groups tokens"],
    ) -> None:
        """Dense attention, and the log-sum-exp of each query's scores with each `GROUP` of keys.

        Args:
            q, k, v: with channels side by side.
            out, lse, logsums: written to, the latter two in fp32; those of groups in powers of two.
        """
        plan = Plan.all_dense(q.shape[2], q.shape[1])
        self._launch(q, k, v, out, lse, plan, logsums=logsums)

    def _launch(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor | None,
        plan: Plan,
        *,
        only: HeadKind | None = None,
        logsums: Tensor | None = None,
    ) -> None:
        from calibatt.kernels import gluon_code, triton_code

        q, k, v = (x if tensor_map_fits(x) else x.clone(memory_format=torch.contiguous_format) for x in (q, k, v))
        batch, heads, tokens, head_dim = q.shape
        given = Launch.of(plan, q.device)
        shape = launch_shape((given.block_q, given.block_k), head_dim)
        tile_q = shape.warpgroups * _ROWS
        tiles = block_count(tokens, tile_q)
        reused_tiles = block_count(len(given.computed), tile_q)
        find = partial(_work, plan, given.counts, batch, tiles, given.block_q // tile_q, reused_tiles, only)
        work = _kept(plan, (batch, tiles, only, q.device), batch * tiles * heads, find)
        scale = math.log2(math.e) / math.sqrt(head_dim)
        k_means, v_means = means_of_blocks(k, v, plan, plan.mask)[:2]
        bonuses = bonuses_of_blocks(plan, scale, shape.tile_k) if plan.remainder != "none" else work
        blocks = [_descriptor(x, shape.tile_k) for x in (k, v)]
        # stand-ins are the keys and values themselves
        means = [_descriptor(x, shape.tile_k) for x in (k_means, v_means)] if plan.remainder != "none" else blocks
        tensors = (
            _descriptor(q, _ROWS), *blocks, *means, _descriptor(out, _ROWS), q if lse is None else lse,
            q if logsums is None else logsums, given.indices, given.counts, given.kinds, given.computed, given.served,
            work, bonuses,
        )  # fmt: skip
        reuse, with_lse = plan.reuse is not None, lse is not None
        mask_step = int(plan.mask is not None and plan.mask.heads > 1)
        sizes = (
            tiles, given.served_most, given.q_blocks, given.k_blocks, heads, len(given.computed),
            *q.stride()[:3], *out.stride()[:3],
        )  # fmt: skip
        constants = {
            "BLOCK_Q": given.block_q, "BLOCK_K": given.block_k, "TILE_K": shape.tile_k, "HEAD_DIM": head_dim,
            "STAGES": shape.stages, "Q_REGISTERS": shape.q_registers, "REUSE": reuse, "WITH_LSE": with_lse,
            "WITH_LOGSUMS": logsums is not None, "REMAINDER": plan.remainder != "none", "num_warps": _WARPS,
            "maxnreg": shape.registers,
        }  # fmt: skip
        if shape.alone:
            gluon_code.attend_alone[(len(work),)](*tensors, q, out, scale, tokens, mask_step, *sizes, **constants)
        else:
            places = torch.cuda.get_device_properties(q.device).multi_processor_count * shape.thread_blocks
            counter = torch.zeros(1, dtype=torch.int32, device=q.device)
            # lists differ in length, and those of the last head end with its shortest
            key_tiles = 0 if plan.mask is not None else block_count(tokens, shape.tile_k)
            whole, shares = shared_out(len(work), places, key_tiles)
            parts = (len(work) - whole) * shares
            mean = q.new_empty((parts * tile_q, head_dim), dtype=torch.float32)
            most, total = q.new_empty((2, parts * tile_q), dtype=torch.float32)
            gluon_code.attend[(min(places, whole + parts),)](
                *tensors, mean, most, total, counter, q, out, scale, tokens, mask_step, whole,
                shares, whole + parts, *sizes,
                WARPGROUPS=shape.warpgroups, SHARED_OUT=parts > 0, PRODUCER_REGISTERS=_PRODUCER_REGISTERS,
                CONSUMER_REGISTERS=_CONSUMER_REGISTERS, **constants,
            )  # fmt: skip
            if parts:
                triton_code.merge[(len(work) - whole, tile_q // _MERGED)](
                    mean, most, total, work[whole:], out, q if lse is None else lse, given.kinds, given.served, shares,
                    tokens, tiles, heads, len(given.computed), given.served_most, *out.stride()[:3],
                    TILE_Q=tile_q, ROWS=_MERGED, HEAD_DIM=head_dim, REUSE=reuse, WITH_LSE=with_lse,
                )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchShape:
    """How a tile of queries is computed.

    Args:
        alone: whether the warpgroup that multiplies loads for itself; otherwise a warp does.
        warpgroups: of a thread block, that multiply 64 queries each.
        thread_blocks: that fit a multiprocessor.
        registers: of a thread at the start, at which so many fit.
        tile_k: keys of a tile.
        stages: tiles of keys, and of values, in shared memory.
        q_registers: whether queries stay in registers; otherwise in shared memory.
    """

    alone: bool
    warpgroups: int
    thread_blocks: int
    registers: int
    tile_k: int
    stages: int
    q_registers: bool


def launch_shape(block: tuple[int, int], head_dim: int) -> LaunchShape:
    """The fastest way that was measured on an H200 (docs/kernels.md) for blocks of this size.

    A multiprocessor has 65,536 registers and 227 KiB of shared memory for a thread block (CUDA's programming guide).
    """
    tile_k = _MOST_KEYS if block[1] % _MOST_KEYS == 0 else _ROWS
    if head_dim == 64:
        # as many warpgroups as fit: exponentials take as long as products here, and one's hide behind another's
        wide = tile_k == _MOST_KEYS
        return LaunchShape(
            alone=True, warpgroups=1, thread_blocks=3 if wide else 4, registers=168 if wide else 128, tile_k=tile_k,
            stages=2, q_registers=not wide,
        )  # fmt: skip
    if block[0] % (2 * _ROWS) == 0:
        return LaunchShape(
            alone=False, warpgroups=2, thread_blocks=1, registers=168, tile_k=tile_k, stages=2 * _MOST_KEYS // tile_k,
            q_registers=True,
        )  # fmt: skip
    return LaunchShape(
        alone=False, warpgroups=1, thread_blocks=2, registers=128, tile_k=_ROWS, stages=2, q_registers=True
    )


def shared_out(items: int, places: int, key_tiles: int) -> tuple[int, int]:
    """Of tiles of queries that are alike, how many are computed whole, and in how many shares of its keys each other.

    The last round would leave most places empty: 1,720 tiles are 13 rounds of 132, and 4 that take as long as one more.

    Args:
        items: tiles of queries.
        places: that compute at a time.
        key_tiles: tiles of keys that each has; 0 where they differ.
    """
    rest = items % places
    shares = min(places // rest, key_tiles // _LEAST_SHARE) if rest else 1
    return (items - rest, shares) if shares > 1 else (items, 1)


def _kept(plan: Plan, key: Any, items: int, find: Callable[[], Tensor]) -> Tensor:
    """Work of a plan, found once where it comes again: offline masks are the same at every call of their site.

    Args:
        plan: whose work it is.
        key: what it depends on beside.
        items: how many there are at most.
        find: makes it.
    """
    if items > _MOST_KEPT:
        return find()
    kept = _WORK.setdefault(plan, {})
    if key not in kept:
        kept[key] = find()
    return kept[key]


def _work(
    plan: Plan,
    counts: Tensor,
    batch: int,
    tiles: int,
    tiles_a_block: int,
    reused_tiles: int,
    only: HeadKind | None = None,
) -> Int32[Tensor, "items"]:
    """Every tile of queries that is to be computed, of one kind of head or of all.

    Head by head, and of a head those with the longest lists first.

    One head after the other, so that those under way at a time share its keys in the cache. Masked heads come last, and
    the last one's shortest lists end the launch, so no tile is waited for long.
    """
    items = _items(plan.kinds, tiles, reused_tiles, only, counts.device)
    if plan.mask is not None:
        heads = len(plan.kinds)
        tile = torch.arange(tiles, device=counts.device)
        lengths = counts[:, tile // tiles_a_block]
        if len(set(plan.kinds)) > 1:
            # only masked heads have lists; the tiles of the others are alike
            lengths = torch.where(kinds_on(plan.kinds, counts.device)[:, None] == KINDS.index("masked"), lengths, 0)
        order = lengths.argsort(dim=1, descending=True, stable=True)
        first = tiles * torch.arange(heads, device=counts.device)[:, None]
        items = (first + order).flatten()[items]
    per_batch = tiles * len(plan.kinds)
    work = items if batch == 1 else (torch.arange(batch, device=items.device)[:, None] * per_batch + items).flatten()
    return work.to(torch.int32)


@functools.lru_cache(maxsize=256)
def _items(
    kinds: Sequence[HeadKind], tiles: int, reused_tiles: int, only: HeadKind | None, device: torch.device
) -> Int[Tensor, "items"]:
    """What there is to compute, by number (head × tiles + tile): reused heads have fewer tiles than the others."""
    wanted = [head for head, kind in enumerate(kinds) if only in (None, kind)]
    heads = sorted(wanted, key=lambda head: kinds[head] == "masked")
    counts = [reused_tiles if kinds[head] == "reused" else tiles for head in heads]
    return torch.cat([head * tiles + torch.arange(count) for head, count in zip(heads, counts, strict=True)]).to(device)


@functools.cache
def _triton_version() -> tuple[int, int]:
    """Major and minor version; zeros where there is no Triton."""
    try:
        major, minor = importlib.metadata.version("triton").split(".")[:2]
    except importlib.metadata.PackageNotFoundError:
        return (0, 0)
    return int(major), int(minor)


def _descriptor(x: Tensor, rows: int) -> Any:
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    box = [1, 1, rows, x.shape[-1]]
    return TensorDescriptor(x, list(x.shape), list(x.stride()), box, _layout(x.dtype, rows, x.shape[-1]))


@functools.cache
def _layout(dtype: torch.dtype, rows: int, head_dim: int) -> Any:
    from triton.experimental.gluon import language as gl

    return gl.NVMMASharedLayout.get_default_for(
        [1, 1, rows, head_dim], gl.bfloat16 if dtype == torch.bfloat16 else gl.float16
    )
