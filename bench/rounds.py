"""The order in which arms take turns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

_T = TypeVar("_T")


def in_turns(arms: Sequence[_T], rounds: int) -> Iterator[tuple[int, _T]]:
    """Every arm once a round; each round begins with another arm, so that none always runs first or after the same."""
    for round_ in range(rounds):
        shift = round_ % max(1, len(arms))
        order = [*arms[shift:], *arms[:shift]]
        # every other round backwards: who runs after whom changes too
        yield from ((round_, arm) for arm in (order if round_ % 2 == 0 else reversed(order)))
