"""Hands samples that were measured elsewhere to pytest-benchmark.

pytest-benchmark runs one benchmark after the other; a fair comparison measures all arms in turns. So the arms of a
workload are measured together, and each benchmark then replays the samples of its own arm through this timer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence


class Replay:
    """A timer in pytest-benchmark's sense whose differences between calls are given samples."""

    def __init__(self) -> None:
        self._readings: Iterator[float] = iter(())

    def load(self, samples_s: Sequence[float]) -> None:
        """Take the samples of the next benchmark: each round reads the clock twice."""
        self._readings = (reading for sample in samples_s for reading in (0.0, sample))

    def __call__(self) -> float:
        """The next reading, in seconds."""
        return next(self._readings)


REPLAY = Replay()
