"""Output errors of reuse and of masks, against their definition in fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from calibatt.kernels import oracle
from calibatt.kernels.geometry import Geometry
from calibatt.kernels.mask import BlockMask, block_count
from calibatt.kernels.plan import Plan, RowReuse, anchor_rows
from calibatt.methods.calibatt import errors
from calibatt.methods.calibatt.errors import output_errors

BLOCK = (16, 8)
TEXTS: list[dict[str, Any]] = [{}, {"text_tokens": 7, "text_side": "first"}, {"text_tokens": 5, "text_side": "last"}]


def drawn(geometry: Geometry) -> tuple[Tensor, Tensor, Tensor, BlockMask]:
    """Queries, keys, values, and a mask with a block in every row."""
    generator = torch.Generator().manual_seed(geometry.tokens)
    q, k, v = torch.randn(3, geometry.heads, geometry.tokens, geometry.head_dim, generator=generator).mul(2)
    shape = [geometry.heads, *(block_count(geometry.tokens, size) for size in BLOCK)]
    keep = torch.rand(shape, generator=generator) < 0.4
    keep[:, :, 1] = True
    return q, k, v, BlockMask.from_keep(keep, tokens=geometry.tokens, block_q=BLOCK[0], block_k=BLOCK[1])


# the last are odd throughout, and one frame of one column
@pytest.mark.parametrize("grid", [(2, 6, 5), (3, 7, 3), (1, 11, 1)], ids=str)
@pytest.mark.parametrize("text", TEXTS, ids=["none", "first", "last"])
def test_errors_are_those_of_the_plans_outputs_over_the_mean_square_of_the_layer(
    grid: tuple[int, int, int], text: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    geometry = Geometry(grid=grid, heads=3, head_dim=16, **text)
    anchors = anchor_rows(grid[1], 2)
    q, k, v, mask = drawn(geometry)
    video = slice(geometry.video_start, geometry.video_start + geometry.video_tokens)
    plans = {
        "dense": Plan.dense(geometry),
        "reused": Plan(tokens=geometry.tokens, kinds=("reused",) * 3, reuse=RowReuse.of_anchor_rows(geometry, anchors)),
        "masked": Plan.masked(mask, 3),
    }
    outs = {name: oracle.attend(q[None], k[None], v[None], plan)[0, :, video] for name, plan in plans.items()}
    square = outs["dense"].square().sum(-1).mean()
    expected = [(outs[name] - outs["dense"]).square().sum(-1).mean(-1) / square for name in ("reused", "masked")]
    # four queries at a time, which does not divide the video
    monkeypatch.setattr(errors, "CHUNK", 4 * geometry.tokens)
    found = output_errors(q, k, v, geometry, anchors, mask)
    for own, exact in zip(found, expected, strict=True):
        torch.testing.assert_close(own.double(), exact, rtol=1e-4, atol=0)


def test_rows_whose_queries_are_alike_lose_nothing_and_nor_does_a_mask_that_keeps_all() -> None:
    geometry = Geometry(grid=(2, 6, 5), heads=2, head_dim=16)
    _, k, v, mask = drawn(geometry)
    q = torch.randn(2, 1, 1, 5, 16).expand(-1, 2, 6, -1, -1).flatten(1, 3)
    reused, masked = output_errors(q, k, v, geometry, (1, 4), mask.each(torch.zeros_like).each(torch.bitwise_not))
    # rounding of fp32, squared
    assert max(reused.max(), masked.max()) < 1e-12


def test_a_mask_without_the_keys_that_a_query_attends_to_has_a_finite_error() -> None:
    geometry = Geometry(grid=(1, 4, 4), heads=1, head_dim=16)
    q, k, v = torch.randn(3, 1, 16, 16)
    # scores of hundreds: the weights of all other keys are zero in fp32
    q[..., 0], k[..., 0] = 100.0, 0.0
    k[:, 8:, 0] = 100.0
    keep = torch.tensor([[[True, False]]])
    mask = BlockMask.from_keep(keep, tokens=16, block_q=16, block_k=8)
    _, masked = output_errors(q, k, v, geometry, (1,), mask)
    assert masked.isfinite().all()
    assert masked.item() > 0.1


def test_outputs_that_are_all_zero_have_no_error() -> None:
    geometry = Geometry(grid=(2, 6, 5), heads=2, head_dim=16)
    q, k, v, mask = drawn(geometry)
    for own in output_errors(q, k, torch.zeros_like(v), geometry, (1, 4), mask):
        assert own.tolist() == [0.0, 0.0]
