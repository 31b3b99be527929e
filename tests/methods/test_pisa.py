"""PISA's choice where scores and second moments are known, and the means that stand for all other blocks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from calibatt.kernels import oracle
from calibatt.kernels.geometry import Geometry
from calibatt.kernels.plan import Plan
from calibatt.methods.pisa import Pisa, deviations
from calibatt.methods.site import Site

# eight frames of one block each
GEOMETRY = Geometry(grid=(8, 4, 4), heads=1, head_dim=4)
Inputs = tuple[Tensor, Tensor, Tensor]


def planned(
    inputs: Inputs, geometry: Geometry = GEOMETRY, *, preset: str = "no-warmup", step: int = 20, layer: int = 5,
    **settings: Any,
) -> Plan:  # fmt: skip
    site = Site(geometry=geometry, step=step, steps=50, sigma=0.5, branch="cond", layer=layer, layers=40)
    return Pisa(replace(Pisa.presets[preset], **{"block": (16, 16), **settings})).plan(*inputs, site)


def keep(inputs: Inputs, geometry: Geometry = GEOMETRY, **settings: Any) -> Tensor:
    mask = planned(inputs, geometry, **settings).mask
    assert mask is not None
    return mask.keep()


def noise(geometry: Geometry = GEOMETRY, seed: int = 0) -> Inputs:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = torch.randn(3, geometry.heads, geometry.tokens, geometry.head_dim, generator=generator)
    return 4 * q, k, v


def expected_deviations(k: Tensor, v: Tensor, block: int) -> Tensor:
    """The formula, block by block in fp64."""
    moments = [
        torch.einsum("htc,htd->hcd", keys - keys.mean(1, keepdim=True), values)
        for keys, values in zip(k.double().split(block, 1), v.double().split(block, 1), strict=True)
    ]
    stacked = torch.stack(moments, 1)
    return torch.linalg.matrix_norm(stacked - stacked.mean(1, keepdim=True))


@pytest.mark.parametrize("tokens", [64, 70])
def test_a_blocks_deviation_is_how_far_its_second_moment_lies_from_their_mean(tokens: int) -> None:
    k, v = 3 + torch.randn(2, 3, tokens, 8, generator=torch.Generator().manual_seed(0))
    found = deviations(k, v, 16, slice(0, None))
    torch.testing.assert_close(found.double(), expected_deviations(k, v, 16), rtol=1e-4, atol=1e-4)


def test_a_row_computes_the_blocks_of_the_highest_score_and_deviation() -> None:
    q, k, v = noise()
    q_means, k_means = (x.double().unflatten(1, (8, 16)).mean(2) for x in (q, k))
    scores = q_means @ k_means.mT / 2
    full = (scores + (expected_deviations(k, v, 16) + 1e-5).log()[:, None]).softmax(-1)
    for wanted, covariance in ((scores, False), (full, True)):
        mask = torch.zeros_like(wanted, dtype=torch.bool).scatter(-1, wanted.topk(3).indices, True)
        assert torch.equal(keep((q, k, v), density=3 / 8, covariance=covariance), mask)
    assert not torch.equal(keep((q, k, v), covariance=True), keep((q, k, v), covariance=False))


def test_of_equal_scores_that_block_is_computed_whose_keys_and_values_vary_together() -> None:
    q, k, v = torch.zeros(3, 1, 128, 4)
    # every block's mean is 0; in block 5 keys and values go up and down together, in block 2 keys alone
    up_and_down = torch.tensor([1.0, -1.0]).repeat(8)
    k[0, 80:96, 1] = v[0, 80:96, 2] = up_and_down
    k[0, 32:48, 1] = 5 * up_and_down
    assert keep((q, k, v), density=1 / 8)[0].nonzero()[:, 1].tolist() == [5] * 8
    # and the first without
    assert keep((q, k, v), density=1 / 8, covariance=False)[0].nonzero()[:, 1].tolist() == [0] * 8


# eight blocks times the density, rounded down
@pytest.mark.parametrize(("density", "count"), [(0.0, 1), (0.124, 1), (0.25, 2), (0.49, 3), (1.0, 8)])
def test_all_rows_compute_the_same_number_of_blocks(density: float, count: int) -> None:
    assert (keep(noise(), density=density).sum(-1) == count).all()


def test_more_density_computes_all_that_less_computes(all_ragged: tuple[Geometry, ...]) -> None:
    for geometry in all_ragged:
        last = torch.zeros(1, dtype=torch.bool)
        for density in (0.0, 0.1, 0.25, 0.5, 1.0):
            kept = keep(noise(geometry), geometry, density=density, block=(32, 16))
            assert kept.any(-1).all()
            assert not (last & ~kept).any()
            last = kept
        assert last.all()


def test_means_stand_for_all_other_blocks_and_the_output_comes_nearer_to_dense() -> None:
    smooth = torch.randn((1, 12, 4), generator=torch.Generator().manual_seed(0))
    k = torch.nn.functional.interpolate(smooth.mT, 128, mode="linear").mT
    plan = planned((4 * k, k, k), density=0.25)
    assert plan.remainder == "zeroth"
    dense, near, far = (
        oracle.attend(4 * k[None], k[None], k[None], one)
        for one in (Plan.dense(GEOMETRY), plan, replace(plan, remainder="none"))
    )
    assert (near - dense).norm() < 0.5 * (far - dense).norm()


@pytest.mark.parametrize(("side", "text"), [("first", [0, 1]), ("last", [3, 4])])
def test_blocks_with_text_are_always_on_and_no_part_of_the_choice(side: Any, text: list[int]) -> None:
    geometry = Geometry(grid=(1, 4, 15), heads=1, head_dim=4, text_tokens=20, text_side=side)
    is_text = torch.isin(torch.arange(5), torch.tensor(text))
    q, k, v = noise(geometry)
    kept = keep((q, k, v), geometry, density=1 / 3)[0]
    assert kept[is_text].all()
    assert kept[:, is_text].all()
    assert (kept[~is_text][:, ~is_text].sum(-1) == 1).all()
    # neither its keys nor its values change what is chosen
    for x in (k, v):
        x[:, is_text.repeat_interleave(16)] *= 100
    assert torch.equal(keep((q, k, v), geometry, density=1 / 3)[0], kept)


@pytest.mark.parametrize("side", ["first", "last"])
def test_where_text_is_in_every_block_all_are_on(side: Any) -> None:
    geometry = Geometry(grid=(1, 2, 5), heads=1, head_dim=4, text_tokens=20, text_side=side)
    assert keep(noise(geometry), geometry, density=0.0, block=(32, 32)).all()


@pytest.mark.parametrize(
    ("preset", "step", "layer", "dense"),
    [
        ("default", 9, 5, True), ("default", 10, 5, False), ("default", 10, 0, True), ("default", 10, 1, False),
        ("wan-1.3b", 14, 5, True), ("wan-1.3b", 15, 5, False), ("no-warmup", 0, 0, False),
    ],
)  # fmt: skip
def test_dense_in_the_first_steps_and_in_the_first_layer(preset: str, step: int, layer: int, dense: bool) -> None:
    plan = planned(noise(), preset=preset, step=step, layer=layer)
    assert (plan.kinds == ("dense",)) == dense
    assert plan.remainder == ("none" if dense else "zeroth")


@pytest.mark.parametrize("wrong", [{"density": -0.1}, {"density": 1.1}, {"dense_steps": 10}])
def test_settings_that_are_no_shares_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="pisa's density and dense steps are shares"):
        planned(noise(), **wrong)
