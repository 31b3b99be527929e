"""The dense baseline is the fastest kernel that is right, and a broken one costs itself, not the run."""

from __future__ import annotations

from collections.abc import Sequence
from types import MappingProxyType

import pytest
import torch
from torch import Tensor

from calibatt.bench import baseline
from calibatt.kernels import oracle
from calibatt.kernels.base import Task, Unsupported
from calibatt.kernels.geometry import Geometry
from calibatt.kernels.plan import Plan


class Clock:
    """Tells a time that stands still until a kernel works."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


_CLOCK = Clock()


class Stub:
    """A dense kernel that is off by something, after a while."""

    def __init__(self, name: str, *, off: float = 0.0, after: Sequence[float] = (0.0,), broken: bool = False) -> None:
        self.name, self._off, self._after, self._broken = name, off, list(after), broken

    def refusal(self, task: Task) -> Unsupported | None:
        return Unsupported("not here") if self.name == "absent" else None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, plan: Plan) -> Tensor:
        if self._broken:
            raise RuntimeError("illegal memory access")
        # the last for ever
        _CLOCK.now += self._after[0] if len(self._after) == 1 else self._after.pop(0)
        return oracle.attend(q, k, v, plan).to(q.dtype) + self._off


def _choose(monkeypatch: pytest.MonkeyPatch, *kernels: Stub) -> tuple[str, str]:
    """Name of the kernel that is chosen, and what was said meanwhile."""
    monkeypatch.setattr("calibatt.bench.timer.perf_counter", _CLOCK)
    monkeypatch.setattr(baseline, "KERNELS", MappingProxyType({kernel.name: kernel for kernel in kernels}))
    q, k, v = torch.randn((3, 1, 3, 32, 16), generator=torch.Generator().manual_seed(0))
    lines: list[str] = []
    return baseline.fastest_dense(
        q, k, v, Geometry(grid=(2, 4, 4), heads=3, head_dim=16), log=lines.append
    ).name, "\n".join(lines)


def test_the_fastest_dense_kernel_that_is_right_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    name, said = _choose(
        monkeypatch,
        Stub("slow", after=[0.2]),
        Stub("right", after=[0.001]),
        Stub("wrong", off=0.1),
        Stub("broken", broken=True),
        Stub("absent"),
    )
    assert name == "right"
    assert "wrong is left out as a baseline: its largest error against fp64 is 0.1" in said
    assert "broken is left out as a baseline: RuntimeError: illegal memory access" in said


def test_without_a_right_dense_kernel_there_is_no_baseline(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match="no dense kernel gives correct results"):
        _choose(monkeypatch, Stub("wrong", off=0.1))


def test_the_round_that_warms_up_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    # one call to check it, one to warm it up, and five whose median is 3 seconds; with the 9 it would be 4
    name, said = _choose(monkeypatch, Stub("uneven", after=[0, 9, 1, 1, 3, 5, 5]), Stub("even", after=[3.5]))
    assert name == "uneven"
    assert "3000.00 ms (uneven), 3500.00 ms (even)" in said
