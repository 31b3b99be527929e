"""Dense attention that sums the weights of each block on the way, so that calibrating by mass takes no second pass.

A softmax sums each tile's weights anyway. Stored as log-sum-exps of every query with every group of keys, they become
masses once a query's own log-sum-exp is known (`estimates.BlockSums`): no score is computed twice.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from calibatt.kernels.base import Task
from calibatt.kernels.estimates import BlockSums, heads_at_once
from calibatt.kernels.gluon_hopper import GROUP, Gluon

_GLUON = Gluon()


def takes_weighed(q: Tensor, block: tuple[int, int]) -> bool:
    """Whether `attend_and_weigh` takes inputs and blocks: those of the Gluon kernel, one sample.

    Args:
        q: the queries, [batch, heads, tokens, head_dim].
        block: tokens of a query and of a key block.
    """
    task = Task(device=q.device, dtype=q.dtype, head_dim=q.shape[-1])
    return len(q) == 1 and block[1] % GROUP == 0 and _GLUON.refusal(task) is None


def attend_and_weigh(
    q: Float[Tensor, "1 heads tokens head_dim"],
    k: Float[Tensor, "1 heads tokens head_dim"],
    v: Float[Tensor, "1 heads tokens head_dim"],
    *,
    block: tuple[int, int],
) -> tuple[Float[Tensor, "1 heads tokens head_dim"], Float[Tensor, "heads q_blocks k_blocks"]]:
    """Dense attention, and its weights summed over the queries and keys of each block, as `methods.energy.block_mass`.

    Args:
        q, k, v: what attention sees, where `takes_weighed` holds.
        block: tokens of a query and of a key block.
    """
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    _, heads, tokens, _ = q.shape
    out = torch.empty_like(q)
    lse = q.new_empty(1, heads, tokens, dtype=torch.float32)
    blocks = BlockSums(None, tokens, block, GROUP, q.device)
    mass = q.new_empty(heads, *blocks.counts, dtype=torch.float32)
    logsums = blocks.logsums(heads, tokens)
    for some in heads_at_once(heads, len(logsums)):
        part = (slice(None), some)
        _GLUON.attend_with_logsums(q[part], k[part], v[part], out[part], lse[part], logsums)
        blocks.sum(logsums, lse[0, some], mass[some])
    return out, mass
