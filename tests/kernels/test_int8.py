"""Queries and keys in INT8: integers worked out by hand, and that oracle and kernel multiply the same ones."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from calibatt.kernels import oracle, triton_sparse
from calibatt.kernels.base import Kernel, Task
from calibatt.kernels.catalogue import KERNELS
from calibatt.kernels.geometry import Geometry
from calibatt.kernels.int8 import dequantise, key_mean, quantise
from calibatt.kernels.mask import BlockMask
from calibatt.kernels.plan import Plan, RowReuse, Skip, TokenOrder

# 126 tokens: neither 64 nor 32 divides them
GEOMETRY = Geometry(grid=(2, 7, 9), heads=3, head_dim=64)
DEVICE, DTYPE = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn((3, 1, 3, GEOMETRY.tokens, 64), generator=generator).to(DEVICE, DTYPE)
    # what all keys have in common is larger than what tells them apart, as in models
    return 2 * q, k + 10, v


def mask(block_q: int, block_k: int) -> BlockMask:
    rows, columns = -(-GEOMETRY.tokens // block_q), -(-GEOMETRY.tokens // block_k)
    keep = torch.rand((3, rows, columns), generator=torch.Generator().manual_seed(1)) < 0.5
    keep[..., 0] = True
    return BlockMask.from_keep(keep, tokens=GEOMETRY.tokens, block_q=block_q, block_k=block_k).to(DEVICE)


def test_the_largest_of_a_block_is_127_and_the_last_block_may_be_shorter() -> None:
    q = torch.tensor([254.0, -2.0, 1.1, 0.0, -1270.0]).view(1, 1, 5, 1)
    values, scales, _, _ = quantise(q, q, (2, 5))
    # scales of 2, 1.1 / 127 and 10
    torch.testing.assert_close(scales, torch.tensor([[[2.0, 1.1 / 127, 10.0]]]))
    assert values.flatten().tolist() == [127, -1, 127, 0, -127]
    torch.testing.assert_close(
        dequantise(values, scales, 2).flatten(), torch.tensor([254, -2, 1.1, 0, -1270]).double(), atol=1e-6, rtol=0
    )


def test_keys_lose_the_mean_of_all_tokens_and_queries_do_not() -> None:
    k = torch.tensor([[101.0, 7.0], [99.0, 7.0], [102.0, 7.0], [98.0, 7.0]])[None, None]
    q_values, _, k_values, scales = quantise(k, k, (4, 2))
    # ±1 and ±2 beside the mean of 100; a channel that all share is gone
    assert k_values[0, 0].tolist() == [[127, 0], [-127, 0], [127, 0], [-127, 0]]
    torch.testing.assert_close(scales.flatten() * 127, torch.tensor([1.0, 2.0]))
    assert q_values[0, 0, 0].tolist() == [round(101 / 102 * 127), round(7 / 102 * 127)]


def test_a_block_of_zeros_stays_zero_and_nan_does_not_vanish() -> None:
    q = torch.zeros(1, 1, 4, 2)
    q[0, 0, 3] = torch.nan
    values, scales, _, _ = quantise(q, q, (2, 2))
    restored = dequantise(values, scales, 2)[0, 0]
    assert not restored[:2].any()
    assert restored[3].isnan().all()


@pytest.mark.parametrize("block", [128, 64, 48])
def test_the_kernel_quantises_to_the_same_integers_and_scales(block: int) -> None:
    # tokens before heads in memory, as models hand them over
    q, k, _ = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs())
    k[0, 1, :50] = key_mean(k)[0, 1]
    k[0, 2, 125, 7] = torch.nan
    q_values, q_scales, k_values, k_scales = quantise(q, k, (block, block))
    for x, mean, values, scales in ((q, None, q_values, q_scales), (k, key_mean(k), k_values, k_scales)):
        found, found_scales = triton_sparse._quantised(x, block, mean)
        torch.testing.assert_close(found_scales, scales, rtol=0, atol=0, equal_nan=True)
        # what NaN becomes is not said: its scale says it
        known = ~scales.isnan().repeat_interleave(block, 2)[:, :, : GEOMETRY.tokens]
        assert torch.equal(found[known], values[known])


def test_without_the_mean_keys_keep_more_digits() -> None:
    q, k, v = inputs()
    dense = Plan.dense(GEOMETRY)
    exact, near = (oracle.attend(q, k, v, plan) for plan in (dense, replace(dense, int8=(128, 64))))
    error = (near - exact).norm() / exact.norm()
    # one of 127 steps of some four standard deviations, of queries and of keys; with the mean of 10, several times that
    assert 0 < error < 0.03


PLANS: dict[str, Any] = {
    "dense": lambda: Plan.dense(GEOMETRY),
    "masked": lambda: Plan.masked(mask(32, 16), 3),
    "mixed": lambda: Plan(
        tokens=GEOMETRY.tokens, kinds=("masked", "reused", "dense"), mask=mask(32, 32),
        reuse=RowReuse.of_anchor_rows(GEOMETRY, (1, 5)).to(DEVICE),
    ),
    "ordered": lambda: Plan.masked(
        mask(32, 32), 3, TokenOrder.of_all(torch.randperm(GEOMETRY.tokens, generator=torch.Generator().manual_seed(2))
        [None].to(DEVICE)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("scales", [(128, 64), (32, 16)], ids=str)
@pytest.mark.parametrize("name", PLANS)
def test_the_triton_kernel_multiplies_the_integers_that_the_oracle_does(name: str, scales: tuple[int, int]) -> None:
    q, k, v = inputs()
    plan = replace(PLANS[name](), int8=scales)
    out = KERNELS["triton"].attend(q, k, v, plan)
    exact = oracle.attend(q, k, v, plan)
    assert (out.double() - exact).abs().max() <= oracle.error_budget(q, k, v, plan, exact)
    # which is not what the plan without INT8 asks for
    plain = replace(plan, int8=None)
    other = oracle.attend(q, k, v, plain)
    if DEVICE == "cpu":
        assert (out.double() - other).abs().max() > 100 * oracle.error_budget(q, k, v, plain, other)


def test_low_blocks_are_left_out_by_scores_in_int8() -> None:
    q, k, v = inputs()
    # near the mean of all keys, and so low for every query
    k[:, :, 32:48] = 10
    blocks = mask(32, 16)
    plan = Plan.masked(blocks, 3, skip=Skip.of(blocks, 3, threshold=-0.5, leave=True))
    plan = replace(plan, int8=(32, 16))
    out = KERNELS["triton"].attend(q, k, v, plan)
    computed = plan.realised()
    assert computed.density().mean() < blocks.density().mean()
    exact = oracle.attend(q, k, v, computed)
    assert (out.double() - exact).abs().max() <= oracle.error_budget(q, k, v, computed, exact)


@pytest.mark.parametrize("name", ["flex", "sdpa-flash", "sdpa-math"])
def test_kernels_without_int8_refuse_it_and_never_compute_something_else(name: str) -> None:
    q, k, v = (x.cpu().float() for x in inputs())
    plan = replace(Plan.dense(GEOMETRY), int8=(128, 64))
    kernel: Kernel = KERNELS[name]
    refusal = kernel.refusal(Task.of(q, plan))
    assert refusal is not None
    assert "in INT8: the Triton kernel does" in refusal.reason
    with pytest.raises(ValueError, match="in INT8: the Triton kernel does"):
        kernel.attend(q, k, v, plan)


def test_triton_refuses_scales_that_change_within_a_tile() -> None:
    asked = {"device": torch.device(DEVICE), "dtype": DTYPE, "head_dim": 64}
    triton = KERNELS["triton"]
    assert triton.refusal(Task(**asked, int8=(100, 48))) is None
    assert triton.refusal(Task(**asked, int8=(128, 40))) is not None
    # a block that may be left out is one tile
    assert triton.refusal(Task(**asked, block=(64, 64), int8=(64, 32))) is None
    assert triton.refusal(Task(**asked, block=(64, 64), int8=(64, 32), skips=True)) is not None


def test_sums_of_scores_are_not_given_for_keys_without_their_mean() -> None:
    with pytest.raises(ValueError, match="lost their mean"):
        KERNELS["triton"].attend_with_lse(*inputs(), replace(Plan.dense(GEOMETRY), int8=(128, 64)))  # type: ignore[attr-defined]
