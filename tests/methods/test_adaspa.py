"""AdaSpa's searches on attention that is known block by block, and what it keeps between them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from calibatt.kernels.geometry import Geometry
from calibatt.kernels.plan import Plan
from calibatt.methods import energy
from calibatt.methods.adaspa import AdaSpa, AdaSpaConfig, head_budgets
from calibatt.methods.energy import block_mass
from calibatt.methods.site import Site

TOKENS = 4
# heaviest on one diagonal, and on the other
FORWARD = [[0.6, 0.2, 0.1, 0.1], [0.1, 0.6, 0.2, 0.1], [0.1, 0.1, 0.6, 0.2], [0.2, 0.1, 0.1, 0.6]]
BACKWARD = [row[::-1] for row in FORWARD]
DIAGONAL = torch.eye(4, dtype=torch.bool)[None]
FLIPPED = DIAGONAL.flip(-1)


def method(**settings: Any) -> AdaSpa:
    chosen: dict[str, Any] = {
        "sparsity": 0.75,
        "search_steps": (10 / 50, 30 / 50),
        "head_adaptive": False,
        "block": (TOKENS, TOKENS),
    }
    return AdaSpa(AdaSpaConfig(**(chosen | settings)))


def geometry_of(q: Tensor, **text: Any) -> Geometry:
    heads, tokens, head_dim = q.shape
    return Geometry(grid=(1, 1, tokens - text.get("text_tokens", 0)), heads=heads, head_dim=head_dim, **text)


def site(geometry: Geometry, **where: Any) -> Site:
    chosen: dict[str, Any] = {"step": 10, "steps": 50, "sigma": 0.5, "branch": "cond", "layer": 0, "layers": 2}
    return Site(geometry=geometry, **(chosen | where))


def keep_of(plan: Plan) -> Tensor:
    assert set(plan.kinds) == {"masked"}
    assert plan.mask is not None
    return plan.mask.keep()


def by_weight(weights: list[Any] | Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys so that a query of block r gives block c these weights, up to a factor for each r."""
    table = torch.as_tensor(weights, dtype=torch.float32)
    table = table if table.ndim == 3 else table[None]
    channels = table.shape[-1]
    # queries of block r point along channel r, where the keys have the logarithms
    q = math.sqrt(channels) * torch.eye(channels).expand(len(table), -1, -1)
    return q.repeat_interleave(TOKENS, 1), table.log().mT.repeat_interleave(TOKENS, 1)


def noise(seed: int, *, heads: int = 3, tokens: int = 50, head_dim: int = 8) -> tuple[Tensor, Tensor]:
    q, k = torch.randn(2, heads, tokens, head_dim, generator=torch.Generator().manual_seed(seed))
    return 3 * q, k


