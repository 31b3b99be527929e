"""What it costs to prepare offline methods."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from calibatt.bench.cells import Cell
from calibatt.bench.replay import REPLAY

SUITE = "calibration"


@pytest.mark.benchmark(timer=REPLAY)
def test_calibration(cell: Cell, report: Callable[[Cell], None]) -> None:
    """Time of what is learnt offline, for this run's other suites."""
    report(cell)
