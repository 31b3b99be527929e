"""Takes times on one device: phases within a piece of work, and the work as a whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import Any, TypeVar

import torch

_T = TypeVar("_T")

# of a GPU's clock, some 10 ms: five times what the slowest launch of a kernel took (docs/kernels.md)
_LEAD_CYCLES = 20_000_000


class PhaseTimer:
    """Adds up the time of named phases. On a GPU they are CUDA events, so that timing does not make the host wait.

    Args:
        device: where the work runs.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._marks: list[tuple[str, Any, Any]] = []

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count what happens inside towards a phase."""
        start = self._mark()
        yield
        self._marks.append((name, start, self._mark()))

    def lead(self) -> None:
        """Keep the device busy until the host has queued what follows, whose time is then the device's alone.

        In a model the host is ahead in the same way, by the layers before.
        """
        if self._cuda:
            torch.cuda._sleep(_LEAD_CYCLES)

    def collect_s(self) -> dict[str, float]:
        """Seconds of each phase since the last call; waits for the device."""
        if self._cuda:
            torch.cuda.synchronize()
        totals: dict[str, float] = {}
        for name, start, end in self._marks:
            # events count in milliseconds
            totals[name] = totals.get(name, 0.0) + (start.elapsed_time(end) / 1e3 if self._cuda else end - start)
        self._marks.clear()
        return totals

    def _mark(self) -> Any:
        if not self._cuda:
            return perf_counter()
        event: Any = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def timed(device: torch.device, work: Callable[[], _T]) -> tuple[float, _T]:
    """Wall-clock seconds of a piece of work, the device's share included, and its result."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = perf_counter()
    result = work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return perf_counter() - start, result
