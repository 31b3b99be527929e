"""Attention calls of a real generation, phase by phase."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from calibatt.bench.cells import Cell
from calibatt.bench.replay import REPLAY

SUITE = "attention"


@pytest.mark.benchmark(timer=REPLAY)
def test_attention(cell: Cell, report: Callable[[Cell], None]) -> None:
    """Mean time of one call, planning included."""
    report(cell)
