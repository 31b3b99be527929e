"""Kernels by themselves."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from calibatt.bench.cells import Cell
from calibatt.bench.replay import REPLAY

SUITE = "kernel"


@pytest.mark.benchmark(timer=REPLAY)
def test_kernels(cell: Cell, report: Callable[[Cell], None]) -> None:
    """Time of one attention call, lists made from bits included."""
    report(cell)
