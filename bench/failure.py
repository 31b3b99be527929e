"""Failure as a value: what one arm cannot do must not stop the others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch

from calibatt.bench.record import Outcome

_T = TypeVar("_T")

# torch has no type for a CPU's lack of memory: these are in the messages of its allocators
_OUT_OF_MEMORY = ("out of memory", "not enough memory", "can't allocate memory")


@dataclass(frozen=True, slots=True)
class Failure:
    """Why something has no times.

    Args:
        outcome: of the record; never `ok`.
        reason: one line.
    """

    outcome: Outcome
    reason: str


def guarded(work: Callable[[], _T]) -> _T | Failure:
    """The work's result; if it raises, the failure that says so."""
    try:
        return work()
    except Exception as error:
        failure = _of(error)
    # the exception's frames are gone by now, and with them what they held
    if failure.outcome == "out_of_memory" and torch.cuda.is_available():
        torch.cuda.empty_cache()
    return failure


def _of(error: Exception) -> Failure:
    said = str(error).strip().splitlines()
    line = f"{type(error).__name__}: {said[0]}" if said else type(error).__name__
    lack = isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _OUT_OF_MEMORY)
    )
    return Failure("out_of_memory" if lack else "failed", line)
