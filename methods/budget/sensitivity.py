"""How far an error of attention at each step moves the video, tried out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from calibatt.kernels.plan import Plan
from calibatt.methods.base import Planner
from calibatt.methods.site import Site

# stands in for no distance and no error, which have no logarithm: rounding a video to 8 bits moves it 500 times as far
_LEAST = 1e-8


class AtSteps:
    """A planner that is asked at some steps only; attention is dense at all others.

    Args:
        planner: what is asked.
        steps: where.
    """

    def __init__(self, planner: Planner, steps: range) -> None:
        self._planner = planner
        self._steps = steps

    def plan(
        self,
        q: Float[Tensor, "heads tokens head_dim"],
        k: Float[Tensor, "heads tokens head_dim"],
        v: Float[Tensor, "heads tokens head_dim"],
        site: Site,
    ) -> Plan:
        """The planner's plan, or dense."""
        return self._planner.plan(q, k, v, site) if site.step in self._steps else Plan.dense(site.geometry)

    def reset(self) -> None:
        """A new video."""
        self._planner.reset()


def step_groups(steps: int) -> list[range]:
    """Steps that are tried out together: the first four by themselves, then more and more, a quarter of those before.

    Of 20 steps that makes ten groups, of 50 it makes 14. At first, steps differ most from their neighbours, as in
    CalibAtt's schedule, whose exponential is nearly flat after a quarter of them.
    """
    groups: list[range] = []
    first = 0
    while first < steps:
        last = min(steps, first + 1 + first // 4)
        groups.append(range(first, last))
        first = last
    return groups


def sensitivity(
    distances: Float[Tensor, "groups prompts"], left_out: Float[Tensor, "steps"], groups: Sequence[range]
) -> Float[Tensor, "steps"]:
    """What an error of attention is to be multiplied by at each step, in fp32; geometric mean 1.

    Args:
        distances: mean squared difference of the video with masks at one group of steps from the dense one. Their
            geometric mean over prompts counts: a video whose layout turns over is farther than all others together.
        left_out: squared error of attention that the masks make at each step, as importances have it.
        groups: of steps.
    """
    moved = distances.double().clamp(min=_LEAST).log().mean(1)
    made = torch.stack([left_out[steps.start : steps.stop].sum() for steps in groups]).clamp(min=_LEAST).log()
    each = (moved - made).repeat_interleave(torch.tensor([len(steps) for steps in groups]))
    return (each - each.mean()).exp().float()
