"""The order in which arms take turns, and what becomes of one that fails."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import groupby
from operator import itemgetter
from typing import TypeVar

from calibatt.bench.failure import Failure, guarded

_T = TypeVar("_T")


def in_turns(arms: Sequence[_T], rounds: int) -> Iterator[tuple[int, _T]]:
    """Every arm once a round; each round begins with another arm, so that none always runs first or after the same."""
    for round_ in range(rounds):
        shift = round_ % max(1, len(arms))
        order = [*arms[shift:], *arms[:shift]]
        # every other round backwards: who runs after whom changes too
        yield from ((round_, arm) for arm in (order if round_ % 2 == 0 else reversed(order)))


def take_turns(
    arms: Sequence[_T],
    rounds: int,
    turn: Callable[[int, _T], None],
    *,
    after: Callable[[int], None] = lambda round_: None,
) -> dict[_T, Failure]:
    """Let arms work in turns; one that fails has no more turns, and the others go on.

    Args:
        arms: who works.
        rounds: how many turns each has.
        turn: the work of an arm in a round.
        after: called at the end of every round.

    Returns:
        Why each arm that failed did.
    """
    failures: dict[_T, Failure] = {}
    for round_, turns in groupby(in_turns(arms, rounds), key=itemgetter(0)):
        for _, arm in turns:
            if arm in failures:
                continue
            failure = guarded(partial(turn, round_, arm))
            if failure is not None:
                failures[arm] = failure
        after(round_)
    return failures
