"""What kernels that compute all heads in one launch have besides: log-sum-exps, and where they write."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from calibatt.kernels import oracle
from calibatt.kernels.base import Task
from calibatt.kernels.catalogue import KERNELS
from calibatt.kernels.fused import FusedKernel
from calibatt.kernels.geometry import Geometry
from calibatt.kernels.mask import BlockMask, block_count
from calibatt.kernels.plan import Plan, RowReuse

GEOMETRY = Geometry(grid=(4, 9, 9), heads=3, head_dim=64)
BLOCK = 64
PLACES = [
    pytest.param(("cpu", torch.float32), id="cpu"),
    pytest.param(("cuda", torch.bfloat16), id="cuda", marks=pytest.mark.gpu),
]


Place = tuple[str, torch.dtype]
Case = tuple[FusedKernel, Tensor, Tensor, Tensor, Plan]


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest) -> Place:
    chosen: Place = request.param
    return chosen


@pytest.fixture(params=[name for name, kernel in KERNELS.items() if isinstance(kernel, FusedKernel)])
def case(request: pytest.FixtureRequest, place: Place) -> Case:
    """A kernel, inputs, and a plan with a head of each kind, whose second row of blocks has no key."""
    kernel, (device, dtype), tokens = KERNELS[request.param], place, GEOMETRY.tokens
    assert isinstance(kernel, FusedKernel)
    refusal = kernel.refusal(
        Task(device=torch.device(device), dtype=dtype, head_dim=GEOMETRY.head_dim, block=(BLOCK, BLOCK))
    )
    if refusal is not None:
        pytest.skip(refusal.reason)
    generator = torch.Generator().manual_seed(1)
    blocks = block_count(tokens, BLOCK)
    keep = torch.rand((3, blocks, blocks), generator=generator) < 0.5
    keep[:, 1] = False
    plan = Plan(
        tokens=tokens,
        kinds=("masked", "reused", "dense"),
        mask=BlockMask.from_keep(keep, tokens=tokens, block_q=BLOCK, block_k=BLOCK).to(device),
        reuse=RowReuse.of_anchor_rows(GEOMETRY, (1, 5)).to(device),
    )
    shape = (1, GEOMETRY.heads, tokens, GEOMETRY.head_dim)
    q, k, v = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(3))
    return kernel, q, k, v, plan


def test_the_log_sum_exp_is_that_of_the_keys_a_query_sees(case: Case) -> None:
    kernel, q, k, v, plan = case
    out, lse = kernel.attend_with_lse(q, k, v, plan)
    exact = oracle.attend(q, k, v, plan)
    assert (out.double() - exact).abs().max() <= oracle.error_budget(q, k, v, plan, exact)
    scores = q.double() @ k.double().mT / math.sqrt(GEOMETRY.head_dim)
    assert plan.reuse is not None
    assert plan.mask is not None
    seen = plan.mask.seen(0, torch.arange(GEOMETRY.tokens, device=q.device))
    expected = torch.stack(
        (
            scores[0, 0].masked_fill(~seen, -math.inf).logsumexp(-1),
            scores[0, 1, plan.reuse.computed[plan.reuse.source]].logsumexp(-1),
            scores[0, 2].logsumexp(-1),
        )
    )
    # the second row of blocks of the first head has no key
    assert bool(lse[0, 0, BLOCK : 2 * BLOCK].isneginf().all())
    torch.testing.assert_close(lse[0].double(), expected, rtol=1e-5, atol=1e-5)


def test_nothing_is_written_outside_the_output(case: Case) -> None:
    kernel, q, k, v, plan = case
    heads, tokens, head_dim = q.shape[1:]
    # room of a whole tile before and behind the tokens of every head
    room = 128
    around = q.new_full((1, heads, tokens + 2 * room, head_dim), 7.0)
    out = around[:, :, room : room + tokens]
    sums_around = q.new_full((heads * tokens + 2 * room,), 7.0, dtype=torch.float32)
    lse = sums_around[room:-room].view(1, heads, tokens)
    kernel._launch(q, k, v, out, lse, plan)
    expected, expected_lse = kernel.attend_with_lse(q, k, v, plan)
    assert torch.equal(out, expected)
    assert torch.equal(lse, expected_lse)
    assert bool((around[:, :, :room] == 7).all() and (around[:, :, room + tokens :] == 7).all())
    assert bool((sums_around[:room] == 7).all() and (sums_around[-room:] == 7).all())


def test_what_a_sanitizer_is_to_look_at_runs() -> None:
    code = Path(__file__).with_name("sanitize.py")
    run = subprocess.run([sys.executable, str(code)], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    # 16 plans at two head dims, each by one kernel at least
    assert int(run.stdout.split()[0]) >= 32
