"""MInference's choice on queries and keys whose attention is known."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from calibatt.kernels.geometry import Geometry
from calibatt.methods.minference import MInference, MInferenceConfig
from calibatt.methods.site import Site

# 64 tokens are 4 blocks of 16
TOKENS = 64
DIAGONAL = torch.eye(4, dtype=torch.bool)


def keep(q: Tensor, k: Tensor, preset: str = "default", **settings: Any) -> Tensor:
    """What is kept, by blocks of 16 tokens; the counts hold as they are, and nothing is forced."""
    given: dict[str, Any] = {"block": (16, 16), "length": 1, "forced": 0, "verticals": 0, "slashes": 0} | settings
    heads, tokens, head_dim = q.shape
    geometry = Geometry(grid=(1, 1, tokens), heads=heads, head_dim=head_dim)
    site = Site(geometry=geometry, step=0, steps=1, sigma=1.0, branch="cond", layer=0, layers=1)
    mask = MInference(replace(MInference.presets[preset], **given)).plan(q, k, k, site).mask
    assert mask is not None
    return mask.keep()


def with_scores(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys whose scaled products are these, query by key."""
    channels = scores.shape[-1]
    return math.sqrt(channels) * torch.eye(channels).expand_as(scores), scores.mT.contiguous()


def on_columns(*columns: int, tokens: int = TOKENS) -> Tensor:
    """Scores of queries that all attend to some keys."""
    return 10.0 * torch.isin(torch.arange(tokens), torch.tensor(columns)).expand(1, tokens, tokens)


def offsets(tokens: int = TOKENS) -> Tensor:
    """Query minus key of every pair."""
    places = torch.arange(tokens)
    return places[:, None] - places


def pooled(pairs: Tensor, block_q: int, block_k: int) -> Tensor:
    """Blocks with any pair of a mask over tokens."""
    rows = [part.any(0) for part in pairs.split(block_q)]
    return torch.stack([torch.stack([part.any() for part in row.split(block_k)]) for row in rows])


def by_blocks(pooled_scores: list[float], tokens: int = TOKENS) -> tuple[Tensor, Tensor]:
    """Queries all alike, and keys whose product with them is one number a block of 16."""
    q, k = torch.zeros(2, 1, tokens, 4)
    q[..., 0] = 1
    k[..., 0] = torch.tensor(pooled_scores).repeat_interleave(16)[:tokens]
    return q, k


def noise(tokens: int = 1000, heads: int = 3) -> tuple[Tensor, Tensor]:
    q, k = torch.randn(2, heads, tokens, 8, generator=torch.Generator().manual_seed(0))
    return q, k


@pytest.mark.parametrize(("columns", "blocks"), [([37], [2]), ([5, 37], [0, 2]), ([15, 16], [0, 1]), ([32, 47], [2])])
def test_columns_that_all_attend_to_are_kept_in_every_row(columns: list[int], blocks: list[int]) -> None:
    kept = keep(*with_scores(on_columns(*columns)), verticals=len(columns))[0]
    assert [row.nonzero().flatten().tolist() for row in kept] == [blocks] * 4


@pytest.mark.parametrize("block", [(16, 16), (32, 16), (16, 32)], ids=lambda block: f"{block[0]}x{block[1]}")
# 50 tokens: the last block has 2
@pytest.mark.parametrize("tokens", [64, 50])
@pytest.mark.parametrize("offset", [-49, -33, -17, -16, -15, -1, 1, 15, 16, 17, 31, 49])
def test_a_diagonal_is_kept_where_it_crosses_a_block(offset: int, tokens: int, block: tuple[int, int]) -> None:
    apart = offsets(tokens)
    scores = 10.0 * (apart == offset)[None]
    # one forced column and the main diagonal, so that every query has a key
    kept = keep(*with_scores(scores), block=block, forced=1, slashes=2)[0]
    pairs = (apart == offset) | (apart == 0) | (torch.arange(tokens) == 0)
    assert torch.equal(kept, pooled(pairs, *block))


