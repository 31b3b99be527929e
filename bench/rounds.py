"""The order in which arms take turns, for how long, and what becomes of one that fails."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from itertools import groupby
from operator import itemgetter
from typing import TypeVar

from calibatt.bench.failure import Failure, guarded

_T = TypeVar("_T")

# rounds whose videos the report shows; they are made however little time there is
SHOWN_ROUNDS = 3


class TimeLimit:
    """Whether there is time for another round: as much as the longest has taken since this was made.

    Args:
        seconds: from now on; None for as long as it takes.
    """

    def __init__(self, seconds: float | None) -> None:
        self._end = math.inf if seconds is None else time.monotonic() + seconds
        self._last: float | None = None
        self._longest = 0.0

    def left_s(self) -> float:
        """Seconds until the end; less than none where it has passed."""
        return self._end - time.monotonic()

    def more(self) -> bool:
        """Asked before each round."""
        now = time.monotonic()
        if self._last is not None:
            self._longest = max(self._longest, now - self._last)
        self._last = now
        return now + self._longest <= self._end


def in_turns(arms: Sequence[_T], rounds: int, *, first: int = 0) -> Iterator[tuple[int, _T]]:
    """Every arm once a round, in an order that is drawn for each, by its number: the same in every run.

    The first arm is what the others are paired with: it stands in the middle of a round, since half a round is as near
    in time as one can be to all others.

    Args:
        arms: who works.
        rounds: how many there are.
        first: the round to begin with, where those before are done.
    """
    for round_ in range(first, rounds):
        draw, order = random.Random(round_), list(arms[1:])
        draw.shuffle(order)
        # of an odd number there are two middles, or one arm would always come after its partner
        middle = (len(order) + draw.randrange(2)) // 2
        yield from ((round_, arm) for arm in (*order[:middle], *arms[:1], *order[middle:]))


def take_turns(
    arms: Sequence[_T],
    rounds: int,
    turn: Callable[[int, _T], None],
    *,
    first: int = 0,
    more: Callable[[int], bool] = lambda round_: True,
    after: Callable[[int], None] = lambda round_: None,
    failures: dict[_T, Failure] | None = None,
    resting: Collection[_T] = (),
) -> dict[_T, Failure]:
    """Let arms work in turns; one that fails has no more turns, and the others go on.

    Args:
        arms: who works; the first is what the others are paired with.
        rounds: how many turns each has.
        turn: the work of an arm in a round.
        first: the round to begin with.
        more: asked before every round, by its number, whether to make it; after one that is not made, none is.
        after: called at the end of every round.
        failures: of arms that have no turns; to these are added those that fail here.
        resting: arms that have no turns for now; may be changed meanwhile.

    Returns:
        Why each arm that failed did: what was given, where it was.
    """
    failures = {} if failures is None else failures
    for round_, turns in groupby(in_turns(arms, rounds, first=first), key=itemgetter(0)):
        if not more(round_):
            break
        for _, arm in turns:
            if arm in failures or arm in resting:
                continue
            failure = guarded(partial(turn, round_, arm))
            if failure is not None:
                failures[arm] = failure
        after(round_)
    return failures