def qkv(seed: int, *, heads: int = 3, tokens: int = 50, head_dim: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    """The same with values, which play no part."""
    q, k = noise(seed, heads=heads, tokens=tokens, head_dim=head_dim)
    return q, k, k


def naive_mass(q: Tensor, k: Tensor, block: tuple[int, int], lse: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """All of the attention at once, in fp64, by the definition."""
    scores = q.double() @ k.double().mT / math.sqrt(q.shape[-1])
    lse = scores.logsumexp(-1) if lse is None else lse
    weights = (scores - lse[..., None]).exp()
    rows = [part.sum(1) for part in weights.split(block[0], 1)]
    return torch.stack([torch.stack([part.sum(-1) for part in row.split(block[1], -1)], -1) for row in rows], 1), lse


def heaviest(mass: Tensor, count: int) -> Tensor:
    return torch.zeros_like(mass, dtype=torch.bool).scatter_(-1, mass.topk(count).indices, True)


def test_the_mass_of_a_block_is_its_share_of_each_query_summed() -> None:
    mass, lse = block_mass(*by_weight(FORWARD), block=(TOKENS, TOKENS))
    # every row of blocks has 4 queries whose weights sum to 1; 4 keys of weight w make a sum of 4 over the row
    torch.testing.assert_close(mass, 4 * torch.tensor([FORWARD]))
    torch.testing.assert_close(lse, torch.full((1, 16), math.log(4)))


# one row of blocks at a time, several with a rest, and all at once
@pytest.mark.parametrize("chunk", [1, 1700, 2**25])
@pytest.mark.parametrize("block", [(16, 8), (5, 10), (64, 64)])
def test_the_mass_is_that_of_the_whole_softmax(
    chunk: int, block: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(energy, "CHUNK", chunk)
    q, k = noise(0)
    mass, lse = block_mass(q, k, block=block)
    expected, expected_lse = naive_mass(q, k, block)
    torch.testing.assert_close(mass, expected.float())
    torch.testing.assert_close(lse, expected_lse.float())
    torch.testing.assert_close(mass.sum((1, 2)), torch.full((3,), 50.0))


def test_given_sums_take_the_place_of_the_own_ones() -> None:
    (q, k), old = noise(0), noise(1)
    _, lse = block_mass(*old, block=(16, 8))
    mass, same = block_mass(q, k, block=(16, 8), lse=lse)
    assert same is lse
    torch.testing.assert_close(mass, naive_mass(q, k, (16, 8), naive_mass(*old, (16, 8))[1])[0].float())


def test_large_scores_do_not_overflow() -> None:
    q, k = noise(0)
    mass, lse = block_mass(100 * q, 100 * k, block=(16, 8))
    assert lse.max() > 1000
    torch.testing.assert_close(mass.sum((1, 2)), torch.full((3,), 50.0))


# 8 blocks: 8 · (1 − s) rounded
@pytest.mark.parametrize(
    ("sparsity", "count"), [(0.0, 8), (0.05, 8), (0.07, 7), (0.5, 4), (0.8, 2), (0.85, 1), (0.99, 1), (1.0, 1)]
)
def test_every_row_keeps_the_same_rounded_share_and_at_least_one(sparsity: float, count: int) -> None:
    q, k = noise(0, tokens=8 * TOKENS)
    kept = keep_of(method(sparsity=sparsity).plan(q, k, k, site(geometry_of(q))))
    assert kept.sum(-1).tolist() == [[count] * 8] * 3
    assert torch.equal(kept, heaviest(naive_mass(q, k, (TOKENS, TOKENS))[0], count))


def test_the_heaviest_blocks_of_each_row_and_head_are_kept() -> None:
    q, k = by_weight([FORWARD, BACKWARD])
    kept = keep_of(method(sparsity=0.5).plan(q, k, k, site(geometry_of(q))))
    expected = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1], [1, 0, 0, 1]]).bool()
    assert torch.equal(kept, torch.stack((expected, expected.flip(-1))))


def test_of_equal_blocks_the_first_are_kept() -> None:
    q, k = torch.zeros(2, 1, 16, 4)
    kept = keep_of(method(sparsity=0.5).plan(q, k, k, site(geometry_of(q))))
    assert kept.tolist() == [[[True, True, False, False]] * 4]


# 10 blocks at sparsity 0.6: 4 a head; the best (1 + 0.6) / 2 = 0.8, so 2; the worst (1.8 − 1) / 2 = 0.4, so 6
@pytest.mark.parametrize(
    ("recall", "budgets"),
    [
        ([0.85, 0.4, 0.95, 0.7], [2, 6, 2, 6]),
        ([0.75, 0.4, 0.95, 0.7], [4, 6, 2, 4]),
        # three are good, but a pair needs one that is not
        ([0.85, 0.9, 0.95, 0.7], [6, 2, 2, 6]),
        ([0.99, 0.98, 0.97, 0.96], [2, 2, 6, 6]),
        ([0.75, 0.4, 0.8, 0.7], [4, 4, 4, 4]),
        ([0.9, 0.9, 0.9, 0.9], [2, 2, 6, 6]),
    ],
)
def test_heads_above_the_recall_give_half_their_blocks_to_as_many_of_the_worst(
    recall: list[float], budgets: list[int]
) -> None:
    assert head_budgets(torch.tensor(recall), 4, 10, good=0.8).tolist() == budgets


@pytest.mark.parametrize(
    ("budget", "best", "worst"), [(1, 1, 1), (3, 2, 4), (5, 3, 7), (6, 3, 9), (8, 6, 10), (10, 10, 10)]
)
def test_the_mean_stays_the_budget_whatever_is_rounded_or_full(budget: int, best: int, worst: int) -> None:
    # of three heads one pair is adapted
    assert head_budgets(torch.tensor([0.9, 0.7, 1.0]), budget, 10, good=0.8).tolist() == [budget, worst, best]


