"""The oracle against attention written out, and the budget against errors that it must tell apart."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from calibatt.kernels import oracle
from calibatt.kernels.geometry import Geometry
from calibatt.kernels.mask import BlockMask, Mask, VariableBlockMask
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


def _approximated(q: Tensor, k: Tensor, v: Tensor, plan: Plan) -> Tensor:
    """One query and one block after the other, as the papers write it: exact terms, or |B| exp(q·k̄) and exp(q·k̄) Σv."""
    assert plan.mask is not None
    out = torch.zeros_like(q)
    for head in range(q.shape[1]):
        queries = keys = torch.arange(plan.tokens)
        if plan.order is not None:
            queries, keys = plan.order.queries[head].long(), plan.order.keys[head].long()
        own = plan.mask.of_heads([head])
        parts = zip((queries, keys), own.sizes(), strict=True)
        q_blocks, k_blocks = (tokens.split(sizes[0].tolist()) for tokens, sizes in parts)
        for row, rows in enumerate(q_blocks):
            for i in rows:
                numerator, denominator = torch.zeros(q.shape[-1]).double(), torch.zeros(()).double()
                for column, block in enumerate(k_blocks):
                    if len(block) == 0:
                        continue
                    if own.keep()[0, row, column]:
                        weights = (k[0, head, block] @ q[0, head, i] / 4).exp()
                        numerator += weights @ v[0, head, block]
                        denominator += weights.sum()
                    else:
                        weight = (k[0, head, block].mean(0) @ q[0, head, i] / 4).exp()
                        numerator += weight * v[0, head, block].sum(0)
                        denominator += len(block) * weight
                out[0, head, i] = numerator / denominator
    return out


@pytest.mark.parametrize("ordered", [False, True], ids=["", "ordered"])
@pytest.mark.parametrize("kind", ["blocks", "shared-by-all-heads", "variable"])
def test_a_remainder_to_zeroth_order_is_the_papers_formula(
    kind: str, ordered: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    q, k, v = (x[:1].double() for x in inputs())
    generator = torch.Generator().manual_seed(1)
    # 60 tokens: the last blocks of 16 × 8 are shorter; of variable ones some are empty, or of one token
    keep = torch.rand(1 if kind == "shared-by-all-heads" else 3, 4, 8, generator=generator) < 0.4
    keep[:, 1] = False
    mask: Mask = BlockMask.from_keep(keep, tokens=60, block_q=16, block_k=8)
    if kind == "variable":
        q_sizes, k_sizes = [[20, 0, 7, 33]] * 3, [[0, 9, 1, 20, 0, 14, 16, 0], [60] + [0] * 7, [7] * 7 + [11]]
        mask = VariableBlockMask.from_keep(
            keep, q_sizes=torch.tensor(q_sizes), k_sizes=torch.tensor(k_sizes), tokens=60
        )
    lots = torch.rand((2, 3, 60), generator=generator).argsort(-1).int()
    plan = Plan.masked(mask, 3, TokenOrder(queries=lots[0], keys=lots[1]) if ordered else None)
    plan = replace(plan, remainder="zeroth")
    # chunks that end inside a block
    monkeypatch.setattr(oracle, "_CHUNK", 13)
    torch.testing.assert_close(oracle.attend(q, k, v, plan), _approximated(q, k, v, plan))


def test_a_remainder_is_of_masked_heads_alone() -> None:
    mask = BlockMask.from_keep(torch.eye(4, dtype=torch.bool)[None], tokens=60, block_q=16, block_k=16)
    reuse = RowReuse.of_anchor_rows(GEOMETRY, (1, 3))
    dropping = Plan(tokens=60, kinds=("masked", "dense", "reused"), mask=mask, reuse=reuse)
    out, dropped = (oracle.attend(*inputs(), plan) for plan in (replace(dropping, remainder="zeroth"), dropping))
    assert torch.equal(out[:, 1:], dropped[:, 1:])
    assert not torch.equal(out[:, 0], dropped[:, 0])


def test_where_keys_are_alike_within_a_block_a_remainder_comes_nearer_to_dense_than_dropping() -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn((1, 3, 60, 16), generator=generator)
    k, v = torch.randn((2, 1, 3, 4, 16), generator=generator).repeat_interleave(16, 3)[..., :60, :]
    mask = BlockMask.from_keep(torch.eye(4, dtype=torch.bool)[None], tokens=60, block_q=16, block_k=16)
    dropping = Plan.masked(mask, 3)
    for noise, nearer in ((0.0, 1e-6), (0.3, 0.2)):
        own = [x + noise * torch.randn(x.shape, generator=generator) for x in (k, v)]
        dense = oracle.attend(q, *own, Plan.dense(GEOMETRY))
        plans = (replace(dropping, remainder="zeroth"), dropping)
        error, dropped = ((oracle.attend(q, *own, plan) - dense).norm().item() for plan in plans)
        assert error < nearer * dropped
