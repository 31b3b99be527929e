"""Sol-Attn: blocks chosen online by one threshold a row, a mean and a spread of its scores; means stand for the others.

Follows arXiv 2607.24027 and github.com/NVlabs/Sana, branch sol-engine (techniques/sparse_backends). There one kernel
scores key blocks by the means that it computes their remainder with, and routes as it goes. Here a plan is made first,
and the remainder is the plan's (`kernels/remainder.py`). What differs:

- Means of queries and keys are in fp32, there in the model's precision.
- Text is kept in both directions, as it is there, and is in neither the choice nor its thresholds; there it counts in
  the thresholds.
- Blocks need not be square: a query block's own key blocks are those that its tokens lie in.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from calibatt.kernels.mask import block_count
from calibatt.kernels.plan import Plan, Remainder
from calibatt.methods.base import Knob, Method
from calibatt.methods.blocks import block_ends, mask_beside_text, pooled, video_blocks
from calibatt.methods.curves import along_curve
from calibatt.methods.site import Site


@dataclass(frozen=True, slots=True, kw_only=True)
class SolConfig:
    """Settings of the choice.

    Args:
        beta: spreads above the mean of a row's scores from which a key block is computed; about 1 - Φ(beta) of them
            are, where scores are spread as a normal distribution.
        dense_steps: share of the steps that are dense at first, rounded to whole steps.
        dense_layers: number of first layers that stay dense.
        spread: of the scores: their standard deviation, or what it would be if channels were uncorrelated.
        curve: along which the tokens are taken; None for the sequence's own order.
        beside: key blocks that are computed on either side of a query block's own, and those.
        block: tokens of a query and of a key block.

    Raises:
        ValueError: the threshold is no number, or the dense steps are no share.
    """

    beta: float
    dense_steps: float
    dense_layers: int
    # thresh_type of the repository's sol_attn, by default "diag"
    spread: Literal["diagonal", "exact"] = "diagonal"
    curve: Literal["morton"] | None = None
    # sol_attn/triton_ref/fwd.py: a distance of 1 at most; the paper does not speak of it
    beside: int = 1
    # the only size that its kernels have
    block: tuple[int, int] = (64, 64)

    def __post_init__(self) -> None:
        if not (math.isfinite(self.beta) and 0 <= self.dense_steps <= 1):
            raise ValueError(f"sol's beta is a number of spreads, its dense steps a share, 0 to 1: got {self}")


class Sol(Method):
    """Computes the blocks whose pooled score is well above the others of its row; means stand for all the others."""

    name: ClassVar[str] = "sol"
    label: ClassVar[str] = "Sol-Attn"
    colour: ClassVar[str] = "#0072B2"
    marker: ClassVar[str] = "s"
    headwise: ClassVar[bool] = True
    presets: ClassVar[Mapping[str, SolConfig]] = MappingProxyType(
        {
            # the paper's: β = 1, the first 20 % of the steps and the first layer dense
            "default": SolConfig(beta=1.0, dense_steps=0.2, dense_layers=1),
            # candidates/wan21_14b_sol_only.toml: tau 1.0, diag, 10 dense steps, dense layer 0; not the paper's order
            "morton": SolConfig(beta=1.0, dense_steps=10 / 50, dense_layers=1, curve="morton"),
            # `thresh_type="exact"` of the README of techniques/sparse_backends
            "exact": SolConfig(beta=1.0, dense_steps=0.2, dense_layers=1, spread="exact"),
            # the first at every step and layer, to compare masks rather than dense schedules
            "no-warmup": SolConfig(beta=1.0, dense_steps=0.0, dense_layers=0),
        }
    )
    # the range that techniques/sparse_backends/sol_attn_backend.py searches for a density
    knob: ClassVar[Knob | None] = Knob(field="beta", low=-8.0, high=8.0)
    without_dense: ClassVar[Mapping[str, Any]] = MappingProxyType({"dense_steps": 0.0, "dense_layers": 0})
    remainder: ClassVar[Remainder] = "zeroth"

    def plan(
        self,
        q: Float[Tensor, "heads tokens head_dim"],
        k: Float[Tensor, "heads tokens head_dim"],
        v: Float[Tensor, "heads tokens head_dim"],
        site: Site,
    ) -> Plan:
        """Masks of this call's queries and keys with the means of the other blocks, or dense at first.

        Blocks that hold text are kept, in both directions, and take no part in the choice.
        """
        config, geometry = self.config, site.geometry
        if site.in_warmup(config.dense_steps) or site.layer < config.dense_layers:
            return Plan.dense(geometry)
        order = None if config.curve is None else along_curve(geometry, config.curve, q.device)
        if order is not None:
            q, k = q[:, order.queries[0].long()], k[:, order.keys[0].long()]
        rows, columns = (video_blocks(geometry, size) for size in config.block)
        q_means, k_means = pooled(q, config.block[0])[:, rows], pooled(k, config.block[1])[:, columns]
        near = near_blocks(geometry.tokens, config.block, config.beside, q.device)[rows, columns]
        chosen = above(q_means, k_means, config.beta, config.spread) | near
        mask = mask_beside_text(chosen, geometry, config.block)
        return replace(Plan.masked(mask, geometry.heads, order=order), remainder=self.remainder)


def above(
    q_means: Float[Tensor, "heads q_blocks head_dim"],
    k_means: Float[Tensor, "heads k_blocks head_dim"],
    beta: float,
    spread: Literal["diagonal", "exact"],
) -> Bool[Tensor, "heads q_blocks k_blocks"]:
    """The blocks whose score, the product of their means, is more than so many spreads above the mean of its row.

    Args:
        q_means, k_means: mean queries and keys of the blocks.
        beta: spreads.
        spread: the scores' standard deviation, or its diagonal estimate √Σ q̄² Var(k̄) over the channels.
    """
    centred = k_means - k_means.mean(1, keepdim=True)
    # above the mean of the row; the root of the channels would change scores and spreads alike
    scores = q_means @ centred.mT
    if spread == "exact":
        variance = scores.square().mean(-1, keepdim=True)
    else:
        variance = q_means.square() @ centred.square().mean(1)[:, :, None]
    return scores > beta * variance.sqrt()


def near_blocks(
    tokens: int, block: tuple[int, int], beside: int, device: torch.device
) -> Bool[Tensor, "q_blocks k_blocks"]:
    """The key blocks that a query block's own tokens lie in, and so many on either side of them.

    Args:
        tokens: of the sequence.
        block: tokens of a query and of a key block.
        beside: how many.
        device: where the mask is made.
    """
    first, last = (end[:, None] // block[1] for end in block_ends(tokens, block[0], device))
    column = torch.arange(block_count(tokens, block[1]), device=device)
    return (column >= first - beside) & (column <= last + beside)