def test_a_diagonal_one_off_the_main_one_crosses_the_next_block_at_a_corner() -> None:
    kept = keep(*with_scores(10.0 * (offsets() == -1)[None]), forced=1, slashes=2)[0]
    # query 15 and key 16, and so on; column 0 is forced
    assert kept.int().tolist() == [[1, 1, 0, 0], [1, 1, 1, 0], [1, 0, 1, 1], [1, 0, 0, 1]]


def test_a_short_diagonal_wins_by_what_its_own_queries_give_it() -> None:
    # shares of a row after softmax: 63 queries give offset 1 about 0.4, but four give 0.9 to offset 60
    weights = torch.full((64, 64), 0.01)
    weights[offsets() == 1] = 0.5
    weights[offsets() == 60] = 9.0
    kept = keep(*with_scores(weights.log()[None]), block=(1, 1), slashes=1)[0]
    assert kept.diagonal(-60).all()
    # beside the one column there always is
    assert kept.sum() <= 64 + 4


def test_only_the_probes_are_asked_and_they_stand_evenly_from_the_first_query_to_the_last() -> None:
    scores = on_columns(40).clone()
    scores[0, [0, 21, 42, 63]] = on_columns(5)[0, 0]
    assert keep(*with_scores(scores), verticals=1, probes=4)[0].nonzero()[:, 1].tolist() == [0] * 4
    assert keep(*with_scores(scores), verticals=1, probes=64)[0].nonzero()[:, 1].tolist() == [2] * 4


def test_more_probes_than_queries_are_all_queries() -> None:
    q, k = noise(63)
    assert torch.equal(keep(q, k, verticals=9, slashes=9, probes=1000), keep(q, k, verticals=9, slashes=9, probes=63))


@pytest.mark.parametrize(("forced", "lowest", "highest"), [(1, 0, 0), (2, 0, 1), (3, -1, 1), (30, -14, 15)])
def test_the_first_columns_and_the_nearest_diagonals_are_forced(forced: int, lowest: int, highest: int) -> None:
    # everything attends to key 50, and yet
    kept = keep(*with_scores(on_columns(50)), block=(1, 1), forced=forced)[0]
    apart = offsets()
    assert torch.equal(kept, (apart >= lowest) & (apart <= highest) | (torch.arange(TOKENS) < forced))


def test_what_is_forced_counts_among_the_chosen() -> None:
    q, k = with_scores(on_columns(50))
    assert keep(q, k, block=(1, 1), forced=3, verticals=3)[0, 20].nonzero().flatten().tolist() == [0, 1, 2, 19, 20, 21]
    assert keep(q, k, block=(1, 1), forced=3, verticals=4)[0, 20, 50]


def test_more_forced_than_there_is_keeps_everything() -> None:
    assert keep(*noise(9), forced=30).all()


def test_every_query_keeps_a_key_where_nothing_is_asked_for() -> None:
    kept = keep(*with_scores(on_columns(37)))[0]
    assert kept.nonzero()[:, 1].tolist() == [2] * 4


@pytest.mark.parametrize(
    ("settings", "count"),
    [
        ({"verticals": 4}, 4),
        ({"verticals": 4, "scale": 0.5}, 2),
        # half as long as the sequence that the counts are for, and 1.2 rounded down
        ({"verticals": 4, "length": 128}, 2),
        ({"verticals": 4, "length": 128, "scale": 0.6}, 1),
        ({"verticals": 4, "length": 32}, 4),
        ({"verticals": 4, "scale": 0}, 1),
        ({"verticals": 1000}, 64),
    ],
)
def test_counts_are_scaled_shortened_and_end_at_what_there_is(settings: dict[str, Any], count: int) -> None:
    kept = keep(*noise(TOKENS, heads=1), block=(1, 1), **settings)[0]
    assert kept.sum(-1).tolist() == [count] * TOKENS


