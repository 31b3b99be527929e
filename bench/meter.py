"""Stands between a pipeline and an arm: takes the time of its phases, keeps plans and inputs when asked to."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from calibatt.bench.timer import PhaseTimer
from calibatt.kernels.base import Attender
from calibatt.kernels.ordered import attend_ordered
from calibatt.kernels.plan import Plan
from calibatt.methods.base import Planner
from calibatt.methods.site import Site


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Probe:
    """The inputs of one attention call of a real generation.

    Args:
        site: where the call happened.
        q, k, v: of one sample.
    """

    site: Site
    q: Float[Tensor, "1 heads tokens head_dim"]
    k: Float[Tensor, "1 heads tokens head_dim"]
    v: Float[Tensor, "1 heads tokens head_dim"]


class Meter:
    """An arm, with its method and its kernel in one object; every arm is measured through one, dense too.

    Args:
        method, kernel: the arm.
        device: where it runs.
    """

    def __init__(self, method: Planner, kernel: Attender, device: torch.device) -> None:
        self.timer = PhaseTimer(device)
        self.plans: list[tuple[Site, Plan]] = []
        self.probes: list[Probe] = []
        self.keep_plans = False
        self.probe_sites: Collection[tuple[int, int]] = ()
        self._method = method
        self._kernel = kernel
        self._site: Site | None = None

    def reset(self) -> None:
        """Start of a video."""
        self._method.reset()

    def plan(
        self,
        q: Float[Tensor, "heads tokens head_dim"],
        k: Float[Tensor, "heads tokens head_dim"],
        site: Site,
    ) -> Plan:
        """The method's plan."""
        with self.timer.phase("plan"):
            plan = self._method.plan(q, k, site)
        self._site = site
        if self.keep_plans:
            self.plans.append((site, plan))
        return plan

    def attend(
        self,
        q: Float[Tensor, "batch heads tokens head_dim"],
        k: Float[Tensor, "batch heads tokens head_dim"],
        v: Float[Tensor, "batch heads tokens head_dim"],
        plan: Plan,
    ) -> Float[Tensor, "batch heads tokens head_dim"]:
        """The kernel's output."""
        site = self._site
        if site is not None and site.branch == "cond" and (site.step, site.layer) in self.probe_sites:
            # clone keeps the strides, on which a kernel's speed may depend
            self.probes.append(Probe(site=site, q=q.clone(), k=k.clone(), v=v.clone()))
        return attend_ordered(self._kernel.attend, q, k, v, plan, self.timer.phase)
