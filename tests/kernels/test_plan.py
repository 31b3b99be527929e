"""Block masks, row reuse, and the plans made of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from calibatt.kernels.geometry import Geometry
from calibatt.kernels.mask import BlockMask, VariableBlockMask, block_count, block_sizes
from calibatt.kernels.plan import Plan, RowReuse, Skip, TokenOrder

# tokens, block_q, block_k: tidy; a shorter last block; exactly one 32-bit word of key blocks; one more; one block
SHAPES = [(1024, 64, 64), (1000, 64, 48), (512, 128, 16), (513, 128, 16), (63, 128, 128)]


def random_keep(heads: int, tokens: int, block_q: int, block_k: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(tokens)
    keep = torch.rand(heads, block_count(tokens, block_q), block_count(tokens, block_k), generator=generator) < 0.4
    keep[0, 0] = False
    keep[-1, -1] = True
    return keep


def masked(keep: torch.Tensor, tokens: int = 64, block: int = 16) -> BlockMask:
    return BlockMask.from_keep(keep, tokens=tokens, block_q=block, block_k=block)


@pytest.mark.parametrize(("tokens", "block_q", "block_k"), SHAPES)
@pytest.mark.parametrize("heads", [1, 3])
def test_bits_and_lists_and_booleans_say_the_same(tokens: int, block_q: int, block_k: int, heads: int) -> None:
    keep = random_keep(heads, tokens, block_q, block_k)
    mask = BlockMask.from_keep(keep, tokens=tokens, block_q=block_q, block_k=block_k)
    again = BlockMask.from_lists(*mask.lists(), tokens=tokens, block_q=block_q, block_k=block_k)
    assert torch.equal(mask.keep(), keep)
    assert torch.equal(again.bits, mask.bits)


def test_a_bit_stands_where_the_words_say() -> None:
    # 34 key blocks: the last is bit 1 of byte 4, and the row is padded to two 32-bit words
    keep = torch.zeros(1, 34, 34, dtype=torch.bool)
    keep[0, 5, [0, 9, 33]] = True
    row = masked(keep, tokens=34 * 16).bits[0, 5].tolist()
    assert row == [1, 2, 0, 0, 2, 0, 0, 0]


def test_lists_ascend_and_then_name_the_others() -> None:
    keep = torch.tensor([[[False, True, False, True]] * 4])
    indices, counts = masked(keep).lists()
    assert indices[0, 0].tolist() == [1, 3, 0, 2]
    assert counts[0].tolist() == [2] * 4


def test_entries_past_a_count_are_ignored() -> None:
    indices = torch.tensor([[[2, 0]] * 4], dtype=torch.int32)
    counts = torch.tensor([[1, 0, 2, 1]], dtype=torch.int32)
    keep = BlockMask.from_lists(indices, counts, tokens=64, block_q=16, block_k=16).keep()
    assert keep[0].int().tolist() == [[0, 0, 1, 0], [0, 0, 0, 0], [1, 0, 1, 0], [0, 0, 1, 0]]


def test_density_counts_real_tokens() -> None:
    # 10 tokens in blocks of 4: sizes 4, 4, 2; kept are 4×4 and 2×2 and 4×2 products of 100
    keep = torch.zeros(1, 3, 3, dtype=torch.bool)
    keep[0, 0, 0] = keep[0, 2, 2] = keep[0, 1, 2] = True
    mask = BlockMask.from_keep(keep, tokens=10, block_q=4, block_k=4)
    assert mask.density().tolist() == [pytest.approx((16 + 4 + 8) / 100)]
    assert block_sizes(10, 4).tolist() == [4, 4, 2]


def test_everything_kept_is_density_one_on_odd_lengths() -> None:
    mask = BlockMask.from_keep(torch.ones(2, 8, 16, dtype=torch.bool), tokens=1000, block_q=128, block_k=64)
    torch.testing.assert_close(mask.density(), torch.ones(2, dtype=torch.float64))


@pytest.mark.parametrize("shape", [(1, 4, 3), (1, 3, 4), (4, 4)])
def test_a_mask_of_another_number_of_blocks_is_refused(shape: tuple[int, ...]) -> None:
    # the check of shapes refuses two dimensions before the mask can
    with pytest.raises((ValueError, TypeError), match=r"4×4 blocks|keep"):
        BlockMask.from_keep(torch.ones(*shape, dtype=torch.bool), tokens=64, block_q=16, block_k=16)


def test_bits_of_another_length_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\[heads, 4, 4\]: got torch.uint8 \[1, 4, 8\]"):
        BlockMask(bits=torch.zeros(1, 4, 8, dtype=torch.uint8), tokens=64, block_q=16, block_k=16)


def test_a_row_copies_the_nearest_anchor_row_of_its_own_frame_and_column() -> None:
    # rows 0 … 6, anchors 1 and 5: row 3 is as near to both, and takes the upper one
    geometry = Geometry(grid=(2, 7, 3), heads=1, head_dim=8)
    reuse = RowReuse.of_anchor_rows(geometry, (1, 5))
    nearest = [1, 1, 1, 1, 5, 5, 5]
    expected = [frame * 21 + nearest[row] * 3 + column for frame in range(2) for row in range(7) for column in range(3)]
    assert reuse.computed[reuse.source].tolist() == expected
    assert reuse.density == 4 / 14


@pytest.mark.parametrize("side", ["first", "last"])
def test_text_tokens_compute_their_own(side: Any) -> None:
    geometry = Geometry(grid=(1, 4, 2), heads=1, head_dim=8, text_tokens=3, text_side=side)
    reuse = RowReuse.of_anchor_rows(geometry, (2,))
    sources = reuse.computed[reuse.source].tolist()
    text = [0, 1, 2] if side == "first" else [8, 9, 10]
    start = 3 if side == "first" else 0
    assert [sources[token] for token in text] == text
    assert [sources[start + token] for token in range(8)] == [start + 4, start + 5] * 4
    assert len(reuse.computed) == 5


def test_every_token_is_served_once_by_the_query_whose_output_it_takes() -> None:
    geometry = Geometry(grid=(2, 5, 3), heads=1, head_dim=8, text_tokens=2, text_side="first")
    reuse = RowReuse.of_anchor_rows(geometry, (1, 4))
    takers: list[list[int]] = [[token for token in row if token >= 0] for row in reuse.served.tolist()]
    # text tokens take their own output
    assert takers[0] == [0]
    # frame 0, row 1, column 0 serves rows 0 to 2, row 4 serves rows 3 and 4
    assert takers[2] == [2, 5, 8]
    assert takers[5] == [11, 14]
    assert sorted(token for row in takers for token in row) == list(range(geometry.tokens))
    for place, row in enumerate(takers):
        assert {int(reuse.source[token]) for token in row} == {place}


@pytest.mark.parametrize(
    ("computed", "source"),
    [
        ([0, 2], [0, 0, 0, 0]),  # token 2 is computed and takes another's output
        ([0, 2], [0, 0, 1, 2]),  # points outside
        ([0, 2], [0, -1, 1, 1]),
        ([0, 9], [0, 0, 0, 0]),  # there is no token 9
    ],
)
def test_inconsistent_reuse_is_refused(computed: list[int], source: list[int]) -> None:
    with pytest.raises(ValueError, match="row reuse"):
        RowReuse(computed=torch.tensor(computed), source=torch.tensor(source))


@pytest.mark.parametrize(
    ("parts", "says"),
    [
        ({"kinds": ("masked", "dense")}, "carries a mask where"),
        ({"kinds": ("dense", "dense"), "mask": "mask"}, "carries a mask where"),
        ({"kinds": ("reused", "dense")}, "row reuse where"),
        ({"kinds": ("masked",) * 3, "mask": "mask"}, "the mask has 2 heads, the plan 3"),
        ({"kinds": ("masked",) * 2, "mask": "mask", "tokens": 65}, "for 65 tokens, its BlockMask for 64"),
        ({"kinds": ("reused",) * 2, "reuse": "reuse", "tokens": 65}, "for 65 tokens, its RowReuse for 64"),
    ],
)
def test_a_plan_that_contradicts_itself_cannot_be_built(parts: dict[str, Any], says: str) -> None:
    known: dict[str, Any] = {
        "mask": masked(torch.ones(2, 4, 4, dtype=torch.bool)),
        "reuse": RowReuse(computed=torch.arange(64), source=torch.arange(64)),
    }
    given = {name: known.get(name, value) for name, value in parts.items()}
    with pytest.raises(ValueError, match=says):
        Plan(**{"tokens": 64, **given})


def mixed_plan(mask_heads: int) -> Plan:
    keep = torch.zeros(mask_heads, 4, 4, dtype=torch.bool)
    keep[:, :, 1] = True
    reuse = RowReuse.of_anchor_rows(Geometry(grid=(1, 8, 8), heads=3, head_dim=8), (1, 5))
    return Plan(tokens=64, kinds=("dense", "masked", "reused"), mask=masked(keep), reuse=reuse)


@pytest.mark.parametrize("mask_heads", [1, 3])
def test_one_launch_keeps_all_of_dense_heads_and_nothing_of_reused_ones(mask_heads: int) -> None:
    mask = mixed_plan(mask_heads).launch_mask()
    assert mask is not None
    dense, own, reused = mask.keep()
    assert dense.all()
    assert not reused.any()
    assert own.int().tolist() == [[0, 1, 0, 0]] * 4


def test_dense_heads_keep_every_variable_block() -> None:
    mask = variable(VARIABLE["uneven"])
    launched = Plan(tokens=50, kinds=("masked", "dense"), mask=mask).launch_mask()
    assert isinstance(launched, VariableBlockMask)
    assert torch.equal(launched.keep()[0], mask.keep()[0])
    assert launched.density().tolist() == [pytest.approx(mask.density()[0].item()), 1.0]


def test_a_wholly_masked_plan_is_launched_as_it_is_and_one_without_a_mask_not_at_all() -> None:
    mask = masked(torch.ones(1, 4, 4, dtype=torch.bool))
    assert Plan.masked(mask, 5).launch_mask() is mask
    assert Plan.dense(Geometry(grid=(1, 8, 8), heads=2, head_dim=8)).launch_mask() is None


def test_density_of_a_plan_is_that_of_each_kind_of_head() -> None:
    assert mixed_plan(1).density().tolist() == [1.0, 0.25, 0.25]


def test_memory_of_a_plan_is_that_of_its_tensors() -> None:
    # 1 head × 4 rows × one 32-bit word; 16 computed and 64 sources of 8 bytes
    assert mixed_plan(1).nbytes() == 4 * 4 + (16 + 64) * 8


def test_the_plan_of_some_heads_has_their_kinds_and_their_blocks() -> None:
    geometry = Geometry(grid=(1, 8, 8), heads=3, head_dim=16)
    keep = torch.rand((3, 4, 4), generator=torch.Generator().manual_seed(0)) < 0.5
    mask = BlockMask.from_keep(keep, tokens=64, block_q=16, block_k=16)
    reuse = RowReuse.of_anchor_rows(geometry, (1, 5))
    plan = Plan(tokens=64, kinds=("masked", "reused", "masked"), mask=mask, reuse=reuse)
    some = plan.of_heads([0, 2])
    assert (some.kinds, some.reuse) == (("masked", "masked"), None)
    assert some.mask is not None
    assert torch.equal(some.mask.keep(), keep[[0, 2]])
    assert plan.of_heads([1]).mask is None


def test_a_plan_refuses_an_order_of_another_sequence_or_beside_row_reuse() -> None:
    order = TokenOrder.of_all(torch.arange(6).flip(0)[None])
    with pytest.raises(ValueError, match="for 8 tokens, its TokenOrder for 6"):
        Plan(tokens=8, kinds=("dense",), order=order)
    with pytest.raises(ValueError, match="the order has 3 heads, the plan 2"):
        Plan(tokens=6, kinds=("dense", "dense"), order=TokenOrder.of_all(order.queries.expand(3, -1)))
    with pytest.raises(ValueError, match="6 queries and 5 keys"):
        TokenOrder(queries=order.queries, keys=order.queries[:, :5])
    reuse = RowReuse(computed=torch.tensor([0]), source=torch.zeros(6, dtype=torch.int64))
    with pytest.raises(ValueError, match="such a plan has no other"):
        Plan(tokens=6, kinds=("reused",), reuse=reuse, order=order)


def test_the_order_of_some_heads_is_theirs() -> None:
    each = torch.stack((torch.arange(6), torch.arange(6).flip(0)))
    plan = Plan(tokens=6, kinds=("dense", "dense"), order=TokenOrder.of_all(each))
    chosen = plan.of_heads([1]).order
    assert chosen is not None
    assert chosen.shared
    assert chosen.queries.tolist() == [[5, 4, 3, 2, 1, 0]]
    assert plan.nbytes() == 2 * 6 * 4
    assert plan.unordered().order is None


# --- blocks of variable size ------------------------------------------------------------------------------------------

# tokens of query blocks and of key blocks, of two heads
VARIABLE = {
    "one": ([[50], [50]], [[50], [50]]),
    "uneven": ([[1, 30, 19], [20, 20, 10]], [[7, 9, 1, 33], [25, 1, 1, 23]]),
    "empty-ones": ([[0, 25, 0, 25, 0], [50, 0, 0, 0, 0]], [[0, 0, 10, 40, 0], [0, 0, 0, 0, 50]]),
    "single-tokens": ([[1] * 50] * 2, [[1] * 50] * 2),
}


def variable(sizes: tuple[list[list[int]], list[list[int]]], share: float = 0.2) -> VariableBlockMask:
    q_sizes, k_sizes = map(torch.tensor, sizes)
    keep = torch.rand((*q_sizes.shape, k_sizes.shape[1]), generator=torch.Generator().manual_seed(1)) < share
    return VariableBlockMask.from_keep(keep, q_sizes=q_sizes, k_sizes=k_sizes, tokens=50)


def of_tokens(mask: VariableBlockMask) -> torch.Tensor:
    """[heads, tokens, tokens], written out."""
    return torch.stack(
        [
            keep.repeat_interleave(q_sizes, 0).repeat_interleave(k_sizes, 1)
            for keep, q_sizes, k_sizes in zip(mask.keep(), mask.q_sizes, mask.k_sizes, strict=True)
        ]
    )


def test_variable_blocks_by_hand() -> None:
    # 6 queries in blocks of 1, 0 and 5, 6 keys in blocks of 2, 3, 0 and 1
    keep = torch.tensor([[[1, 0, 0, 1], [1, 1, 1, 1], [0, 1, 1, 0]]], dtype=torch.bool)
    sizes = torch.tensor([[1, 0, 5]]), torch.tensor([[2, 3, 0, 1]])
    mask = VariableBlockMask.from_keep(keep, q_sizes=sizes[0], k_sizes=sizes[1], tokens=6)
    assert torch.equal(mask.keep(), keep)
    assert mask.bits[0, :, 0].tolist() == [1 + 8, 15, 2 + 4]
    assert mask.density().tolist() == [pytest.approx((1 * 3 + 5 * 3) / 36)]
    assert mask.seen(0, torch.tensor([5, 0])).int().tolist() == [[0, 0, 1, 1, 1, 0], [1, 1, 0, 0, 0, 1]]
    assert (mask.heads, mask.q_blocks, mask.k_blocks, mask.block) == (1, 3, 4, None)
    # 3 rows of one 32-bit word, and 3 + 4 sizes
    plan = Plan.masked(mask, 2)
    assert plan.nbytes() == 3 * 4 + (3 + 4) * 4
    assert plan.realised() is plan
    assert plan.density().tolist() == [pytest.approx(0.5)] * 2


@pytest.mark.parametrize("sizes", VARIABLE)
def test_tokens_see_those_of_the_blocks_that_theirs_keeps(sizes: str) -> None:
    mask = variable(VARIABLE[sizes])
    tokens = of_tokens(mask)
    assert all(torch.equal(mask.seen(head, torch.arange(50)), tokens[head]) for head in range(2))
    torch.testing.assert_close(mask.density(), tokens.double().mean((1, 2)))


@pytest.mark.parametrize("share", [0.2, 1.0])
@pytest.mark.parametrize("block", [(16, 8), (8, 16), (50, 50), (64, 1)])
@pytest.mark.parametrize("sizes", VARIABLE)
def test_the_cover_is_of_the_blocks_that_hold_a_kept_pair_of_tokens(
    sizes: str, block: tuple[int, int], share: float
) -> None:
    mask = variable(VARIABLE[sizes], share)
    rows = [part.any(1) for part in of_tokens(mask).split(block[0], 1)]
    expected = torch.stack([torch.stack([part.any(-1) for part in row.split(block[1], 1)], 1) for row in rows], 1)
    cover = mask.cover(block)
    assert cover.block == block
    assert torch.equal(cover.keep(), expected)


def test_some_heads_of_variable_blocks_have_their_own_sizes() -> None:
    mask = variable(VARIABLE["uneven"])
    some = Plan(tokens=50, kinds=("masked", "masked"), mask=mask).of_heads([1]).mask
    assert isinstance(some, VariableBlockMask)
    assert torch.equal(some.keep(), mask.keep()[1:])
    assert (some.q_sizes.tolist(), some.k_sizes.tolist()) == ([[20, 20, 10]], [[25, 1, 1, 23]])


def test_sizes_of_other_heads_or_blocks_are_refused() -> None:
    mask = variable(VARIABLE["uneven"])
    # the check of shapes refuses some before the mask can
    refused = pytest.raises((ValueError, TypeError), match=r"sizes|heads|blocks")
    with refused:
        VariableBlockMask.from_keep(mask.keep()[:, 1:], q_sizes=mask.q_sizes, k_sizes=mask.k_sizes, tokens=50)
    with refused:
        VariableBlockMask.from_keep(mask.keep()[:1], q_sizes=mask.q_sizes[:1], k_sizes=mask.k_sizes, tokens=50)
    with refused:
        VariableBlockMask(bits=mask.bits, tokens=50, q_sizes=mask.q_sizes[:1], k_sizes=mask.k_sizes)


def test_variable_blocks_stand_beside_neither_row_reuse_nor_what_a_kernel_skips() -> None:
    mask = variable(VARIABLE["uneven"])
    every = torch.arange(50)
    with pytest.raises(ValueError, match="differ in size go with no row reuse"):
        Plan(tokens=50, kinds=("masked", "reused"), mask=mask, reuse=RowReuse(computed=every, source=every))
    with pytest.raises(ValueError, match="differ in size go with no row reuse"):
        Plan.masked(mask, 2, skip=Skip.of(mask.cover((16, 16)), 2, threshold=-1.0, leave=False))


# --- remainders -------------------------------------------------------------------------------------------------------


def test_a_remainder_goes_with_a_mask_and_stays_with_it() -> None:
    mask = variable(VARIABLE["uneven"])
    plan = Plan(tokens=50, kinds=("masked", "dense"), mask=mask, remainder="zeroth")
    assert plan.to("cpu").remainder == plan.unordered().remainder == plan.realised().remainder == "zeroth"
    assert plan.of_heads([0]).remainder == "zeroth"
    # nothing is left out of what has no mask
    assert plan.of_heads([1]).remainder == "none"
    # means are no part of the density
    assert torch.equal(plan.density(), replace(plan, remainder="none").density())
    with pytest.raises(ValueError, match="a plan without a mask leaves no block out: it has no remainder 'zeroth'"):
        Plan(tokens=50, kinds=("dense",), remainder="zeroth")
    # the check of types refuses it before the plan can
    with pytest.raises((ValueError, TypeError), match="remainder"):
        replace(plan, remainder="first")  # type: ignore[arg-type]