@pytest.mark.parametrize(("count", "blocks"), [(0, [2]), (1, [2]), (2, [0, 2]), (3, [0, 2, 3]), (9, [0, 1, 2, 3])])
def test_block_sparse_keeps_the_key_blocks_with_the_highest_pooled_scores(count: int, blocks: list[int]) -> None:
    kept = keep(*by_blocks([3.0, 1.0, 4.0, 2.0]), preset="block-sparse", key_blocks=count)[0]
    assert [row.nonzero().flatten().tolist() for row in kept] == [blocks] * 4


def test_block_sparse_chooses_row_by_row() -> None:
    # the tokens of block r all point along channel r
    x = torch.eye(4).repeat_interleave(16, 0)[None]
    assert torch.equal(keep(x, x, preset="block-sparse", key_blocks=1)[0], DIAGONAL)


def test_a_shorter_last_block_is_pooled_over_its_own_tokens() -> None:
    # 50 tokens: the last block has 2, and would score 0.5 if divided by 16
    q, k = by_blocks([2.0, 3.0, 1.0, 4.0], tokens=50)
    assert keep(q, k, preset="block-sparse", key_blocks=1)[0].nonzero()[:, 1].tolist() == [3] * 4


@pytest.mark.parametrize("preset", MInference.presets)
def test_density_rises_with_the_scale(preset: str) -> None:
    q, k = noise()
    default = MInference.presets[preset]
    settings = {name: getattr(default, name) for name in ("length", "forced", "verticals", "slashes")}
    scales = [0.0, 0.3, 0.5, 1.0, 2.0, 4.0, 15.0]
    found = [keep(q, k, preset=preset, **settings, scale=scale).float().mean((1, 2)) for scale in scales]
    assert all((less <= more).all() for less, more in itertools.pairwise(found))
    assert (found[0] < 0.2).all()
    assert (found[-1] > 0.75).all()


def test_the_knob_reaches_everything_in_a_sequence_of_the_searched_length() -> None:
    knob, config = MInference.knob, MInference.presets["default"]
    assert knob is not None
    widest = replace(config, **{knob.field: knob.high})
    assert widest.count(widest.slashes, config.length) >= 2 * config.length - 1


def test_heads_choose_apart() -> None:
    q, k = with_scores(torch.cat((on_columns(5), on_columns(37))))
    kept = keep(q, k, verticals=1)
    assert kept.any(1).nonzero().tolist() == [[0, 0], [1, 2]]
    q, falling = by_blocks([4.0, 3.0, 2.0, 1.0])
    rising = falling.flip(1)
    kept = keep(q.repeat(2, 1, 1), torch.cat((falling, rising)), preset="block-sparse", key_blocks=1)
    assert kept.any(1).nonzero().tolist() == [[0, 0], [1, 3]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("preset", MInference.presets)
def test_half_precision_chooses_as_single_does(preset: str, dtype: torch.dtype) -> None:
    q, k = (x.to(dtype) for x in noise())
    settings: dict[str, Any] = {"verticals": 20, "slashes": 20, "key_blocks": 5}
    assert torch.equal(keep(q, k, preset=preset, **settings), keep(q.float(), k.float(), preset=preset, **settings))


@pytest.mark.parametrize("wrong", ["verticals", "slashes", "forced", "key_blocks", "scale"])
def test_negative_counts_are_refused(wrong: str) -> None:
    with pytest.raises(ValueError, match="not negative"):
        MInferenceConfig(pattern="vertical-slash", **{wrong: -1})


@pytest.mark.parametrize("wrong", ["probes", "length"])
def test_no_probe_and_no_length_are_refused(wrong: str) -> None:
    with pytest.raises(ValueError, match="at least one"):
        MInferenceConfig(pattern="vertical-slash", **{wrong: 0})