def test_heads_keep_more_the_worse_they_do_at_the_base_sparsity() -> None:
    # the recall of a head whose four heaviest blocks share p, and the six others 1 − p; the rows are turned
    table = []
    for p in (0.85, 0.45, 0.95, 0.7):
        row = torch.tensor([p / 4] * 4 + [(1 - p) / 6] * 6)
        table.append(torch.stack([row.roll(turn) for turn in range(10)]))
    q, k = by_weight(torch.stack(table))
    where = site(geometry_of(q))
    kept = keep_of(method(sparsity=0.6, head_adaptive=True).plan(q, k, k, where))
    assert kept.sum(-1).tolist() == [[2] * 10, [6] * 10, [2] * 10, [6] * 10]
    assert kept.double().mean() == pytest.approx(0.4)
    # a row's own heaviest four are all kept where there is room for six
    assert all(kept[3, row, [(row + i) % 10 for i in range(4)]].all() for row in range(10))
    stricter = keep_of(method(sparsity=0.6, head_adaptive=True, good_recall=0.9).plan(q, k, k, where))
    assert stricter.sum(-1)[:, 0].tolist() == [4, 6, 2, 4]
    alike = keep_of(method(sparsity=0.6).plan(q, k, k, where))
    assert alike.sum(-1).unique().tolist() == [4]


@pytest.mark.parametrize("head_adaptive", [True, False])
@pytest.mark.parametrize("text", [0, 6])
def test_density_falls_as_sparsity_rises_from_all_to_one_block_a_row(head_adaptive: bool, text: int) -> None:
    # from sharp to nearly uniform heads, so that some pass the recall and others do not; the last block is shorter
    q, k = noise(0, heads=6, tokens=70)
    q *= torch.tensor([0.1, 0.3, 0.5, 1.0, 2.0, 4.0])[:, None, None]
    where = site(geometry_of(q, text_tokens=text))
    found = [
        method(sparsity=share / 18, head_adaptive=head_adaptive).plan(q, k, k, where).density().mean().item()
        for share in range(19)
    ]
    assert found == sorted(found, reverse=True)
    assert found[0] == 1
    if not text:
        assert found[-1] <= 4 / 70


# of 50 steps the first 10 are dense, as in the paper; shorter schedules have as large a share
@pytest.mark.parametrize(("steps", "dense"), [(50, 10), (8, 2), (4, 1), (1, 0)])
def test_what_comes_before_the_first_search_is_dense(steps: int, dense: int) -> None:
    q, k = noise(0, tokens=256)
    planner = AdaSpa(AdaSpa.presets["default"])
    kinds = [set(planner.plan(q, k, k, site(geometry_of(q), step=step, steps=steps)).kinds) for step in range(steps)]
    assert kinds == [{"dense"}] * dense + [{"masked"}] * (steps - dense)


def test_without_warm_up_the_first_step_is_sparse() -> None:
    q, k = noise(0, tokens=256)
    plan = AdaSpa(AdaSpa.presets["no-warmup"]).plan(q, k, k, site(geometry_of(q), step=0))
    # 4 blocks of 64, of which sparsity 0.8 leaves one
    assert keep_of(plan).sum(-1).unique().tolist() == [1]


def test_a_mask_holds_until_the_next_search() -> None:
    forward, backward = by_weight(FORWARD), by_weight(BACKWARD)
    planner, geometry = method(), geometry_of(forward[0])
    calls = [(10, forward), (11, backward), (29, backward), (30, backward), (31, forward), (49, forward)]
    found = [keep_of(planner.plan(*x, x[1], site(geometry, step=step))) for step, x in calls]
    expected = [DIAGONAL, DIAGONAL, DIAGONAL, FLIPPED, FLIPPED, FLIPPED]
    assert all(map(torch.equal, found, expected))


