"""The solver for what is wanted of a method."""

from __future__ import annotations

import pytest
import torch

from calibatt.bench.observers import Probe
from calibatt.bench.tuning import DENSITY_TOLERANCE, density_of, solve
from calibatt.kernels.base import Unsupported
from calibatt.kernels.catalogue import KERNELS
from calibatt.kernels.geometry import Geometry
from calibatt.kernels.mask import BlockMask
from calibatt.kernels.plan import Plan
from calibatt.methods.base import Knob
from calibatt.methods.site import Site

GEOMETRY = Geometry(grid=(4, 16, 16), heads=2, head_dim=16)
SITE = Site(geometry=GEOMETRY, step=0, steps=1, sigma=1.0, branch="cond", layer=0, layers=1)


class Share:
    """Keeps the first blocks of every row, as many as its share says."""

    def __init__(self, share: float) -> None:
        self.share = share

    def reset(self) -> None: ...

    def plan(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, site: Site) -> Plan:
        keep = torch.zeros(2, 64, 64, dtype=torch.bool)
        keep[:, :, : round(self.share * 64)] = True
        return Plan.masked(BlockMask.from_keep(keep, tokens=1024, block_q=16, block_k=16), 2)


@pytest.fixture
def probes() -> list[Probe]:
    q, k, v = torch.randn(3, 1, 2, 1024, 16, generator=torch.Generator().manual_seed(0))
    return [Probe(site=SITE, q=q, k=k, v=v)]


@pytest.mark.parametrize("target", [0.25, 0.5, 0.77])
@pytest.mark.parametrize("rising", [True, False])
def test_the_density_is_reached_whichever_way_the_knob_turns(probes: list[Probe], target: float, rising: bool) -> None:
    def build(x: float) -> Share:
        return Share(x if rising else 1 - x)

    def density(x: float) -> float:
        return density_of(build(x), probes, KERNELS["flex"])

    knob = Knob(field="share", low=0.1, high=0.9)
    value = solve(density, knob, target, tolerance=DENSITY_TOLERANCE, quantity="densities")
    assert isinstance(value, float)
    # 64 blocks a row: the nearest density there is lies at most half a block away
    assert abs(density(value) - target) <= max(DENSITY_TOLERANCE, 0.5 / 64)


def test_any_quantity_is_solved_for_by_the_same_search() -> None:
    # a PSNR that falls along the knob: 40 dB at 0, 20 dB at 1
    knob = Knob(field="share", low=0.0, high=1.0)
    value = solve(lambda x: 40 - 20 * x, knob, 32.5, tolerance=0.25, quantity="PSNRs in dB")
    # halving meets 0.375 exactly
    assert value == 0.375
    answer = solve(lambda x: 40 - 20 * x, knob, 45, tolerance=0.25, quantity="PSNRs in dB")
    assert answer == Unsupported("its share reaches PSNRs in dB from 20.000 to 40.000, not 45.000")


def test_a_target_in_the_middle_of_a_large_step_is_said_to_be_out_of_reach() -> None:
    knob = Knob(field="reach", low=0.0, high=11.0)

    def density(reach: float) -> float:
        return 0.104 if reach < 4 else 1.0

    answer = solve(density, knob, 0.35, tolerance=DENSITY_TOLERANCE, quantity="densities")
    assert answer == Unsupported("its reach gives densities of 0.104 and 1.000, none near 0.350")


def test_a_density_out_of_reach_is_said_so(probes: list[Probe]) -> None:
    answer = solve(
        lambda x: density_of(Share(x), probes, KERNELS["flex"]), Knob(field="share", low=0.25, high=0.5), 0.75,
        tolerance=DENSITY_TOLERANCE, quantity="densities",
    )  # fmt: skip
    assert answer == Unsupported("its share reaches densities from 0.250 to 0.500, not 0.750")
