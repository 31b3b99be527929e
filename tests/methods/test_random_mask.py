"""The random control: as many blocks as CalibAtt's plan has, anywhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from calibatt.kernels.geometry import Geometry
from calibatt.kernels.mask import packed
from calibatt.kernels.plan import Plan
from calibatt.methods.base import Method
from calibatt.methods.catalogue import build, learner
from calibatt.methods.learning import Learnt
from calibatt.methods.random_mask import RandomMask, RandomMaskConfig
from calibatt.methods.site import Site

# 1000 tokens in blocks of 32 × 16: 32 × 63 blocks, the last of each axis shorter
GEOMETRY = Geometry(grid=(8, 5, 25), heads=3, head_dim=8)
BLOCK = (32, 16)
Q = torch.zeros(3, 1000, 8)
# another number of blocks in every row
MODEL = (torch.arange(63) <= torch.arange(32)[:, None]).expand(3, -1, -1)
MASKED, MIXED = (0.0, 0.0, 0.0), (0.0, 1.0, 0.0)
Made = Callable[..., tuple[Method, Method]]


def site(**where: Any) -> Site:
    given = {"step": 3, "steps": 50, "sigma": 0.5, "branch": "cond", "layer": 2, "layers": 8}
    return Site(**{"geometry": GEOMETRY, **given, **where})


@pytest.fixture
def made(tabled: Callable[..., Learnt]) -> Made:
    """The control, and CalibAtt by the same calibration, whose heads have a similarity each."""

    def both(similarity: tuple[float, ...] = MASKED, **settings: Any) -> tuple[Method, Method]:
        tables = {
            "bits": packed(MODEL).expand(50, 8, -1, -1, -1),
            "similarity": torch.tensor(similarity).expand(50, 8, -1),
            "agreement": torch.ones(50, 8, 3),
        }
        learnt = tabled("calibatt", site(), tables, learner("calibatt", block=BLOCK, anchors=2))
        calibration = None if "density" in settings else learnt
        control = build("random", calibration=calibration, **{"block": BLOCK, **settings})
        return control, build("calibatt", calibration=learnt)

    return both


def planned(method: Method, **where: Any) -> Plan:
    return method.plan(Q, Q, Q, site(**where))


def kept(method: Method, **where: Any) -> Tensor:
    mask = planned(method, **where).mask
    assert mask is not None
    return mask.keep()


def test_as_many_blocks_of_every_row_are_kept_as_calibatt_keeps(made: Made) -> None:
    control, _ = made()
    assert torch.equal(kept(control).sum(-1), MODEL.sum(-1))


def test_other_blocks_are_kept_than_calibatts_and_than_the_other_heads(made: Made) -> None:
    one, other, _ = kept(made()[0])
    # a draw agrees with anything in half of its blocks or so; CalibAtt's own would in all
    assert (one & MODEL[0]).sum() < 0.6 * one.sum()
    assert (one & other).sum() < 0.6 * one.sum()


def test_the_draws_spread_over_all_blocks(made: Made) -> None:
    control, _ = made()
    drawn = sum(kept(control, step=step).sum(0) for step in range(50))
    # row 19 keeps 20 of 63 blocks in 150 draws: 48 a block, with a standard deviation below 6
    assert 48 - 5 * 6 < drawn[19].min() <= drawn[19].max() < 48 + 5 * 6


@pytest.mark.parametrize(
    ("block", "off"),
    # half a block of 63 from rounding, and as much from the shorter last one
    [(BLOCK, 1 / 63), ((64, 64), 1 / 16)],
)
def test_the_density_is_calibatts_whatever_its_heads_do(made: Made, block: tuple[int, int], off: float) -> None:
    control, calibatt = (planned(method) for method in made(MIXED, block=block))
    assert set(control.kinds) == {"masked"}
    assert "reused" in calibatt.kinds
    torch.testing.assert_close(control.density(), calibatt.density(), atol=off, rtol=0)


def test_a_density_of_its_own_is_that_of_every_row(made: Made) -> None:
    control, _ = made(density=0.25)
    assert control.learnt is None
    assert set(kept(control).sum(-1).flatten().tolist()) == {round(63 / 4)}


def test_a_density_and_a_calibration_are_one_too_many_and_neither_is_too_few(made: Made) -> None:
    control, _ = made()
    for config, learnt in ((RandomMaskConfig(), None), (RandomMaskConfig(density=0.5), control.learnt)):
        with pytest.raises(ValueError, match="either a density of their own or a calibration"):
            RandomMask(config, learnt)


def test_the_same_is_drawn_again_and_for_the_other_branch(made: Made) -> None:
    first = kept(made()[0])
    torch.rand(3)
    assert torch.equal(kept(made()[0], branch="uncond"), first)


def test_the_presets_are_five_draws_at_one_density() -> None:
    draws = [kept(build("random", preset=preset, block=BLOCK, density=0.35)) for preset in RandomMask.presets]
    assert len({tuple(draw.flatten().tolist()) for draw in draws}) == len(draws) == 5
    assert {draw.sum().item() for draw in draws} == {draws[0].sum().item()}


@pytest.mark.parametrize("elsewhere", [{"step": 4}, {"layer": 3}, {"seed": 1}])
def test_another_site_and_another_seed_draw_anew(made: Made, elsewhere: dict[str, int]) -> None:
    settings = {key: value for key, value in elsewhere.items() if key == "seed"}
    where = {key: value for key, value in elsewhere.items() if key != "seed"}
    assert not torch.equal(kept(made(**settings)[0], **where), kept(made()[0]))
