"""Sol-Attn's thresholds where scores are known, and the means that stand for all other blocks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from calibatt.kernels import oracle
from calibatt.kernels.geometry import Geometry
from calibatt.kernels.plan import Plan
from calibatt.methods.curves import curve_order
from calibatt.methods.site import Site
from calibatt.methods.sol import Sol, above, near_blocks

# eight frames of one block each
GEOMETRY = Geometry(grid=(8, 4, 4), heads=1, head_dim=4)
OWN = torch.eye(8, dtype=torch.bool)
SMALL: dict[str, Any] = {"block": (16, 16), "beside": 0}


def planned(
    q: Tensor, k: Tensor, geometry: Geometry = GEOMETRY, *, preset: str = "no-warmup", step: int = 20, layer: int = 5,
    **settings: Any,
) -> Plan:  # fmt: skip
    site = Site(geometry=geometry, step=step, steps=50, sigma=0.5, branch="cond", layer=layer, layers=40)
    return Sol(replace(Sol.presets[preset], **{**SMALL, **settings})).plan(q, k, k, site)


def keep(q: Tensor, k: Tensor, geometry: Geometry = GEOMETRY, **settings: Any) -> Tensor:
    mask = planned(q, k, geometry, **settings).mask
    assert mask is not None
    return mask.keep()


def noise(geometry: Geometry, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q, k = torch.randn(2, geometry.heads, geometry.tokens, geometry.head_dim, generator=generator)
    return 8 * q, k


def by_score(scores: list[float]) -> tuple[Tensor, Tensor]:
    """Queries all alike, and keys of one channel, so that the means of blocks of 16 have these scores."""
    q, k = torch.zeros(2, 1, 16 * len(scores), 4)
    q[..., 0] = 1.0
    k[..., 0] = torch.tensor(scores).repeat_interleave(16)
    return q, k


# a mean of 2 and a standard deviation of 2: 4 and 6 are one and two of them above
SCORES = [0.0, 0.0, 2.0, 0.0, 4.0, 2.0, 2.0, 6.0]


@pytest.mark.parametrize("spread", ["diagonal", "exact"])
@pytest.mark.parametrize(
    ("beta", "chosen"), [(-1.01, range(8)), (-0.99, [2, 4, 5, 6, 7]), (0.99, [4, 7]), (1.01, [7]), (2.01, [])]
)
def test_a_block_is_computed_whose_score_is_so_many_spreads_above_its_rows_mean(
    beta: float, chosen: list[int], spread: Any
) -> None:
    kept = keep(*by_score(SCORES), beta=beta, spread=spread)[0]
    assert torch.equal(kept, OWN | torch.isin(torch.arange(8), torch.tensor(list(chosen))))


def test_what_is_no_more_than_the_threshold_is_left_to_its_mean() -> None:
    assert torch.equal(keep(*by_score([1.0] * 8), beta=0.0)[0], OWN)


def test_the_thresholds_are_those_of_the_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 3, 40, 8, generator=generator, dtype=torch.float64)
    # channels that go together, so that the two spreads differ
    k[..., 1] += 2 * k[..., 0]
    scores = torch.einsum("hid,hjd->hij", q, k)
    mean, diagonal = scores.mean(-1), torch.einsum("hid,hd->hi", q**2, k.var(1, correction=0)).sqrt()
    exact = scores.std(-1, correction=0)
    for spread, deviation in (("diagonal", diagonal), ("exact", exact)):
        expected = scores > (mean + 0.7 * deviation)[..., None]
        assert torch.equal(above(q, k, 0.7, spread), expected)  # type: ignore[arg-type]
    assert not torch.equal(above(q, k, 0.7, "diagonal"), above(q, k, 0.7, "exact"))


def test_of_scores_spread_as_a_normal_distribution_a_spread_of_one_computes_16_percent() -> None:
    q, k = torch.randn(2, 4, 400, 64, generator=torch.Generator().manual_seed(0))
    for spread in ("diagonal", "exact"):
        assert abs(above(q, k, 1.0, spread).double().mean().item() - 0.159) < 0.01  # type: ignore[arg-type]


def test_a_rows_own_blocks_and_those_beside_them_are_always_computed() -> None:
    apart = (torch.arange(8)[:, None] - torch.arange(8)).abs()
    for beside in (0, 1, 2):
        assert torch.equal(keep(*by_score([0.0] * 8), beside=beside)[0], apart <= beside)


def test_a_query_block_lies_in_key_blocks_of_another_size() -> None:
    # 80 tokens: query blocks of 32, the last of 16, key blocks of 16; and the other way round
    cpu = torch.device("cpu")
    assert near_blocks(80, (32, 16), 0, cpu).int().tolist() == [[1, 1, 0, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 0, 1]]
    assert torch.equal(near_blocks(80, (16, 32), 0, cpu), near_blocks(80, (32, 16), 0, cpu).mT)
    assert near_blocks(80, (32, 16), 1, cpu).int().tolist() == [[1, 1, 1, 0, 0], [0, 1, 1, 1, 1], [0, 0, 0, 1, 1]]


def test_means_stand_for_all_other_blocks_and_the_output_comes_nearer_to_dense() -> None:
    smooth = torch.randn((1, 12, 8), generator=torch.Generator().manual_seed(0))
    k = torch.nn.functional.interpolate(smooth.mT, 128, mode="linear").mT
    plan = planned(4 * k, k, replace(GEOMETRY, head_dim=8))
    assert plan.remainder == "zeroth"
    dense, near, far = (
        oracle.attend(4 * k[None], k[None], k[None], one)
        for one in (Plan.dense(GEOMETRY), plan, replace(plan, remainder="none"))
    )
    assert (near - dense).norm() < 0.5 * (far - dense).norm()


def test_less_beta_computes_all_that_more_computes(all_ragged: tuple[Geometry, ...]) -> None:
    for geometry in all_ragged:
        last = torch.zeros(1, dtype=torch.bool)
        for beta in (8.0, 2.0, 1.0, 0.0, -1.0, -8.0):
            kept = keep(*noise(geometry), geometry, beta=beta, block=(32, 16))
            assert not (last & ~kept).any()
            last = kept
        assert last.all()


def test_no_query_is_left_without_a_key(ragged: Geometry) -> None:
    assert keep(*noise(ragged), ragged, beta=8.0, block=(32, 16)).any(-1).all()


# 20 tokens of text reach into two of five blocks of 16, one of which is shared with the video
@pytest.mark.parametrize(("side", "text"), [("first", [0, 1]), ("last", [3, 4])])
def test_blocks_with_text_are_always_on_and_no_part_of_the_choice(side: Any, text: list[int]) -> None:
    geometry = Geometry(grid=(1, 4, 15), heads=1, head_dim=4, text_tokens=20, text_side=side)
    is_text = torch.isin(torch.arange(5), torch.tensor(text))
    # text's scores would raise any threshold out of reach
    scores = torch.where(is_text, 1000.0, torch.arange(5.0))
    kept = keep(*by_score(scores.tolist()), geometry, beta=1.0)[0]
    largest = torch.arange(5) == (~is_text).nonzero().max()
    assert torch.equal(kept, torch.eye(5, dtype=torch.bool) | is_text[:, None] | is_text | largest)


@pytest.mark.parametrize("side", ["first", "last"])
def test_where_text_is_in_every_block_all_are_on(side: Any) -> None:
    geometry = Geometry(grid=(1, 2, 5), heads=1, head_dim=4, text_tokens=20, text_side=side)
    assert keep(*noise(geometry), geometry, beta=8.0, block=(32, 32)).all()


@pytest.mark.parametrize(
    ("preset", "step", "layer", "dense"),
    [
        ("default", 9, 5, True), ("default", 10, 5, False), ("default", 10, 0, True), ("default", 10, 1, False),
        ("morton", 9, 1, True), ("morton", 10, 1, False), ("no-warmup", 0, 0, False),
    ],
)  # fmt: skip
def test_dense_in_a_fifth_of_the_steps_and_in_the_first_layer(preset: str, step: int, layer: int, dense: bool) -> None:
    plan = planned(*noise(GEOMETRY), preset=preset, step=step, layer=layer)
    assert (plan.kinds == ("dense",)) == dense
    assert plan.remainder == ("none" if dense else "zeroth")


def test_along_a_curve_blocks_are_those_of_the_curve() -> None:
    # each octant of the video points its own way; taken row by row, blocks would mix two of them
    geometry = Geometry(grid=(4, 4, 4), heads=1, head_dim=8)
    half = torch.tensor([0, 0, 1, 1])
    octant = (4 * half[:, None, None] + 2 * half[:, None] + half).flatten()
    x = torch.eye(8)[octant][None]
    plan = planned(x, x, geometry, preset="morton", block=(8, 8))
    assert plan.mask is not None
    assert plan.order is not None
    assert torch.equal(plan.order.queries, curve_order(geometry, "morton"))
    assert torch.equal(plan.mask.keep()[0], OWN)
    assert planned(x, x, geometry).order is None


def test_one_instance_serves_several_geometries(all_ragged: tuple[Geometry, ...]) -> None:
    method = Sol(replace(Sol.presets["morton"], block=(32, 16)))
    for geometry in (*all_ragged, *all_ragged):
        site = Site(geometry=geometry, step=49, steps=50, sigma=0.1, branch="cond", layer=3, layers=4)
        q, k = noise(geometry)
        plan, alone = method.plan(q, k, k, site), Sol(method.config).plan(q, k, k, site)
        assert all(map(torch.equal, plan.tensors(), alone.tensors()))


@pytest.mark.parametrize("wrong", [{"beta": float("nan")}, {"beta": float("inf")}, {"dense_steps": 10}])
def test_settings_that_make_no_sense_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="sol's beta is a number of spreads, its dense steps a share"):
        planned(*noise(GEOMETRY), **wrong)
