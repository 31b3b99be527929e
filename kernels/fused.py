"""What our own kernels share: all heads of a plan in one launch, whatever kind each is."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from calibatt.kernels.base import Task, Unsupported, check, check_accepted
from calibatt.kernels.expand import block_lists, kinds_on
from calibatt.kernels.mask import BlockMask, Mask, block_count
from calibatt.kernels.ordered import attend_ordered
from calibatt.kernels.plan import Plan

# tokens of a block where a plan has none
_BLOCK = 128
# tokens that `block_means` loads at a time: 16 KiB of keys and as much of values, as `permute._ROWS`
_MEAN_ROWS = 64


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Launch:
    """A plan as device code reads it; what it does not have is stood for by a tensor that nothing reads.

    Args:
        kinds: of each head, as `expand.KINDS` counts them.
        indices, counts: lists of key blocks, of masked heads.
        computed, served: queries that reused heads compute, and the tokens that take each one's output.
        served_most: the most tokens that take one output.
        block_q, block_k: tokens of a block.
        q_blocks, k_blocks: how many there are.
    """

    kinds: Tensor
    indices: Tensor
    counts: Tensor
    computed: Tensor
    served: Tensor
    served_most: int
    block_q: int
    block_k: int
    q_blocks: int
    k_blocks: int

    @classmethod
    def of(cls, plan: Plan, device: torch.device) -> Launch:
        """Lists are made of the mask's bits here, on its device."""
        kinds = kinds_on(plan.kinds, device)
        block_q, block_k = plan.mask.block if isinstance(plan.mask, BlockMask) else (_BLOCK, _BLOCK)
        indices, counts = (kinds, kinds) if plan.mask is None else block_lists(plan)
        computed, served = (kinds, kinds) if plan.reuse is None else (plan.reuse.computed, plan.reuse.served)
        return cls(
            kinds=kinds, indices=indices, counts=counts, computed=computed, served=served,
            served_most=1 if plan.reuse is None else served.shape[1], block_q=block_q, block_k=block_k,
            q_blocks=block_count(plan.tokens, block_q), k_blocks=block_count(plan.tokens, block_k),
        )  # fmt: skip


class FusedKernel(ABC):
    """A kernel that computes masked, dense and reused heads at once.

    A reused head's rows are gathered when they are loaded, and each is written to every token that takes its output:
    there is no pass over the output besides.
    """

    name: str

    @abstractmethod
    def refusal(self, task: Task) -> Unsupported | None:
        """Why this kernel cannot do the task on this machine, or None when it can."""

    @abstractmethod
    def _launch(self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor | None, plan: Plan) -> None:
        """Write output and log-sum-exps; the inputs have been checked."""

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
        return attend_ordered(partial(self._checked, lse=None), q, k, v, plan)

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
            ValueError: as `attend`, or the plan has INT8: its keys have lost their mean, which such sums hold.
        """
        if plan.int8 is not None:
            raise ValueError("there are no log-sum-exps of keys that have lost their mean, as those in INT8 have")
        lse = q.new_empty(q.shape[:3], dtype=torch.float32)
        out = attend_ordered(partial(self._checked, lse=lse), q, k, v, plan)
        if plan.order is not None:
            lse = torch.empty_like(lse).scatter_(2, plan.order.queries.long().expand(lse.shape), lse)
        return out, lse

    def _checked(self, q: Tensor, k: Tensor, v: Tensor, plan: Plan, *, lse: Tensor | None) -> Tensor:
        check(q, k, v, plan)
        check_accepted(self, q, plan)
        # device code steps over tokens, heads and batch by their strides, but over channels by one
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
        out = torch.empty_like(q)
        self._launch(q, k, v, out, lse, plan)
        return out


def means_of_blocks(k: Tensor, v: Tensor, plan: Plan, mask: Mask | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mean keys and values of all blocks, where blocks begin, and a mask's bits; where no mean counts, stand-ins."""
    from calibatt.kernels import triton_code

    if plan.remainder == "none":
        return k, v, k, v
    assert mask is not None
    batch, heads, _, head_dim = k.shape
    starts = torch.nn.functional.pad(mask.sizes()[1].cumsum(-1, dtype=torch.int32), (1, 0))
    k_means, v_means = (x.new_empty((batch, heads, mask.k_blocks, head_dim)) for x in (k, v))
    triton_code.block_means[(mask.k_blocks, heads, batch)](
        k, v, starts, k_means, v_means, starts.shape[1] if len(starts) > 1 else 0, *k.stride()[:3], *v.stride()[:3],
        ROWS=_MEAN_ROWS, HEAD_DIM=head_dim,
    )  # fmt: skip
    return k_means, v_means, starts, mask.bits.view(torch.int32)


def bonuses_of_blocks(plan: Plan, scale: float, tile: int) -> Float[Tensor, "mask_heads q_blocks padded_k_blocks"]:
    """What is added to a mean's score: the logarithm of its block's tokens, and -inf where a mask keeps the block.

    Args:
        plan: has a mask of blocks of one size.
        scale: what scores are multiplied by, after that, to be powers of two.
        tile: rows are padded to multiples of it, with -inf.
    """
    from calibatt.kernels import triton_code

    mask = plan.mask
    assert isinstance(mask, BlockMask)
    size = mask.block[1]
    last = plan.tokens - (mask.k_blocks - 1) * size
    width = block_count(mask.k_blocks, tile) * tile
    words = mask.bits.view(torch.int32)
    out = torch.empty((mask.heads, mask.q_blocks, width), dtype=torch.float32, device=words.device)
    triton_code.bonuses[(mask.heads * mask.q_blocks,)](
        words, out, mask.k_blocks, words.shape[-1], width, math.log2(size) / scale, math.log2(last) / scale,
        BLOCKS=1 << (width - 1).bit_length(),
    )  # fmt: skip
    return out
