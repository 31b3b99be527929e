"""Radial's mask, worked out by hand from its closed form."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from calibatt.kernels.geometry import Geometry
from calibatt.kernels.plan import Plan
from calibatt.methods.catalogue import build
from calibatt.methods.site import Site

# frames of 16 tokens in 4 blocks of 4, 10 frames
GEOMETRY = Geometry(grid=(10, 4, 4), heads=2, head_dim=8)
BLOCKS_PER_FRAME = 4
# 16 has 5 binary digits, so the width at a distance d is 2⁵ / 2^digits(d): 32 | 16 | 8 8 | 4 4 4 4 | 2 2.
# The same frame is kept whole, and the next half a frame wide: |r − c| ≤ 8, two blocks to either side. Then a quarter
# of the width is less than a block, so |r − c| ≤ 4: a neighbouring block has 4, 3, 2, 1 of its 4 rows set in its
# columns, of which three are over a third, and is kept. From distance 8 on the width, 2, is half a block: every
# second distance is dropped.
REACH = {0: 3, 1: 2, 2: 1, 3: 1, 4: 1, 5: 1, 6: 1, 7: 1, 8: 1, 9: -1}


def plan(geometry: Geometry, *, step: int = 0, steps: int = 50, layer: int = 0, **settings: Any) -> Plan:
    chosen: dict[str, Any] = {"preset": "no-warmup", "block": (4, 4), "decay": 0.25} | settings
    q = torch.randn(geometry.heads, geometry.tokens, geometry.head_dim)
    site = Site(geometry=geometry, step=step, steps=steps, sigma=1.0, branch="cond", layer=layer, layers=4)
    return build("radial", **chosen).plan(q, q, q, site)


def keep(geometry: Geometry, **settings: Any) -> Tensor:
    mask = plan(geometry, **settings).mask
    assert mask is not None
    assert mask.heads == 1
    return mask.keep()[0]


def by_hand(frames: int, *, sink: bool) -> Tensor:
    expected = torch.zeros(frames * BLOCKS_PER_FRAME, frames * BLOCKS_PER_FRAME, dtype=torch.bool)
    for row in range(len(expected)):
        for column in range(len(expected)):
            (i, a), (j, b) = divmod(row, BLOCKS_PER_FRAME), divmod(column, BLOCKS_PER_FRAME)
            expected[row, column] = abs(a - b) <= REACH[abs(i - j)] or (sink and j == 0)
    return expected


@pytest.mark.parametrize("sink", [True, False])
def test_the_mask_is_the_closed_form(sink: bool) -> None:
    assert torch.equal(keep(GEOMETRY, sink=sink), by_hand(10, sink=sink))


def by_pairs(geometry: Geometry, block: int) -> Tensor:
    """The repository's rule, one pair of frames at a time, with its loss of what lies beyond ⌈frame / block⌉ blocks."""
    frames, size = geometry.grid[0], geometry.frame_tokens
    place = torch.arange(size)
    whole = -(-size // block)
    kept = torch.zeros(2 * [-(-geometry.tokens // block) + 1], dtype=torch.bool)
    for i in range(frames):
        for j in range(frames):
            distance = abs(i - j)
            width = 2.0 ** (size.bit_length() - distance.bit_length())
            reach = (size, size // 2)[distance] if distance < 2 else max(width / 4, block)
            pairs = (place - place[:, None]).abs() <= reach
            pairs &= width >= block or distance % int(block / width) == 0
            if j == 0:
                pairs[:] = True
            (up, above), (left, before) = (divmod(frame * size, block) for frame in (i, j))
            padded = torch.zeros(2 * [(whole + 2) * block])
            padded[above : above + size, before : before + size] = pairs.float()
            shares = padded.view(whole + 2, block, whole + 2, block).mean(1)[:whole, :whole]
            chosen = (shares > 1 / 3).sum(-1) > 0.6 * (shares > 0).sum(-1)
            kept[up : up + whole, left : left + whole] |= chosen
    return kept[:-1, :-1]


@pytest.mark.parametrize(("grid", "block"), [((8, 3, 6), 4), ((4, 5, 6), 8), ((12, 5, 6), 8)])
def test_where_frames_are_not_whole_blocks_each_pair_of_frames_is_judged_by_itself(
    grid: tuple[int, int, int], block: int
) -> None:
    geometry = Geometry(grid=grid, heads=2, head_dim=8)
    expected = by_pairs(geometry, block)
    assert expected.any(-1).all()
    assert torch.equal(keep(geometry, block=(block, block)), expected)


def test_a_query_block_that_would_lose_every_key_keeps_what_the_repository_cuts_off() -> None:
    # of blocks of 32, frames of 125 fill four; the fourth reaches 28 tokens into a fifth, which the next hardly fills
    geometry = Geometry(grid=(8, 5, 25), heads=2, head_dim=8)
    expected, made = by_pairs(geometry, 32), keep(geometry, block=(32, 32))
    filled = expected.any(-1)
    # the last block is shorter, and judged by its own rows
    filled[-1] = False
    assert not filled[:-1].all()
    assert torch.equal(made[filled], expected[filled])
    assert made.any(-1).all()


def test_a_wider_band_keeps_more() -> None:
    # at decay 1 the band between frames 2 or 3 apart is 8 wide, not 4: two blocks to either side
    rows = keep(GEOMETRY, decay=1.0, sink=False)[:4]
    assert rows[:, 8:12].int().tolist() == [[1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 1, 1], [0, 1, 1, 1]]
    assert rows[:, 16:20].int().tolist() == [[1, 1, 0, 0], [1, 1, 1, 0], [0, 1, 1, 1], [0, 0, 1, 1]]


@pytest.mark.parametrize("side", ["first", "last"])
def test_text_sees_and_is_seen_by_everything_and_video_is_as_without_it(side: Any) -> None:
    # 8 text tokens are two blocks, so that the video's blocks stay what they were
    geometry = Geometry(grid=(10, 4, 4), heads=2, head_dim=8, text_tokens=8, text_side=side)
    mask = keep(geometry)
    text, video = (slice(0, 2), slice(2, None)) if side == "first" else (slice(40, 42), slice(0, 40))
    assert mask[text].all()
    assert mask[:, text].all()
    assert torch.equal(mask[video, video], by_hand(10, sink=True))


@pytest.mark.parametrize(("side", "block"), [("first", 0), ("last", -1)])
def test_a_block_that_is_partly_text_counts_as_text(side: Any, block: int) -> None:
    mask = keep(Geometry(grid=(10, 4, 4), heads=2, head_dim=8, text_tokens=1, text_side=side))
    assert mask[block].all()
    assert mask[:, block].all()


@pytest.mark.parametrize("frames", [1, 2])
def test_few_frames_are_nearly_dense(frames: int) -> None:
    assert torch.equal(keep(Geometry(grid=(frames, 4, 4), heads=2, head_dim=8)), by_hand(frames, sink=True))


@pytest.mark.parametrize("grid", [(20, 4, 4), (7, 3, 5), (13, 2, 2), (16, 5, 5)])
@pytest.mark.parametrize("sink", [True, False])
def test_frames_smaller_than_a_block_leave_no_query_without_a_key(grid: tuple[int, int, int], sink: bool) -> None:
    geometry = Geometry(grid=grid, heads=2, head_dim=8)
    method = build("radial", preset="no-warmup", block=(64, 64), sink=sink)
    if method.refusal(geometry) is None:
        assert keep(geometry, block=(64, 64), sink=sink).any(-1).all()


# wan_t2v_inference.sh: 12 of 50; its fusionx and lightx2v scripts: 2 of 8 and 1 of 4
@pytest.mark.parametrize(("steps", "dense"), [(50, 12), (8, 2), (4, 1)])
def test_the_first_quarter_of_the_steps_is_dense_as_in_the_scripts(steps: int, dense: int) -> None:
    kinds = [plan(GEOMETRY, preset="default", step=step, steps=steps, layer=3).kinds[0] for step in range(steps)]
    assert kinds == ["dense"] * dense + ["masked"] * (steps - dense)


def test_the_first_layer_is_dense_at_every_step() -> None:
    assert set(plan(GEOMETRY, preset="default", step=49, layer=0).kinds) == {"dense"}
    assert set(plan(GEOMETRY, preset="default", step=49, layer=1).kinds) == {"masked"}


def test_without_warm_up_the_first_call_is_sparse() -> None:
    assert set(plan(GEOMETRY).kinds) == {"masked"}


def test_another_geometry_gets_its_own_mask() -> None:
    # the original keeps the first mask it makes
    method = build("radial", preset="no-warmup", block=(4, 4))
    for grid in ((10, 4, 4), (4, 10, 4)):
        geometry = Geometry(grid=grid, heads=2, head_dim=8)
        q = torch.zeros(2, 160, 8)
        site = Site(geometry=geometry, step=0, steps=1, sigma=1.0, branch="cond", layer=0, layers=1)
        made = method.plan(q, q, q, site).mask
        assert made is not None
        assert torch.equal(made.keep()[0], keep(geometry, decay=0.2))
