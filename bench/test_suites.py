"""Every cell of every suite as one benchmark; names begin with the suite's, for `-k`."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from calibatt.bench.cells import Cell
from calibatt.bench.record import Suite
from calibatt.bench.replay import REPLAY


@pytest.mark.benchmark(timer=REPLAY)
def test_cell(suite: Suite, cell: Cell, report: Callable[[Suite, Cell], None]) -> None:
    """The cell's samples, measured in turns with the other arms of its workload."""
    report(suite, cell)
