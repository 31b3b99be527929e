"""Clusters: k-means against a plain loop, the choice of clusters, their plan and their order."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from calibatt.kernels.geometry import Geometry
from calibatt.kernels.mask import BlockMask
from calibatt.methods import clusters
from calibatt.methods.clusters import (
    Grouped,
    attention,
    cluster_counts,
    cluster_order,
    cluster_plan,
    kmeans,
    random_tokens,
    seriate,
)
from calibatt.methods.selection import top_p


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def groups(labels: Tensor, centroids: Tensor) -> Grouped:
    sizes = torch.stack([row.bincount(minlength=centroids.shape[1]) for row in labels])
    return Grouped(labels=labels, sizes=sizes, centroids=centroids)


# --- k-means ---------------------------------------------------------------------------------------------------------


def test_one_turn_of_kmeans_is_nearest_centroids_and_their_means() -> None:
    # on a line: 0, 1 and 2 are nearest to 1, 10 and 14 to 11, none to 100
    x = torch.tensor([0.0, 10.0, 1.0, 14.0, 2.0]).view(1, 5, 1)
    found = kmeans(x, torch.tensor([11.0, 1.0, 100.0]).view(1, 3, 1), iterations=1, tolerance=0.0)
    assert found.labels.tolist() == [[1, 0, 1, 0, 1]]
    assert found.sizes.tolist() == [[2, 3, 0]]
    # a cluster without tokens stays where it was
    assert found.centroids.flatten().tolist() == [12.0, 1.0, 100.0]


def test_heads_are_clustered_apart_and_as_in_a_plain_loop() -> None:
    x = noise(3, 200, 8)
    start = x[:, :7].clone()
    found = kmeans(x, start, iterations=4, tolerance=0.0)
    for head in range(3):
        centroids = start[head]
        for _ in range(4):
            labels = torch.cdist(x[head], centroids).argmin(-1)
            centroids = torch.stack([x[head][labels == cluster].mean(0) for cluster in range(7)])
        assert torch.equal(found.labels[head], labels)
        torch.testing.assert_close(found.centroids[head], centroids)


@pytest.mark.parametrize("chunk", [1, 3 * 7 * 13, 2**26])
def test_tokens_taken_in_parts_are_clustered_alike(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x = noise(3, 50, 8)
    whole = kmeans(x, x[:, :7], iterations=2, tolerance=0.0)
    monkeypatch.setattr(clusters, "_CHUNK", chunk)
    parts = kmeans(x, x[:, :7], iterations=2, tolerance=0.0)
    assert torch.equal(parts.labels, whole.labels)
    torch.testing.assert_close(parts.centroids, whole.centroids)


def test_kmeans_ends_when_no_centroid_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    turns = 0
    original = clusters.assign

    def counted(*args: Any) -> Grouped:
        nonlocal turns
        turns += 1
        return original(*args)

    monkeypatch.setattr(clusters, "assign", counted)
    x = torch.tensor([0.0, 2.0, 10.0, 12.0]).view(1, 4, 1)
    start = torch.tensor([0.0, 10.0]).view(1, 2, 1)
    # they move by 1 in the first turn, and not at all in the second
    assert kmeans(x, start, iterations=50, tolerance=1e-4).centroids.flatten().tolist() == [1.0, 11.0]
    assert turns == 2
    kmeans(x, start, iterations=50, tolerance=1.5)
    assert turns == 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_single(dtype: torch.dtype) -> None:
    # 4096 tokens of 100: in half precision neither their sum nor their number plus one exists
    x = torch.full((1, 4096, 2), 100.0, dtype=dtype)
    x[:, :1] = -100
    found = kmeans(x, torch.tensor([[[90.0, 90.0], [-90.0, -90.0]]]), iterations=1, tolerance=0.0)
    assert found.sizes.tolist() == [[4095, 1]]
    assert found.centroids.tolist() == [[[100.0, 100.0], [-100.0, -100.0]]]


def test_first_centroids_are_tokens_none_twice_and_those_of_the_seed() -> None:
    x = noise(2, 30, 4)
    drawn = [random_tokens(x, 30, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    for head in range(2):
        assert torch.equal(drawn[0][head].sort(0).values, x[head].sort(0).values)
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_short_videos_have_clusters_of_64_tokens_and_the_length_of_the_settings_as_many_as_asked_for() -> None:
    def of(frames: int) -> Geometry:
        return Geometry(grid=(frames, 45, 80), heads=1, head_dim=4, text_tokens=100)

    assert cluster_counts(of(21), (300, 1000)) == (300, 1000)
    assert cluster_counts(of(1), (300, 1000)) == (56, 56)
    assert cluster_counts(of(1), (30, 1000)) == (30, 56)
    assert cluster_counts(Geometry(grid=(1, 7, 9), heads=1, head_dim=4), (300, 1000)) == (1, 1)


# --- choice ----------------------------------------------------------------------------------------------------------


def test_attention_is_that_of_centroids_times_the_size_of_the_keys_cluster() -> None:
    # two keys' clusters of equal score, of 1 and 3 tokens, and one that has none
    q = groups(torch.zeros(1, 4, dtype=torch.int64), torch.zeros(1, 1, 4))
    k = groups(torch.tensor([[0, 1, 1, 1]]), noise(1, 3, 4))
    torch.testing.assert_close(attention(q, k), torch.tensor([[[0.25, 0.75, 0.0]]]))
    # every query and key a cluster of its own: attention itself
    x, y = noise(2, 1, 5, 4)
    alone = torch.arange(5)[None]
    torch.testing.assert_close(attention(groups(alone, x), groups(alone, y)), (x @ y.mT / 2).softmax(-1))


# --- plan -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("side", "queries"), [("first", [0, 1, 3, 5, 2, 4]), ("last", [1, 3, 0, 2, 4, 5])])
def test_text_is_a_cluster_that_stays_where_it_is_and_sees_and_is_seen_by_all(side: Any, queries: list[int]) -> None:
    geometry = Geometry(grid=(1, 2, 2), heads=1, head_dim=4, text_tokens=2, text_side=side)
    labels = torch.tensor([[1, 0, 1, 0]])
    order = cluster_order(geometry, labels, 1 - labels)
    assert order.queries.tolist() == [queries]
    two = torch.tensor([[2, 2]])
    plan = cluster_plan(geometry, order, two, two, torch.eye(2, dtype=torch.bool)[None], None)
    text = 0 if side == "first" else 2
    expected = torch.eye(3, dtype=torch.bool)
    expected[text] = expected[:, text] = True
    assert plan.mask is not None
    assert torch.equal(plan.mask.keep()[0], expected)
    assert [sizes.tolist() for sizes in plan.mask.sizes()] == [[[2, 2, 2]]] * 2
    # a block a cluster
    covered = cluster_plan(geometry, order, two, two, torch.eye(2, dtype=torch.bool)[None], (2, 2)).mask
    assert isinstance(covered, BlockMask)
    assert torch.equal(covered.keep()[0], expected)
    # the tokens of the video's first cluster of queries and of keys: those labelled 0, and those labelled 1
    start = geometry.video_start
    assert order.queries[0, start : start + 2].tolist() == [start + 1, start + 3]
    assert order.keys[0, start : start + 2].tolist() == [start, start + 2]


# --- order -----------------------------------------------------------------------------------------------------------


def test_seriated_clusters_are_the_same_clusters() -> None:
    x, y = noise(2, 2, 100, 8)
    q, k = (kmeans(tokens, tokens[:, :9], iterations=2, tolerance=0.0) for tokens in (x, y))
    for before, after in zip((q, k), seriate(q, k), strict=True):
        for head in range(2):
            # every token still has its centroid, and every centroid its size
            for old, new in ((before.centroids, after.centroids), (before.sizes[..., None], after.sizes[..., None])):
                assert torch.equal(old[head][before.labels[head]], new[head][after.labels[head]])


def test_seriated_clusters_are_covered_by_fewer_blocks() -> None:
    # clusters that see their neighbours on a line, numbered at random
    count, each = 40, 10
    number = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    angles = torch.pi * number / count
    centroids = 20 * torch.stack((angles.cos(), angles.sin()), -1)[None]
    labels = torch.arange(count).repeat_interleave(each)[None]
    geometry = Geometry(grid=(1, count, each), heads=1, head_dim=2)

    def covered(q: Grouped, k: Grouped) -> float:
        keep = top_p(attention(q, k), 0.9, inclusive=True)
        order = cluster_order(geometry, q.labels, k.labels)
        return cluster_plan(geometry, order, q.sizes, k.sizes, keep, (16, 16)).density().item()

    q, k = groups(labels, centroids), groups(labels, centroids)
    assert covered(*seriate(q, k)) < 0.6 * covered(q, k)


def test_one_cluster_stays_one_seriate() -> None:
    alone = groups(torch.zeros(2, 5, dtype=torch.int64), noise(2, 1, 4))
    assert all(found.labels.eq(0).all() for found in seriate(alone, alone))
