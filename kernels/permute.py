"""Tokens into another order and back: what methods need that compute blocks of tokens which do not lie side by side."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from calibatt.kernels.mask import block_count

# of one program: 64 rows of 256 bytes are 16 KiB, of which enough are under way at a time to fill the memory's pipes
_ROWS = 64
# the most tensors that one launch moves: queries, keys and values
_MOST = 3


def permute(
    tensors: Sequence[Float[Tensor, "batch heads tokens head_dim"]], order: Int[Tensor, "order_heads tokens"]
) -> list[Float[Tensor, "batch heads tokens head_dim"]]:
    """Tokens of every head in another order: token i of a result is token `order[head, i]` of its tensor.

    Args:
        tensors: up to three of one shape, moved in one launch.
        order: a permutation of each head, or one row that all share.

    Raises:
        ValueError: shapes, dtypes, strides or devices differ, or the order is another sequence's.
    """
    return _moved(tensors, order, back=False)


def unpermute(
    x: Float[Tensor, "batch heads tokens head_dim"], order: Int[Tensor, "order_heads tokens"]
) -> Float[Tensor, "batch heads tokens head_dim"]:
    """Back from the order that `permute` made.

    Raises:
        ValueError: as `permute`.
    """
    return _moved([x], order, back=True)[0]


def _moved(tensors: Sequence[Tensor], order: Tensor, *, back: bool) -> list[Tensor]:
    if not 1 <= len(tensors) <= _MOST:
        raise ValueError(f"one launch moves up to {_MOST} tensors, not {len(tensors)}")
    first = tensors[0]
    heads, tokens = first.shape[1:3]
    for other in tensors[1:]:
        alike = ("shape", "dtype", "device")
        if any(getattr(other, name) != getattr(first, name) for name in alike) or other.stride() != first.stride():
            raise ValueError(
                f"tensors to move differ: {list(first.shape)} {first.dtype} on {first.device}, strides "
                f"{first.stride()}, and {list(other.shape)} {other.dtype} on {other.device}, strides {other.stride()}"
            )
    if order.shape not in ((1, tokens), (heads, tokens)) or order.device != first.device:
        raise ValueError(
            f"an order for {heads} heads × {tokens} tokens on {first.device} is [{heads} or 1, {tokens}]: "
            f"got {list(order.shape)} on {order.device}"
        )
    if first.device.type == "cpu":
        # Triton has no CPU but its interpreter
        index = order.long()[None, :, :, None].expand(first.shape)
        return [torch.empty_like(x).scatter_(2, index, x) if back else x.gather(2, index) for x in tensors]
    return _launch(tensors, order, back=back)


def _launch(tensors: Sequence[Tensor], order: Tensor, *, back: bool) -> list[Tensor]:
    """By the device code; what belongs together has been checked."""
    from calibatt.kernels import triton_code

    first = tensors[0]
    batch, heads, tokens, head_dim = first.shape
    moved = [torch.empty_like(x) for x in tensors]
    # an argument that nothing reads must still be a tensor
    sources, targets = ([*tensors, first, first][:_MOST], [*moved, first, first][:_MOST])
    strides = (*first.stride(), *moved[0].stride())
    triton_code.move_rows[(block_count(tokens, _ROWS), heads, batch * len(tensors))](
        *sources, *targets, order, order.stride(0) if len(order) > 1 else 0, order.stride(1), tokens, *strides,
        COUNT=len(tensors), ROWS=_ROWS, HEAD_DIM=head_dim, BACK=back,
    )  # fmt: skip
    return moved
