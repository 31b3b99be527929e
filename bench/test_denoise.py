"""Whole generations: speed and fidelity against dense."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from calibatt.bench.cells import Cell
from calibatt.bench.replay import REPLAY

SUITE = "denoise"


@pytest.mark.benchmark(timer=REPLAY)
def test_denoise(cell: Cell, report: Callable[[Cell], None]) -> None:
    """Time of one video."""
    report(cell)
