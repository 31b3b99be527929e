"""Sparse VideoGen 2: queries and keys in clusters of k-means, and the clusters chosen by attention between centroids.

Follows github.com/svg-project/Sparse-VideoGen (svg/kmeans_utils.py, scripts/wan/wan_t2v_720p_sap.sh). What differs:

- There a kernel walks clusters of any size. So it does here in the presets named `clusters`; in the others the plan
  computes all blocks of fixed size that hold any of the mask, which is more, and what all kernels have. For that to be
  little more, clusters are put in another order (`seriate`).
- There both branches of guidance share one cache of centroids in Wan, so that each branch starts from the other's. Here
  each has its own.
- Short videos have fewer clusters, as `cluster_counts` says; there every video has as many.
- First centroids are drawn without replacement, from a generator of their own; there two of them may be one token.
- Text is one cluster that sees and is seen by all. There it is two in HunyuanVideo, the second for its padding, which
  is not part of the sequence here. Nor are videos clustered in steps that stay dense, as that model's script has it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from calibatt.kernels.plan import Plan
from calibatt.methods.base import Knob, Method
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
from calibatt.methods.kept import Keeper
from calibatt.methods.selection import top_p
from calibatt.methods.site import Site


@dataclass(frozen=True, slots=True, kw_only=True)
class Svg2Config:
    """Settings of the clusters and of the choice.

    Args:
        clusters: clusters of queries and of keys in every head; fewer in short videos.
        dense_steps: share of the first steps that stay dense, rounded down to whole steps.
        dense_layers: share of the first layers that stay dense, rounded down to whole layers.
        mass: least share of a cluster's estimated attention that its chosen clusters of keys hold.
        least_share: least share of the clusters of keys that is kept whatever the mass, rounded down.
        first_iterations: turns of k-means in the first sparse step, from random tokens.
        iterations: turns in every later step, from the centroids of the last.
        tolerance: k-means ends early when no centroid moves as far as this.
        block: tokens of a query and of a key block that clusters are covered by; None computes just the clusters.
        seed: of the random tokens.

    Raises:
        ValueError: a share is outside 0 to 1, or a number of clusters or iterations is below 1.
    """

    clusters: tuple[int, int]
    dense_steps: float
    dense_layers: float
    # --top_p_kmeans, --min_kc_ratio, --kmeans_iter_init and --kmeans_iter_step of the scripts for Wan
    mass: float = 0.9
    least_share: float = 0.10
    first_iterations: int = 50
    iterations: int = 2
    # batch_kmeans_Euclid
    tolerance: float = 1e-4
    # the original has none; of the usual sizes, the one that covers clusters most closely
    block: tuple[int, int] | None = (64, 64)
    seed: int = 0

    def __post_init__(self) -> None:
        if not all(0 <= share <= 1 for share in (self.mass, self.least_share, self.dense_steps, self.dense_layers)):
            raise ValueError(f"mass, least share, dense steps and dense layers are shares, 0 to 1: got {self}")
        if min(*self.clusters, self.first_iterations, self.iterations) < 1:
            raise ValueError(f"k-means needs at least one cluster and one iteration: got {self}")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Centroids:
    """What one layer, branch and sample keeps from call to call: 27 MB at 40 heads and the default numbers."""

    queries: Float[Tensor, "heads q_clusters head_dim"]
    keys: Float[Tensor, "heads k_clusters head_dim"]


class Svg2(Method):
    """Clusters queries and keys at every call, from the last call's centroids, and keeps the clusters that weigh most.

    Each call goes on from the last, at whatever step: asked twice at one step, it has been improved twice.
    """

    name: ClassVar[str] = "svg2"
    label: ClassVar[str] = "SVG2"
    colour: ClassVar[str] = "#0072B2"
    marker: ClassVar[str] = "D"
    presets: ClassVar[Mapping[str, Svg2Config]] = MappingProxyType(
        {
            # scripts/wan/wan_t2v_720p_sap.sh
            "default": Svg2Config(clusters=(300, 1000), dense_steps=0.2, dense_layers=0.03),
            # arXiv 2505.18875, on Wan 2.1; the share of dense layers is the script's
            "paper": Svg2Config(clusters=(100, 500), dense_steps=0.3, dense_layers=0.03),
            # the script's at every step and layer, to compare masks rather than dense schedules
            "no-warmup": Svg2Config(clusters=(300, 1000), dense_steps=0.0, dense_layers=0.0),
            # the script's clusters as they are, for kernels of blocks that differ in size
            "clusters": Svg2Config(clusters=(300, 1000), dense_steps=0.2, dense_layers=0.03, block=None),
            "clusters-no-warmup": Svg2Config(clusters=(300, 1000), dense_steps=0.0, dense_layers=0.0, block=None),
        }
    )
    # the least share bounds density from below
    knob: ClassVar[Knob | None] = Knob(field="mass", low=0.0, high=1.0)
    without_dense: ClassVar[Mapping[str, Any]] = MappingProxyType({"dense_steps": 0.0, "dense_layers": 0.0})

    def __init__(self, config: Svg2Config) -> None:
        super().__init__(config)
        self._centroids: Keeper[_Centroids] = Keeper()

    def plan(
        self,
        q: Float[Tensor, "heads tokens head_dim"],
        k: Float[Tensor, "heads tokens head_dim"],
        v: Float[Tensor, "heads tokens head_dim"],
        site: Site,
    ) -> Plan:
        """The clusters of this call or blocks that cover them, or dense in the first steps and layers."""
        geometry, config = site.geometry, self.config
        if site.in_warmup(config.dense_steps, config.dense_layers, whole=math.floor):
            return Plan.dense(geometry)
        video = slice(geometry.video_start, geometry.video_start + geometry.video_tokens)
        q, k, v = q[:, video], k[:, video], v[:, video]
        last = self._centroids.last(site, q.device)
        if last is None:
            q_count, k_count = cluster_counts(geometry, config.clusters)
            generator = torch.Generator(q.device).manual_seed(config.seed * site.layers + site.layer)
            starts = random_tokens(q, q_count, generator), random_tokens(k, k_count, generator)
            iterations = config.first_iterations
        else:
            starts, iterations = (last.made.queries, last.made.keys), config.iterations
        queries, keys = (
            kmeans(x, start, iterations=iterations, tolerance=config.tolerance)
            for x, start in zip((q, k), starts, strict=True)
        )
        queries, keys = seriate(queries, keys)
        centroids = _Centroids(queries=queries.centroids, keys=keys.centroids)
        self._centroids.keep(centroids, site, q.device)
        order = cluster_order(geometry, queries.labels, keys.labels)
        keep = self._keep(queries, keys, k, v)
        return cluster_plan(geometry, order, queries.sizes, keys.sizes, keep, config.block)

    def reset(self) -> None:
        """Forget all centroids."""
        self._centroids.clear()

    def _keep(
        self,
        queries: Grouped,
        keys: Grouped,
        k: Float[Tensor, "heads video_tokens head_dim"],
        v: Float[Tensor, "heads video_tokens head_dim"],
    ) -> Bool[Tensor, "heads q_clusters k_clusters"]:
        """Which clusters of keys each cluster of queries sees: by their centroids alone, here."""
        least = int(self.config.least_share * keys.sizes.shape[1])
        return top_p(attention(queries, keys), self.config.mass, inclusive=True, least=least)
