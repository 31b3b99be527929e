"""What happens to an arm before it is timed."""

from __future__ import annotations

import torch

from calibatt.bench.arms import first_of_layers
from calibatt.bench.observers import Probe
from calibatt.kernels.geometry import Geometry
from calibatt.methods.site import Site

GEOMETRY = Geometry(grid=(1, 2, 2), heads=1, head_dim=8)


def probe(step: int, layer: int) -> Probe:
    x = torch.zeros(1, 1, 4, 8)
    site = Site(geometry=GEOMETRY, step=step, steps=9, sigma=0.5, branch="cond", layer=layer, layers=3)
    return Probe(site=site, q=x, k=x, v=x)


def test_every_layer_has_its_first_call_before_anything_is_timed() -> None:
    # two steps of one layer: a call at the later one first would begin another video
    probes = [probe(1, 0), probe(4, 2), probe(6, 0), probe(8, 2)]
    assert [(one.site.step, one.site.layer) for one in first_of_layers(probes)] == [(1, 0), (4, 2)]
