"""DraftAttention's choice on queries and keys whose pooled attention is known."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from calibatt.kernels.geometry import Geometry
from calibatt.kernels.plan import Plan
from calibatt.methods.base import Method
from calibatt.methods.draft import Draft, largest
from calibatt.methods.patches import patch_order
from calibatt.methods.site import Site

# four frames of one patch and one block each
GEOMETRY = Geometry(grid=(4, 4, 4), heads=1, head_dim=4)
SMALL: dict[str, Any] = {"patch": (4, 4), "block": (16, 16)}
DIAGONAL = torch.eye(4, dtype=torch.bool)


def planned(
    q: Tensor,
    k: Tensor,
    geometry: Geometry,
    *,
    preset: str = "no-warmup",
    sigma: float = 1.0,
    layer: int = 0,
    **settings: Any,
) -> Plan:
    site = Site(geometry=geometry, step=0, steps=1, sigma=sigma, branch="cond", layer=layer, layers=60)
    return Draft(replace(Draft.presets[preset], **settings)).plan(q, k, k, site)


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


def by_power(weights: list[float], powers: list[float]) -> tuple[Tensor, Tensor]:
    """Softmax over the blocks, of the queries of block r, proportional to the weights to the power r."""
    q, k = torch.zeros(2, 1, 16 * len(weights), 4)
    q[..., 0] = math.sqrt(4) * torch.tensor(powers).repeat_interleave(16)
    k[..., 0] = torch.tensor(weights).log().repeat_interleave(16)
    return q, k


# per row:     0.400 0.300 0.200 0.100
#              0.420 0.302 0.189 0.088   to the power 1.1
#              0.440 0.303 0.178 0.079   to the power 1.2
#              0.235 0.242 0.252 0.270   to the power -0.1
UNEQUAL = by_power([0.4, 0.3, 0.2, 0.1], [1.0, 1.1, 1.2, -0.1])


def test_it_is_a_method() -> None:
    assert isinstance(Draft(Draft.presets["default"]), Method)
    assert Draft(Draft.presets["default"]).refusal(GEOMETRY) is None


def test_one_threshold_for_all_rows_and_a_row_below_it_keeps_its_own_largest() -> None:
    # 6 of 16 entries: two of each of the first rows, none of the last
    chosen = keep(*UNEQUAL, sparsity=0.625)[0]
    assert chosen.int().tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0, 1]]


def test_a_row_takes_from_the_others_what_is_larger_there() -> None:
    # 10 of 16 entries: all four of the last row, and no third of the others
    chosen = keep(*UNEQUAL, sparsity=0.375)[0]
    assert chosen.int().tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1]]


# 16 entries times the share that is kept: 5.6, 6.4, and never none
@pytest.mark.parametrize(("sparsity", "count"), [(0.65, 6), (0.6, 6), (0.99, 1), (1.0, 1), (0.0, 16), (0.5, 8)])
def test_the_share_is_rounded_and_one_entry_is_always_kept(sparsity: float, count: int) -> None:
    weights = torch.rand(3, 4, 4, generator=torch.Generator().manual_seed(0))
    assert largest(weights, sparsity, fill=False).sum((1, 2)).tolist() == [count] * 3


def test_at_full_sparsity_every_row_keeps_its_largest_entry() -> None:
    assert keep(*UNEQUAL, sparsity=1.0)[0].int().tolist() == [[1, 0, 0, 0]] * 3 + [[0, 0, 0, 1]]


def test_of_equal_entries_at_the_threshold_all_are_kept_but_a_row_is_filled_by_one() -> None:
    weights = torch.tensor([[[0.5, 0.25, 0.25], [0.25, 0.5, 0.25], [0.2, 0.4, 0.4]]])
    assert largest(weights, 2 / 3, fill=True).int().tolist() == [[[1, 0, 0], [0, 1, 0], [0, 1, 1]]]
    assert largest(weights, 8 / 9, fill=True).int().tolist() == [[[1, 0, 0], [0, 1, 0], [0, 1, 0]]]


def test_less_sparsity_keeps_all_that_more_keeps(all_ragged: tuple[Geometry, ...]) -> None:
    for geometry in all_ragged:
        q, k = noise(geometry)
        last = torch.zeros(1, dtype=torch.bool)
        for sparsity in (1.0, 0.95, 0.9, 0.75, 0.5, 0.25, 0.0):
            kept = keep(q, k, geometry, sparsity=sparsity, block=(32, 16), patch=(8, 16))
            assert not (last & ~kept).any()
            last = kept
        assert last.all()


def test_a_block_is_a_patch_of_a_frame() -> None:
    # the tokens of each quarter of the frame point one way; taken row by row, blocks would mix two of them
    geometry = Geometry(grid=(1, 8, 8), heads=1, head_dim=4)
    quarter = torch.tensor([[0, 1], [2, 3]]).repeat_interleave(4, 0).repeat_interleave(4, 1).flatten()
    x = 4 * torch.eye(4)[quarter][None]
    plan = planned(x, x, geometry, sparsity=0.75, **SMALL)
    assert plan.mask is not None
    assert torch.equal(plan.mask.keep()[0], DIAGONAL)
    assert plan.order is not None
    assert plan.order.shared
    assert torch.equal(plan.order.queries, patch_order(geometry, 4, 4))


def test_a_query_block_and_a_key_block_are_pooled_by_their_own_sizes() -> None:
    # key blocks of 16 tokens, each in one frame; query blocks of 32, each two frames that point the same way
    x = 4 * torch.eye(4).repeat_interleave(16, 0)[None]
    q = 4 * torch.eye(4)[[0, 0, 3, 3]].repeat_interleave(16, 0)[None]
    assert keep(q, x, sparsity=0.75, block=(32, 16))[0].int().tolist() == [[1, 0, 0, 0], [0, 0, 0, 1]]


# 20 tokens of text reach into two of five blocks of 16, one of which is shared with the video
@pytest.mark.parametrize(("side", "text"), [("first", [0, 1]), ("last", [3, 4])])
def test_blocks_with_text_are_always_on_and_no_part_of_the_choice(side: str, text: list[int]) -> None:
    geometry = Geometry(grid=(1, 4, 15), heads=1, head_dim=5, text_tokens=20, text_side=side)  # type: ignore[arg-type]
    is_text = torch.zeros(5, dtype=torch.bool)
    is_text[text] = True
    # every block points its own way, and text as block 2 does: in the softmax it would leave that one's row nothing
    q = 4 * torch.eye(5).repeat_interleave(16, 0)[None]
    k = q.clone()
    k[:, is_text.repeat_interleave(16), 2] = 50.0
    # 3 of the 9 pairs of the other blocks
    kept = keep(q, k, geometry, sparsity=2 / 3, patch=(4, 15))[0]
    assert torch.equal(kept, torch.eye(5, dtype=torch.bool) | is_text[:, None] | is_text)


def test_beside_text_a_row_without_any_video_key_is_left_as_it_is() -> None:
    # the four video blocks have the weights of above; text has keys for the last of them
    geometry = Geometry(grid=(4, 4, 4), heads=1, head_dim=4, text_tokens=16)
    q, k = (torch.cat((x, torch.zeros(1, 16, 4)), dim=1) for x in UNEQUAL)
    assert keep(q, k, geometry, sparsity=0.625)[0].int().tolist() == [
        [1, 1, 0, 0, 1],
        [1, 1, 0, 0, 1],
        [1, 1, 0, 0, 1],
        [0, 0, 0, 0, 1],
        [1, 1, 1, 1, 1],
    ]


@pytest.mark.parametrize("side", ["first", "last"])
def test_where_text_is_in_every_block_all_are_on(side: str) -> None:
    geometry = Geometry(grid=(1, 2, 5), heads=1, head_dim=4, text_tokens=20, text_side=side)  # type: ignore[arg-type]
    assert keep(*noise(geometry), geometry, sparsity=1.0, block=(32, 32)).all()


# timesteps above 925 and 945 of 1000, and not those
@pytest.mark.parametrize(
    ("preset", "sigma", "layer", "dense"),
    [
        ("default", 0.926, 5, True),
        ("default", 0.925, 5, False),
        ("default", 0.3, 0, True),
        ("default", 0.3, 1, False),
        ("hunyuan", 0.946, 5, True),
        ("hunyuan", 0.945, 5, False),
        ("hunyuan", 0.3, 1, True),
        ("hunyuan", 0.3, 2, False),
        ("no-warmup", 1.0, 0, False),
    ],
)
def test_dense_in_noise_and_in_the_first_layers(preset: str, sigma: float, layer: int, dense: bool) -> None:
    plan = planned(*UNEQUAL, GEOMETRY, preset=preset, sigma=sigma, layer=layer, **SMALL)
    assert (plan.kinds == ("dense",)) == dense
    assert (plan.mask is None) == (plan.order is None) == dense


def test_a_shorter_last_block_is_pooled_over_its_own_tokens() -> None:
    # 50 tokens: the last block has 2, and would point an eighth as far if divided by 16
    geometry = Geometry(grid=(1, 5, 10), heads=1, head_dim=4)
    x = 4 * torch.eye(4).repeat_interleave(16, 0)[None, :50]
    kept = keep(x, x, geometry, sparsity=0.75, patch=(5, 10))[0]
    assert torch.equal(kept, DIAGONAL)


def test_heads_choose_apart() -> None:
    # the second head's attention is nearly flat, below any threshold of the first's
    q, k = (torch.cat((x, x)) for x in UNEQUAL)
    q[1] *= -0.1
    kept = keep(q, k, replace(GEOMETRY, heads=2), sparsity=0.625)
    assert torch.equal(kept[0], keep(*UNEQUAL, sparsity=0.625)[0])
    assert torch.equal(kept[1:], keep(q[1:], k[1:], sparsity=0.625))
    assert kept[1].sum() >= 6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_chooses_as_single_does(dtype: torch.dtype, all_ragged: tuple[Geometry, ...]) -> None:
    for geometry in all_ragged:
        q, k = (x.to(dtype) for x in noise(geometry))
        assert torch.equal(keep(q, k, geometry, block=(32, 16)), keep(q.float(), k.float(), geometry, block=(32, 16)))


@pytest.mark.parametrize("sparsity", [0.0, 0.75, 1.0])
def test_no_query_is_left_without_a_key(ragged: Geometry, sparsity: float) -> None:
    kept = keep(*noise(ragged), ragged, sparsity=sparsity, block=(32, 16), patch=(8, 16))
    assert kept.any(-1).all()
    assert kept.all() == (sparsity == 0)


def test_one_instance_serves_several_geometries(all_ragged: tuple[Geometry, ...]) -> None:
    method = Draft(replace(Draft.presets["no-warmup"], block=(32, 16)))
    for geometry in (*all_ragged, *all_ragged):
        site = Site(geometry=geometry, step=0, steps=1, sigma=1.0, branch="cond", layer=0, layers=1)
        plan = method.plan(*qkv(geometry), site)
        alone = planned(*noise(geometry), geometry, block=(32, 16))
        assert plan.mask is not None
        assert alone.mask is not None
        assert torch.equal(plan.mask.keep(), alone.mask.keep())
        method.reset()


@pytest.mark.parametrize("sparsity", [-0.1, 1.1])
def test_a_sparsity_that_is_no_share_is_refused(sparsity: float) -> None:
    with pytest.raises(ValueError, match="0 to 1"):
        replace(Draft.presets["default"], sparsity=sparsity)
