"""How much each block matters to the output, in a byte."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Float64, Int, UInt8
from torch import Tensor
from torch.nn.functional import pad

from calibatt.kernels import estimates
from calibatt.kernels.mask import block_count, block_sizes
from calibatt.methods.energy import CHUNK, exponentials

# Importances are bytes: 0 is nothing, 1 to 254 are powers of two in quarters, 255 is a block that is always computed.
LEVELS = 256
ALWAYS = LEVELS - 1
# a byte is off by 2^(1/8), 9 %, at most: less than what looking at some queries only makes of it (see the tests)
PER_OCTAVE = 4
# level 1 is 2⁻⁴⁸, the square of fp32's rounding: smaller changes of an output are lost in it; level 254 is 2^15.25
_LEAST = -48.0
# attention that counts as left at least: several times what fp32 rounds a sum of a few hundred masses by
LEAST_LEFT = 1e-4


def importance(
    samples: Sequence[Sample],
    *,
    block: tuple[int, int],
    queries: int,
    together: bool = True,
) -> Float[Tensor, "heads rows columns"]:
    """How much outputs move without each block: squared, mean over its queries, and relative to the layer's outputs.

    Of several samples, the mean of all: a block is left out of all of them, or of none. Computed in fp32, some query
    blocks of one head at a time.

    Args:
        samples: of one site, each with as many rows and columns as the others.
        block: tokens of a query and of a key block.
        queries: of each query block that are looked at.
        together: whether a block counts beside those that are left out before it, by `eliminated`; otherwise alone, to
            first order in its attention.
    """
    heads, _, channels = samples[0].q.shape
    rows, columns = samples[0].size(block)
    blocks = max(block_count(len(sample.k[0]), block[1]) for sample in samples)
    width = max(min(queries, block[0]) * max(block[1], channels), blocks)
    at_once = max(1, CHUNK // (blocks * width))
    moved = samples[0].q.new_empty(heads, rows, columns, dtype=torch.float32)
    squares = moved.new_zeros(heads, rows)
    for head in range(heads):
        looks = [_Look(sample, head, block, queries) for sample in samples]
        for some in torch.arange(rows, device=moved.device).split(at_once):
            # added up one by one: inner products of all samples are as large as the weights
            sums = functools.reduce(_added, (look.moved(some, together) for look in looks))
            each, mass, whole = (total / len(looks) for total in sums)
            moved[head, some] = eliminated(each, mass, whole) if together else each
            squares[head, some] = whole
    # a shorter row has fewer queries in it
    counts = block_sizes(samples[0].q.shape[1], block[0], moved.device)[samples[0].rows].clamp(max=queries)
    mean = (squares * counts).sum() / (heads * counts.sum())
    return moved / mean.clamp(min=torch.finfo(mean.dtype).tiny)


def _all_blocks() -> slice:
    return slice(None)


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """What attention sees of one sample, and which blocks of it can be left out; the others count as computed.

    Args:
        q, k, v: queries, keys and values.
        rows, columns: blocks of queries and of keys; all of them by default.
    """

    q: Float[Tensor, "heads tokens head_dim"]
    k: Float[Tensor, "heads tokens head_dim"]
    v: Float[Tensor, "heads tokens head_dim"]
    rows: slice = field(default_factory=_all_blocks)
    columns: slice = field(default_factory=_all_blocks)

    def size(self, block: tuple[int, int]) -> tuple[int, int]:
        """Of rows and of columns, how many there are."""
        counts = (block_count(self.q.shape[1], size) for size in block)
        rows, columns = (len(range(n)[part]) for n, part in zip(counts, (self.rows, self.columns), strict=True))
        return rows, columns


_Movements = tuple[Float[Tensor, "rows ..."], Float[Tensor, "rows columns"], Float[Tensor, "rows"]]


def _added(one: _Movements, other: _Movements) -> _Movements:
    return one[0] + other[0], one[1] + other[1], one[2] + other[2]


class _Look:
    """Looks at some queries of each row of one head of a sample."""

    def __init__(self, sample: Sample, head: int, block: tuple[int, int], queries: int) -> None:
        self._q, self._k, v = sample.q[head], sample.k[head], sample.v[head].float()
        self._columns = sample.columns
        tokens, channels = v.shape
        place, real = looked_at(tokens, block[0], queries, v.device)
        self._place, self._real = place[sample.rows], real[sample.rows]
        self._left_over = -tokens % block[1]
        self._values = pad(v, (0, 0, 0, self._left_over)).view(-1, block[1], channels)

    def moved(self, some: Int[Tensor, "rows"], together: bool) -> _Movements:
        """Of some rows, means over their queries.

        Returns:
            Inner products of the movements a_c − p_c·o of each two blocks, or, where blocks do not count together, of
            each with itself; the attention p to each block; and the squared outputs.
        """
        counted = self._real[some]
        share = counted / counted.sum(-1, keepdim=True)
        weights = exponentials(self._q[self._place[some].flatten()], self._k)
        weights /= weights.sum(-1, keepdim=True)
        by_block = pad(weights, (0, self._left_over)).view(len(weights), *self._values.shape[:2]).transpose(0, 1)
        parts = by_block @ self._values
        out, mass = parts.sum(0), by_block.sum(-1)
        # in place, since the parts are as large as the weights
        parts = parts.addcmul_(mass[..., None], out, value=-1)[self._columns]
        whole = (out.square().sum(-1).view(share.shape) * share).sum(-1)
        mean_mass = (mass[self._columns].view(len(parts), *share.shape) * share).sum(-1).T
        if not together:
            return (parts.square_().sum(-1).view(len(parts), *share.shape) * share).sum(-1).T, mean_mass, whole
        each = parts.view(len(parts), *share.shape, -1).mul_(share.sqrt()[..., None])
        by_row = each.transpose(0, 1).flatten(2)
        return by_row @ by_row.mT, mean_mass, whole


def eliminated(
    gram: Float[Tensor, "rows blocks blocks"], mass: Float[Tensor, "rows blocks"], whole: Float[Tensor, "rows"]
) -> Float[Tensor, "rows blocks"]:
    """By how much a row's error grows with each block, when the one that costs least is left out again and again.

    Greedy backward elimination. Where S is left out and the rest renormalised, an output moves by Σ_{c∈S} (a_c − p_c·o)
    over the attention that is left, 1 − Σ p_c: movements of several blocks add up or cancel. No block costs less than
    one before it: a cheaper one that comes later could only be left out with that.

    Args:
        gram: inner products of the movements a_c − p_c·o of each two blocks, mean over the queries of the row.
        mass: attention p to each block, likewise.
        whole: squared outputs, likewise: the error without any block.
    """
    if estimates.takes_rows(gram):
        return estimates.eliminate(gram, mass, whole, least=LEAST_LEFT)
    row = torch.arange(len(mass), device=mass.device)
    own = gram.diagonal(dim1=1, dim2=2)
    product, grown, gone = torch.zeros_like(mass), torch.empty_like(mass), torch.zeros_like(mass, dtype=torch.bool)
    length, error, most, lost = torch.zeros(4, len(mass), device=mass.device)
    for _ in range(mass.shape[1] - 1):
        lengths = length[:, None] + 2 * product + own
        left = (1 - lost[:, None] - mass).clamp(min=LEAST_LEFT)
        errors = (lengths / left.square()).masked_fill_(gone, torch.inf)
        next_error, block = errors.min(-1)
        most = torch.maximum(most, next_error - error)
        grown[row, block], gone[row, block] = most, True
        error, length, lost = next_error, lengths[row, block], lost + mass[row, block]
        product += gram[row, block]
    return torch.where(gone, grown, torch.maximum(most, whole - error)[:, None])


def looked_at(
    tokens: int, block: int, queries: int, device: torch.device | str = "cpu"
) -> tuple[Int[Tensor, "blocks queries"], Bool[Tensor, "blocks queries"]]:
    """Evenly spaced tokens of each block, the middles of equal parts of it, and which of them are there.

    Args:
        tokens: of the sequence.
        block: tokens of a block.
        queries: wanted of each block; one that is shorter has all of its own, and fills up with its last.
        device: of the result.
    """
    sizes = block_sizes(tokens, block, device)[:, None]
    count = sizes.clamp(max=queries)
    number = torch.arange(min(queries, block), device=device)
    within = (2 * number + 1) * sizes // (2 * count)
    first = torch.arange(0, tokens, block, device=device)[:, None]
    return first + within.minimum(sizes - 1), number < count


def to_levels(importance: Float[Tensor, "heads q_blocks k_blocks"]) -> UInt8[Tensor, "heads q_blocks k_blocks"]:
    """The nearest level: 0 below the least that counts, ALWAYS for what is infinitely important."""
    level = ((importance.log2() - _LEAST) * PER_OCTAVE).round() + 1
    return level.clamp(0, ALWAYS - 1).masked_fill(importance.isinf(), ALWAYS).to(torch.uint8)


def level_values() -> Float64[Tensor, "levels"]:
    """What each level stands for, in fp64; infinity for ALWAYS."""
    value = torch.exp2(torch.arange(-1, LEVELS - 1, dtype=torch.float64) / PER_OCTAVE + _LEAST)
    value[0], value[ALWAYS] = 0, torch.inf
    return value


def to_importance(levels: UInt8[Tensor, "heads q_blocks k_blocks"]) -> Float64[Tensor, "heads q_blocks k_blocks"]:
    """What levels stand for, in fp64; infinity for ALWAYS."""
    return level_values().to(levels.device)[levels.int()]
