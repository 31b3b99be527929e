"""SVG-EAR: what means would get wrong, and what is computed for it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from calibatt.kernels import oracle
from calibatt.kernels.geometry import Geometry
from calibatt.kernels.mask import VariableBlockMask
from calibatt.kernels.plan import Plan
from calibatt.methods.catalogue import build
from calibatt.methods.clusters import Grouped
from calibatt.methods.ear import Ear, errors_of_means
from calibatt.methods.remainder import WithRemainder
from calibatt.methods.site import Site

# 1280 tokens: 20 clusters of 64
GEOMETRY = Geometry(grid=(5, 16, 16), heads=2, head_dim=8)
SMALL: dict[str, Any] = {"clusters": (8, 20), "first_iterations": 6}


def site(geometry: Geometry = GEOMETRY, **where: Any) -> Site:
    given: dict[str, Any] = {"step": 20, "steps": 50, "layer": 5, "layers": 40, "sigma": 0.5, "branch": "cond"}
    return Site(geometry=geometry, **{**given, **where})


def noise(geometry: Geometry = GEOMETRY, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, geometry.heads, geometry.tokens, geometry.head_dim, generator=generator)


def made(preset: str = "no-warmup", **settings: Any) -> Ear:
    return Ear(replace(Ear.presets[preset], **{**SMALL, **settings}))


def mask_of(plan: Plan) -> VariableBlockMask:
    assert isinstance(plan.mask, VariableBlockMask)
    return plan.mask


def cost(plan: Plan) -> Tensor:
    """Keys that each cluster of queries computes."""
    mask = mask_of(plan)
    return (mask.keep() * mask.k_sizes[:, None]).sum(-1)


@pytest.fixture
def kinds() -> Tensor:
    """Of every token, in random order: 0 for keys that are all alike, 1 for keys that are spread, 2 for far ones."""
    order = torch.randperm(1280, generator=torch.Generator().manual_seed(0))
    return torch.arange(3).repeat_interleave(torch.tensor([320, 640, 320]))[order]


@pytest.fixture
def qkv(kinds: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """All queries along the first axis, on which the keys of kind 0 are 3, of kind 1 about 1 and of kind 2 about -3.

    Kinds lie far apart on the axes beside it, so that no cluster mixes them. Values are random, one a kind.
    """
    spread = torch.randn(1280, generator=torch.Generator().manual_seed(1))
    k = 20 * torch.eye(8)[kinds + 1]
    k[:, 0] = torch.tensor([3.0, 1.0, -3.0])[kinds] + torch.tensor([0.0, 1.0, 1.0])[kinds] * spread
    q = torch.eye(8)[0].expand(1280, 8) * 8**0.5
    v = torch.randn(3, 8, generator=torch.Generator().manual_seed(2))[kinds]
    q, k, v = (x.expand(2, -1, -1) for x in (q, k, v))
    return q, k, v


def kept_kinds(plan: Plan, kinds: Tensor) -> set[int]:
    """Of which kinds any key is computed."""
    assert plan.order is not None
    mask, found = mask_of(plan), set()
    for head in range(2):
        columns = mask.keep()[head].any(0).repeat_interleave(mask.k_sizes[head])
        found |= set(kinds[plan.order.keys[head].long()][columns].tolist())
    return found


def test_keys_that_are_alike_are_left_to_their_mean_though_they_have_most_of_the_mass(
    qkv: tuple[Tensor, Tensor, Tensor], kinds: Tensor
) -> None:
    q, k, v = qkv
    mass = (q[0, :1] @ k[0].T / 8**0.5).softmax(-1)[0]
    assert mass[kinds == 0].sum() > 2 / 3
    plan = made(mass=0.0, least_share=0.0).plan(q, k, v, site())
    assert kept_kinds(plan, kinds) == {1}
    # Sparse VideoGen 2 computes the same share of keys or less, and computes those
    other = build("svg2", preset="clusters-no-warmup", mass=0.0, least_share=0.0, **SMALL).plan(q, k, v, site())
    assert kept_kinds(other, kinds) == {0}


def test_the_output_is_nearer_to_dense_than_with_as_many_keys_chosen_by_mass(
    qkv: tuple[Tensor, Tensor, Tensor],
) -> None:
    q, k, v = qkv
    by_mass = WithRemainder(build("svg2", preset="clusters-no-warmup", mass=0.5, least_share=0.0, **SMALL), "zeroth")
    plans = [method.plan(q, k, v, site()) for method in (made(mass=0.5, least_share=0.0), by_mass)]
    dense, ear, other = (oracle.attend(q[None], k[None], v[None], plan) for plan in (Plan.dense(GEOMETRY), *plans))
    assert (ear - dense).norm() < 0.5 * (other - dense).norm()


def test_the_error_is_the_sum_over_keys_of_what_their_means_get_wrong() -> None:
    q, k, v = noise()
    labels = torch.randint(5, (2, 1280), generator=torch.Generator().manual_seed(3))
    # cluster 5 has no key
    sizes = torch.stack([row.bincount(minlength=6) for row in labels])
    centroids = torch.zeros(2, 6, 8)
    expected = torch.zeros(2, 7, 6, dtype=torch.float64)
    for head in range(2):
        queries, keys, values = (x[head].double() for x in (q, k, v))
        largest = (queries[:7] @ keys.T / 8**0.5).amax(-1, keepdim=True)
        for cluster in range(5):
            own, values_own = keys[labels[head] == cluster], values[labels[head] == cluster]
            centroids[head, cluster] = own.mean(0)
            exact = (queries[:7] @ own.T / 8**0.5 - largest).exp()[:, :, None] * values_own
            left = (queries[:7] @ own.mean(0)[:, None] / 8**0.5 - largest).exp()[:, :, None] * values_own.mean(0)
            expected[head, :, cluster] = (exact - left).square().sum((1, 2))
    found = errors_of_means(q[:, :7], k, v, Grouped(labels=labels, sizes=sizes, centroids=centroids))
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=0)


def test_keys_and_values_that_are_alike_leave_no_error_and_no_score_overflows() -> None:
    labels = torch.arange(4).repeat_interleave(320).expand(2, -1)
    centroids = 300 * torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(4))
    alike = centroids.repeat_interleave(320, dim=1)
    keys = Grouped(labels=labels, sizes=torch.full((2, 4), 320), centroids=centroids)
    assert (centroids @ centroids.mT).max() > 1e5
    # but for rounding: beside what the values themselves amount to
    whole = 320 * centroids.square().sum(-1).max()
    assert errors_of_means(centroids, alike, alike, keys).abs().max() < 1e-9 * whole
    assert errors_of_means(centroids, alike, noise()[2], keys).isfinite().all()


@pytest.mark.parametrize("mass", [0.0, 0.4, 0.9])
def test_it_computes_what_sparse_videogen_2_would_and_at_most_one_cluster_more(mass: float) -> None:
    q, k, v = noise()
    plan = made(mass=mass, least_share=0.1).plan(2 * q, k, v, site())
    other = build("svg2", preset="clusters-no-warmup", mass=mass, least_share=0.2, **SMALL).plan(2 * q, k, v, site())
    assert torch.equal(mask_of(plan).k_sizes, mask_of(other).k_sizes)
    assert not torch.equal(mask_of(plan).keep(), mask_of(other).keep())
    more = cost(plan) - cost(other)
    assert (more >= 0).all()
    assert (more < mask_of(plan).k_sizes.amax(-1, keepdim=True)).all()


def test_the_heaviest_few_are_computed_whatever_their_error(qkv: tuple[Tensor, Tensor, Tensor], kinds: Tensor) -> None:
    for share in (0.01, 0.05):
        assert 0 in kept_kinds(made(mass=0.0, least_share=share).plan(*qkv, site()), kinds)


def test_more_mass_keeps_all_that_less_keeps() -> None:
    last = torch.zeros(1, dtype=torch.bool)
    for mass in (0.0, 0.5, 0.9, 1.0):
        kept = mask_of(made(mass=mass).plan(*noise(), site())).keep()
        assert not (last & ~kept).any()
        last = kept
    assert last.all()


def test_means_stand_for_what_is_left_out_where_anything_is() -> None:
    method = made("default")
    assert [method.plan(*noise(), site(step=step)).remainder for step in (9, 10)] == ["none", "zeroth"]


@pytest.mark.parametrize(("preset", "dense"), [("default", 10), ("i2v", 17), ("hunyuan", 5), ("no-warmup", 0)])
def test_the_first_steps_are_dense(preset: str, dense: int) -> None:
    method = made(preset)
    kinds = {step: method.plan(*noise(), site(step=step)).kinds[0] for step in (0, dense - 1, dense) if step >= 0}
    assert kinds.pop(dense) == "masked"
    assert set(kinds.values()) <= {"dense"}


def test_in_blocks_the_clusters_are_covered() -> None:
    own, covering = (made(preset).plan(*noise(), site()) for preset in ("no-warmup", "blocks-no-warmup"))
    assert covering.mask is not None
    assert torch.equal(covering.mask.keep(), mask_of(own).cover((64, 64)).keep())
    assert covering.remainder == "zeroth"


def test_text_is_computed_by_all_and_computes_all() -> None:
    geometry = Geometry(grid=(5, 16, 16), heads=2, head_dim=8, text_tokens=40, text_side="last")
    keep = mask_of(made(mass=0.0).plan(*noise(geometry), site(geometry))).keep()
    assert keep[:, -1].all()
    assert keep[:, :, -1].all()
    assert not keep.all()


def test_settings_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="0 to 1: got EarConfig"):
        made(least_share=1.1)
