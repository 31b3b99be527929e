"""What methods share that look at blocks of consecutive tokens."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int, Int32
from torch import Tensor

from calibatt.kernels.geometry import Geometry
from calibatt.kernels.plan import block_count


def pooled(x: Float[Tensor, "heads tokens head_dim"], block: int) -> Float[Tensor, "heads blocks head_dim"]:
    """Mean token of each block, in fp32; a shorter last block is the mean of its own."""
    blocks, rest = divmod(x.shape[1], block)
    # sums half precision in fp32 without a copy of the input
    means: Tensor = x[:, : blocks * block].unflatten(1, (blocks, block)).mean(2, dtype=torch.float32)
    if not rest:
        return means
    return torch.cat((means, x[:, -rest:].mean(1, keepdim=True, dtype=torch.float32)), dim=1)


def block_sums(x: Float[Tensor, "rows tokens"], block: int) -> Float[Tensor, "rows blocks"]:
    """Sums over the blocks of the last dimension, a shorter last one included."""
    blocks, rest = divmod(x.shape[1], block)
    sums = x[:, : blocks * block].unflatten(1, (blocks, block)).sum(-1)
    return torch.cat((sums, x[:, -rest:].sum(1, keepdim=True)), dim=1) if rest else sums


def video_blocks(geometry: Geometry, block: int) -> slice:
    """The blocks without any text token, which stand side by side."""
    end = geometry.video_start + geometry.video_tokens
    first = block_count(geometry.video_start, block)
    # a shorter last block is whole where no text follows
    last = block_count(end, block) if end == geometry.tokens else end // block
    return slice(first, max(first, last))


def text_blocks(geometry: Geometry, block: tuple[int, int], device: torch.device) -> Bool[Tensor, "q_blocks k_blocks"]:
    """Blocks with a text token among their queries or keys."""
    text = torch.ones([block_count(geometry.tokens, size) for size in block], dtype=torch.bool, device=device)
    rows, columns = (video_blocks(geometry, size) for size in block)
    text[rows, columns] = False
    return text


def with_text(geometry: Geometry, video: Int[Tensor, "video_tokens"]) -> Int32[Tensor, "1 tokens"]:
    """An order of the video's tokens as one of all tokens, text where it is.

    Args:
        geometry: layout of the tokens.
        video: a permutation of the video tokens, counted from the first of them.
    """
    order = torch.arange(geometry.tokens)
    start = geometry.video_start
    order[start : start + geometry.video_tokens] = video + start
    return order[None].to(torch.int32)
