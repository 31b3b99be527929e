"""What methods share that look at blocks of consecutive tokens."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int, Int32, Shaped
from torch import Tensor

from calibatt.kernels import estimates
from calibatt.kernels.geometry import Geometry
from calibatt.kernels.mask import BlockMask, block_count, block_sizes


def pooled(x: Float[Tensor, "heads tokens head_dim"], block: int) -> Float[Tensor, "heads blocks head_dim"]:
    """Mean token of each block, in fp32; a shorter last block is the mean of its own."""
    blocks, rest = divmod(x.shape[1], block)
    # sums half precision in fp32 without a copy of the input
    means: Tensor = x[:, : blocks * block].unflatten(1, (blocks, block)).mean(2, dtype=torch.float32)
    if not rest:
        return means
    return torch.cat((means, x[:, -rest:].mean(1, keepdim=True, dtype=torch.float32)), dim=1)


def self_similarity(
    x: Float[Tensor, "heads tokens head_dim"], block: int, centre: Float[Tensor, "heads head_dim"]
) -> tuple[Float[Tensor, "heads blocks head_dim"], Float[Tensor, "heads blocks"]]:
    """Mean token of each block, and its self-similarity: mean cosine of all pairs of its tokens.

    Args:
        x: the tokens.
        block: tokens of a block; a shorter last one counts its own.
        centre: in fp32, taken off every token first.
    """
    if estimates.takes(x):
        return estimates.alike_blocks(x, block, centre)
    heads, tokens, channels = x.shape
    sizes = block_sizes(tokens, block, x.device).to(torch.float32)[None, :, None]
    centred = torch.nn.functional.pad(
        x.float() - centre[:, None], (0, 0, 0, block_count(tokens, block) * block - tokens)
    )
    blocks = centred.view(heads, -1, block, channels)
    # the mean cosine over all pairs is the squared length of the mean unit vector
    units = torch.nn.functional.normalize(blocks, dim=-1)
    return blocks.sum(2) / sizes, (units.sum(2) / sizes).square().sum(-1)


def block_sums(x: Float[Tensor, "rows tokens"], block: int) -> Float[Tensor, "rows blocks"]:
    """Sums over the blocks of the last dimension, a shorter last one included."""
    blocks, rest = divmod(x.shape[1], block)
    sums = x[:, : blocks * block].unflatten(1, (blocks, block)).sum(-1)
    return torch.cat((sums, x[:, -rest:].sum(1, keepdim=True)), dim=1) if rest else sums


def block_ends(
    tokens: int, block: int, device: torch.device | str = "cpu"
) -> tuple[Int[Tensor, "blocks"], Int[Tensor, "blocks"]]:
    """First and last token of each block.

    Args:
        tokens: of the sequence.
        block: tokens of a block.
        device: of the result.
    """
    first = torch.arange(0, tokens, block, device=device)
    return first, first + block_sizes(tokens, block, device) - 1


def video_blocks(geometry: Geometry, block: int) -> slice:
    """The blocks without any text token, which stand side by side."""
    end = geometry.video_start + geometry.video_tokens
    first = block_count(geometry.video_start, block)
    # a shorter last block is whole where no text follows
    last = block_count(end, block) if end == geometry.tokens else end // block
    return slice(first, max(first, last))


def strided_columns(geometry: Geometry, stride: int, device: torch.device | str = "cpu") -> Int[Tensor, "columns"]:
    """Of every so many columns of the video one: the middles of equal parts of a row, ascending.

    In every row the same, so that what is looked at of different rows lies at the same places.
    """
    columns = geometry.grid[2]
    count = block_count(columns, stride)
    return (2 * torch.arange(count, device=device) + 1) * columns // (2 * count)


def video_queries(geometry: Geometry, stride: int, device: torch.device | str = "cpu") -> Int[Tensor, "queries"]:
    """The tokens of the video in `strided_columns`, ascending."""
    rows = torch.arange(geometry.grid[0] * geometry.grid[1], device=device) * geometry.grid[2]
    columns = strided_columns(geometry, stride, device)
    return (geometry.video_start + rows[:, None] + columns).flatten()


def check_query_stride(stride: int, block_q: int) -> None:
    """Refuse a stride of `strided_columns` by which a whole block may have no query.

    Raises:
        ValueError: one line that says so.
    """
    if stride != 1 and not 2 <= stride <= block_q // 2:
        raise ValueError(
            f"of every so many queries one is looked at, up to half a block's {block_q}: got query_stride={stride}"
        )


def video_table(
    part: Shaped[Tensor, "heads rows columns"], geometry: Geometry, block: tuple[int, int], *, left_over: float
) -> Shaped[Tensor, "heads q_blocks k_blocks"]:
    """What is known of the blocks without text, in a table of the size that the video alone has.

    So prompts of different lengths share tables; `video_part` reads them.

    Args:
        part: of the blocks without text, numbered from the first of them, or of as many as are known of.
        geometry: layout of the tokens.
        block: tokens of a query and of a key block.
        left_over: what stands where nothing is known.
    """
    blocks = [block_count(geometry.video_tokens, size) for size in block]
    table = part.new_full((len(part), *blocks), left_over)
    table[:, : part.shape[1], : part.shape[2]] = part
    return table


def video_part(
    table: Shaped[Tensor, "heads q_blocks k_blocks"], geometry: Geometry, block: tuple[int, int]
) -> Shaped[Tensor, "heads rows columns"]:
    """The part of such a table that this geometry has blocks without text for: a view."""
    rows, columns = (video_blocks(geometry, size) for size in block)
    return table[:, : rows.stop - rows.start, : columns.stop - columns.start]


def text_blocks(
    geometry: Geometry, block: tuple[int, int], device: torch.device | str = "cpu"
) -> Bool[Tensor, "q_blocks k_blocks"]:
    """Blocks with a text token among their queries or keys.

    Args:
        geometry: layout of the tokens.
        block: tokens of a query and of a key block.
        device: where the mask is made.
    """
    text = torch.ones([block_count(geometry.tokens, size) for size in block], dtype=torch.bool, device=device)
    rows, columns = (video_blocks(geometry, size) for size in block)
    text[rows, columns] = False
    return text


def mask_beside_text(
    chosen: Bool[Tensor, "heads rows columns"], geometry: Geometry, block: tuple[int, int]
) -> BlockMask:
    """A choice among the blocks without text, and all blocks that hold any, in both directions.

    Args:
        chosen: of the blocks without text, as `video_blocks` counts them.
        geometry: layout of the tokens.
        block: tokens of a query and of a key block.
    """
    rows, columns = (video_blocks(geometry, size) for size in block)
    keep = text_blocks(geometry, block, chosen.device).expand(len(chosen), -1, -1).clone()
    keep[:, rows, columns] = chosen
    return BlockMask.from_keep(keep, tokens=geometry.tokens, block_q=block[0], block_k=block[1])


def with_text(geometry: Geometry, video: Int[Tensor, "*order_heads video_tokens"]) -> Int32[Tensor, "rows tokens"]:
    """Orders of the video's tokens as orders of all tokens, text where it is.

    Args:
        geometry: layout of the tokens.
        video: permutations of the video tokens, counted from the first of them, head by head; or one for all.
    """
    video = video.view(-1, geometry.video_tokens)
    order = torch.arange(geometry.tokens, dtype=torch.int32, device=video.device).repeat(len(video), 1)
    start = geometry.video_start
    order[:, start : start + geometry.video_tokens] = video + start
    return order
