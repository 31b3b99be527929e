"""What methods keep of one attention call for later ones: of one layer, branch and sample, and of one video."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

from calibatt.kernels.geometry import Geometry
from calibatt.methods.site import Branch, Site

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Kept(Generic[_T]):
    """Something that was made at one call, and where.

    Args:
        made: what it is.
        step: index of that call's denoising step.
        geometry: layout of its tokens.
        device: where they were.
    """

    made: _T
    step: int
    geometry: Geometry
    device: torch.device


class Keeper(Generic[_T]):
    """Keeps the last thing that was made at each layer, branch and sample."""

    def __init__(self) -> None:
        self._kept: dict[tuple[Branch, int, int], Kept[_T]] = {}

    def last(self, site: Site, device: torch.device) -> Kept[_T] | None:
        """What was kept last at this layer, branch and sample; None where there is nothing that holds for this call.

        Nothing holds for other tokens or on another device, nor at a step before its own: another video has begun.

        Args:
            site: of the call.
            device: of its queries.
        """
        kept = self._kept.get((site.branch, site.layer, site.sample))
        if kept is None or kept.geometry != site.geometry or kept.device != device or kept.step > site.step:
            return None
        return kept

    def keep(self, made: _T, site: Site, device: torch.device) -> None:
        """Keep it in place of what was kept before.

        Args:
            made: what it is.
            site: of the call that it was made at.
            device: of the call's queries.
        """
        place = (site.branch, site.layer, site.sample)
        self._kept[place] = Kept(made=made, step=site.step, geometry=site.geometry, device=device)

    def clear(self) -> None:
        """Forget everything."""
        self._kept.clear()
