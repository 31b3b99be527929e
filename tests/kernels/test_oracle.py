"""The oracle against attention written out, and the budget against errors that it must tell apart."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from calibatt.kernels import oracle
from calibatt.kernels.geometry import Geometry
from calibatt.kernels.mask import BlockMask
from calibatt.kernels.plan import Plan, RowReuse, TokenOrder

GEOMETRY = Geometry(grid=(2, 5, 6), heads=3, head_dim=16)


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, GEOMETRY.heads, GEOMETRY.tokens, GEOMETRY.head_dim, generator=generator).to(dtype)
    return q, k, v


def test_a_dense_plan_is_plain_softmax_attention() -> None:
    q, k, v = (x.double() for x in inputs())
    expected = torch.softmax(q @ k.mT / 16**0.5, dim=-1) @ v
    torch.testing.assert_close(oracle.attend(q, k, v, Plan.dense(GEOMETRY)), expected)


def test_a_mask_is_what_torch_makes_of_it_token_by_token(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = (x.double() for x in inputs())
    # 60 tokens in blocks of 16 × 8, the last ones shorter
    keep = torch.rand(3, 4, 8, generator=torch.Generator().manual_seed(1)) < 0.5
    keep[..., 0] = True
    plan = Plan.masked(BlockMask.from_keep(keep, tokens=60, block_q=16, block_k=8), 3)
    tokens = keep.repeat_interleave(16, 1).repeat_interleave(8, 2)[:, :60, :60]
    # chunks that end inside a block
    monkeypatch.setattr(oracle, "_CHUNK", 13)
    torch.testing.assert_close(
        oracle.attend(q, k, v, plan), scaled_dot_product_attention(q, k, v, attn_mask=tokens[None])
    )


def test_a_row_without_a_block_gives_zeros() -> None:
    keep = torch.ones(1, 4, 4, dtype=torch.bool)
    keep[0, 1] = False
    plan = Plan.masked(BlockMask.from_keep(keep, tokens=60, block_q=16, block_k=16), 3)
    out = oracle.attend(*inputs(), plan)
    assert not out[:, :, 16:32].any()
    assert out[:, :, :16].abs().min() > 0


def test_reused_rows_are_those_of_dense_attention() -> None:
    reuse = RowReuse.of_anchor_rows(GEOMETRY, (1, 3))
    plan = Plan(tokens=60, kinds=("reused", "dense", "reused"), reuse=reuse)
    out, dense = oracle.attend(*inputs(), plan), oracle.attend(*inputs(), Plan.dense(GEOMETRY))
    copied = reuse.computed[reuse.source]
    torch.testing.assert_close(out[:, 0], dense[:, 0, copied])
    torch.testing.assert_close(out[:, 1], dense[:, 1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_budget_holds_eager_attention_and_little_more(dtype: torch.dtype) -> None:
    q, k, v = inputs(dtype)
    plan = Plan.dense(GEOMETRY)
    exact = oracle.attend(q, k, v, plan)
    budget = oracle.error_budget(q, k, v, plan, exact)
    eager = (oracle.attend(q, k, v, plan, dtype=dtype).double() - exact).abs().max().item()
    assert eager < budget
    # attention averages values of size 1: a few roundings, not a per cent of the output in fp32
    assert budget < 20 * torch.finfo(dtype).eps * exact.abs().max().item()


def test_the_budget_is_too_small_for_a_block_left_out() -> None:
    q, k, v = inputs()
    keep = torch.ones(1, 4, 4, dtype=torch.bool)
    plan = Plan.masked(BlockMask.from_keep(keep, tokens=60, block_q=16, block_k=16), 3)
    exact = oracle.attend(q, k, v, plan)
    keep[0, 2, 3] = False
    fewer = Plan.masked(BlockMask.from_keep(keep, tokens=60, block_q=16, block_k=16), 3)
    error = (oracle.attend(q, k, v, fewer) - exact).abs().max().item()
    assert error > 100 * oracle.error_budget(q, k, v, plan, exact)


def test_nan_in_the_inputs_is_not_taken_for_an_empty_row() -> None:
    q, k, v = inputs()
    q[0, 0, 7] = torch.nan
    assert oracle.attend(q, k, v, Plan.dense(GEOMETRY))[0, 0, 7].isnan().all()


def test_an_order_says_which_tokens_a_block_holds() -> None:
    # blocks of two: the first holds tokens 0 and 3, the second 1 and 2; queries see their own block only
    order = TokenOrder.of_all(torch.tensor([[0, 3, 1, 2]]))
    mask = BlockMask.from_keep(torch.eye(2, dtype=torch.bool)[None], tokens=4, block_q=2, block_k=2)
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn((3, 1, 1, 4, 8), generator=generator).double()
    out = oracle.attend(q, k, v, Plan.masked(mask, 1, order))
    seen = torch.tensor([[1, 0, 0, 1], [0, 1, 1, 0], [0, 1, 1, 0], [1, 0, 0, 1]], dtype=torch.bool)
    torch.testing.assert_close(out, torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen))


def test_queries_and_keys_may_stand_in_orders_of_their_own() -> None:
    order = TokenOrder(queries=torch.tensor([[3, 2, 1, 0]]).int(), keys=torch.tensor([[0, 2, 1, 3]]).int())
    mask = BlockMask.from_keep(torch.eye(2, dtype=torch.bool)[None], tokens=4, block_q=2, block_k=2)
    q, k, v = torch.randn((3, 1, 1, 4, 8), generator=torch.Generator().manual_seed(0)).double()
    out = oracle.attend(q, k, v, Plan.masked(mask, 1, order))
    # queries 3 and 2 see keys 0 and 2, queries 1 and 0 see keys 1 and 3
    seen = torch.tensor([[0, 1, 0, 1], [0, 1, 0, 1], [1, 0, 1, 0], [1, 0, 1, 0]], dtype=torch.bool)
    torch.testing.assert_close(out, torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen))
