"""XAttention's choice on queries and keys whose antidiagonals are known."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from calibatt.kernels.geometry import Geometry
from calibatt.kernels.plan import Plan
from calibatt.methods.site import Site
from calibatt.methods.xattention import XAttention, antidiagonal_energy

# 64 tokens are 4 blocks of 16, each of 4 groups of 4
GEOMETRY = Geometry(grid=(4, 4, 4), heads=1, head_dim=4)
DIAGONAL = torch.eye(4, dtype=torch.bool)
FIRST = torch.tensor([True, False, False, False])


def plan(
    q: Tensor, k: Tensor, geometry: Geometry = GEOMETRY, *, step: int = 0, preset: str = "default", **settings: Any
) -> Plan:
    config = replace(XAttention.presets[preset], **{"block": (16, 16), "stride": 4} | settings)
    site = Site(geometry=geometry, step=step, steps=50, sigma=1.0, branch="cond", layer=0, layers=1)
    return XAttention(config).plan(q, k, k, site)


def keep(q: Tensor, k: Tensor, geometry: Geometry = GEOMETRY, **settings: Any) -> Tensor:
    mask = plan(q, k, geometry, **settings).mask
    assert mask is not None
    return mask.keep()


def one_direction_a_block() -> Tensor:
    """The tokens of block r all point along channel r: a score of 18 within a block, of 0 outside."""
    return 6 * torch.eye(4).repeat_interleave(16, 0)[None]


def by_weight(weights: list[float], tokens: int = 64) -> tuple[Tensor, Tensor]:
    """Queries all alike, and keys so that every query's softmax over the blocks of 16 is these weights."""
    q, k = torch.zeros(2, 1, tokens, 4)
    q[..., 0] = math.sqrt(4)
    k[..., 0] = torch.tensor(weights).log().repeat_interleave(16)[:tokens]
    return q, k


