"""The default kernel: what it chooses for which task, and that it computes what was asked."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch

from calibatt.bench.record import Record, load_run
from calibatt.kernels import oracle
from calibatt.kernels.base import Task, Unsupported
from calibatt.kernels.catalogue import DEFAULT, KERNELS
from calibatt.kernels.default import ran_on
from calibatt.kernels.geometry import Geometry
from calibatt.kernels.mask import BlockMask
from calibatt.kernels.plan import Plan, RowReuse

GEOMETRY = Geometry(grid=(2, 8, 8), heads=3, head_dim=64)


@pytest.fixture
def a_gpu_with_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("calibatt.kernels.flash._installed", lambda package: True)
    monkeypatch.setattr("calibatt.kernels.gluon_hopper._triton_version", lambda: (3, 6))
    monkeypatch.setattr("calibatt.kernels.triton_sparse.interpreted", lambda: False)


def chosen(capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch, **what: Any) -> str:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    # it remembers what it chose on this machine
    monkeypatch.setattr(DEFAULT, "_chosen", {})
    found = DEFAULT.chosen(Task(**{"device": torch.device("cuda"), "dtype": torch.bfloat16, "head_dim": 128} | what))
    assert not isinstance(found, Unsupported), found.reason
    return found.name


@pytest.mark.usefixtures("a_gpu_with_everything")
@pytest.mark.parametrize(
    ("capability", "what", "expected"),
    [
        ((9, 0), {}, "fa3"),
        # FlashAttention-3 is built without it
        ((9, 0), {"dtype": torch.float16}, "fa4"),
        # what no dense kernel has: torch chooses by itself
        ((9, 0), {"dtype": torch.float32}, "flex"),
        ((7, 5), {"dtype": torch.float16}, "flex"),
        ((9, 0), {"block": (128, 128)}, "fa4"),
        ((9, 0), {"block": (64, 64)}, "gluon"),
        ((9, 0), {"block": (128, 128), "head_dim": 64}, "gluon"),
        ((9, 0), {"block": (128, 128), "reuses": True}, "gluon"),
        # what only one of them has
        ((9, 0), {"block": (128, 48)}, "fa4"),
        ((9, 0), {"variable": True}, "triton"),
        ((9, 0), {"int8": (128, 64)}, "triton"),
        ((9, 0), {"block": (128, 64), "skips": True}, "triton"),
        ((9, 0), {"block": (128, 128), "approximates": True}, "gluon"),
        ((9, 0), {"block": (64, 64), "reuses": True, "approximates": True}, "gluon"),
        ((9, 0), {"block": (128, 48), "approximates": True}, "triton"),
        # FlashAttention-4 ignores lists there, or has blocks of other sizes
        ((8, 0), {"block": (128, 128)}, "triton"),
        ((8, 9), {"reuses": True}, "fa4"),
        ((10, 0), {"block": (256, 128)}, "fa4"),
        ((10, 0), {"block": (128, 128)}, "triton"),
    ],
)
def test_each_task_goes_to_the_fastest_kernel_that_can(
    capability: tuple[int, int], what: dict[str, Any], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert chosen(capability, monkeypatch, **what) == expected


@pytest.mark.usefixtures("a_gpu_with_everything")
def test_its_choice_on_hopper_is_within_a_twentieth_of_the_fastest_in_the_committed_results(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    results = Path(__file__).parents[2] / "bench" / "results" / "h200"
    cells: dict[tuple[Any, ...], dict[str, Record]] = {}
    for path in results.glob("kernel*.json"):
        for record in load_run(path).records:
            if record.method == "blocks" and record.mask is not None and record.outcome == "ok":
                cells.setdefault((path.name, *record.workload, record.preset, record.block, record.mask), {})[
                    record.kernel
                ] = record
    assert len(cells) > 30
    for cell, kernels in cells.items():
        one = next(iter(kernels.values()))
        what = {"head_dim": one.head_dim, "block": one.block, "reuses": one.mask in ("rows", "mixed")}
        name = chosen((9, 0), monkeypatch, **what)
        seconds = {kernel: median(record.samples_s or ()) for kernel, record in kernels.items()}
        assert seconds[name] <= 1.05 * min(seconds.values()), (cell, name, seconds)


def test_what_no_kernel_can_do_is_refused_with_every_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("calibatt.kernels.triton_sparse.interpreted", lambda: False)
    refusal = DEFAULT.refusal(Task(device=torch.device("mps"), dtype=torch.float32, head_dim=64, block=(64, 64)))
    assert refusal is not None
    assert "FlexAttention" in refusal.reason
    assert "Triton" in refusal.reason
    assert "\n" not in refusal.reason


def test_what_ran_is_told_of_what_is_not_plain_where_anything_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("calibatt.kernels.triton_sparse.interpreted", lambda: True)
    cpu = {"device": torch.device("cpu"), "dtype": torch.float32, "head_dim": 64}
    dense, sparse = Task(**cpu), Task(**cpu, block=(64, 64))
    assert ran_on(DEFAULT, [dense]) == "sdpa-flash"
    assert ran_on(DEFAULT, [dense, sparse, sparse]) == "flex"
    assert ran_on(DEFAULT, [dense, Task(**cpu, block=(64, 64), approximates=True)]) == "flex"
    assert ran_on(DEFAULT, [Task(**cpu, variable=True, approximates=True)]) == "triton"
    assert ran_on(DEFAULT, [Task(**cpu, int8=(64, 64)), dense, sparse]) == "flex+triton"
    assert ran_on(KERNELS["triton"], [dense, sparse]) is None


@pytest.mark.slow
def test_every_kind_of_plan_comes_out_as_it_should() -> None:
    q, k, v = torch.randn((3, 1, 3, 128, 64), generator=torch.Generator().manual_seed(0))
    keep = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(1)) < 0.5
    mask = BlockMask.from_keep(keep, tokens=128, block_q=16, block_k=16)
    reuse = RowReuse.of_anchor_rows(GEOMETRY, (1, 5))
    for plan in (
        Plan.dense(GEOMETRY),
        Plan.masked(mask, 3),
        Plan(tokens=128, kinds=("masked", "reused", "dense"), mask=mask, reuse=reuse),
        Plan(tokens=128, kinds=("masked", "reused", "dense"), mask=mask, reuse=reuse, remainder="zeroth"),
    ):
        truth = oracle.attend(q, k, v, plan)
        assert (DEFAULT.attend(q, k, v, plan) - truth).abs().max() < 1e-5


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 128])
def test_what_it_chooses_on_this_gpu_computes_what_was_asked(head_dim: int) -> None:
    q, k, v = torch.randn((3, 1, 3, 128, head_dim), device="cuda").bfloat16()
    geometry = Geometry(grid=(2, 8, 8), heads=3, head_dim=head_dim)
    reuse = RowReuse.of_anchor_rows(geometry, (1, 5)).to("cuda")
    plans = [Plan.dense(geometry), Plan(tokens=128, kinds=("reused", "dense", "dense"), reuse=reuse)]
    for block in ((128, 128), (64, 64), (128, 48)):
        keep = torch.ones(3, -(-128 // block[0]), -(-128 // block[1]), dtype=torch.bool)
        keep[1:, :, 1:] = False
        mask = BlockMask.from_keep(keep, tokens=128, block_q=block[0], block_k=block[1]).to("cuda")
        plans += [Plan.masked(mask, 3), replace(Plan.masked(mask, 3), remainder="zeroth")]
    for plan in plans:
        exact = oracle.attend(q, k, v, plan)
        budget = oracle.error_budget(q, k, v, plan, exact)
        assert (DEFAULT.attend(q, k, v, plan).double() - exact).abs().max().item() <= budget
