"""Lists made on the device are those of the mask."""

from __future__ import annotations

import pytest
import torch

from calibatt.kernels import tiles
from calibatt.kernels.expand import block_lists, key_tiles, query_tiles
from calibatt.kernels.geometry import Geometry
from calibatt.kernels.mask import BlockMask, VariableBlockMask
from calibatt.kernels.plan import Plan, RowReuse

pytestmark = pytest.mark.skipif(
    not (tiles.interpreted() or torch.cuda.is_available()), reason="needs Triton's interpreter or a CUDA GPU"
)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GEOMETRY = Geometry(grid=(8, 5, 25), heads=3, head_dim=64)


def _mask(heads: int) -> BlockMask:
    # more key blocks than a word has bits
    keep = torch.rand((heads, 32, 63), generator=torch.Generator().manual_seed(0)) < 0.5
    keep[:, 1] = False
    return BlockMask.from_keep(keep, tokens=GEOMETRY.tokens, block_q=32, block_k=16).to(DEVICE)


def _listed(indices: torch.Tensor, counts: torch.Tensor) -> list[list[list[int]]]:
    return [
        [row[:n] for row, n in zip(*head, strict=True)] for head in zip(indices.tolist(), counts.tolist(), strict=True)
    ]


@pytest.mark.parametrize("heads", [3, 1])
def test_they_are_ascending_and_complete(heads: int) -> None:
    mask = _mask(heads)
    indices, counts = block_lists(Plan.masked(mask, 3))
    wanted = [[row.nonzero().flatten().tolist() for row in head] for head in mask.keep().expand(3, -1, -1)]
    assert _listed(indices, counts) == wanted


@pytest.mark.parametrize("heads", [3, 1])
def test_for_every_head_dense_ones_have_all_blocks_and_reused_ones_none(heads: int) -> None:
    mask, reuse = _mask(heads), RowReuse.of_anchor_rows(GEOMETRY, (1, 3)).to(DEVICE)
    plan = Plan(tokens=GEOMETRY.tokens, kinds=("dense", "masked", "reused"), mask=mask, reuse=reuse)
    whole = plan.launch_mask()
    assert whole is not None
    wanted = [[row.nonzero().flatten().tolist() for row in head] for head in whole.keep()]
    assert _listed(*block_lists(plan, every_head=True)) == wanted


def _variable(keep: list[list[int]], q_sizes: list[int], k_sizes: list[int]) -> VariableBlockMask:
    sizes = (torch.tensor([x]) for x in (q_sizes, k_sizes))
    q, k = sizes
    kept = torch.tensor([keep], dtype=torch.bool)
    return VariableBlockMask.from_keep(kept, q_sizes=q, k_sizes=k, tokens=sum(q_sizes)).to(DEVICE)


def test_tiles_of_queries_span_no_two_blocks() -> None:
    mask = _variable([[1]] * 5, [0, 17, 0, 16, 1], [34])
    tiles = query_tiles(mask, 16)[0].tolist()
    assert tiles[:4] == [[1, 0, 16], [1, 16, 17], [3, 17, 33], [4, 33, 34]]
    # the rest of 34 // 16 + 5 that there can be is of a block past the last one, and empty
    assert len(tiles) == 7
    assert all(block == 5 and first >= behind for block, first, behind in tiles[4:])


def test_kept_neighbours_are_one_range_and_whole_tiles_come_first() -> None:
    #         0–5 5–9 9 9–40 40–41 41–60
    sizes = [5, 4, 0, 31, 1, 19]
    mask = _variable(
        [
            [1, 1, 0, 1, 0, 1],  # nobody is between the second and the fourth
            [1, 0, 1, 0, 1, 0],
            [0, 0, 1, 0, 0, 0],  # nobody at all
            [1, 1, 1, 1, 1, 1],
        ],
        [15] * 4,
        sizes,
    )
    tiles, counts = key_tiles(mask, 16)
    listed = [
        [(x // 16, x % 16) for x in row[: n[1]]] for row, n in zip(tiles[0].tolist(), counts[0].tolist(), strict=True)
    ]
    assert listed == [
        [(0, 0), (16, 0), (41, 0), (32, 8), (57, 3)],
        [(0, 5), (40, 1)],
        [],
        [(0, 0), (16, 0), (32, 0), (48, 12)],
    ]
    assert counts[0, :, 0].tolist() == [3, 0, 0, 3]


def test_many_blocks_by_lot_list_every_key_once() -> None:
    generator = torch.Generator().manual_seed(0)
    # more blocks than a word has bits, a third of them empty
    labels = torch.randint(0, 70, (2, 1000), generator=generator)
    sizes = torch.stack([row.bincount(minlength=100) for row in labels])
    keep = torch.rand((2, 100, 100), generator=generator) < 0.3
    mask = VariableBlockMask.from_keep(keep, q_sizes=sizes, k_sizes=sizes, tokens=1000).to(DEVICE)
    tiles, counts = (x.cpu() for x in key_tiles(mask, 16))
    for head in range(2):
        for row in range(100):
            whole, count = counts[head, row].tolist()
            entries = tiles[head, row, :count].tolist()
            assert [x % 16 == 0 for x in entries] == [True] * whole + [False] * (count - whole)
            keys = [x // 16 + i for x in entries for i in range(x % 16 or 16)]
            expected = keep[head, row].repeat_interleave(sizes[head]).nonzero().flatten()
            assert sorted(keys) == expected.tolist()
