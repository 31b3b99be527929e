"""What it costs to prepare CalibAtt."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from calibatt.bench.cells import Cell
from calibatt.bench.replay import REPLAY

SUITE = "calibration"


@pytest.mark.benchmark(timer=REPLAY)
def test_calibration(cell: Cell, report: Callable[[Cell], None]) -> None:
    """Time of the calibration that this run's other suites use."""
    report(cell)
