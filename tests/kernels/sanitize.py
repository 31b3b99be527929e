"""Every path of our own kernels on small shapes, for compute-sanitizer.

No test: what `compute-sanitizer --tool memcheck python tests/kernels/sanitize.py` says is what matters. Without a GPU
the Triton kernels run in the interpreter.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from calibatt.kernels import estimates
from calibatt.kernels.catalogue import KERNELS
from calibatt.kernels.fused import FusedKernel
from calibatt.kernels.geometry import Geometry
from calibatt.kernels.mask import BlockMask, VariableBlockMask, block_count
from calibatt.kernels.plan import Plan, RowReuse, Skip, TokenOrder
from calibatt.kernels.weighed import attend_and_weigh, takes_weighed
from calibatt.methods.blocks import self_similarity
from calibatt.methods.clusters import assign
from calibatt.methods.energy import block_mass

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# a last block that is not whole, and an empty row
GRID, HEADS = (4, 5, 15), 3


def plans(geometry: Geometry) -> Iterator[Plan]:
    """Every kind of head, fixed and variable blocks, low blocks, INT8."""
    tokens = geometry.tokens
    for block in ((128, 128), (128, 64), (64, 64)):
        keep = torch.rand(HEADS, *(block_count(tokens, size) for size in block)) < 0.5
        keep[0, 1] = False
        mask = BlockMask.from_keep(keep, tokens=tokens, block_q=block[0], block_k=block[1])
        masked = Plan.masked(mask, HEADS)
        yield masked
        yield Plan(
            tokens=tokens, kinds=("masked", "dense", "reused"), mask=mask,
            reuse=RowReuse.of_anchor_rows(geometry, [1, 3]),
        )  # fmt: skip
        yield replace(masked, int8=(128, 64))
        for leave in (True, False):
            yield Plan.masked(mask, HEADS, skip=Skip.of(mask, HEADS, threshold=-1.0, leave=leave))
    sizes = torch.tensor([[100, 0, 150, 1, 49]]).expand(HEADS, -1).contiguous()
    clusters = VariableBlockMask.from_keep(torch.rand(HEADS, 5, 5) < 0.6, q_sizes=sizes, k_sizes=sizes, tokens=tokens)
    yield Plan.masked(clusters, HEADS, TokenOrder.of_all(torch.rand(HEADS, tokens).argsort(-1)))


def attend(q: Tensor, k: Tensor, v: Tensor, plan: Plan) -> int:
    """Calls of our own kernels that compute the plan; their outputs have no NaN."""
    calls = 0
    for kernel in (kernel for kernel in KERNELS.values() if isinstance(kernel, FusedKernel)):
        try:
            out = kernel.attend(q, k, v, plan)
        except ValueError:
            # not this kernel's
            continue
        assert out.isfinite().all(), (kernel.name, plan.kinds)
        calls += 1
    return calls


def estimate(q: Tensor, k: Tensor) -> None:
    """Fused estimates, which run on a GPU alone."""
    assert estimates.takes(q)
    if takes_weighed(q[None], (128, 128)):
        attend_and_weigh(q[None], k[None], k[None], block=(128, 128))
    # eight tokens put together
    block_mass(q[:, :296].reshape(HEADS, 37, -1), k[:, :296].reshape(HEADS, 37, -1), block=(16, 16))
    for block in ((128, 128), (64, 48)):
        block_mass(q, k, block=block)
    self_similarity(q, 80, k.float().mean(1))
    centroids = torch.randn(HEADS, 7, q.shape[-1], device=DEVICE)
    assign(q, centroids, centroids.to(q.dtype), centroids.square().sum(-1) / -2)


def share_out(head_dim: int) -> int:
    """Plans so long that the keys of the last tiles are shared out, which takes the interpreter minutes."""
    geometry = Geometry(grid=(16, 8, 17), heads=HEADS, head_dim=head_dim)
    q, k, v = torch.randn(3, 1, HEADS, geometry.tokens, head_dim).to(DEVICE, torch.float16)
    reuse = RowReuse.of_anchor_rows(geometry, [1, 5])
    mixed = Plan(tokens=geometry.tokens, kinds=("reused", "dense", "reused"), reuse=reuse)
    return sum(attend(q, k, v, plan.to(DEVICE)) for plan in (Plan.dense(geometry), mixed))


if __name__ == "__main__":
    torch.manual_seed(0)
    calls = 0
    for head_dim in (64, 128):
        geometry = Geometry(grid=GRID, heads=HEADS, head_dim=head_dim)
        q, k, v = torch.randn(3, 1, HEADS, geometry.tokens, head_dim).to(DEVICE, torch.float16)
        calls += sum(attend(q, k, v, plan.to(DEVICE)) for plan in plans(geometry))
        if DEVICE == "cuda":
            estimate(q[0], k[0])
            calls += share_out(head_dim)
    print(f"{calls} calls of kernels")
