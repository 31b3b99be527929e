"""Sparge's choice on queries and keys whose pooled attention is known."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from calibatt.kernels.geometry import Geometry
from calibatt.methods.catalogue import build, learner
from calibatt.methods.learning import Learnt
from calibatt.methods.site import Site
from calibatt.methods.skipping import without_low
from calibatt.methods.sparge import SIMILARITIES, Found, SpargeSearch, search

# 64 tokens are 4 blocks of 16
GEOMETRY = Geometry(grid=(4, 4, 4), heads=1, head_dim=4)
DIAGONAL = torch.eye(4, dtype=torch.bool)


def keep(q: Tensor, k: Tensor, geometry: Geometry = GEOMETRY, **settings: Any) -> Tensor:
    chosen: dict[str, Any] = {"block": (16, 16), "similarity": 0.6} | settings
    site = Site(geometry=geometry, step=0, steps=1, sigma=1.0, branch="cond", layer=0, layers=1)
    mask = build("sparge", **chosen).plan(q, k, k, site).mask
    assert mask is not None
    return mask.keep()


def one_direction_a_block() -> Tensor:
    """The tokens of block r all point along channel r."""
    return 4 * torch.eye(4).repeat_interleave(16, 0)[None]


def by_weight(weights: list[float]) -> tuple[Tensor, Tensor]:
    """Queries all alike, and keys so that every query's softmax over the blocks is these weights."""
    q, k = torch.zeros(2, 1, 64, 4)
    q[..., 0] = math.sqrt(4)
    k[..., 0] = torch.tensor(weights).log().repeat_interleave(16)
    return q, k


@pytest.mark.parametrize(("topk", "count"), [(0.0, 1), (0.25, 1), (0.49, 1), (0.5, 2), (0.75, 3), (1.0, 4)])
def test_topk_keeps_that_share_of_the_blocks_rounded_down_and_at_least_one(topk: float, count: int) -> None:
    q, k = torch.randn(2, 1, 64, 4, generator=torch.Generator().manual_seed(0))
    assert keep(q, k, topk=topk, similarity=-0.1).sum(-1).tolist() == [[count] * 4]


def test_a_query_block_keeps_the_key_block_that_points_where_it_does() -> None:
    x = one_direction_a_block()
    assert torch.equal(keep(x, x, topk=0.25)[0], DIAGONAL)


def test_what_all_keys_have_in_common_changes_nothing() -> None:
    # beside what they share the tokens of block 2 differ, and it cannot be pooled; with it they would all look alike
    q, k = one_direction_a_block(), one_direction_a_block()
    k[0, 32:48:2] *= -1
    common = torch.tensor([30.0, -70.0, 110.0, 20.0])
    assert torch.equal(keep(q, k, topk=0.25), keep(q, k + common, topk=0.25))


def test_a_key_block_that_cannot_be_pooled_is_kept_by_every_query() -> None:
    q, k = one_direction_a_block(), one_direction_a_block()
    k[0, 32:48:2] *= -1
    kept = keep(q, k, topk=0.25)[0]
    assert kept[:, 2].all()
    others = kept[[0, 1, 3]]
    assert torch.equal(others, DIAGONAL[[0, 1, 3]] | (torch.arange(4) == 2))


def test_a_query_block_that_cannot_be_pooled_keeps_everything() -> None:
    q, k = one_direction_a_block(), one_direction_a_block()
    q[0, 16:32:2] *= -1
    kept = keep(q, k, topk=0.25)[0]
    assert kept[1].all()
    assert torch.equal(kept[[0, 2, 3]], DIAGONAL[[0, 2, 3]])


def test_where_no_key_block_can_be_pooled_everything_is_kept() -> None:
    x = one_direction_a_block()
    x[0, ::2] *= -1
    assert keep(x, x, topk=0.25).all()


def test_the_gate_of_the_default_preset_is_never_shut() -> None:
    # a mean cosine over all pairs is a squared length, never below 0
    q, k = torch.randn(2, 1, 64, 4, generator=torch.Generator().manual_seed(0))
    default = keep(q, k, preset="default", similarity=-0.1)
    assert default.sum(-1).tolist() == [[2] * 4]


# as the original's searchsorted(…, right=True): the running sum of what is kept does not pass the share
@pytest.mark.parametrize(("cdf", "kept"), [(0.3, [0]), (0.5, [0]), (0.75, [0, 1]), (0.95, [0, 1, 2])])
def test_cdf_keeps_the_heaviest_blocks_up_to_the_share(cdf: float, kept: list[int]) -> None:
    chosen = keep(*by_weight([0.4, 0.3, 0.2, 0.1]), preset="cdf", cdf=cdf)[0]
    assert all(row.nonzero().flatten().tolist() == kept for row in chosen)


