"""Anchor rows, and what counts as repeating."""

from typing import Any

import pytest
import torch
from torch import Tensor

from calibatt.kernels.geometry import Geometry
from calibatt.kernels.plan import RowReuse, anchor_rows
from calibatt.methods.calibatt import repetition
from calibatt.methods.calibatt.repetition import row_similarity


def repeating_queries(geometry: Geometry) -> Tensor:
    """The same queries in every row of every frame; text queries are others."""
    frames, rows, columns = geometry.grid
    q = torch.randn(geometry.heads, geometry.tokens, geometry.head_dim)
    row = torch.randn(geometry.heads, 1, 1, columns, geometry.head_dim)
    video = slice(geometry.video_start, geometry.video_start + geometry.video_tokens)
    q[:, video] = row.expand(-1, frames, rows, -1, -1).flatten(1, 3)
    return q


@pytest.mark.parametrize(
    ("rows", "expected"), [(30, (3, 9, 15, 21, 27)), (45, (4, 13, 22, 31, 40)), (16, (1, 4, 8, 11, 14))]
)
def test_anchor_rows_are_the_middles_of_equal_bands(rows: int, expected: tuple[int, ...]) -> None:
    assert anchor_rows(rows, 5) == expected


@pytest.mark.parametrize(("rows", "count"), [(5, 5), (4, 5), (8, 0)])
def test_a_frame_without_other_rows_or_without_anchors_is_refused(rows: int, count: int) -> None:
    with pytest.raises(ValueError, match="anchor rows: got"):
        anchor_rows(rows, count)


@pytest.mark.parametrize("text", [{}, {"text_tokens": 7, "text_side": "first"}, {"text_tokens": 7}])
def test_attention_that_repeats_across_rows_has_similarity_one(text: dict[str, Any]) -> None:
    geometry = Geometry(grid=(2, 8, 5), heads=2, head_dim=16, **text)
    k = torch.randn(2, geometry.tokens, 16)
    similarity = row_similarity(repeating_queries(geometry), k, geometry, anchor_rows(8, 2))
    torch.testing.assert_close(similarity, torch.ones(2))


def test_rows_that_only_swap_their_columns_do_not_repeat() -> None:
    torch.manual_seed(0)
    geometry = Geometry(grid=(1, 6, 8), heads=1, head_dim=16)
    row = torch.randn(8, 16).mul(3)
    # each row is the same set of queries in another order: the mean over a row could not tell
    q = torch.cat([row.roll(shift, 0) for shift in range(6)])[None]
    similarity = row_similarity(q, torch.randn(1, geometry.tokens, 16), geometry, anchor_rows(6, 2))
    assert similarity.item() < 0.7


def test_similarity_is_the_median_over_rows_of_the_mean_cosine_with_the_token_that_would_be_copied(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    geometry = Geometry(grid=(3, 7, 5), heads=2, head_dim=8, text_tokens=4, text_side="first")
    anchors = anchor_rows(7, 2)
    q, k = torch.randn(2, 2, geometry.tokens, 8)
    weights = torch.softmax(q @ k.mT / 8**0.5, dim=-1)
    reuse = RowReuse.of_anchor_rows(geometry, anchors)
    copied = reuse.computed[reuse.source]
    cosines = torch.cosine_similarity(weights, weights[:, copied], dim=-1)
    rows = cosines[:, 4:].view(2, 3, 7, 5).mean(-1)
    others = rows[:, :, [row for row in range(7) if row not in anchors]]
    # two columns at a time
    monkeypatch.setattr(repetition, "CHUNK", 2 * 7 * geometry.tokens)
    torch.testing.assert_close(
        row_similarity(q, k, geometry, anchors), others.flatten(1).quantile(0.5, dim=-1), atol=1e-5, rtol=0
    )
