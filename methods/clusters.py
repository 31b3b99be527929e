"""What methods share that cluster similar tokens: k-means, attention between clusters, and their plan.

Clusters are blocks that differ in size, which the Triton kernel computes as they are. Kernels of fixed blocks compute
every block with a pair of tokens of kept clusters, which is more.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from calibatt.kernels import estimates
from calibatt.kernels.geometry import Geometry
from calibatt.kernels.mask import VariableBlockMask
from calibatt.kernels.plan import Plan, TokenOrder
from calibatt.methods.blocks import with_text
from calibatt.methods.energy import products

# scores of tokens against clusters held at a time, 256 MiB in fp32: at 40 heads and 1000 clusters, 1677 tokens of each
_CHUNK = 2**26
# tokens of a cluster, mean: smaller ones leave tiles of fast kernels part empty, and fixed blocks hold too many of
# them; the 75,600 tokens that the settings were made for have 76 in each of 1000 clusters
_LEAST_TOKENS = 64
# of the power iteration; its result is an order of clusters, which need not be the best
_TURNS = 20


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Grouped:
    """Tokens of every head in clusters.

    Args:
        labels: the cluster of each token.
        sizes: tokens of each cluster; it may have none.
        centroids: their mean in fp32; for a cluster without tokens, what it was before.
    """

    labels: Int[Tensor, "heads tokens"]
    sizes: Int[Tensor, "heads clusters"]
    centroids: Float[Tensor, "heads clusters head_dim"]


def cluster_plan(
    geometry: Geometry,
    order: TokenOrder,
    q_sizes: Int[Tensor, "heads q_clusters"],
    k_sizes: Int[Tensor, "heads k_clusters"],
    keep: Bool[Tensor, "heads q_clusters k_clusters"],
    block: tuple[int, int] | None,
) -> Plan:
    """The plan of the video's clusters, and of all text as one more cluster, which sees and is seen by all.

    Args:
        geometry: layout of the tokens.
        order: of all tokens, as `cluster_order` makes it.
        q_sizes, k_sizes: tokens of the video's clusters, in that order; a cluster may be empty.
        keep: the pairs of clusters to compute.
        block: tokens of a query and of a key block that the clusters are covered by; None for the clusters themselves.

    Raises:
        ValueError: the parts differ in their heads or clusters.
    """
    if geometry.text_tokens:
        # text stands before the first cluster or after the last
        sides = (1, 0) if geometry.text_side == "first" else (0, 1)
        pad = torch.nn.functional.pad
        q_sizes, k_sizes = (pad(sizes, sides, value=geometry.text_tokens) for sizes in (q_sizes, k_sizes))
        keep = pad(keep, (*sides, *sides), value=True)
    mask = VariableBlockMask.from_keep(keep, q_sizes=q_sizes, k_sizes=k_sizes, tokens=geometry.tokens)
    return Plan.masked(mask if block is None else mask.cover(block), geometry.heads, order=order)


def cluster_order(
    geometry: Geometry, q_labels: Int[Tensor, "heads video_tokens"], k_labels: Int[Tensor, "heads video_tokens"]
) -> TokenOrder:
    """The video's tokens cluster by cluster, within a cluster as in the sequence, and the text where it is.

    Args:
        geometry: layout of the tokens.
        q_labels, k_labels: cluster of each token of the video.
    """
    queries, keys = (with_text(geometry, by_cluster(labels)) for labels in (q_labels, k_labels))
    return TokenOrder(queries=queries, keys=keys)


def by_cluster(labels: Int[Tensor, "heads tokens"]) -> Int[Tensor, "heads tokens"]:
    """Places of the tokens cluster by cluster, within a cluster as they come."""
    heads, tokens = labels.shape
    if not labels.is_cuda:
        return labels.argsort(dim=-1, stable=True)
    # a GPU sorts long rows one after the other, but all of them at once as numbers that tell heads apart
    before = tokens * torch.arange(heads, device=labels.device)[:, None]
    order = (labels + before).flatten().to(torch.int32).argsort(stable=True)
    return order.view(heads, tokens) - before


def cluster_counts(geometry: Geometry, clusters: tuple[int, int]) -> tuple[int, int]:
    """How many clusters of queries and of keys a video has: as many as asked for, but fewer where it is short.

    Args:
        geometry: layout of the tokens.
        clusters: wanted clusters of queries and of keys.
    """
    most = max(1, geometry.video_tokens // _LEAST_TOKENS)
    return min(clusters[0], most), min(clusters[1], most)


def random_tokens(
    x: Float[Tensor, "heads tokens head_dim"], count: int, generator: torch.Generator
) -> Float[Tensor, "heads {count} head_dim"]:
    """Centroids to begin with: random tokens of each head, none twice, in fp32.

    Args:
        x: queries or keys.
        count: how many of each head.
        generator: draws them.
    """
    draws = torch.rand(x.shape[:2], generator=generator, device=x.device)
    return x.take_along_dim(draws.topk(count).indices[:, :, None], 1).float()


def kmeans(
    x: Float[Tensor, "heads tokens head_dim"],
    centroids: Float[Tensor, "heads clusters head_dim"],
    *,
    iterations: int,
    tolerance: float,
) -> Grouped:
    """Euclidean k-means in every head at once.

    Labels are by the centroids before the last update, as in the original.

    Args:
        x: the tokens.
        centroids: to begin with.
        iterations: upper bound; at least one is made.
        tolerance: ends when no centroid of any head moves as far as this.
    """
    turn = 0
    while True:
        turn += 1
        nearest = centroids.to(x.dtype)
        # the nearest centroid has the largest x · c - |c|² / 2
        grouped = assign(x, centroids, nearest, nearest.float().square().sum(-1) / -2)
        # to look at how far they moved is to wait for the device: not after the last turn
        if turn >= iterations or bool((grouped.centroids - centroids).norm(dim=-1).max() < tolerance):
            return grouped
        centroids = grouped.centroids


def assign(
    x: Float[Tensor, "heads tokens head_dim"],
    centroids: Float[Tensor, "heads clusters head_dim"],
    directions: Float[Tensor, "heads clusters head_dim"],
    offsets: Float[Tensor, "heads clusters"],
) -> Grouped:
    """Each token in the cluster j of its head with the largest x · directions[j] + offsets[j].

    Sums are in fp32.

    Args:
        x: the tokens.
        centroids: what clusters that get no token keep.
        directions: of the tokens' type, so that half precision is multiplied on tensor cores.
        offsets: in fp32.
    """
    if estimates.takes(x):
        labels = estimates.nearest(x, directions, offsets)
        sizes = _sizes(labels, centroids.shape[1])
        means = estimates.cluster_means(x, by_cluster(labels), sizes, centroids)
        return Grouped(labels=labels, sizes=sizes, centroids=means)
    heads, tokens, channels = x.shape
    clusters = centroids.shape[1]
    labels = torch.empty(heads, tokens, dtype=torch.int64, device=x.device)
    sums = torch.zeros(heads * clusters, channels, dtype=torch.float32, device=x.device)
    before = clusters * torch.arange(heads, device=x.device)[:, None]
    at_once = max(1, _CHUNK // (heads * clusters))
    for first in range(0, tokens, at_once):
        some = slice(first, first + at_once)
        labels[:, some] = products(x[:, some], directions).add_(offsets[:, None]).argmax(-1)
        sums.index_add_(0, (labels[:, some] + before).flatten(), x[:, some].float().reshape(-1, channels))
    sizes = _sizes(labels, clusters)
    means = sums.view_as(centroids) / sizes.clamp(min=1)[:, :, None]
    return Grouped(labels=labels, sizes=sizes, centroids=torch.where(sizes[:, :, None] > 0, means, centroids))


def _sizes(labels: Int[Tensor, "heads tokens"], clusters: int) -> Int[Tensor, "heads clusters"]:
    """Tokens of each cluster."""
    sizes = torch.zeros(len(labels), clusters, dtype=torch.int64, device=labels.device)
    return sizes.scatter_add_(1, labels, torch.ones_like(labels))


def attention(q: Grouped, k: Grouped) -> Float[Tensor, "heads q_clusters k_clusters"]:
    """Attention of centroids to centroids, each key's times the tokens of its cluster."""
    scores = q.centroids @ k.centroids.transpose(-1, -2) / math.sqrt(q.centroids.shape[-1])
    # the logarithm of a size is a factor of the weight; no tokens have no weight
    return (scores + k.sizes.log()[:, None]).softmax(-1)