def test_a_shorter_last_block_is_pooled_over_its_own_tokens() -> None:
    # 50 tokens: the last block has 2, and would look four times as short if divided by 16
    geometry = Geometry(grid=(1, 5, 10), heads=1, head_dim=4)
    x = one_direction_a_block()[:, :50]
    assert torch.equal(keep(x, x, geometry, topk=0.25)[0], DIAGONAL)
    assert not keep(x, x, geometry, topk=0.25, similarity=0.9).all(), "constant blocks are alike whatever their length"


def test_in_int8_the_blocks_are_the_same_and_each_has_a_scale() -> None:
    x = one_direction_a_block()
    site = Site(geometry=GEOMETRY, step=0, steps=1, sigma=1.0, branch="cond", layer=0, layers=1)
    plan = build("sparge", preset="int8", topk=0.25, block=(16, 16)).plan(x, x, x, site)
    assert plan.mask is not None
    assert torch.equal(plan.mask.keep()[0], DIAGONAL)
    assert plan.int8 == (16, 16)


def graded() -> tuple[Tensor, Tensor]:
    """Every query has scores of 0, -1, -4 and -2 at the blocks, in powers of two."""
    return by_weight([1.0, 0.5, 2.0**-4, 2.0**-2])


@pytest.mark.parametrize(("threshold", "kept"), [(0.5, [0]), (1.5, [0, 1]), (3.0, [0, 1, 3]), (5.0, [0, 1, 2, 3])])
def test_stage_two_leaves_out_chosen_blocks_that_turn_out_low(threshold: float, kept: list[int]) -> None:
    q, k = graded()
    chosen = keep(q, k, preset="pv-skip-oracle", topk=1.0, pv_threshold=threshold)[0]
    assert all(row.nonzero().flatten().tolist() == kept for row in chosen)


def test_stage_two_leaves_out_nothing_but_chosen_blocks_and_compares_with_no_others() -> None:
    q, k = graded()
    # by pooling, the two heaviest: 0 and 1
    assert keep(q, k, preset="pv-skip-oracle", topk=0.5, pv_threshold=5.0)[0, 0].tolist() == [True, True, False, False]


def test_in_the_kernel_stage_two_is_a_threshold_beside_the_same_blocks() -> None:
    q, k = graded()
    site = Site(geometry=GEOMETRY, step=0, steps=1, sigma=1.0, branch="cond", layer=0, layers=1)
    plan = build("sparge", preset="pv-skip", block=(16, 16)).plan(q, k, k, site)
    assert plan.mask is not None
    assert plan.skip is not None
    assert torch.equal(plan.mask.keep(), keep(q, k, preset="default", similarity=-0.1))
    assert (plan.skip.thresholds, plan.skip.leave) == ((-20.0,), True)
    with pytest.raises(ValueError, match="above 0, got -1"):
        build("sparge", preset="pv-skip", pv_threshold=-1.0)


def test_heads_choose_apart() -> None:
    geometry = Geometry(grid=(4, 4, 4), heads=2, head_dim=4)
    x = one_direction_a_block()
    q = torch.cat((x, x.flip(1)))
    k = torch.cat((x, x))
    assert torch.equal(keep(q, k, geometry, topk=0.25), torch.stack((DIAGONAL, DIAGONAL.flip(0))))


def test_half_precision_chooses_as_single_does() -> None:
    x = one_direction_a_block()
    assert torch.equal(keep(x.bfloat16(), x.bfloat16(), topk=0.25)[0], DIAGONAL)


# shares of four blocks; the running sum passes no cdf of the grid by rounding alone
SHARES = [0.42, 0.3, 0.19, 0.09]


def one_channel_a_block() -> Tensor:
    """Values whose output has the weight of each block in a channel of its own."""
    return torch.eye(4).repeat_interleave(16, 0)[None]


def bounded(l1: float, l2: float) -> SpargeSearch:
    return SpargeSearch(l1=l1, l2=l2, block=(16, 16))


# keeping a share w and leaving out the rest is an L1 error of 2 (1 - w): 1.16, 0.56, 0.18 and 0 for one to four blocks;
# the others lie 0.5, 1.1 and 2.2 powers of two below the first
@pytest.mark.parametrize(
    ("l1", "l2", "cdf", "pv_threshold", "sparsity"),
    [
        (0.6, 0.7, 0.8, 1.0, 0.5),
        (0.2, 0.3, 0.95, 2.0, 0.25),
        (0.1, 0.2, math.inf, 2.0, 0.0),
        (0.1, 0.15, math.inf, 4.0, 0.0),
    ],
)
def test_the_search_takes_the_least_cdf_and_then_the_least_threshold_within_the_bounds(
    l1: float, l2: float, cdf: float, pv_threshold: float, sparsity: float
) -> None:
    q, k = by_weight(SHARES)
    found = search(q, k, one_channel_a_block(), torch.arange(4), bounded(l1, l2))
    for one, expected in zip(found, (sparsity, cdf, pv_threshold), strict=True):
        torch.testing.assert_close(one, torch.full((len(SIMILARITIES), 1), expected))


