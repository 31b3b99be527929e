"""SVOO: the table it learns, co-clustering against profiles written out, and when clusters are made anew."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from calibatt.kernels.geometry import Geometry
from calibatt.methods import svoo
from calibatt.methods.clusters import random_tokens
from calibatt.methods.energy import needed_share
from calibatt.methods.learning import Learner, Learnt
from calibatt.methods.site import Site
from calibatt.methods.svoo import Svoo, SvooConfig, cocluster

# 1280 tokens: 20 clusters of 64
GEOMETRY = Geometry(grid=(5, 16, 16), heads=2, head_dim=8)
STEPS, LAYERS = 10, 3
CONFIG = replace(Svoo.presets["no-warmup"], clusters=(8, 20), block=(32, 16))


def site(geometry: Geometry = GEOMETRY, **where: Any) -> Site:
    given: dict[str, Any] = {"step": 4, "steps": STEPS, "layer": 1, "layers": LAYERS, "sigma": 0.5, "branch": "cond"}
    return Site(geometry=geometry, **{**given, **where})


def noise(seed: int = 0, geometry: Geometry = GEOMETRY) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q, k = torch.randn(2, geometry.heads, geometry.tokens, geometry.head_dim, generator=generator)
    return 2 * q, k


def qkv(seed: int = 0, geometry: Geometry = GEOMETRY) -> tuple[Tensor, Tensor, Tensor]:
    """The same with values, which play no part."""
    q, k = noise(seed, geometry)
    return q, k, k


Made = Callable[..., Svoo]


@pytest.fixture
def made(tabled: Callable[..., Learnt]) -> Made:
    """The method, with a table of shares."""

    def of(share: Tensor | float = 0.2, **settings: Any) -> Svoo:
        config = replace(CONFIG, **settings)
        table = torch.as_tensor(share, dtype=torch.float32).expand(STEPS, LAYERS, GEOMETRY.heads)
        return Svoo(config, tabled("svoo", site(), {"share": table}, Svoo.learner(config)))

    return of


@pytest.fixture
def made_at(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry each time that clusters are made."""
    seen: list[int] = []
    original = svoo.cocluster

    def noted(*args: Any) -> Any:
        seen.append(1)
        return original(*args)

    monkeypatch.setattr(svoo, "cocluster", noted)
    return seen


# --- the table -------------------------------------------------------------------------------------------------------


def test_the_table_is_the_mean_over_videos_and_so_many_deviations_more() -> None:
    learner = Svoo.learner(CONFIG)
    q, k = noise()
    notes = [learner.note(scale * q, k, k, site(), prompt) for prompt, scale in enumerate((0.5, 1.0, 3.0))]
    stacked = torch.stack([note["share"] for note in notes]).double()
    expected = stacked.mean(0) + 1.645 * stacked.std(0)
    torch.testing.assert_close(learner.merge(notes)["share"], expected.float())
    torch.testing.assert_close(learner.merge(notes[::-1])["share"], expected.float())


def test_one_video_has_no_deviation_and_all_rows_are_exact() -> None:
    learner = Svoo.learner(replace(CONFIG, rows=10**6))
    q, k = noise()
    merged = learner.merge([learner.note(q, k, k, site(), 0)])
    torch.testing.assert_close(merged["share"], needed_share(q, k, 0.95))


def test_text_is_neither_watched_nor_counted() -> None:
    geometry = replace(GEOMETRY, text_tokens=50, text_side="first")
    q, k = noise()
    learner = Svoo.learner(CONFIG)
    # text that would take all attention
    text = torch.full((2, 50, 8), 100.0)
    q_text, k_text = (torch.cat((text, x), 1) for x in (q, k))
    other = learner.note(q_text, k_text, k_text, site(geometry), 0)
    assert torch.equal(other["share"], learner.note(q, k, k, site(), 0)["share"])


def test_a_learner_draws_from_no_global_generator_and_alike_for_every_prompt() -> None:
    learner = Svoo.learner(CONFIG)
    assert isinstance(learner, Learner)
    state = torch.get_rng_state()
    one, other = (learner.note(*qkv(), site(), prompt)["share"] for prompt in (0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one, other)


# --- the choice ------------------------------------------------------------------------------------------------------


def test_each_head_keeps_its_learnt_share_within_bounds(made: Made) -> None:
    table = torch.full((STEPS, LAYERS, 2), 0.5)
    table[4, 1] = torch.tensor([0.3, 0.01])
    table[5, 1] = torch.tensor([0.9, 0.4])
    method = made(table, mass=0.0, bounds=(0.1, 0.4), block=None)
    # of 20 clusters
    for step, expected in ((4, [6, 2]), (5, [8, 8])):
        mask = method.plan(*qkv(), site(step=step)).mask
        assert mask is not None
        assert [row.unique().tolist() for row in mask.keep().sum(-1)] == [[count] for count in expected]


def test_the_mass_keeps_more_than_the_share_where_attention_is_even(made: Made) -> None:
    q, k = noise()
    # queries so short that all keys weigh alike: 0.9 of all, whatever the share
    mask = made(mass=0.9, block=None).plan(0.001 * q, k, k, site()).mask
    assert mask is not None
    held = torch.einsum("hqk,hk->hq", mask.keep().double(), mask.sizes()[1].double()) / GEOMETRY.tokens
    assert held.min() >= 0.9
    assert mask.keep().float().mean() > 0.5


@pytest.mark.parametrize("elsewhere", [{"grid": (16, 5, 16)}, {"text_tokens": 3}])
def test_a_table_of_other_videos_is_refused_in_dense_steps_too(elsewhere: dict[str, Any], made: Made) -> None:
    geometry = replace(GEOMETRY, **elsewhere)
    with pytest.raises(ValueError, match="what svoo learnt is for"):
        made(dense_steps=0.5).plan(*qkv(geometry=geometry), site(geometry, step=0))


@pytest.mark.parametrize("wrong", [{"mass": 1.1}, {"bounds": (0.2, 0.1)}, {"reuse": -1.0}, {"rows": 0}])
def test_settings_that_make_no_sense_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="svoo"):
        SvooConfig(dense_steps=0.0, dense_layers=0.0, **wrong)


