"""Lists made on the device are those of the mask."""

from __future__ import annotations

import pytest
import torch

from calibatt.kernels import tiles
from calibatt.kernels.expand import block_lists
from calibatt.kernels.geometry import Geometry
from calibatt.kernels.plan import BlockMask, Plan, RowReuse

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