def test_the_search_gives_every_similarity_what_it_allows() -> None:
    q, k = by_weight(SHARES)
    # beside the mean of all keys, half of block 3's tokens point the other way: only without a gate is it left out
    k[0, 48:, 1] = 100.0 * (-1) ** torch.arange(16)
    q[..., 1] = 0
    sparsity, _, _ = search(q, k, one_channel_a_block(), torch.arange(4), bounded(0.2, 0.3))
    assert sparsity[:, 0].tolist() == [0.25, 0.0, 0.0, 0.0]


def test_errors_are_relative_and_over_the_compared_query_blocks_alone() -> None:
    q, k = by_weight(SHARES)
    # other queries see the last block alone, which no pooled choice leaves out for them
    q[:, 16:] *= -1000
    found = search(q, k, 7 * one_channel_a_block(), torch.tensor([0]), bounded(0.2, 0.3))
    assert [one[0, 0].item() for one in found] == pytest.approx([0.25, 0.95, 2.0])


def test_a_layer_has_the_largest_of_all_calls_and_a_head_that_nothing_can_be_left_out_of_stays_dense() -> None:
    geometry = Geometry(grid=(4, 4, 4), heads=2, head_dim=4)
    first, second = by_weight(SHARES), by_weight([0.25, 0.25, 0.25, 0.25])
    q, k = (torch.cat(pair) for pair in zip(first, second, strict=True))
    v = one_channel_a_block().expand(2, -1, -1)
    learning = bounded(0.1, 0.15)
    # of the first head, one call needs all blocks and a threshold of 4, the other one block, whatever the rest
    notes = []
    for step, weights in enumerate((SHARES, [0.96, 0.02, 0.01, 0.01])):
        k = torch.cat((by_weight(weights)[1], k[1:]))
        site = Site(geometry=geometry, step=step, steps=2, sigma=1.0, branch="cond", layer=0, layers=1)
        notes.append(learning.note(q, k, v, site, 0))
    # two steps of one prompt, and one step of two prompts, are calls alike
    by_step = [learning.merge([note]) for note in notes]
    for tables in (
        {name: torch.stack([part[name] for part in by_step])[:, None] for name in by_step[0]},
        {name: part[None, None] for name, part in learning.merge(notes).items()},
    ):
        found = Found.of(tables)
        assert found.similarity.tolist() == [[pytest.approx(-0.1), math.inf]]
        assert found.cdf[0, 0].item() == math.inf
        assert found.thresholds == [[-4.0, -1.0]]


def test_what_was_found_is_each_heads_own_and_the_first_block_is_always_kept(tabled: Callable[..., Learnt]) -> None:
    geometry = Geometry(grid=(4, 4, 4), heads=3, head_dim=4)
    x, (q, k) = one_direction_a_block(), by_weight([0.1, 0.2, 0.3, 0.4])
    q, k = torch.cat((q, q, x)), torch.cat((k, k, x))
    # the least similarity leaves out the most, but in the third head, where nothing does
    sparsity = torch.zeros(2, 2, len(SIMILARITIES), 3)
    sparsity[:, :, 0, :2] = 0.5
    cdf = torch.tensor([[0.5, 0.95, 0.5], [0.8, 0.8, 0.8]])[None, :, None].repeat(2, 1, len(SIMILARITIES), 1)
    # the largest of both steps counts
    cdf[0] /= 2
    threshold = torch.tensor([[2.0, 4.0, math.inf], [6.0, 8.0, 10.0]])[None, :, None].expand_as(cdf)
    site = Site(geometry=geometry, step=1, steps=2, sigma=1.0, branch="cond", layer=0, layers=2)
    tables = {"sparsity": sparsity, "cdf": cdf, "pv_threshold": threshold}
    learnt = tabled("sparge", site, tables, learner("sparge", preset="tuned", block=(16, 16)))
    plan = build("sparge", preset="tuned", calibration=learnt, block=(16, 16)).plan(q, k, k, site)
    assert plan.mask is not None
    assert plan.mask.keep()[:, 0].int().tolist() == [[1, 0, 0, 1], [1, 1, 1, 1], [1, 1, 1, 1]]
    assert plan.skip is not None
    assert plan.skip.thresholds == (-2.0, -4.0, -math.inf)
    kept = build("sparge", preset="tuned-oracle", calibration=learnt, block=(16, 16)).plan(q, k, k, site)
    assert kept.skip is None
    assert torch.equal(kept.mask.keep(), without_low(q, k, plan.mask, plan.skip.thresholds).keep())  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "wrong",
    [
        {"topk": 0.5, "preset": "cdf"},
        {"topk": None},
        {"topk": 0.5, "preset": "tuned"},
        {"similarity": None},
        {"l2": 0.1},
        {"preset": "tuned", "l2": 0.06},
        {"preset": "tuned", "l2": None},
        {"preset": "tuned", "similarity": 0.5},
        {"preset": "tuned", "pv_threshold": 20.0},
    ],
    ids=str,
)
def test_settings_that_contradict_each_other_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="sparge"):
        build("sparge", **wrong)
