"""The attention of an arm, timed: every arm is measured through one, dense too."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from calibatt.bench.timer import PhaseTimer
from calibatt.kernels.base import Attender
from calibatt.methods.base import Planner
from calibatt.methods.call import Call, Observer, SparseAttention


class Meter(SparseAttention):
    """A method and a kernel whose phases are timed, and what their observers take too: phase `observe`.

    Args:
        method, kernel: the arm.
        device: where it runs.
        observers: told of every call.
    """

    def __init__(
        self, method: Planner, kernel: Attender, device: torch.device, *, observers: Iterable[Observer] = ()
    ) -> None:
        self.timer = PhaseTimer(device)
        timed = [_Timed(observer, self.timer) for observer in observers]
        super().__init__(method, kernel, observers=timed, phase=self.timer.phase)


class _Timed:
    def __init__(self, observer: Observer, timer: PhaseTimer) -> None:
        self._observer = observer
        self._timer = timer

    def saw(self, call: Call) -> None:
        with self._timer.phase("observe"):
            self._observer.saw(call)
