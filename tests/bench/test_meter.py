"""The meter: what it adds to the time that it takes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from calibatt.bench.meter import Meter
from calibatt.bench.timer import timed
from calibatt.kernels.plan import Plan
from calibatt.methods.call import SparseAttention
from calibatt.methods.site import Site

CPU = torch.device("cpu")


class _Nothing:
    """Plans and computes nothing, so that what is left is the call."""

    name = "nothing"

    def __init__(self, plan: Plan) -> None:
        self._plan = plan

    def reset(self) -> None: ...

    def plan(self, q: Tensor, k: Tensor, v: Tensor, site: Site) -> Plan:
        return self._plan

    def attend(self, q: Tensor, k: Tensor, v: Tensor, plan: Plan) -> Tensor:
        return q


def _cpu_s(work: Callable[[], Any], calls: int = 200) -> float:
    start = time.thread_time()
    for _ in range(calls):
        work()
    return (time.thread_time() - start) / calls


def test_to_time_a_call_adds_less_than_a_hundredth_of_ten_milliseconds(
    calls_of_video: Callable[[int], Any],
) -> None:
    call = next(calls_of_video(0))
    nothing = _Nothing(Plan.dense(call[-1].geometry))
    bare, meter = SparseAttention(nothing, nothing), Meter(nothing, nothing, CPU)

    def metered() -> None:
        timed(CPU, lambda: meter(*call))
        meter.timer.collect_s()

    added = statistics.median(_cpu_s(metered) - _cpu_s(lambda: bare(*call)) for _ in range(11))
    assert added < 0.01 * 10e-3
