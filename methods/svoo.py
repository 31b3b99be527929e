"""SVOO: queries and keys clustered for each other, and head by head a share of clusters that was learnt offline.

Follows arXiv 2603.18636 and github.com/Mutual-Luo/SVOO (svoo/co_clustering.py, svoo/sparsity,
scripts/inference/wan/wan_t2v_720p_svoo.sh). As in Sparse VideoGen 2, the clusters of keys are chosen by the attention
between centroids, up to a mass; the least share that each head keeps is its own: what it needed in dense videos
to reach 0.95 of its attention, within bounds. What differs:

- The original makes a profile of every token: its scores with all centroids of the other side, as a unit vector; and
  compares these. With G the sum of c · cᵀ over those centroids, the inner product of two scores' vectors is that of
  their tokens under G. So a token x goes to the centroid c with the largest x · G · c / √(c · G · c), which is the
  same, and no profile is made.
- The table is the paper's, of mean and standard deviation over prompts; the repository's has their largest value.
- A table is learnt from random rows of queries. The repository takes all, or every so many.
- What `methods/svg2.py` says on fixed blocks, short videos, first centroids and text holds here too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from calibatt.kernels.plan import Plan, TokenOrder
from calibatt.methods.ahead import sent
from calibatt.methods.base import Knob, Method
from calibatt.methods.clusters import (
    Grouped,
    assign,
    attention,
    cluster_counts,
    cluster_order,
    cluster_plan,
    random_tokens,
    seriate,
)
from calibatt.methods.energy import needed_share
from calibatt.methods.kept import Keeper
from calibatt.methods.learning import Learnt
from calibatt.methods.selection import top_p
from calibatt.methods.site import Site

# the table's name in what was learnt
_SHARE = "share"


@dataclass(frozen=True, slots=True, kw_only=True)
class SvooConfig:
    """Settings of the table, the clusters and the choice.

    Args:
        dense_steps: share of the first steps that stay dense, rounded down to whole steps.
        dense_layers: share of the first layers that stay dense, rounded down to whole layers.
        bounds: the learnt least share of clusters of keys that a head keeps is clamped to these.
        mass: least share of a cluster's estimated attention that its chosen clusters of keys hold.
        clusters: clusters of queries and of keys in every head; fewer in short videos.
        iterations: turns of co-clustering, each from random tokens.
        reuse: share of the schedule over which clusters are kept, from the first sparse step on.
        coverage: share of a query's attention that its heaviest keys are counted up to.
        deviations: standard deviations over videos that are added to the mean share.
        rows: queries of each call that are learnt from.
        block: tokens of a query and of a key block that clusters are covered by; None computes just the clusters.
        seed: of all draws.

    Raises:
        ValueError: a share is outside 0 to 1, bounds do not ascend, or a number is below 1.
    """

    dense_steps: float
    dense_layers: float
    # the paper's, on Wan 2.1 14B at 720p
    bounds: tuple[float, float] = (0.15, 0.20)
    # the scripts' for Wan: --top_p_kmeans, --num_q_centroids, --num_k_centroids, --kmeans_iter_init and _step
    mass: float = 0.90
    clusters: tuple[int, int] = (256, 1024)
    iterations: int = 2
    # --reuse_interval: 20 of the 40 steps of the paper; the script for text to video has 20 of 50
    reuse: float = 20 / 40
    # DEFAULT_SPARSITY_THRESHOLD
    coverage: float = 0.95
    # the quantile of 0.95 of a normal distribution
    deviations: float = 1.645
    # at the worst, where queries need all keys or none, a share of 0.15 has a standard error of 0.03 by so many
    rows: int = 128
    # the original has none; of the usual sizes, the one that covers clusters most closely
    block: tuple[int, int] | None = (64, 64)
    seed: int = 0

    def __post_init__(self) -> None:
        shares = (self.dense_steps, self.dense_layers, *self.bounds, self.mass, self.reuse, self.coverage)
        if not all(0 <= share <= 1 for share in shares) or self.bounds[0] > self.bounds[1]:
            raise ValueError(f"svoo's shares are 0 to 1, and its bounds ascend: got {self}")
        if min(*self.clusters, self.iterations, self.rows) < 1:
            raise ValueError(f"svoo needs at least one cluster, one iteration and one row: got {self}")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Coclusters:
    """What one layer, branch and sample keeps: 66 MB at 40 heads of 75,600 tokens."""

    order: TokenOrder
    q_sizes: Int[Tensor, "heads q_clusters"]
    k_sizes: Int[Tensor, "heads k_clusters"]
    weights: Float[Tensor, "heads q_clusters k_clusters"]


class Svoo(Method):
    """Co-clusters at every so many steps, and at each step keeps the heaviest clusters, as many as its table says."""

    name: ClassVar[str] = "svoo"
    label: ClassVar[str] = "SVOO"
    colour: ClassVar[str] = "#D55E00"
    marker: ClassVar[str] = "D"
    presets: ClassVar[Mapping[str, SvooConfig]] = MappingProxyType(
        {
            # --first_times_fp and --first_layers_fp of the scripts for Wan
            "default": SvooConfig(dense_steps=0.2, dense_layers=0.03),
            # scripts/inference/wan/wan_t2v_720p_svoo.sh, with other bounds than the paper
            "script": SvooConfig(dense_steps=0.2, dense_layers=0.03, bounds=(0.03, 0.10), reuse=20 / 50),
            # the default at every step and layer, to compare masks rather than dense schedules
            "no-warmup": SvooConfig(dense_steps=0.0, dense_layers=0.0),
            # clusters as they are, for kernels of blocks that differ in size
            "clusters": SvooConfig(dense_steps=0.2, dense_layers=0.03, block=None),
            "clusters-no-warmup": SvooConfig(dense_steps=0.0, dense_layers=0.0, block=None),
        }
    )
    # the table bounds density from below
    knob: ClassVar[Knob | None] = Knob(field="mass", low=0.0, high=1.0)
    without_dense: ClassVar[Mapping[str, Any]] = MappingProxyType({"dense_steps": 0.0, "dense_layers": 0.0})
    learnt: Learnt

    def __init__(self, config: SvooConfig, learnt: Learnt) -> None:
        super().__init__(config, learnt)
        self._coclusters: Keeper[_Coclusters] = Keeper()

    @classmethod
    def learner(cls, config: SvooConfig) -> ShareLearner:
        """Learns the table of shares."""
        return ShareLearner(coverage=config.coverage, deviations=config.deviations, rows=config.rows, seed=config.seed)

    def plan(
        self,
        q: Float[Tensor, "heads tokens head_dim"],
        k: Float[Tensor, "heads tokens head_dim"],
        v: Float[Tensor, "heads tokens head_dim"],
        site: Site,
    ) -> Plan:
        """The clusters of this call or blocks that cover them, or dense in the first steps and layers.

        Raises:
            ValueError: the table was learnt from other videos.
        """
        self.learnt.check(site)
        if site.in_warmup(self.config.dense_steps, self.config.dense_layers, whole=math.floor):
            return Plan.dense(site.geometry)
        first = math.floor(self.config.dense_steps * site.steps)
        every = max(1, round(self.config.reuse * site.steps))
        due = first + (site.step - first) // every * every
        last = self._coclusters.last(site, q.device)
        # clusters are of use from their step to the next that is due; asked twice at a step that is due, they are made
        # twice, with the same result
        if last is None or last.step < due or site.step == due:
            found = self._cocluster(q, k, site)
            self._coclusters.keep(found, site, q.device)
        else:
            found = last.made
        share = sent(self.learnt.at(_SHARE, site), q.device).clamp(*self.config.bounds)
        counts = (share * found.k_sizes.shape[1]).long()
        keep = top_p(found.weights, self.config.mass, inclusive=True, least=counts[:, None, None])
        return cluster_plan(site.geometry, found.order, found.q_sizes, found.k_sizes, keep, self.config.block)

    def reset(self) -> None:
        """Forget all clusters; the table stays."""
        self._coclusters.clear()

    def _cocluster(
        self, q: Float[Tensor, "heads tokens head_dim"], k: Float[Tensor, "heads tokens head_dim"], site: Site
    ) -> _Coclusters:
        geometry = site.geometry
        video = slice(geometry.video_start, geometry.video_start + geometry.video_tokens)
        generator = site.generator(self.config.seed, q.device)
        counts = cluster_counts(geometry, self.config.clusters)
        queries, keys = seriate(*cocluster(q[:, video], k[:, video], counts, self.config.iterations, generator))
        return _Coclusters(
            order=cluster_order(geometry, queries.labels, keys.labels),
            q_sizes=queries.sizes,
            k_sizes=keys.sizes,
            weights=attention(queries, keys),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ShareLearner:
    """Counts how many keys hold most of a query's attention, head by head: mean and deviation over videos.

    Args:
        coverage, deviations, rows, seed: as in `SvooConfig`.
    """

    coverage: float
    deviations: float
    rows: int
    seed: int

    def note(
        self,
        q: Float[Tensor, "heads tokens head_dim"],
        k: Float[Tensor, "heads tokens head_dim"],
        v: Float[Tensor, "heads tokens head_dim"],
        site: Site,
        prompt: int,
    ) -> Mapping[str, Tensor]:
        """`share`: of the video's keys, what some of its queries need; of each head of one call.

        The queries are those of the same places in every video, so that the deviation is one of videos.
        """
        geometry = site.geometry
        video = slice(geometry.video_start, geometry.video_start + geometry.video_tokens)
        generator = site.generator(self.seed, q.device)
        rows = torch.randperm(geometry.video_tokens, generator=generator, device=q.device)[: self.rows]
        return {_SHARE: needed_share(q[:, video][:, rows], k[:, video], self.coverage)}

    def merge(self, notes: Sequence[Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
        """`share`: the mean over the prompts and so many deviations more; of one prompt there is no deviation."""
        shares = torch.stack([note[_SHARE] for note in notes]).double()
        deviation = shares.std(0) if len(shares) > 1 else torch.zeros_like(shares[0])
        return {_SHARE: (shares.mean(0) + self.deviations * deviation).float()}


def cocluster(
    q: Float[Tensor, "heads tokens head_dim"],
    k: Float[Tensor, "heads tokens head_dim"],
    counts: tuple[int, int],
    iterations: int,
    generator: torch.Generator,
) -> tuple[Grouped, Grouped]:
    """Clusters of queries with similar scores for the keys' centroids, and of keys likewise.

    Each turn clusters the keys by the last centroids of queries, then the queries by the new ones of keys.

    Args:
        q, k: the tokens.
        counts: clusters of queries and of keys.
        iterations: turns, from random tokens.
        generator: of the random tokens.
    """
    q_centroids, k_centroids = random_tokens(q, counts[0], generator), random_tokens(k, counts[1], generator)
    for _ in range(iterations):
        keys = _assigned(k, k_centroids, by=q_centroids)
        queries = _assigned(q, q_centroids, by=keys.centroids)
        q_centroids, k_centroids = queries.centroids, keys.centroids
    return queries, keys


def _assigned(
    x: Float[Tensor, "heads tokens head_dim"],
    centroids: Float[Tensor, "heads clusters head_dim"],
    *,
    by: Float[Tensor, "heads others head_dim"],
) -> Grouped:
    """Each token with the centroid whose scores with the other side's centroids point most nearly the same way."""
    # mean in place of sum, for half precision's range: one factor for all changes no order
    gram = by.transpose(1, 2) @ by / by.shape[1]
    directions = centroids @ gram
    lengths = (directions * centroids).sum(-1, keepdim=True).clamp(min=0).sqrt()
    # a centroid without any score has no direction: 0, as the original's
    directions = (directions / lengths.clamp(min=1e-8)).to(x.dtype)
    return assign(x, centroids, directions, torch.zeros_like(lengths[..., 0]))
