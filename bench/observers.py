"""What the benchmark keeps of attention calls, reduced at the call: nothing here grows with the length of a video."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from calibatt.kernels.mask import Mask
from calibatt.kernels.plan import Plan
from calibatt.methods.call import Call
from calibatt.methods.site import Site

# masks that a report shows of an arm
_SHOWN_MASKS = 4
# tokens of a cell of a picture where blocks differ in size: the sizes that methods take otherwise
_CELL = (64, 64)


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


class ProbeTaker:
    """Keeps the inputs of some calls of the conditional branch.

    Args:
        sites: (step, layer) of those calls.
    """

    def __init__(self, sites: Collection[tuple[int, int]]) -> None:
        self.probes: list[Probe] = []
        self._sites = frozenset(sites)

    def saw(self, call: Call) -> None:
        """Keep the call's inputs, if it is one of those."""
        if call.site.branch == "cond" and (call.site.step, call.site.layer) in self._sites:
            # clone keeps the strides, on which a kernel's speed may depend
            self.probes.append(Probe(site=call.site, q=call.q.clone(), k=call.k.clone(), v=call.v.clone()))


class PlanSummary:
    """What a record and its pictures say of the plans of a video: mean density, memory, density by site, some masks.

    Attributes:
        nbytes: of the largest plan.
        ordered: whether any plan has an order of its own.
    """

    def __init__(self) -> None:
        self.nbytes = 0
        self.ordered = False
        self._sum: Tensor | None = None
        self._calls = 0
        self._by_site: Tensor | None = None
        self._masks: dict[int, tuple[Site, int, Mask]] = {}

    def saw(self, call: Call) -> None:
        """Add one call; nothing waits for the device."""
        plan, site = call.plan.realised(), call.site
        density = _density(call.plan, call.q.device)
        self._calls += 1
        self._sum = density.mean() if self._sum is None else self._sum + density.mean()
        self.nbytes = max(self.nbytes, call.plan.nbytes())
        self.ordered |= plan.order is not None
        if site.branch != "cond":
            return
        if self._by_site is None:
            self._by_site = torch.zeros((site.steps, site.layers, len(density)), device=density.device)
        self._by_site[site.step, site.layer] = density
        if plan.mask is not None:
            self._keep_masks(plan, plan.mask, site)

    def density(self) -> float:
        """Mean over all calls.

        Raises:
            ValueError: there was no call.
        """
        if self._sum is None:
            raise ValueError("no attention call was seen: is the pipeline's self-attention replaced?")
        return self._sum.item() / self._calls

    def by_site(self) -> Float[Tensor, "steps layers heads"]:
        """Density of every head at every site of the conditional branch, on the CPU.

        Raises:
            ValueError: there was no such call.
        """
        if self._by_site is None:
            raise ValueError("no attention call of the conditional branch was seen")
        return self._by_site.cpu()

    def masks(self) -> list[tuple[tuple[int, int, int], NDArray[np.bool_]]]:
        """A few masked heads, spread evenly over the video: (step, layer, head) of each, and its picture."""
        return [
            ((site.step, site.layer, head), _picture(mask)) for _, (site, head, mask) in sorted(self._masks.items())
        ]

    def _keep_masks(self, plan: Plan, mask: Mask, site: Site) -> None:
        heads = plan.heads_of("masked")
        at, calls = site.step * site.layers + site.layer, site.steps * site.layers
        for part in range(_SHOWN_MASKS):
            # the middle of each part of the video: the very first and last steps are seldom typical
            middle = (2 * part + 1) / (2 * _SHOWN_MASKS)
            # the last mask up to there, or else the first one after it
            if at <= int(middle * calls) or part not in self._masks:
                head = heads[int(middle * len(heads))]
                self._masks[part] = (site, head, mask.of_heads([head]))


def _density(plan: Plan, device: torch.device) -> Float[Tensor, "heads"]:
    """As `Plan.density`, which waits for the device: here that would change what is timed."""
    if plan.skip is not None and plan.skip.leave:
        # the scores of a block that is left out are computed, its values are not
        return (_masked_density(plan, device) + _masked_density(plan.realised(), device)) / 2
    return _masked_density(plan, device)


def _masked_density(plan: Plan, device: torch.device) -> Float[Tensor, "heads"]:
    reused = 1.0 if plan.reuse is None else plan.reuse.density
    host = torch.tensor([reused if kind == "reused" else 1.0 for kind in plan.kinds], dtype=torch.float64)
    density = host.to(device, non_blocking=True)
    if plan.mask is None:
        return density
    masked = torch.tensor([kind == "masked" for kind in plan.kinds]).to(device, non_blocking=True)
    return torch.where(masked, plan.mask.density().to(device), density)


def _picture(mask: Mask) -> NDArray[np.bool_]:
    """The mask of one head, a cell for each pair of blocks: what the tokens in their middles see.

    Where blocks differ in size, cells are of one size all the same: a picture to scale, whose mean is near the density.
    """
    tokens = torch.arange(mask.tokens, device=mask.bits.device)
    queries, keys = (torch.stack([part[len(part) // 2] for part in tokens.split(size)]) for size in mask.block or _CELL)
    picture: NDArray[np.bool_] = mask.seen(0, queries)[:, keys].cpu().numpy()
    return picture
