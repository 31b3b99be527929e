"""One forward pass of a model's shape, with random weights."""

from __future__ import annotations

import contextlib
from argparse import Namespace
from dataclasses import fields, replace
from types import MappingProxyType

import pytest
import torch

from calibatt.bench import cells as cells_module
from calibatt.bench.cells import DENSE, BlockArm, Workload
from calibatt.bench.options import Options
from calibatt.bench.suites import forward
from calibatt.bench.suites.suite import Job
from calibatt.models.entry import Resolution
from calibatt.models.shapes.entry import SHAPES

CPU = torch.device("cpu")
# 2 × 4 × 8 tokens
TINY = replace(SHAPES, resolutions=MappingProxyType({"tiny": Resolution(height=16, width=32, frames=2)}))
AT = Workload(model="shapes", resolution="tiny", steps=0, device=CPU, layers=2)
ARM = BlockArm(kernel="triton", density=0.5, mask="random", block=(16, 16))


class Quiet:
    """A console that nobody reads."""

    def line(self, text: str) -> None: ...

    def open(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


def options(**given: str) -> Options:
    """What the command line gives, with these options."""
    defaults = {one.name: one.metadata["default"] for one in fields(Options)}
    return Options.read(Namespace(**{**defaults, **given}))


@pytest.fixture
def job(monkeypatch: pytest.MonkeyPatch) -> Job:
    monkeypatch.setattr(cells_module, "MODELS", {"shapes": TINY})
    monkeypatch.setattr(forward, "ROUNDS", 3)
    return Job(
        workload=AT, rounds=1, artifacts=None, console=Quiet(), open=lambda: pytest.fail("no workload is opened"),
        most=3,
    )  # fmt: skip


def test_every_arm_is_paired_with_dense_round_by_round(job: Job) -> None:
    reused = replace(ARM, reused=0.5)
    records = dict(forward.measure(job, [ARM, reused]))
    assert {record.outcome for record in records.values()} == {"ok"}
    dense = records[DENSE]
    assert dense.baseline_samples_s is None
    for arm in (ARM, reused):
        assert records[arm].baseline_samples_s == dense.samples_s
        assert len(dense.samples_s or ()) == 3
        assert records[arm].baseline == dense.kernel
    assert (dense.weights, dense.layers, dense.compiled) == ("random", 2, False)
    # half of the heads keep half of the blocks, half compute one of four rows, or two: five do not fit
    assert records[ARM].density == pytest.approx(0.5, abs=0.2)
    assert records[reused].density != records[ARM].density


def test_there_is_no_forward_pass_unless_layers_are_asked_for() -> None:
    assert forward.cells(options()) == []
    cells = forward.cells(options(layers="2", masks="even", reused_heads="0,0.5", compile="no,blocks"))
    # dense and two arms, eager and compiled
    assert len(cells) == 6
    assert {(cell.workload.layers, cell.workload.compiled) for cell in cells} == {(2, False), (2, True)}


def test_a_mask_that_takes_a_video_is_refused_in_one_line() -> None:
    with pytest.raises(ValueError, match="--masks captured: a forward pass"):
        forward.cells(options(layers="2", masks="captured"))


def test_a_kernel_that_cannot_is_a_record_and_the_others_go_on(job: Job) -> None:
    records = dict(forward.measure(job, [replace(ARM, kernel="fa4"), ARM]))
    assert records[replace(ARM, kernel="fa4")].outcome == "unsupported"
    assert records[ARM].outcome == "ok"


def test_the_same_weights_and_inputs_are_made_at_every_call() -> None:
    assert TINY.untrained is not None
    first, second = (TINY.untrained(TINY.geometry("tiny"), 1, CPU, torch.float32).run() for _ in range(2))
    assert torch.equal(first, second)
    assert torch.get_default_dtype() == torch.float32


def test_layers_of_different_number_are_not_compared(job: Job) -> None:
    (dense,) = (record for arm, record in forward.measure(job, []) if arm == DENSE)
    assert replace(dense, layers=3).key != dense.key
