"""What happens to an arm before it is timed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from calibatt.bench.arms import Ready, first_of_layers, ready
from calibatt.bench.failure import Failure
from calibatt.bench.observers import Probe
from calibatt.kernels.geometry import Geometry
from calibatt.kernels.plan import Plan
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


def test_an_arm_whose_plans_leave_nothing_out_has_no_remainder(fakes: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    arm = replace(fakes.arm("mine"), remainder="zeroth")
    fakes.kernels[arm], fakes.methods[arm] = next(zip(fakes.kernels.values(), fakes.methods.values(), strict=True))
    method = type(fakes.methods[arm])
    planned: Callable[..., Plan] = method.plan
    monkeypatch.setattr(method, "plan", lambda *call: replace(planned(*call), remainder="zeroth"))
    assert isinstance(ready(fakes.context(), arm), Ready)
    monkeypatch.setattr(method, "plan", lambda self, q, k, v, site: Plan.dense(site.geometry))
    answer = ready(fakes.context(), arm)
    assert isinstance(answer, Failure)
    assert (answer.outcome, answer.reason[:28]) == ("unsupported", "it leaves out no block of th")
