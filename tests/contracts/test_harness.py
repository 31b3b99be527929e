"""That the tests do run under what tests/conftest.py promises; without it the contracts would prove less."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from jaxtyping import TypeCheckError

from calibatt.kernels import oracle
from calibatt.kernels.base import Task
from calibatt.kernels.catalogue import KERNELS
from calibatt.kernels.geometry import Geometry
from calibatt.kernels.plan import Plan


def test_memory_that_nothing_wrote_is_nan() -> None:
    given = torch.zeros(5)
    for fresh in (torch.empty(5), torch.empty_like(given), given.new_empty(5), torch.empty(5, dtype=torch.bfloat16)):
        assert fresh.isnan().all()


def test_an_element_left_out_shows_in_the_output() -> None:
    # a kernel that forgets its last row
    out = torch.empty_like(torch.zeros(2, 3))
    out[:1] = 1
    assert out[1].isnan().all()


def test_compiled_code_allocates_poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    if KERNELS["flex"].refusal(Task(device=torch.device("cpu"), dtype=torch.float32, head_dim=64)) is not None:
        pytest.skip("nothing can be compiled here: there is no C++ compiler")
    poisoned = []
    guards: Any = torch._C._dynamo.guards
    allocate = guards._empty_strided_cpu

    def watched(*args: Any) -> Any:
        out = allocate(*args)
        poisoned.append(bool(out.isnan().all()))
        return out

    monkeypatch.setattr(guards, "_empty_strided_cpu", watched)
    assert torch.compile(lambda x: x.sin() + 1)(torch.zeros(3)).tolist() == [1, 1, 1]
    assert poisoned == [True]


def test_shapes_are_enforced() -> None:
    q = torch.randn(1, 2, 64, 16)
    with pytest.raises(TypeCheckError, match="parameter 'v'"):
        oracle.attend(q, q, q[:, :1], Plan.dense(Geometry(grid=(1, 8, 8), heads=2, head_dim=16)))


def test_fields_of_facts_are_enforced() -> None:
    with pytest.raises(TypeCheckError, match="grid"):
        Geometry(grid=(8, 8), heads=2, head_dim=16)  # type: ignore[arg-type]


def test_each_process_keeps_to_its_share_of_two_cores() -> None:
    worker = "PYTEST_XDIST_WORKER" in os.environ
    assert torch.get_num_threads() == (1 if worker else 2)
    # and what it starts
    assert os.environ.get("OMP_NUM_THREADS") == "1" or not worker