def seriate(q: Grouped, k: Grouped) -> tuple[Grouped, Grouped]:
    """The same clusters in another order (seriation): those with similar attention side by side.

    The order does not change the mask. But a fixed block holds the ends of several clusters, and is computed for any
    of them, so the more alike neighbours are, the fewer blocks cover the mask; and a kernel of variable blocks walks
    kept neighbours as one range, whose tiles are full but for the last. Clusters are sorted by the second singular
    vectors of the attention between them, normalised by its sums over rows and columns, as in spectral co-clustering
    (Dhillon, 2001); the first ones, which are known, tell nothing apart.
    """
    pairs = attention(q, k) * q.sizes[:, :, None]
    # square roots of each cluster's share; one without tokens has none
    rows, columns = (pairs.sum(dim, keepdim=True).clamp(min=1e-12).sqrt() for dim in (2, 1))
    # the first singular vectors are these roots themselves, of singular value 1: what they explain is taken off
    pairs = pairs / rows / columns - rows * columns / pairs.sum((1, 2), keepdim=True)
    place = torch.linspace(-1, 1, k.sizes.shape[1], device=pairs.device).expand(len(pairs), 1, -1)
    for _ in range(_TURNS):
        other = pairs @ place.transpose(1, 2)
        place = torch.nn.functional.normalize(other.transpose(1, 2) @ pairs, dim=-1)
    return _renumbered(q, (other / rows).flatten(1)), _renumbered(k, (place / columns).flatten(1))


def _renumbered(grouped: Grouped, place: Float[Tensor, "heads clusters"]) -> Grouped:
    """The same clusters in ascending order of their places."""
    order = place.argsort(dim=-1, stable=True)
    number = order.argsort(dim=-1)
    return Grouped(
        labels=number.gather(1, grouped.labels),
        sizes=grouped.sizes.gather(1, order),
        centroids=grouped.centroids.take_along_dim(order[:, :, None], 1),
    )
