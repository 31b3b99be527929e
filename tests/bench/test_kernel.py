"""The kernel suite, on kernels whose times are known."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import pytest
import torch

from calibatt.bench.cells import DENSE, BlockArm, Workload
from calibatt.bench.context import Context
from calibatt.bench.record import Record
from calibatt.bench.suites import kernel
from calibatt.bench.suites.suite import Job
from calibatt.models.entry import Resolution
from calibatt.models.shapes.entry import SHAPES

# calls before anything is timed: of dense to check it; of others once more, which compiles
CHECKED = 1
# 32 tokens
TINY = replace(SHAPES, resolutions=MappingProxyType({"tiny": Resolution(height=16, width=16, frames=2)}))


class Silent:
    def line(self, text: str) -> None: ...

    def open(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


def measured(fakes: Any, monkeypatch: pytest.MonkeyPatch, *names: str) -> dict[str, Record]:
    """Records of the fakes' kernels, half of whose blocks are kept, by name."""
    kernels = {one.name: one for one in fakes.kernels.values()}
    monkeypatch.setattr(kernel, "KERNELS", MappingProxyType(kernels))
    monkeypatch.setattr(kernel, "fastest_dense", lambda *inputs, log: kernels["dense"])
    monkeypatch.setattr(kernel, "_gemm_tflops", lambda device, dtype: 1.0)
    monkeypatch.setattr("calibatt.bench.cells.MODELS", MappingProxyType({"shapes": TINY}))

    def never() -> Context:
        raise AssertionError("kernels by themselves need no pipeline")

    job = Job(
        workload=Workload(model="shapes", resolution="tiny", steps=0, device=torch.device("cpu")), rounds=1,
        artifacts=None, console=Silent(), open=never,
    )  # fmt: skip
    arms = [BlockArm(kernel=name, density=0.5, mask="banded", block=(8, 8)) for name in names]
    # dense is measured though nobody asked for it
    return {record.kernel: record for _, record in kernel.measure(job, arms)}


def test_samples_are_paired_with_dense_ones_of_the_same_round(
    fakes: Any, monkeypatch: pytest.MonkeyPatch, by_round: Callable[..., list[float]]
) -> None:
    rounds = [float(round_ + 1) for round_ in range(kernel.ROUNDS + 2)]
    fakes.arm("dense", by_round(CHECKED, 1, rounds))
    fakes.arm("sparse", by_round(CHECKED + 1, 1, [second / 4 for second in rounds]))
    records = measured(fakes, monkeypatch, "sparse")
    sparse = records["sparse"]
    # two rounds warm up, and where nothing varies the least rounds do
    assert sparse.baseline_samples_s == records["dense"].samples_s == tuple(rounds[2:])
    assert sparse.samples_s == tuple(second / 4 for second in rounds[2:])
    assert sparse.speedup is not None
    assert (sparse.speedup.low, sparse.speedup.high) == (4.0, 4.0)
    assert (sparse.method, sparse.mask, sparse.block, sparse.baseline) == ("blocks", "banded", (8, 8), "dense")
    assert (records["dense"].method, records["dense"].baseline_samples_s) == (DENSE.method, None)


@pytest.mark.parametrize("lasts", [0, CHECKED + 3])
def test_a_kernel_that_runs_out_of_memory_says_so_and_the_others_go_on(
    fakes: Any, monkeypatch: pytest.MonkeyPatch, lasts: int
) -> None:
    for name, more in (("dense", {}), ("large", {"lasts": lasts}), ("small", {})):
        fakes.arm(name, **more)
    records = measured(fakes, monkeypatch, "large", "small")
    assert records["large"].outcome == "out_of_memory"
    assert records["small"].samples_s == (1.0,) * kernel.ROUNDS
    assert records["small"].baseline_samples_s == (1.0,) * kernel.ROUNDS