def by_hand(q: Tensor, k: Tensor, *, stride: int, block_q: int, block_k: int) -> Tensor:
    """Pair by pair over the full scores of each head: what has no place in the sequence has no score."""
    heads, tokens, channels = q.shape
    scores = q.double() @ k.double().mT / math.sqrt(channels)
    groups = math.ceil(tokens / stride)
    tiles = torch.zeros(heads, groups, groups, dtype=torch.float64)
    for row in range(tokens):
        for column in range(tokens):
            if row % stride + column % stride == stride - 1:
                tiles[:, row // stride, column // stride] += scores[:, row, column] / stride
    weights = tiles.softmax(-1)
    energy = torch.zeros(heads, math.ceil(tokens / block_q), math.ceil(tokens / block_k), dtype=torch.float64)
    for i in range(groups):
        for j in range(groups):
            energy[:, i * stride // block_q, j * stride // block_k] += weights[:, i, j]
    return energy


def noise(heads: int, tokens: int, channels: int = 4) -> tuple[Tensor, Tensor]:
    q, k = 3 * torch.randn(2, heads, tokens, channels, generator=torch.Generator().manual_seed(0))
    return q, k


def test_a_query_block_keeps_the_key_block_that_points_where_it_does() -> None:
    x = one_direction_a_block()
    assert torch.equal(keep(x, x)[0], DIAGONAL | FIRST)


def test_the_first_key_block_is_on_in_every_row_whatever_its_attention() -> None:
    # it has none: as in the repository, where what a row drops is written to place 0
    chosen = keep(*by_weight([1e-9, 0.5, 0.3, 0.2]), threshold=0.4)[0]
    assert chosen.tolist() == [[True, True, False, False]] * 4


def test_only_the_antidiagonal_of_a_tile_counts() -> None:
    # one group of queries, [a b], and two of keys, [c d] and [e f]: the sums are a·d + b·c and a·f + b·e
    q = torch.tensor([[[2.0], [0.0], [0.0], [0.0]]])
    k = torch.tensor([[[9.0], [1.0], [-9.0], [3.0]]])
    energy = antidiagonal_energy(q, k, stride=2, block_q=2, block_k=2)
    # a = 2: scores 2 · 1 / 2 and 2 · 3 / 2; the second group of queries is zero
    first = 1 / (1 + math.exp(3 - 1))
    torch.testing.assert_close(energy, torch.tensor([[[first, 1 - first], [0.5, 0.5]]]))


# multiples of every block, then a last block of 8, then a last group of 2 in a block of its own, then hardly anything
@pytest.mark.parametrize("tokens", [64, 40, 50, 3])
@pytest.mark.parametrize("block", [(16, 16), (32, 16), (8, 32), (4, 4)])
@pytest.mark.parametrize("stride", [1, 2, 4])
def test_the_estimate_is_the_softmax_of_the_antidiagonal_sums(stride: int, block: tuple[int, int], tokens: int) -> None:
    q, k = noise(2, tokens)
    sizes = {"stride": stride, "block_q": block[0], "block_k": block[1]}
    energy = antidiagonal_energy(q, k, **sizes)
    torch.testing.assert_close(energy, by_hand(q, k, **sizes).float())


# a block is kept as long as those before it fall short: 0.4, 0.7, 0.9 and 1 are reached after one to four
@pytest.mark.parametrize(
    ("threshold", "kept"),
    [(0.0, [0, 1]), (0.39, [0, 1]), (0.41, [0, 1, 3]), (0.69, [0, 1, 3]), (0.71, [0, 1, 2, 3]), (0.91, [0, 1, 2, 3])],
)
def test_the_fewest_blocks_that_reach_the_threshold_are_kept_beside_the_first(
    threshold: float, kept: list[int]
) -> None:
    chosen = keep(*by_weight([0.1, 0.4, 0.2, 0.3]), threshold=threshold)[0]
    assert all(row.nonzero().flatten().tolist() == kept for row in chosen)


def test_the_ends_of_the_knob_are_the_first_block_and_the_heaviest_and_all_that_hold_anything() -> None:
    q, k = noise(1, 64)
    assert XAttention.knob is not None
    heaviest = antidiagonal_energy(q, k, stride=4, block_q=16, block_k=16).argmax(-1)
    assert torch.equal(
        keep(q, k, threshold=XAttention.knob.low), torch.nn.functional.one_hot(heaviest, 4).bool() | FIRST
    )
    assert keep(q, k, threshold=XAttention.knob.high).all()
    # a score 200 below the others, whose exponential is 0 in fp32
    q, k = by_weight([1.0] * 4)
    k[0, 48:, 0] = -200
    assert keep(q, k, threshold=XAttention.knob.high)[0].tolist() == [[True, True, True, False]] * 4


def test_a_shorter_last_key_block_has_the_attention_of_its_own_tokens_alone() -> None:
    # 56 tokens are 14 groups, all alike: blocks of 4, 4, 4 and 2. Three of them hold 12 / 14, which is over 0.8; with
    # padded keys it would be 12 / 16, which is under
    geometry = Geometry(grid=(7, 2, 4), heads=1, head_dim=4)
    q, k = by_weight([1.0] * 4, tokens=56)
    assert keep(q, k, geometry, threshold=0.8)[0].tolist() == [[True, True, True, False]] * 4
    assert keep(q, k, geometry, threshold=0.9).all()


def test_a_shorter_last_query_block_is_judged_by_its_own_tokens_alone() -> None:
    # 50 tokens: the last block is half a group, and looks at the first key block alone, which scores 18 / 2. The other
    # half of its antidiagonal is empty, as is all of it against the last group of keys, which has the same half
    geometry = Geometry(grid=(1, 5, 10), heads=1, head_dim=4)
    q = one_direction_a_block()[:, :50]
    k = q.clone()
    k[0, :16, 3] = 6
    # three padded groups of queries, whose attention is even, would want other blocks too
    assert keep(q, k, geometry)[0, 3].tolist() == [True, False, False, False]


def test_text_is_tokens_like_any_others() -> None:
    q, k = noise(1, 64)
    beside = Geometry(grid=(3, 4, 4), heads=1, head_dim=4, text_tokens=16, text_side="first")
    assert torch.equal(keep(q, k, beside), keep(q, k))


def test_heads_choose_apart() -> None:
    geometry = Geometry(grid=(4, 4, 4), heads=2, head_dim=4)
    x = one_direction_a_block()
    q, k = torch.cat((x, x.flip(1))), torch.cat((x, x))
    assert torch.equal(keep(q, k, geometry), torch.stack((DIAGONAL, DIAGONAL.flip(0))) | FIRST)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_chooses_as_single_does(dtype: torch.dtype) -> None:
    # rounded first, so that both are given the same numbers: all that is left is how they are multiplied and added
    q, k = (x.to(dtype) for x in noise(1, 64))
    sizes = {"stride": 4, "block_q": 16, "block_k": 16}
    halved = antidiagonal_energy(q, k, **sizes)
    assert halved.dtype == torch.float32
    torch.testing.assert_close(halved, antidiagonal_energy(q.float(), k.float(), **sizes))
    assert torch.equal(keep(q, k), keep(q.float(), k.float()))


@pytest.mark.parametrize(("preset", "dense"), [("default", 0), ("vbench", 5), ("script", 5)])
def test_the_first_steps_of_a_preset_are_dense(preset: str, dense: int) -> None:
    x = one_direction_a_block()
    kinds = [plan(x, x, preset=preset, step=step).kinds for step in range(8)]
    assert kinds == [("dense",)] * dense + [("masked",)] * (8 - dense)


@pytest.mark.parametrize(("block", "wrong"), [((120, 128), 120), ((128, 72), 72), ((8, 16), 8)])
def test_blocks_that_are_not_whole_strides_are_refused(block: tuple[int, int], wrong: int) -> None:
    with pytest.raises(ValueError, match=f"whole strides: got {wrong} tokens, stride 16"):
        replace(XAttention.presets["default"], block=block)


def test_a_threshold_outside_0_to_1_is_refused() -> None:
    x = one_direction_a_block()
    with pytest.raises(ValueError, match="0 to 1: got"):
        plan(x, x, threshold=1.5)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_gpu_estimates_what_a_cpu_does(dtype: torch.dtype) -> None:
    q, k = (x.to(dtype) for x in noise(2, 1000, 64))
    q /= 8
    sizes = {"stride": 8, "block_q": 32, "block_k": 16}
    there = antidiagonal_energy(q.cuda(), k.cuda(), **sizes)
    torch.testing.assert_close(there.cpu(), antidiagonal_energy(q, k, **sizes), rtol=1e-4, atol=1e-5)
