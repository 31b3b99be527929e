"""The front: what nothing else beats in two things at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")


def unbeaten(points: Sequence[T], place: Callable[[T], tuple[float, float]]) -> list[T]:
    """Those that no other is better than in one thing and no worse than in the other.

    Args:
        points: what is compared.
        place: its two figures, the higher the better.

    Returns:
        ascending by the first figure; of equal points all.
    """
    places = {id(point): place(point) for point in points}

    def beaten(one: T) -> bool:
        x, y = places[id(one)]
        return any(a >= x and b >= y and (a, b) != (x, y) for a, b in places.values())

    return sorted((p for p in points if not beaten(p)), key=lambda p: (places[id(p)][0], -places[id(p)][1]))
