"""SageAttention's plan: everything, in INT8."""

from __future__ import annotations

import torch

from calibatt.kernels.geometry import Geometry
from calibatt.methods.catalogue import build
from calibatt.methods.site import Site


def test_everything_is_computed_with_a_scale_for_every_128_queries_and_64_keys() -> None:
    geometry = Geometry(grid=(1, 8, 8), heads=2, head_dim=8)
    site = Site(geometry=geometry, step=0, steps=1, sigma=1.0, branch="cond", layer=0, layers=1)
    q = torch.zeros(2, 64, 8)
    # the stage's blocks are none of its own
    plan = build("sage", block=(64, 64)).plan(q, q, q, site)
    assert (set(plan.kinds), plan.int8) == ({"dense"}, (128, 64))
    assert plan.density().tolist() == [1.0, 1.0]
