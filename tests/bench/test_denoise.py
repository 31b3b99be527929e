"""Pictures of masks, of blocks of one size and of any."""

from __future__ import annotations

import torch

from calibatt.bench.suites.denoise import _some_masks
from calibatt.kernels.geometry import Geometry
from calibatt.kernels.mask import BlockMask, VariableBlockMask
from calibatt.kernels.plan import Plan
from calibatt.methods.site import Site

GEOMETRY = Geometry(grid=(1, 10, 25), heads=2, head_dim=8)
SITE = Site(geometry=GEOMETRY, step=3, steps=5, sigma=1.0, branch="cond", layer=1, layers=2)


def test_a_cell_is_a_block() -> None:
    keep = torch.rand((2, 4, 8), generator=torch.Generator().manual_seed(0)) < 0.5
    mask = BlockMask.from_keep(keep, tokens=250, block_q=80, block_k=32)
    sites, pictures = _some_masks([(SITE, Plan.masked(mask, 2))])
    assert sites == [(3, 1, 0), (3, 1, 0), (3, 1, 1), (3, 1, 1)]
    assert all(
        torch.equal(torch.from_numpy(picture), keep[site[2]]) for site, picture in zip(sites, pictures, strict=True)
    )


def test_blocks_that_differ_in_size_are_drawn_to_scale() -> None:
    # cells of 64 tokens, whose middles are tokens 32, 96, 160 and 221
    q_sizes, k_sizes = torch.tensor([[33, 0, 217]]), torch.tensor([[96, 1, 153]])
    keep = torch.tensor([[[1, 0, 0], [1, 1, 1], [0, 1, 1]]], dtype=torch.bool)
    mask = VariableBlockMask.from_keep(keep, q_sizes=q_sizes, k_sizes=k_sizes, tokens=250)
    _, pictures = _some_masks([(SITE, Plan.masked(mask, 2))])
    assert pictures[0].astype(int).tolist() == [[1, 0, 0, 0], [0, 1, 1, 1], [0, 1, 1, 1], [0, 1, 1, 1]]
