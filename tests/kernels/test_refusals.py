"""What kernels refuse, and that they say what would help."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from torch import Tensor

from calibatt.kernels.base import Kernel, Task, check
from calibatt.kernels.catalogue import KERNELS
from calibatt.kernels.geometry import Geometry
from calibatt.kernels.mask import BlockMask, VariableBlockMask
from calibatt.kernels.plan import Plan, RowReuse, Skip

GEOMETRY = Geometry(grid=(1, 8, 8), heads=2, head_dim=16)


def task(device: str = "cpu", block: tuple[int, int] | None = None) -> Task:
    return Task(device=torch.device(device), dtype=torch.float32, head_dim=16, block=block)


def inputs(heads: int = 2, tokens: int = 64, head_dim: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = torch.randn(3, 1, heads, tokens, head_dim)
    return q, k, v


def half_mask(tokens: int = 64) -> BlockMask:
    return BlockMask.from_keep(torch.eye(4, dtype=torch.bool)[None], tokens=tokens, block_q=16, block_k=16)


def test_names_in_the_catalogue_are_the_kernels_own() -> None:
    assert all(isinstance(kernel, Kernel) and kernel.name == name for name, kernel in KERNELS.items())


def test_flex_without_a_compiler_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    refusal = KERNELS["flex"].refusal(task())
    assert refusal is not None
    assert "g++" in refusal.reason


def test_flex_looks_for_the_compiler_that_cxx_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert KERNELS["flex"].refusal(task()) is not None
    monkeypatch.setenv("CXX", "clang++-42")
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}" if name == "clang++-42" else None)
    assert KERNELS["flex"].refusal(task()) is None


def test_flex_needs_no_cpp_compiler_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert KERNELS["flex"].refusal(task("cuda")) is None


@pytest.mark.parametrize("block", [(64, 40), (8, 64)])
def test_flex_refuses_blocks_that_are_not_multiples_of_16(block: tuple[int, int]) -> None:
    refusal = KERNELS["flex"].refusal(task(block=block))
    assert refusal is not None
    assert str(block) in refusal.reason


def test_flex_refuses_other_devices() -> None:
    refusal = KERNELS["flex"].refusal(task("mps"))
    assert refusal is not None
    assert "not on mps" in refusal.reason


@pytest.mark.parametrize("name", [name for name in KERNELS if name.startswith("sdpa")])
def test_dense_kernels_refuse_sparse_work(name: str) -> None:
    refusal = KERNELS[name].refusal(task("cuda", block=(64, 64)))
    assert refusal is not None
    assert name in refusal.reason
    with pytest.raises(ValueError, match=f"{name} computes dense plans only, this one has masked"):
        KERNELS[name].attend(*inputs(), Plan.masked(half_mask(), 2))


def test_cudnn_runs_on_cuda_only() -> None:
    refusal = KERNELS["sdpa-cudnn"].refusal(task())
    assert refusal is not None
    assert "cuda, not on cpu" in refusal.reason


def test_inputs_of_another_type_are_refused_and_both_are_named() -> None:
    q, k, v = inputs()
    for name, given in (("k", (q, k.half(), v)), ("v", (q, k, v.half()))):
        with pytest.raises(ValueError, match=f"q is .*float32.*{name} is .*float16"):
            check(*given, Plan.dense(GEOMETRY))


@pytest.mark.parametrize("other", [{"heads": 3}, {"tokens": 63}, {"head_dim": 8}])
def test_inputs_of_another_shape_are_refused_and_both_are_named(other: dict[str, int]) -> None:
    q, k, _ = inputs()
    wrong = inputs(**other)[0]
    with pytest.raises(ValueError, match=r"q is \[1, 2, 64, 16\].*v is \[1, "):
        check(q, k, wrong, Plan.dense(GEOMETRY))


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("other", [{"heads": 3}, {"tokens": 63}])
def test_a_plan_for_another_geometry_is_refused_and_both_are_named(name: str, other: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"the plan is for 2 heads × 64 tokens, q is .* = \[1, "):
        KERNELS[name].attend(*inputs(**other), Plan.dense(GEOMETRY))


def test_a_mask_for_another_length_is_refused_by_every_kernel_that_takes_masks() -> None:
    with pytest.raises(ValueError, match="the plan is for 2 heads × 63 tokens"):
        KERNELS["flex"].attend(*inputs(), Plan.masked(half_mask(63), 2))


def test_a_plan_on_another_device_is_refused_and_both_are_named() -> None:
    bits = half_mask().bits.to("meta")
    plan = Plan.masked(BlockMask(bits=bits, tokens=64, block_q=16, block_k=16), 2)
    with pytest.raises(ValueError, match="the plan is on meta, q on cpu"):
        check(*inputs(), plan)


@pytest.mark.parametrize("name", ["flex", "triton"])
def test_blocks_are_left_out_only_by_kernels_that_can(name: str) -> None:
    refusals = [
        KERNELS[name].refusal(
            Task(device=torch.device("cpu"), dtype=torch.float32, head_dim=64, block=block, skips=True)
        )
        for block in ((128, 64), (128, 48))
    ]
    # 48 keys are no whole tile
    expected = {"flex": [True, True], "triton": [False, True]}
    assert [refusal is not None for refusal in refusals] == expected[name]


def test_what_is_left_out_is_noted_for_one_sample() -> None:
    q, k, v = (x.expand(2, -1, -1, -1) for x in inputs())
    mask = half_mask()
    plan = Plan.masked(mask, 2, skip=Skip.of(mask, 2, threshold=-1.0, leave=True))
    with pytest.raises(ValueError, match="is for one sample: q has 2"):
        KERNELS["flex"].attend(q, k, v, plan)


def test_a_dense_kernel_refuses_heads_that_reuse_rows() -> None:
    plan = Plan(tokens=64, kinds=("reused", "dense"), reuse=RowReuse.of_anchor_rows(GEOMETRY, (1, 5)))
    assert KERNELS["sdpa-flash"].refusal(Task.of(inputs()[0], plan)) is not None
    assert KERNELS["flex"].refusal(Task.of(inputs()[0], plan)) is None


def test_blocks_that_differ_in_size_are_refused_by_every_other_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    # as on a GPU that has them all
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr("calibatt.kernels.flash._installed", lambda package: True)
    monkeypatch.setattr("calibatt.kernels.gluon_hopper._triton_version", lambda: (3, 6))
    given = {"device": torch.device("cuda"), "dtype": torch.bfloat16, "head_dim": 128}
    for name, kernel in KERNELS.items():
        refusal = kernel.refusal(Task(**given, variable=True))
        if name == "default":
            # it hands them to the one that can
            continue
        if name == "triton" and refusal is not None:
            # its interpreter has other types
            assert "computes" in refusal.reason
            continue
        assert (refusal is None) == (name == "triton")
        assert refusal is None or "blocks of one size" in refusal.reason or "is a dense kernel" in refusal.reason


@pytest.mark.parametrize("name", [name for name in KERNELS if name not in ("default", "triton")])
def test_no_kernel_computes_another_mask_in_place_of_variable_blocks(name: str) -> None:
    sizes = torch.tensor([[20, 44]])
    keep = torch.eye(2, dtype=torch.bool)[None]
    plan = Plan.masked(VariableBlockMask.from_keep(keep, q_sizes=sizes, k_sizes=sizes, tokens=64), 2)
    assert Task.of(inputs()[0], plan).variable
    assert not Task.of(inputs()[0], Plan.masked(half_mask(), 2)).variable
    with pytest.raises(ValueError, match=r"blocks of one size|dense plans only|not on cpu|not cpu"):
        KERNELS[name].attend(*inputs(), plan)


def test_a_remainder_is_refused_by_every_kernel_that_drops_what_it_does_not_compute(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # as on a GPU that has them all
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr("calibatt.kernels.flash._installed", lambda package: True)
    monkeypatch.setattr("calibatt.kernels.gluon_hopper._triton_version", lambda: (3, 6))
    monkeypatch.setattr("calibatt.kernels.triton_sparse.interpreted", lambda: False)
    given = {"device": torch.device("cuda"), "dtype": torch.bfloat16, "head_dim": 128, "block": (128, 128)}
    for name, kernel in KERNELS.items():
        for reuses in (False, True):
            if kernel.refusal(Task(**given, reuses=reuses)) is not None:
                continue
            refusal = kernel.refusal(Task(**given, reuses=reuses, approximates=True))
            assert (refusal is None) == (name in ("default", "flex", "gluon", "triton"))
            assert refusal is None or "drops what it does not compute: the Gluon" in refusal.reason


@pytest.mark.parametrize("other", [{"skips": True}, {"int8": (64, 64)}])
def test_a_remainder_goes_neither_with_what_a_kernel_leaves_out_nor_with_int8(
    other: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("calibatt.kernels.triton_sparse.interpreted", lambda: True)
    given = {"device": torch.device("cpu"), "dtype": torch.float32, "head_dim": 64, "block": (64, 64), **other}
    assert KERNELS["triton"].refusal(Task(**given)) is None
    refusal = KERNELS["triton"].refusal(Task(**given, approximates=True))
    assert refusal is not None
    assert "approximates neither" in refusal.reason