# --- co-clustering ---------------------------------------------------------------------------------------------------


def test_tokens_go_to_the_centroid_of_the_most_alike_profile() -> None:
    q, k = noise()
    generator = torch.Generator().manual_seed(0)
    q_centroids, k_centroids = random_tokens(q, 8, generator), random_tokens(k, 20, generator)

    def by_profile(x: Tensor, centroids: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
        """Scores with the other side's centroids, as unit vectors, compared one by one."""
        profiles, of_centroids = (
            torch.nn.functional.normalize(tokens @ others.mT, dim=-1) for tokens in (x, centroids)
        )
        labels = (profiles @ of_centroids.mT).argmax(-1)
        means = [
            torch.stack([x[head][labels[head] == cluster].mean(0) for cluster in range(centroids.shape[1])])
            for head in range(len(x))
        ]
        return labels, torch.stack(means)

    for _ in range(2):
        k_labels, k_centroids = by_profile(k, k_centroids, q_centroids)
        q_labels, q_centroids = by_profile(q, q_centroids, k_centroids)
    queries, keys = cocluster(q, k, (8, 20), 2, torch.Generator().manual_seed(0))
    assert torch.equal(queries.labels, q_labels)
    assert torch.equal(keys.labels, k_labels)
    torch.testing.assert_close(keys.centroids, k_centroids)


def test_keys_that_no_query_tells_apart_are_one() -> None:
    # queries along the first axis; keys of two kinds, which differ along it and at random along all others
    generator = torch.Generator().manual_seed(0)
    sign = torch.where(torch.rand(1, 400, generator=generator) < 0.5, -1.0, 1.0)
    k = 5 * torch.randn(1, 400, 8, generator=generator)
    k[..., 0] = sign
    q = torch.zeros(1, 400, 8)
    q[..., 0] = 1 + torch.rand(1, 400, generator=generator)
    # of two centroids one for each sign, if their first tokens are
    for seed in range(4):
        _, keys = cocluster(q, k, (1, 2), 1, torch.Generator().manual_seed(seed))
        parts = [sign[keys.labels == cluster].unique().tolist() for cluster in range(2)]
        assert sorted(parts) in ([[-1.0], [1.0]], [[], [-1.0, 1.0]])


# --- what is kept ----------------------------------------------------------------------------------------------------


def test_clusters_are_kept_for_a_share_of_the_schedule(made_at: list[int], made: Made) -> None:
    # 2 dense steps of 10, then clusters of steps 2 to 5 and of 6 to 9
    method = made(dense_steps=0.2, reuse=0.4)
    counts = []
    for step in range(STEPS):
        method.plan(*qkv(seed=step), site(step=step))
        counts.append(len(made_at))
    assert counts == [0, 0, 1, 1, 1, 1, 2, 2, 2, 2]


def test_kept_clusters_hold_at_later_steps_with_the_shares_of_those(made: Made) -> None:
    table = torch.full((STEPS, LAYERS, 2), 0.1)
    table[5] = 0.3
    method = made(table, mass=0.0, bounds=(0.0, 1.0), reuse=1.0, block=None)
    first, later = (method.plan(*qkv(seed=step), site(step=step)) for step in (4, 5))
    assert first.order is not None
    assert later.order is not None
    assert torch.equal(later.order.queries, first.order.queries)
    assert torch.equal(later.order.keys, first.order.keys)
    assert first.mask is not None
    assert later.mask is not None
    fewer, more = first.mask.keep(), later.mask.keep()
    assert (fewer.sum(-1).unique().tolist(), more.sum(-1).unique().tolist()) == ([2], [6])
    assert not (fewer & ~more).any()


@pytest.mark.parametrize("elsewhere", [{"branch": "uncond"}, {"sample": 1}, {"layer": 2}, {"step": 3}])
def test_each_branch_sample_and_layer_and_an_earlier_step_begin_anew(
    elsewhere: dict[str, Any], made_at: list[int], made: Made
) -> None:
    method = made(reuse=1.0)
    method.plan(*qkv(), site(step=4))
    method.plan(*qkv(seed=1), site(**{"step": 5, **elsewhere}))
    assert len(made_at) == 2


def test_a_reset_forgets_clusters(made_at: list[int], made: Made) -> None:
    method = made(reuse=1.0)
    method.plan(*qkv(), site(step=4))
    method.plan(*qkv(), site(step=5))
    assert len(made_at) == 1
    method.reset()
    method.plan(*qkv(), site(step=6))
    assert len(made_at) == 2


def test_a_step_that_is_due_answers_alike_when_it_is_asked_twice(made: Made) -> None:
    method = made(reuse=0.4)
    one, other = (method.plan(*qkv(), site(step=4)) for _ in range(2))
    assert one.mask is not None
    assert other.mask is not None
    assert torch.equal(one.mask.keep(), other.mask.keep())
