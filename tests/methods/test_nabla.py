"""NABLA's choice on queries and keys whose pooled attention is known."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from calibatt.kernels.geometry import Geometry
from calibatt.kernels.plan import Plan
from calibatt.methods.base import Method
from calibatt.methods.nabla import Nabla, window_blocks
from calibatt.methods.patches import patch_order
from calibatt.methods.site import Site

# four frames of one patch and one block each
GEOMETRY = Geometry(grid=(4, 4, 4), heads=1, head_dim=4)
SMALL: dict[str, Any] = {"patch": (4, 4), "block": (16, 16)}
DIAGONAL = torch.eye(4, dtype=torch.bool)


def planned(q: Tensor, k: Tensor, geometry: Geometry, **settings: Any) -> Plan:
    site = Site(geometry=geometry, step=0, steps=1, sigma=1.0, branch="cond", layer=0, layers=1)
    return Nabla(replace(Nabla.presets["default"], **settings)).plan(q, k, k, site)


def keep(q: Tensor, k: Tensor, geometry: Geometry = GEOMETRY, **settings: Any) -> Tensor:
    mask = planned(q, k, geometry, **(SMALL | settings)).mask
    assert mask is not None
    return mask.keep()


def noise(geometry: Geometry, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q, k = torch.randn(2, geometry.heads, geometry.tokens, geometry.head_dim, generator=generator)
    return 8 * q, k


def qkv(geometry: Geometry, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """The same with values, which play no part."""
    q, k = noise(geometry, seed)
    return q, k, k


def by_weight(weights: list[float], tokens: int = 64) -> tuple[Tensor, Tensor]:
    """Queries all alike, and keys so that every query's softmax over the blocks is these weights."""
    q, k = torch.zeros(2, 1, tokens, 4)
    q[..., 0] = math.sqrt(4)
    k[..., 0] = torch.tensor(weights).log().repeat_interleave(16)[:tokens]
    return q, k


def test_it_is_a_method() -> None:
    assert isinstance(Nabla(Nabla.presets["default"]), Method)
    assert Nabla(Nabla.presets["default"]).refusal(GEOMETRY) is None


# sums from the lightest on: 0.1, 0.3, 0.6, 1; kept from where they reach 1 - mass
@pytest.mark.parametrize(
    ("mass", "kept"),
    [(0.0, [0]), (0.3, [0]), (0.45, [0, 1]), (0.65, [0, 1]), (0.75, [0, 1, 2]), (0.95, [0, 1, 2, 3])],
)
def test_the_heaviest_blocks_that_hold_more_than_the_mass_are_kept(mass: float, kept: list[int]) -> None:
    chosen = keep(*by_weight([0.4, 0.3, 0.2, 0.1]), mass=mass)[0]
    assert all(row.nonzero().flatten().tolist() == kept for row in chosen)


def test_more_mass_keeps_all_that_less_keeps(all_ragged: tuple[Geometry, ...]) -> None:
    q, k = noise(all_ragged[1])
    last = torch.zeros(1, dtype=torch.bool)
    for mass in (0.0, 0.2, 0.5, 0.7, 0.9, 0.99, 1.0):
        kept = keep(q, k, all_ragged[1], mass=mass, block=(32, 16), patch=(8, 8))
        assert not (last & ~kept).any()
        last = kept
    assert last.all()


def test_a_block_is_a_patch_of_a_frame() -> None:
    # the tokens of each quarter of the frame point one way; taken row by row, blocks would mix two of them
    geometry = Geometry(grid=(1, 8, 8), heads=1, head_dim=4)
    quarter = torch.tensor([[0, 1], [2, 3]]).repeat_interleave(4, 0).repeat_interleave(4, 1).flatten()
    x = 4 * torch.eye(4)[quarter][None]
    plan = planned(x, x, geometry, mass=0.5, **SMALL)
    assert plan.mask is not None
    assert torch.equal(plan.mask.keep()[0], DIAGONAL)
    assert plan.order is not None
    assert plan.order.shared
    assert torch.equal(plan.order.queries, patch_order(geometry, 4, 4))


def test_a_query_block_and_a_key_block_are_pooled_by_their_own_sizes() -> None:
    # key blocks of 16 tokens, each in one frame; query blocks of 32, each two frames that point the same way
    x = 4 * torch.eye(4).repeat_interleave(16, 0)[None]
    q = 4 * torch.eye(4)[[0, 0, 3, 3]].repeat_interleave(16, 0)[None]
    assert keep(q, x, mass=0.5, block=(32, 16))[0].int().tolist() == [[1, 0, 0, 0], [0, 0, 0, 1]]


def test_a_shorter_last_block_is_pooled_over_its_own_tokens() -> None:
    # 50 tokens: the last block has 2; its mean over 16 would have an eighth of the score, and lose
    geometry = Geometry(grid=(1, 5, 10), heads=1, head_dim=4)
    q, k = by_weight([0.05, 0.05, 0.05, 0.85], tokens=50)
    k -= k.min()
    assert keep(q, k, geometry, mass=0.5, patch=(5, 10))[0].int().tolist() == [[0, 0, 0, 1]] * 4


