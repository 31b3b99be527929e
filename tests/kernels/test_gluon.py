"""What the Gluon kernel can be asked without a GPU; the contract tests compute with it where there is one."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
import triton

from calibatt.kernels import gluon_hopper
from calibatt.kernels.base import Task
from calibatt.kernels.gluon_hopper import Gluon, launch_shape
from calibatt.kernels.plan import BlockMask, Plan, RowReuse

# CUDA's programming guide, compute capability 9.0: registers and bytes of shared memory of a multiprocessor, and what
# each of its thread blocks takes of the latter for the system
REGISTERS, SHARED, SYSTEM = 65536, 228 * 1024, 1024
CASES = {
    "128x128": ((128, 128), 128),
    "128x64": ((128, 64), 128),
    "256x128": ((256, 128), 128),
    "64x64": ((64, 64), 128),
    "192x128": ((192, 128), 128),
    "128x128-dim64": ((128, 128), 64),
    "64x64-dim64": ((64, 64), 64),
}


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, None),
        ({"device": torch.device("cpu")}, "CUDA GPU, not cpu"),
        ({"dtype": torch.float32}, "bfloat16 and float16, not float32"),
        ({"head_dim": 96}, "head dims 64 and 128, not 96"),
        ({"block": (96, 64)}, r"multiples of 64: got (96, 64)"),
    ],
)
@pytest.mark.usefixtures("hopper")
def test_it_takes_a_task_or_says_why_not(change: dict[str, Any], said: str | None) -> None:
    given = {"device": torch.device("cuda"), "dtype": torch.bfloat16, "head_dim": 128, "block": (64, 192), **change}
    refusal = Gluon().refusal(Task(**given))
    assert refusal is None if said is None else refusal is not None and said in refusal.reason


@pytest.mark.usefixtures("hopper")
def test_another_gpu_or_an_older_triton_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    task = Task(device=torch.device("cuda"), dtype=torch.bfloat16, head_dim=128)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "3.5.1")
    assert "3.6 or newer, here is 3.5" in str(Gluon().refusal(task))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 0))
    assert "for sm90, not sm100" in str(Gluon().refusal(task))


def _plan(*kinds: Any, keep: torch.Tensor | None = None) -> Plan:
    mask = None if keep is None else BlockMask.from_keep(keep, tokens=500, block_q=128, block_k=128)
    source = torch.zeros(500, dtype=torch.int64)
    reuse = RowReuse(computed=torch.tensor([0]), source=source) if "reused" in kinds else None
    return Plan(tokens=500, kinds=kinds, mask=mask, reuse=reuse)


def test_of_every_head_the_longest_lists_come_first() -> None:
    counts = torch.tensor([[3, 1, 4, 2], [1, 2, 1, 4]], dtype=torch.int32)
    plan = _plan("masked", "masked", keep=torch.ones(2, 4, 4, dtype=torch.bool))
    work = gluon_hopper._work(plan, counts, batch=1, tiles=4, tiles_a_block=1, reused_tiles=1)
    assert work.tolist() == [2, 0, 3, 1, 7, 5, 4, 6]


def test_two_tiles_of_a_block_share_its_list_and_a_batch_repeats() -> None:
    counts = torch.tensor([[1, 3]], dtype=torch.int32)
    plan = _plan("masked", keep=torch.ones(1, 4, 4, dtype=torch.bool))
    work = gluon_hopper._work(plan, counts, batch=2, tiles=4, tiles_a_block=2, reused_tiles=1)
    assert work.tolist() == [2, 3, 0, 1, 6, 7, 4, 5]


def test_reused_heads_have_the_tiles_of_their_computed_rows_only() -> None:
    # what stands in the rows of heads without a list is not looked at
    counts = torch.tensor([[9, 9, 9, 9], [1, 2, 1, 4], [7, 9, 8, 9]], dtype=torch.int32)
    plan = _plan("reused", "masked", "dense", keep=torch.ones(3, 4, 4, dtype=torch.bool))
    work = gluon_hopper._work(plan, counts, batch=1, tiles=4, tiles_a_block=1, reused_tiles=2)
    assert work.tolist() == [0, 1, 7, 5, 4, 6, 8, 9, 10, 11]


@pytest.fixture(scope="module")
def compiled() -> dict[str, dict[str, Any]]:
    """What the compiler says of every case; in a process of its own, where Triton takes this machine for a Hopper."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    told: dict[str, dict[str, Any]] = json.loads(done.stdout)
    return told


@pytest.mark.parametrize("case", CASES)
def test_as_many_thread_blocks_fit_a_multiprocessor_as_it_counts_on(
    compiled: dict[str, dict[str, Any]], case: str
) -> None:
    told, shape = compiled[case], launch_shape(*CASES[case])
    threads = 32 * told["warps"]
    # the hardware gives registers to warps in units of 256, that is 8 a thread
    assert shape.thread_blocks * threads * -(-shape.registers // 8) * 8 <= REGISTERS
    assert shape.thread_blocks * (told["shared"] + SYSTEM) <= SHARED
    assert told["wgmma"]


def _compile(block: tuple[int, int], head_dim: int) -> dict[str, Any]:
    """Compile the launch of a plan with all kinds of heads, with the arguments that the launch itself makes."""
    made: list[Any] = []

    class Hopper:
        """What Triton asks its driver while compiling."""

        def get_current_target(self) -> Any:
            from triton.backends.compiler import GPUTarget

            return GPUTarget("cuda", 90, 32)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int | None = None) -> int:
            return 0

    from calibatt.kernels import gluon_code

    class Entry:
        """Compiles in place of launching."""

        def __init__(self, function: Any) -> None:
            self._function = function

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda *args, **constants: made.append(self._function.warmup(*args, grid=grid, **constants))

    triton.runtime.driver.set_active(Hopper())
    # there is no GPU to load the code into
    triton.compiler.CompiledKernel._init_handles = lambda self: None
    torch.cuda.get_device_properties = lambda device: type("Properties", (), {"multi_processor_count": 132})
    tokens, heads = 500, 3
    shape = (heads, -(-tokens // block[0]), -(-tokens // block[1]))
    mask = BlockMask.from_keep(torch.ones(shape, dtype=torch.bool), tokens=tokens, block_q=block[0], block_k=block[1])
    plan = Plan(
        tokens=tokens,
        kinds=("masked", "reused", "dense"),
        mask=mask,
        reuse=RowReuse(computed=torch.tensor([0]), source=torch.zeros(tokens, dtype=torch.int64)),
    )
    q = torch.zeros((1, tokens, heads, head_dim), dtype=torch.bfloat16).transpose(1, 2)
    lists = (torch.zeros(shape, dtype=torch.int32), torch.zeros(shape[:2], dtype=torch.int32))
    import calibatt.kernels.one_launch

    calibatt.kernels.one_launch.block_lists = lambda plan: lists
    entries = {name: getattr(gluon_code, name) for name in ("attend", "attend_alone")}
    for name, function in entries.items():
        setattr(gluon_code, name, Entry(function))
    Gluon()._launch(q, q, q, torch.empty_like(q), torch.empty(q.shape[:3]), plan)
    for name, function in entries.items():
        setattr(gluon_code, name, function)
    (code,) = made
    return {
        "shared": code.metadata.shared,
        "warps": code.metadata.num_warps,
        "wgmma": "wgmma" in code.asm["ptx"],
    }


if __name__ == "__main__":
    print(json.dumps({name: _compile(*case) for name, case in CASES.items()}))