def test_later_searches_weigh_by_the_sums_of_the_first() -> None:
    block = (10, 5)
    inputs = [noise(seed) for seed in range(3)]
    geometry = geometry_of(inputs[0][0])
    planner = method(search_steps=(0.2, 0.6, 0.8), sparsity=0.7, block=block)
    found = [
        keep_of(planner.plan(q, k, k, site(geometry, step=step)))
        for (q, k), step in zip(inputs, (10, 30, 40), strict=True)
    ]
    first, lse = naive_mass(*inputs[0], block)
    assert torch.equal(found[0], heaviest(first, 3))
    for (q, k), kept in zip(inputs[1:], found[1:], strict=True):
        assert torch.equal(kept, heaviest(naive_mass(q, k, block, lse)[0], 3))
        assert not torch.equal(kept, heaviest(naive_mass(q, k, block)[0], 3)), "the sums made no difference"


def test_sums_too_old_to_weigh_by_still_leave_every_row_its_blocks() -> None:
    q, k = noise(0)
    geometry = geometry_of(q)
    for first, second in ((1, 100), (100, 1)):
        planner = method(sparsity=0.5, head_adaptive=True)
        planner.plan(first * q, first * k, first * k, site(geometry, step=10))
        # 13 blocks: 6 a row
        kept = keep_of(planner.plan(second * q, second * k, second * k, site(geometry, step=30)))
        assert kept.sum(-1).unique().tolist() == [6]


def test_the_same_call_twice_has_the_same_plan() -> None:
    planner = method(sparsity=0.7, block=(10, 5))
    for step, (q, k) in ((10, noise(0)), (30, noise(1))):
        where = site(geometry_of(q), step=step)
        assert torch.equal(keep_of(planner.plan(q, k, k, where)), keep_of(planner.plan(q, k, k, where)))


def test_a_reset_forgets_masks_and_sums() -> None:
    used, fresh = method(sparsity=0.7, block=(10, 5)), method(sparsity=0.7, block=(10, 5))
    q, k = noise(1)
    geometry = geometry_of(q)
    for step in (10, 30):
        used.plan(*qkv(0), site(geometry, step=step))
    used.reset()
    for step in (20, 30):
        where = site(geometry, step=step)
        assert torch.equal(keep_of(used.plan(q, k, k, where)), keep_of(fresh.plan(q, k, k, where)))


@pytest.mark.parametrize(
    "apart", [{"branch": "uncond"}, {"layer": 1}, {"sample": 1}], ids=["branch", "layer", "sample"]
)
def test_branches_layers_and_samples_do_not_share(apart: dict[str, Any]) -> None:
    forward, backward = by_weight(FORWARD), by_weight(BACKWARD)
    planner, geometry = method(), geometry_of(forward[0])
    assert torch.equal(keep_of(planner.plan(*forward, forward[1], site(geometry))), DIAGONAL)
    assert torch.equal(keep_of(planner.plan(*backward, backward[1], site(geometry, **apart))), FLIPPED)
    # each keeps its own, whatever it is asked with
    assert torch.equal(keep_of(planner.plan(*backward, backward[1], site(geometry, step=11))), DIAGONAL)
    assert torch.equal(keep_of(planner.plan(*forward, forward[1], site(geometry, step=11, **apart))), FLIPPED)


def test_a_schedule_entered_midway_is_searched_there_and_where_a_search_was_missed() -> None:
    forward, backward = by_weight(FORWARD), by_weight(BACKWARD)
    planner, geometry = method(), geometry_of(forward[0])
    calls = [(20, forward), (25, backward), (40, backward), (45, forward)]
    found = [keep_of(planner.plan(*x, x[1], site(geometry, step=step))) for step, x in calls]
    assert all(map(torch.equal, found, [DIAGONAL, DIAGONAL, FLIPPED, FLIPPED]))


def test_a_step_back_begins_another_video() -> None:
    planner, fresh = method(sparsity=0.7, block=(10, 5)), method(sparsity=0.7, block=(10, 5))
    geometry = geometry_of(noise(0)[0])
    for step in (10, 30):
        planner.plan(*qkv(0), site(geometry, step=step))
    for step in (20, 30):
        where = site(geometry, step=step)
        assert torch.equal(keep_of(planner.plan(*qkv(1), where)), keep_of(fresh.plan(*qkv(1), where)))