def test_text_is_not_special() -> None:
    # 16 tokens of text before three frames: the block that holds them is chosen like any other
    geometry = Geometry(grid=(3, 4, 4), heads=1, head_dim=4, text_tokens=16, text_side="first")
    assert keep(*by_weight([0.1, 0.2, 0.3, 0.4]), geometry, mass=0.35)[0].int().tolist() == [[0, 0, 0, 1]] * 4


def test_heads_choose_apart() -> None:
    x = 4 * torch.eye(4).repeat_interleave(16, 0)[None]
    q, k = torch.cat((x, x.flip(1))), torch.cat((x, x))
    kept = keep(q, k, replace(GEOMETRY, heads=2), mass=0.5)
    assert torch.equal(kept, torch.stack((DIAGONAL, DIAGONAL.flip(0))))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_chooses_as_single_does(dtype: torch.dtype, all_ragged: tuple[Geometry, ...]) -> None:
    for geometry in all_ragged:
        q, k = (x.to(dtype) for x in noise(geometry))
        assert torch.equal(keep(q, k, geometry, block=(32, 16)), keep(q.float(), k.float(), geometry, block=(32, 16)))


@pytest.mark.parametrize("mass", [0.0, 0.7, 1.0])
def test_no_query_is_left_without_a_key(ragged: Geometry, mass: float) -> None:
    kept = keep(*noise(ragged), ragged, mass=mass, block=(32, 16), patch=(8, 8))
    assert kept.any(-1).all()
    assert kept.all() == (mass == 1)


def test_a_window_is_united_with_the_choice() -> None:
    # all choose the first frame; with one frame to either side on top
    chosen = keep(*by_weight([0.4, 0.3, 0.2, 0.1]), mass=0.3, window=(3, 1, 1))[0]
    assert chosen.int().tolist() == [[1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1], [1, 0, 1, 1]]


@pytest.mark.parametrize("window", [(1, 1, 1), (3, 1, 1), (1, 3, 1), (1, 1, 3), (3, 3, 5), (2, 2, 2), (11, 3, 3)])
def test_a_window_reaches_half_its_extent_to_either_side_on_each_axis(window: tuple[int, int, int]) -> None:
    # 3 frames of 2 × 4 whole patches: blocks are patches
    geometry = Geometry(grid=(3, 4, 8), heads=1, head_dim=4)
    places = list(product(range(3), range(2), range(4)))
    expected = [
        [all(abs(a - b) <= size // 2 for a, b, size in zip(one, other, window, strict=True)) for other in places]
        for one in places
    ]
    assert window_blocks(geometry, window=window, patch=(2, 2), block=(4, 4)).tolist() == expected


def test_a_block_of_several_patches_has_the_window_of_each() -> None:
    # a patch a frame; the query blocks hold frames 0 and 1, and 2 and 3
    kept = window_blocks(GEOMETRY, window=(3, 1, 1), patch=(4, 4), block=(32, 16))
    assert kept.int().tolist() == [[1, 1, 1, 0], [0, 1, 1, 1]]


@pytest.mark.parametrize(("side", "text"), [("first", 0), ("last", 3)])
def test_text_is_in_no_window(side: str, text: int) -> None:
    geometry = Geometry(grid=(3, 4, 4), heads=1, head_dim=4, text_tokens=16, text_side=side)  # type: ignore[arg-type]
    video = torch.arange(4) != text
    kept = window_blocks(geometry, window=(5, 1, 1), patch=(4, 4), block=(16, 16))
    assert torch.equal(kept, video[:, None] & video)


def test_one_instance_serves_several_geometries(all_ragged: tuple[Geometry, ...]) -> None:
    method = Nabla(replace(Nabla.presets["default"], block=(32, 16), window=(3, 3, 3)))
    for geometry in (*all_ragged, *all_ragged):
        site = Site(geometry=geometry, step=0, steps=1, sigma=1.0, branch="cond", layer=0, layers=1)
        plan = method.plan(*qkv(geometry), site)
        alone = planned(*noise(geometry), geometry, block=(32, 16), window=(3, 3, 3))
        assert plan.mask is not None
        assert alone.mask is not None
        assert torch.equal(plan.mask.keep(), alone.mask.keep())
        method.reset()


@pytest.mark.parametrize("mass", [-0.1, 1.1])
def test_a_mass_that_is_no_share_is_refused(mass: float) -> None:
    with pytest.raises(ValueError, match="0 to 1"):
        replace(Nabla.presets["default"], mass=mass)


def test_an_empty_window_is_refused() -> None:
    with pytest.raises(ValueError, match="its own patch"):
        replace(Nabla.presets["default"], window=(3, 0, 3))
