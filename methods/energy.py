"""Attention mass: how much falls in each block, how few keys hold most of it; never is all of the attention held."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from calibatt.kernels import estimates
from calibatt.kernels.mask import block_count, block_sizes
from calibatt.methods.blocks import block_sums

# attention weights held at a time: 256 MiB in fp32, enough to keep a GPU busy with one launch
CHUNK = 2**26
# weights sorted at a time: with their places and running sums 0.8 GB
_SORTED = 2**25


def block_energy(
    q: Float[Tensor, "heads queries head_dim"],
    k: Float[Tensor, "heads tokens head_dim"],
    *,
    block_q: int,
    block_k: int,
    places: Int[Tensor, "queries"] | None = None,
) -> Float[Tensor, "heads q_blocks k_blocks"]:
    """Softmax mass in each key block, mean over the queries of each query block; every row sums to 1.

    A shorter last block is averaged over the queries it has. Computed as `block_mass`.

    Args:
        q, k: what attention sees.
        block_q, block_k: tokens of a query block and of a key block.
        places: as for `block_mass`.
    """
    mass, _ = block_mass(q, k, block=(block_q, block_k), places=places)
    return mean_mass(mass, k.shape[1], block_q, places)


def mean_mass(
    mass: Float[Tensor, "heads q_blocks k_blocks"],
    tokens: int,
    block_q: int,
    places: Int[Tensor, "queries"] | None,
) -> Float[Tensor, "heads q_blocks k_blocks"]:
    """Mass as a mean over the queries of each block; of a block none of whose tokens is one, the same everywhere.

    Args:
        mass: of `block_mass`.
        tokens: of the sequence.
        block_q: tokens of a query block.
        places: as for `block_mass`.
    """
    if places is None:
        return mass / block_sizes(tokens, block_q, mass.device)[:, None]
    ends = torch.arange(mass.shape[1] + 1, device=mass.device) * block_q
    counts = torch.searchsorted(places, ends).diff()[:, None]
    return torch.where(counts > 0, mass / counts.clamp(min=1), 1 / mass.shape[2])


def block_mass(
    q: Float[Tensor, "heads queries channels"],
    k: Float[Tensor, "heads tokens channels"],
    *,
    block: tuple[int, int],
    scale: float | None = None,
    lse: Float[Tensor, "heads queries"] | None = None,
    places: Int[Tensor, "queries"] | None = None,
) -> tuple[Float[Tensor, "heads q_blocks k_blocks"], Float[Tensor, "heads queries"]]:
    """Attention weights summed over the queries and keys of each block, and the log-sum-exp of each query's scores.

    Computed in fp32: half precision on a GPU by a kernel of its own, else some queries of one head at a time.

    Args:
        q, k: what attention sees.
        block: tokens of a query and of a key block.
        scale: of the products, not negative; 1/√channels where None.
        lse: log-sum-exp to weigh by in place of their own, returned as it is.
        places: ascending, which tokens the queries are, where there are not all; None for all.
    """
    heads, queries, channels = q.shape
    tokens = k.shape[1]
    scale = 1 / math.sqrt(channels) if scale is None else scale
    if estimates.takes_mass(q, block[1]):
        return estimates.block_mass(q, k, block=block, scale=scale, lse=lse, places=places)
    block_q, block_k = block
    sums = q.new_empty(heads, queries, dtype=torch.float32) if lse is None else lse
    mass = q.new_zeros(heads, block_count(tokens, block_q), block_count(tokens, block_k), dtype=torch.float32)
    row = (torch.arange(tokens, device=q.device) if places is None else places) // block_q
    for head in range(heads):
        for some in torch.arange(queries, device=q.device).split(max(1, CHUNK // tokens)):
            scores = products(q[head, some], k[head]).mul_(scale)
            # the largest score stands in for a sum that is not known yet, so that no exponential overflows
            reference = scores.amax(-1) if lse is None else lse[head, some]
            weights = block_sums(scores.sub_(reference[:, None]).exp_(), block_k)
            if lse is None:
                total = weights.sum(-1)
                sums[head, some] = reference + total.log()
                weights /= total[:, None]
            # a product of ones and zeros, which is the same at every repetition, as adding by index on a GPU is not
            mass[head] += (row[some] == torch.arange(mass.shape[1], device=q.device)[:, None]).float() @ weights
    return mass, sums


def products(
    x: Float[Tensor, "*batch rows channels"], y: Float[Tensor, "*batch columns channels"]
) -> Float[Tensor, "*batch rows columns"]:
    """Inner products of all pairs, in fp32; there is at most one batch dimension."""
    if x.is_cuda and x.dtype in (torch.bfloat16, torch.float16):
        # tensor cores multiply half precision exactly and add in fp32: nothing is rounded on the way
        return (torch.mm if x.ndim == 2 else torch.bmm)(x, y.mT, out_dtype=torch.float32)
    return x.float() @ y.float().mT


def exponentials(
    q: Float[Tensor, "queries head_dim"], k: Float[Tensor, "tokens head_dim"]
) -> Float[Tensor, "queries tokens"]:
    """Attention weights before they are divided by their sum, in fp32; the largest of each query is 1."""
    scores = products(q, k)
    scores -= scores.amax(-1, keepdim=True)
    scores *= 1 / math.sqrt(q.shape[-1])
    return scores.exp_()


def needed_share(
    q: Float[Tensor, "heads queries head_dim"], k: Float[Tensor, "heads keys head_dim"], coverage: float
) -> Float[Tensor, "heads"]:
    """The smallest share of keys that holds so much of a query's attention, mean over the queries.

    Args:
        q: some queries.
        k: all keys.
        coverage: the share of attention, 0 to 1.
    """
    heads, queries, channels = q.shape
    keys = k.shape[1]
    at_once = max(1, _SORTED // (heads * keys))
    counts = torch.zeros(heads, dtype=torch.int64, device=q.device)
    for first in range(0, queries, at_once):
        weights = (products(q[:, first : first + at_once], k) / math.sqrt(channels)).softmax(-1)
        reached = weights.sort(dim=-1, descending=True).values.cumsum(-1)
        # keys that fall short, and the one that does not
        needed = (reached < coverage * reached[..., -1:]).sum(-1) + 1
        counts += needed.clamp(max=keys).sum(-1)
    return (counts.double() / (queries * keys)).float()
