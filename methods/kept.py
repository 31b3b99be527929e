"""What methods keep of one attention call for later ones: of one layer, branch and sample, and of one video."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

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


def check_searches(searches: Sequence[float]) -> None:
    """Refuse shares of a schedule at which nothing can be looked for.

    Raises:
        ValueError: they do not ascend within 0 to 1.
    """
    if list(searches) != sorted(set(searches)) or not all(0 <= share <= 1 for share in searches):
        raise ValueError(f"search steps are ascending shares of the schedule, 0 to 1: got {searches}")


def searches_so_far(searches: Sequence[float], site: Site) -> list[int]:
    """The steps up to this call's at which something is looked for anew.

    Args:
        searches: when, ascending shares of the schedule.
        site: of the call.
    """
    return [step for share in searches if (step := round(share * site.steps)) <= site.step]


def outdated(kept: Kept[Any], search: int, site: Site) -> bool:
    """Whether a search is to be made at this call: at its own step, and later where that step was not asked for.

    A later call is the first of its kind where a schedule is entered midway.

    Args:
        kept: what the last search found.
        search: the step of the last search that is due.
        site: of the call.
    """
    return kept.step < search or site.step == search
