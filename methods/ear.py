"""SVG-EAR: the clusters of Sparse VideoGen 2, computed where their means would err most, and elsewhere left to those.

Follows arXiv 2603.08982 and github.com/svg-project/Sparse-VideoGen (svg/kmeans_utils.py,
`identify_dynamic_map_estimated`; svg/models/wan/attention.py, `WanAttn_EARAttn_Processor`). What differs:

- Exponentials are taken as shares of the largest of their row, so that none overflows. There errors below 1e-8 count as
  equal; here they are told apart.
- The error is summed in plain PyTorch, head by head; there one Triton kernel makes it.
- What `methods/svg2.py` says on branches, short videos, first centroids and text holds here too. Text is never left to
  its mean.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from calibatt.kernels.plan import Plan, Remainder
from calibatt.kernels.remainder import block_means
from calibatt.methods.clusters import Grouped, attention, by_cluster
from calibatt.methods.selection import top_p
from calibatt.methods.site import Site
from calibatt.methods.svg2 import Svg2, Svg2Config


@dataclass(frozen=True, slots=True, kw_only=True)
class EarConfig(Svg2Config):
    """Settings of the clusters, as in `Svg2Config`, and of the choice.

    Args:
        mass: share of a cluster's estimated attention whose clusters of keys are the budget: so many keys are computed,
            though not those.
        least_share: share of the clusters of keys that is computed whatever the error: the heaviest, rounded down but
            one at least, unless it is 0. The budget is twice as many at least.
        block: tokens of a query and of a key block that clusters are covered by, whose means then stand in for what is
            left out; None computes just the clusters, and takes theirs.
    """

    # what the processor for Wan passes on; --min_kc_ratio of its scripts, 0.10, is not read there
    least_share: float = 0.05
    block: tuple[int, int] | None = None


class Ear(Svg2):
    """Clusters as Sparse VideoGen 2 does, and spends what its choice would cost where means err most for their cost."""

    name: ClassVar[str] = "ear"
    label: ClassVar[str] = "SVG-EAR"
    colour: ClassVar[str] = "#56B4E9"
    marker: ClassVar[str] = "D"
    presets: ClassVar[Mapping[str, EarConfig]] = MappingProxyType(
        {
            # scripts/wan/wan_t2v_720p_ear.sh
            "default": EarConfig(clusters=(300, 1000), dense_steps=0.2, dense_layers=0.03),
            # scripts/wan/wan_i2v_720p_ear.sh
            "i2v": EarConfig(clusters=(300, 1000), dense_steps=0.35, dense_layers=0.03),
            # scripts/hyvideo/hyvideo_t2v_720p_ear.sh
            "hunyuan": EarConfig(clusters=(400, 1000), dense_steps=0.1, dense_layers=0.03),
            # the default at every step and layer, to compare masks rather than dense schedules
            "no-warmup": EarConfig(clusters=(300, 1000), dense_steps=0.0, dense_layers=0.0),
            # covered by blocks, of the size of svg2's, for kernels that have no other
            "blocks": EarConfig(clusters=(300, 1000), dense_steps=0.2, dense_layers=0.03, block=(64, 64)),
            "blocks-no-warmup": EarConfig(clusters=(300, 1000), dense_steps=0.0, dense_layers=0.0, block=(64, 64)),
        }
    )
    remainder: ClassVar[Remainder] = "zeroth"

    def plan(
        self,
        q: Float[Tensor, "heads tokens head_dim"],
        k: Float[Tensor, "heads tokens head_dim"],
        v: Float[Tensor, "heads tokens head_dim"],
        site: Site,
    ) -> Plan:
        """The clusters of this call, with the means of the others, or dense in the first steps and layers."""
        plan = super().plan(q, k, v, site)
        return plan if plan.mask is None else replace(plan, remainder=self.remainder)

    def _keep(
        self,
        queries: Grouped,
        keys: Grouped,
        k: Float[Tensor, "heads video_tokens head_dim"],
        v: Float[Tensor, "heads video_tokens head_dim"],
    ) -> Bool[Tensor, "heads q_clusters k_clusters"]:
        """The heaviest few, and with the rest of the budget those of the largest error per key."""
        weights, least = attention(queries, keys), self.config.least_share * keys.sizes.shape[1]
        heaviest = top_p(weights, 0.0, least=int(least)) & (least > 0)
        affordable = top_p(weights, self.config.mass, inclusive=True, least=int(2 * least))
        cost = keys.sizes[:, None].expand_as(weights)
        budget = (cost * (affordable.int() - heaviest.int())).sum(-1, keepdim=True)
        # all pairs of a row have as many queries: what tells their costs apart is the keys
        error_per_key = errors_of_means(queries.centroids, k, v, keys) / cost.clamp(min=1)
        order = error_per_key.masked_fill(heaviest, -1).argsort(dim=-1, descending=True, stable=True)
        cost = cost.gather(-1, order)
        chosen = cost.cumsum(-1) - cost < budget
        return torch.zeros_like(heaviest).scatter_(-1, order, chosen).logical_or_(heaviest)


def errors_of_means(
    q: Float[Tensor, "heads q_clusters head_dim"],
    k: Float[Tensor, "heads tokens head_dim"],
    v: Float[Tensor, "heads tokens head_dim"],
    keys: Grouped,
) -> Float[Tensor, "heads q_clusters k_clusters"]:
    """What a query would get wrong of each cluster of keys, were all its keys and values their means.

    It is the sum of |exp(q·k/√head_dim) v - exp(q·k̄/√head_dim) v̄|² over the cluster's keys (`_error_estimation_kernel`
    of the original), over the square of the query's largest exponential. Opposite errors of two keys do not cancel.

    Args:
        q: queries, of which centroids are asked here.
        k, v: keys and values.
        keys: the clusters of the keys.
    """
    order = by_cluster(keys.labels)[:, :, None]
    k, v = k.take_along_dim(order, 1), v.take_along_dim(order, 1)
    v_means = block_means(v[None], keys.sizes)[0]
    return torch.stack([*map(_errors_of_head, q, k, v, keys.centroids, v_means, keys.sizes)])


def _errors_of_head(
    q: Float[Tensor, "q_clusters head_dim"],
    k: Float[Tensor, "tokens head_dim"],
    v: Float[Tensor, "tokens head_dim"],
    k_means: Float[Tensor, "k_clusters head_dim"],
    v_means: Float[Tensor, "k_clusters head_dim"],
    sizes: Int[Tensor, "k_clusters"],
) -> Float[Tensor, "q_clusters k_clusters"]:
    """The same of one head, whose keys and values stand cluster by cluster."""

    def of_tokens(x: Float[Tensor, "k_clusters columns"]) -> Float[Tensor, "tokens columns"]:
        return x.repeat_interleave(sizes, dim=0, output_size=len(k))

    directions = q.T / q.shape[-1] ** 0.5
    scores = k.float() @ directions
    largest = scores.amax(0)
    weights = (scores - largest).exp_()
    off = weights - of_tokens((k_means @ directions - largest).exp_())
    means = of_tokens(v_means.float())
    apart = v.float() - means
    # weight·v - mean_weight·v̄ is off·v̄ + weight·apart: so nothing cancels where keys and values are near their means
    squares = off.square() * means.square().sum(-1, keepdim=True)
    squares += weights.square() * apart.square().sum(-1, keepdim=True)
    squares += 2 * off * weights * (means * apart).sum(-1, keepdim=True)
    return torch.segment_reduce(squares, "sum", lengths=sizes, axis=0).T
