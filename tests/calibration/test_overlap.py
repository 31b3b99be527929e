"""How far masks overlap: counted by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from calibatt.calibration.overlap import overlap
from calibatt.kernels.mask import packed

Made = Callable[..., Any]


def test_the_overlap_is_of_all_blocks_that_either_keeps_at_any_site(run: Made, hand_made: Made) -> None:
    made = run(hand_made(), preset="masks-only")
    # 4 × 8 blocks of 2 heads, at 2 steps of 3 layers: all kept, but at one site half of those of one head
    full = packed(torch.ones(2, 4, 8, dtype=torch.bool)).repeat(2, 3, 1, 1, 1)
    half = full.clone()
    half[1, 2, 0] = packed(torch.arange(8).expand(1, 4, 8) < 4)[0]
    one, other = (replace(made, tables={**dict(made.parts.items()), "bits": bits}) for bits in (full, half))
    assert overlap(one, other) == overlap(other, one) == 1 - 0.5 / 12
    assert overlap(one, one) == 1


def test_heads_without_a_mask_do_not_count(run: Made, hand_made: Made) -> None:
    # a likeness of 0 is anybody's, so that every head reuses rows
    made = run(hand_made(), gamma=0.0)
    assert overlap(made, run(hand_made(), preset="masks-only")) is None


def test_masks_for_other_videos_are_refused_with_both_named(run: Made, hand_made: Made) -> None:
    made = run(hand_made(), preset="masks-only")
    with pytest.raises(ValueError, match=r"2 steps, 3 layers, blocks \[16, 8\] have nothing .* 5 steps, 3 layers"):
        overlap(made, made.transferred(hand_made(steps=5)))
