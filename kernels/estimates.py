"""What methods estimate by, fused for a GPU: mass and likeness of blocks, cosines, clusters, elimination of blocks.

Plain torch passes over memory between a product and what is made of it, which costs many times the product. A method
has the same in torch, for whatever this does not take.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, Int32, Int64
from torch import Tensor

from calibatt.kernels.mask import block_count
from calibatt.kernels.tiles import compute_capability, descriptor, has_tma, tile_of

# log-sum-exps held at a time, 1 GiB in fp32: six heads of a 720p Wan video (75,600 tokens) and blocks of 128 keys
_HELD = 2**28
# the fewest keys of a group: of fewer, the log-sum-exps would be no fewer than the scores by much
_LEAST_KEYS = 8
# heads' channels, which fit all at once; of more, so many are multiplied at a time
_HEAD_DIMS, _STEP = (64, 128), 64
# log-sum-exps that one program of `block_mass` sums at a time, and the most queries among them: 16 KiB, of which
# those of a group lie side by side
_SUMMED, _MOST_QUERIES = 4096, 128
# rows whose weights `block_mass_and_cosines` compares with those of an anchor row at a time: of more, registers spill
_MEMBERS = 2
# tokens that `cluster_means` and `alike_blocks` load at a time: enough under way for clusters of ten to a hundred
_MEAN_ROWS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """How a product of rows and columns is cut: its tile, the warps of a program, and tiles loaded ahead."""

    rows: int
    columns: int
    warps: int
    stages: int


def mass_shape(capability: tuple[int, int], channels: int) -> Shape:
    """Of queries and keys, by compute capability and channels of the product.

    Tensor cores and exponentials take equally long for one tile at 128 channels, so that several tiles must be under
    way on a multiprocessor: one's exponentials hide behind another's product.
    """
    narrow = channels in _HEAD_DIMS
    if capability == (9, 0):
        # tokens of 128 channels, sixteen together: 7 ms in place of 11 with 128 columns, at 75,600 of them on an H100
        return Shape(rows=128, columns=128 if narrow else 256, warps=8, stages=2 if narrow else 4)
    # shared memory of sm86, sm89 and sm120 has no room for more (CUDA's programming guide)
    return Shape(rows=64, columns=128, warps=4 if narrow else 8, stages=2)


def nearest_shape(capability: tuple[int, int]) -> Shape:
    """Of tokens and clusters, by compute capability."""
    if capability == (9, 0):
        # 1,000 clusters, 75,600 tokens: 1.8 ms on an H100, in place of 2.0 with 128 rows
        return Shape(rows=256, columns=64, warps=8, stages=3)
    return Shape(rows=128, columns=64, warps=4, stages=2)


def cosine_shape(capability: tuple[int, int]) -> Shape:
    """Of places in a row and keys, by compute capability: all that fits beside two products; not timed."""
    if capability == (9, 0):
        return Shape(rows=64, columns=64, warps=4, stages=3)
    # with 64 columns, registers of sm80 and sm89 spill at 128 channels (the compiler's own figures, tests)
    return Shape(rows=64, columns=32, warps=4, stages=2)


def takes(x: Tensor) -> bool:
    """Whether tokens are of a kind that the device code computes: half precision, of 64 or 128 channels, on a GPU.

    Args:
        x: tokens, [heads, tokens, head_dim].
    """
    return _on_device(x) and x.shape[-1] in _HEAD_DIMS


def takes_mass(q: Tensor, block_k: int) -> bool:
    """Whether the device code sums attention of these tokens over key blocks of that size.

    Args:
        q: queries, [heads, tokens, channels]; of more channels than a head has, in multiples of 64, where tokens are
            put together.
        block_k: tokens of a key block.
    """
    return _on_device(q) and q.shape[-1] % _STEP == 0 and block_k % _LEAST_KEYS == 0


def takes_rows(gram: Tensor) -> bool:
    """Whether the device code eliminates these rows.

    Args:
        gram: [rows, blocks, blocks] in fp32.
    """
    return gram.is_cuda and _has_triton()


def _on_device(x: Tensor) -> bool:
    return (
        x.is_cuda
        and x.dtype in (torch.bfloat16, torch.float16)
        # older tensor cores have no bf16
        and compute_capability(x.device) >= (8, 0)
        and _has_triton()
    )


def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def block_mass(
    q: Float[Tensor, "heads queries channels"],
    k: Float[Tensor, "heads tokens channels"],
    *,
    block: tuple[int, int],
    scale: float,
    lse: Float[Tensor, "heads queries"] | None = None,
    places: Int[Tensor, "queries"] | None = None,
) -> tuple[Float[Tensor, "heads q_blocks k_blocks"], Float[Tensor, "heads queries"]]:
    """Attention weights summed over the queries and keys of each block, and the log-sum-exp of each query's scores.

    Scores are computed once. Of them stay the log-sum-exps of each query with each group of keys, a block or a part of
    it; a second pass subtracts the query's own and sums. At 75,600 tokens, 40 heads and blocks of 128 keys these are
    7 GB, which an H200 writes and reads in 3 ms; computing all scores again would take it 90.

    Args:
        q, k: what attention sees, where `takes_mass` holds.
        block: tokens of a query and of a key block.
        scale: of the products; not negative.
        lse: log-sum-exp to weigh by in place of their own, returned as it is.
        places: ascending, which tokens the queries are; None for all.
    """
    from calibatt.kernels import estimate_code

    heads, queries, channels = q.shape
    tokens = k.shape[1]
    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
    shape = mass_shape(compute_capability(q.device), channels)
    group = tile_of(block[1], shape.columns)
    step = channels if channels in _HEAD_DIMS else _STEP
    tma = has_tma(q, k)
    sums = q.new_empty(heads, queries, dtype=torch.float32)
    given = sums if lse is None else lse.contiguous()
    blocks = BlockSums(places, tokens, block, group, q.device)
    mass = q.new_empty(heads, *blocks.counts, dtype=torch.float32)
    logsums = blocks.logsums(heads, queries)
    for some in heads_at_once(heads, len(logsums)):
        some_q, some_k = q[some], k[some]
        if tma:
            some_q, some_k = descriptor(some_q, shape.rows, step), descriptor(some_k, shape.columns, step)
        estimate_code.group_logsums[(block_count(queries, shape.rows), len(sums[some]))](
            some_q, some_k, logsums, sums[some], scale * math.log2(math.e), queries, tokens, blocks.groups,
            *q.stride()[:2], *k.stride()[:2], TILE_Q=shape.rows, TILE_K=shape.columns, GROUP=group, CHANNELS=channels,
            STEP=step, TMA=tma, num_warps=shape.warps, num_stages=shape.stages,
        )  # fmt: skip
        blocks.sum(logsums, given[some], mass[some])
    return mass, sums if lse is None else lse


def block_mass_and_cosines(
    q: Float[Tensor, "heads queries head_dim"],
    k: Float[Tensor, "heads tokens head_dim"],
    *,
    grid: tuple[int, int, int],
    nearest_anchor: Sequence[int],
    block: tuple[int, int],
    places: Int[Tensor, "queries"],
) -> tuple[Float[Tensor, "heads q_blocks k_blocks"], Float[Tensor, "heads queries"]]:
    """As `block_mass`, and the cosine similarity of each query's attention weights with those in its anchor row.

    Scores are computed once for both, those of anchor rows once for every few rows that they are compared with. Weights
    are exponentials of scores, and their sums cancel out of a cosine: what is left are three inner products, added up
    while the keys go by. So nothing is held but the tile at hand, and what `block_mass` holds.

    Args:
        q, k: what attention sees, where `takes` and `takes_mass` hold; queries frame by frame, row by row.
        grid: frames, rows and columns of the queries.
        nearest_anchor: of each row the one that it is compared with, at the same frame and column; an anchor row is its
            own.
        block, places: as for `block_mass`.
    """
    from calibatt.kernels import estimate_code

    heads, queries, head_dim = q.shape
    tokens = k.shape[1]
    frames, rows, columns = grid
    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
    shape = cosine_shape(compute_capability(q.device))
    group = tile_of(block[1], shape.columns)
    bands = _bands(tuple(nearest_anchor), q.device)
    sums, cosine = q.new_empty(2, heads, queries, dtype=torch.float32)
    blocks = BlockSums(places, tokens, block, group, q.device)
    mass = q.new_empty(heads, *blocks.counts, dtype=torch.float32)
    logsums = blocks.logsums(heads, queries)
    for some in heads_at_once(heads, len(logsums)):
        launch = (block_count(frames * columns, shape.rows), len(bands), len(sums[some]))
        estimate_code.logsums_and_cosines[launch](
            q[some], k[some], bands, logsums, sums[some], cosine[some], math.log2(math.e) / math.sqrt(head_dim),
            frames * columns, rows, columns, tokens, blocks.groups, *q.stride()[:2], *k.stride()[:2],
            TILE_Q=shape.rows, TILE_K=shape.columns, GROUP=group, MEMBERS=_MEMBERS, HEAD_DIM=head_dim,
            num_warps=shape.warps, num_stages=shape.stages,
        )  # fmt: skip
        blocks.sum(logsums, sums[some], mass[some])
    return mass, cosine


class BlockSums:
    """The second pass of `block_mass`: sums over blocks, of log-sum-exps of groups of keys.

    Args:
        places: ascending, which tokens the queries are; None for all.
        tokens: of the sequence.
        block: tokens of a query and of a key block.
        group: keys of a group.
        device: of the queries.

    Attributes:
        counts: of query and of key blocks.
        groups: of keys.
    """

    def __init__(
        self, places: Tensor | None, tokens: int, block: tuple[int, int], group: int, device: torch.device
    ) -> None:
        self.counts = (block_count(tokens, block[0]), block_count(tokens, block[1]))
        self.groups = block_count(tokens, group)
        self._parts, self._block_q = block[1] // group, block[0]
        # the first query of each block, and the one behind the last
        first = torch.arange(self.counts[0] + 1, device=device) * block[0]
        starts = first.clamp(max=tokens) if places is None else torch.searchsorted(places, first)
        self._starts: Int32[Tensor, "q_blocks+1"] = starts.to(torch.int32)

    def logsums(self, heads: int, queries: int) -> Float[Tensor, "heads_at_once groups queries"]:
        """Room for as many heads as may be held."""
        at_once = min(heads, max(1, _HELD // (self.groups * queries)))
        return torch.empty(at_once, self.groups, queries, device=self._starts.device)

    def sum(
        self,
        logsums: Float[Tensor, "heads_at_once groups queries"],
        lse: Float[Tensor, "heads queries"],
        mass: Float[Tensor, "heads q_blocks k_blocks"],
    ) -> None:
        """Write the mass of some heads, the first of those whose log-sum-exps there are."""
        import triton

        from calibatt.kernels import estimate_code

        rows = min(_MOST_QUERIES, triton.next_power_of_2(self._block_q))
        columns = _SUMMED // rows
        estimate_code.block_mass[(self.counts[0], block_count(self.counts[1], columns), len(mass))](
            logsums, lse, self._starts, mass, lse.shape[1], self.groups, *self.counts, PARTS=self._parts, ROWS=rows,
            COLUMNS=columns,
        )  # fmt: skip


def heads_at_once(heads: int, at_once: int) -> list[slice]:
    """Heads in parts of so many."""
    return [slice(first, first + at_once) for first in range(0, heads, at_once)]


@functools.lru_cache(maxsize=16)
def _bands(nearest_anchor: tuple[int, ...], device: torch.device) -> Int32[Tensor, "bands row_count"]:
    """Of every program an anchor row, whether it is the first with that, and the rows that it compares; -1 for none.

    Kept, since to send them is to wait for the device.
    """
    bands = []
    for anchor in dict.fromkeys(nearest_anchor):
        members = [row for row, own in enumerate(nearest_anchor) if own == anchor and row != anchor]
        # an anchor that no other row is near to has a program too
        for first in range(0, max(1, len(members)), _MEMBERS):
            some = members[first : first + _MEMBERS]
            bands.append([anchor, int(first == 0), *some, *[-1] * (_MEMBERS - len(some))])
    return torch.tensor(bands, dtype=torch.int32, device=device)


def nearest(
    x: Float[Tensor, "heads tokens head_dim"],
    directions: Float[Tensor, "heads clusters head_dim"],
    offsets: Float[Tensor, "heads clusters"],
) -> Int64[Tensor, "heads tokens"]:
    """The cluster j of each token with the largest x · directions[j] + offsets[j], of equal ones the first.

    Args:
        x: the tokens, where `takes` holds.
        directions: of the tokens' type.
        offsets: in fp32.
    """
    from calibatt.kernels import estimate_code

    heads, tokens, head_dim = x.shape
    x = x if x.stride(-1) == 1 else x.contiguous()
    shape = nearest_shape(compute_capability(x.device))
    labels = torch.empty(heads, tokens, dtype=torch.int64, device=x.device)
    estimate_code.nearest[(block_count(tokens, shape.rows), heads)](
        x, directions.contiguous(), offsets.contiguous(), labels, tokens, directions.shape[1], *x.stride()[:2],
        TILE=shape.rows, CLUSTERS=shape.columns, HEAD_DIM=head_dim, num_warps=shape.warps, num_stages=shape.stages,
    )  # fmt: skip
    return labels


def cluster_means(
    x: Float[Tensor, "heads tokens head_dim"],
    order: Int64[Tensor, "heads tokens"],
    sizes: Int[Tensor, "heads clusters"],
    before: Float[Tensor, "heads clusters head_dim"],
) -> Float[Tensor, "heads clusters head_dim"]:
    """The mean token of each cluster in fp32, always added in the same order.

    Tokens come cluster by cluster: each is read once. As products of ones and zeros with the tokens, on tensor cores,
    the sums would cost as much as finding the nearest centroids; added to memory as they come, by atomics, they cost
    more, and no two runs would give the same.

    Args:
        x: the tokens, where `takes` holds.
        order: the tokens cluster by cluster.
        sizes: tokens of each cluster.
        before: in fp32, what clusters without tokens get.
    """
    from calibatt.kernels import estimate_code

    heads, clusters, head_dim = before.shape
    x = x if x.stride(-1) == 1 else x.contiguous()
    means = torch.empty_like(before, memory_format=torch.contiguous_format)
    estimate_code.cluster_means[(clusters, heads)](
        x, order.contiguous(), sizes.contiguous(), sizes.flatten().cumsum(0), before.contiguous(), means, clusters,
        x.shape[1], *x.stride()[:2], ROWS=_MEAN_ROWS, HEAD_DIM=head_dim,
    )  # fmt: skip
    return means


def alike_blocks(
    x: Float[Tensor, "heads tokens head_dim"], block: int, centre: Float[Tensor, "heads head_dim"]
) -> tuple[Float[Tensor, "heads blocks head_dim"], Float[Tensor, "heads blocks"]]:
    """The mean token of each block, and how alike its tokens are: the mean cosine over all pairs, each with itself too.

    The mean cosine over all pairs is the squared length of the mean unit vector, so each token is read once.

    Args:
        x: the tokens, where `takes` holds.
        block: tokens of a block; a shorter last one counts its own.
        centre: in fp32, taken off every token before.
    """
    from calibatt.kernels import estimate_code

    heads, tokens, head_dim = x.shape
    x = x if x.stride(-1) == 1 else x.contiguous()
    means = x.new_empty(heads, block_count(tokens, block), head_dim, dtype=torch.float32)
    alike = torch.empty_like(means[..., 0], memory_format=torch.contiguous_format)
    estimate_code.alike_blocks[(means.shape[1], heads)](
        x, centre.contiguous(), means, alike, tokens, means.shape[1], *x.stride()[:2], BLOCK=block, ROWS=_MEAN_ROWS,
        HEAD_DIM=head_dim,
    )  # fmt: skip
    return means, alike


def eliminate(
    gram: Float[Tensor, "rows blocks blocks"],
    mass: Float[Tensor, "rows blocks"],
    whole: Float[Tensor, "rows"],
    *,
    least: float,
) -> Float[Tensor, "rows blocks"]:
    """Greedy backward elimination of the blocks of each row, a program a row; see `budget.importance.eliminated`.

    As launches, a hundred blocks would be a thousand of them.

    Args:
        gram, mass, whole: in fp32, where `takes_rows` holds.
        least: mass that is counted as left at least.
    """
    import triton

    from calibatt.kernels import estimate_code

    rows, blocks = mass.shape
    grown = torch.empty_like(mass, memory_format=torch.contiguous_format)
    estimate_code.eliminate[(rows,)](
        gram.contiguous(), mass.contiguous(), whole.contiguous(), grown, blocks, least,
        BLOCKS=triton.next_power_of_2(blocks),
    )  # fmt: skip
    return grown