def test_another_geometry_is_searched_anew() -> None:
    forward, backward = by_weight(FORWARD), by_weight(BACKWARD)
    planner = method()
    planner.plan(*forward, forward[1], site(geometry_of(forward[0])))
    # as many tokens: a mask kept by length would pass unseen
    other = Geometry(grid=(2, 2, 4), heads=1, head_dim=4)
    assert torch.equal(keep_of(planner.plan(*backward, backward[1], site(other, step=11))), FLIPPED)


# 2 text tokens in 4 blocks of 4: the block that they share with the video counts as text
@pytest.mark.parametrize(("side", "block"), [("first", 0), ("last", 3)])
def test_text_sees_and_is_seen_by_everything_and_video_is_as_without_it(side: Any, block: int) -> None:
    q, k = by_weight(FORWARD)
    kept = keep_of(method().plan(q, k, k, site(geometry_of(q, text_tokens=2, text_side=side))))[0]
    expected = DIAGONAL[0].clone()
    expected[block] = True
    expected[:, block] = True
    assert torch.equal(kept, expected)


def test_recall_counts_the_text_that_is_kept_anyway() -> None:
    # at sparsity 0.5 the video rows of the first head keep 0.8, and beside it the text's 0.1 where that is not among
    # the two heaviest; the text row keeps all: (0.9 + 0.9 + 0.8 + 1) / 4 = 0.9 with text, 0.8 without
    q, k = by_weight([FORWARD, [[0.25] * 4] * 4])
    where = site(geometry_of(q, text_tokens=TOKENS))
    adapted = keep_of(method(sparsity=0.5, head_adaptive=True, good_recall=0.85).plan(q, k, k, where))
    assert adapted[:, 0].int().tolist() == [[1, 0, 0, 1], [1, 1, 1, 1]]
    alike = keep_of(method(sparsity=0.5, head_adaptive=True, good_recall=0.95).plan(q, k, k, where))
    assert alike[:, 0].int().tolist() == [[1, 1, 0, 1], [1, 1, 0, 1]]


def test_a_shorter_last_block_weighs_by_the_tokens_that_it_has() -> None:
    # 13 keys: each of the last block's one weighs 3, all others 1; 3 is less than the 4 of a whole block
    q, k = torch.zeros(2, 1, 13, 4)
    q[..., 0], k[:, 12, 0] = 2, math.log(3)
    mass, _ = block_mass(q, k, block=(TOKENS, TOKENS))
    row = torch.tensor([4, 4, 4, 3]) / 15
    torch.testing.assert_close(mass[0], torch.stack([4 * row] * 3 + [row]))
    assert keep_of(method(sparsity=0.25).plan(q, k, k, site(geometry_of(q)))).tolist() == [[[True] * 3 + [False]] * 4]
    k[:, 12, 0] = math.log(5)
    assert keep_of(method(sparsity=0.75).plan(q, k, k, site(geometry_of(q)))).tolist() == [[[False] * 3 + [True]] * 4]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_half_precision_is_weighed_in_single(dtype: torch.dtype, device: str) -> None:
    q, k = (x.to(device, dtype) for x in noise(0))
    mass, lse = block_mass(q, k, block=(16, 8))
    assert mass.dtype == lse.dtype == torch.float32
    torch.testing.assert_close(mass, naive_mass(q, k, (16, 8))[0].float())
    kept = keep_of(method(sparsity=0.5, block=(16, 8)).plan(q, k, k, site(geometry_of(q))))
    assert kept.device == q.device
    assert kept.sum(-1).unique().tolist() == [4]


def test_it_applies_to_every_geometry() -> None:
    assert method().refusal(Geometry(grid=(1, 1, 1), heads=1, head_dim=1)) is None


@pytest.mark.parametrize("sparsity", [-0.1, 1.1, math.nan])
def test_a_sparsity_that_is_no_share_is_refused(sparsity: float) -> None:
    with pytest.raises(ValueError, match="sparsity is a share"):
        method(sparsity=sparsity)


@pytest.mark.parametrize("steps", [(0.6, 0.2), (0.2, 0.2), (-0.1, 0.2), (0.2, 30.0)])
def test_search_steps_that_do_not_ascend_within_the_schedule_are_refused(steps: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="search steps are ascending shares"):
        method(search_steps=steps)
