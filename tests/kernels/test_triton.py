"""What only the Triton kernel has: two ways to load, blocks of any size, code for every GPU."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from calibatt.kernels import oracle, triton_code, triton_sparse
from calibatt.kernels.base import Task
from calibatt.kernels.geometry import Geometry
from calibatt.kernels.plan import BlockMask, Plan, RowReuse, block_count
from calibatt.kernels.triton_sparse import Triton

pytestmark = pytest.mark.skipif(
    not (triton_sparse._interpreted() or torch.cuda.is_available()), reason="needs Triton's interpreter or a CUDA GPU"
)
GEOMETRY = Geometry(grid=(2, 7, 9), heads=3, head_dim=64)
DEVICE, DTYPE = ("cuda", torch.float16) if torch.cuda.is_available() else ("cpu", torch.float32)


def _mask(block_q: int, block_k: int) -> BlockMask:
    tokens = GEOMETRY.tokens
    shape = (3, block_count(tokens, block_q), block_count(tokens, block_k))
    keep = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.5
    keep[:, 1] = False
    return BlockMask.from_keep(keep, tokens=tokens, block_q=block_q, block_k=block_k).to(DEVICE)


def _mixed() -> Plan:
    reuse = RowReuse.of_anchor_rows(GEOMETRY, (1, 5)).to(DEVICE)
    return Plan(tokens=GEOMETRY.tokens, kinds=("masked", "reused", "dense"), mask=_mask(32, 16), reuse=reuse)


def _inputs(heads: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    shape = (1, heads, GEOMETRY.tokens, GEOMETRY.head_dim)
    return [torch.randn(shape, generator=generator).to(DEVICE, DTYPE) for _ in range(3)]


def _within_budget(out: Tensor, inputs: list[Tensor], plan: Plan) -> bool:
    exact = oracle.attend(*inputs, plan)
    return bool((out.double() - exact).abs().max() <= oracle.error_budget(*inputs, plan, exact))


def test_both_ways_to_load_keys_give_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, plan = _inputs(), _mixed()
    asked: list[bool] = []

    def answer(tma: bool) -> Any:
        return lambda *tensors: asked.append(tma) or tma

    for tma in (True, False):
        if tma and DEVICE == "cuda" and torch.cuda.get_device_capability() < (9, 0):
            continue
        monkeypatch.setattr(triton_sparse, "_has_tma", answer(tma))
        assert _within_budget(Triton().attend(*inputs, plan), inputs, plan)
    assert False in asked


@pytest.mark.parametrize("block", [(48, 48), (96, 32), (16, 80)])
def test_blocks_that_are_no_power_of_two_are_walked_in_tiles(block: tuple[int, int]) -> None:
    inputs, plan = _inputs(), Plan.masked(_mask(*block), 3)
    assert _within_budget(Triton().attend(*inputs, plan), inputs, plan)


@pytest.mark.parametrize("change", [{"head_dim": 96}, {"dtype": torch.float64}, {"block": (24, 16)}])
def test_what_it_does_not_have_is_refused_before_anything_runs(change: dict[str, Any]) -> None:
    block_q, block_k = change.get("block", (32, 16))
    plan = Plan.masked(_mask(block_q, block_k), 3)
    shape = (1, 3, GEOMETRY.tokens, change.get("head_dim", 64))
    q = torch.zeros(shape, dtype=change.get("dtype", DTYPE), device=DEVICE)
    with pytest.raises(ValueError, match="the Triton kernel"):
        Triton().attend(q, q, q, plan)


def test_where_there_is_no_triton_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    refusal = Triton().refusal(Task(device=torch.device(DEVICE), dtype=DTYPE, head_dim=64))
    assert refusal is not None
    assert "pip install triton" in refusal.reason


# compute capability, head dim, block
TARGETS = {
    "sm80": ((8, 0), 128, (128, 128)),
    "sm86": ((8, 6), 128, (128, 128)),
    "sm89": ((8, 9), 128, (128, 64)),
    "sm90": ((9, 0), 128, (128, 128)),
    "sm90-dim64": ((9, 0), 64, (64, 64)),
    "sm120": ((12, 0), 128, (128, 128)),
}
# with neither row reuse nor log-sum-exps, with both, and with queries and keys in INT8
WHATS = ("plain", "all", "int8")
# bytes of shared memory that a block of threads may have: CUDA's programming guide, table of compute capabilities
SHARED = {(8, 0): 163 * 1024, (8, 6): 99 * 1024, (8, 9): 99 * 1024, (9, 0): 227 * 1024, (12, 0): 99 * 1024}
# bytes of a thread that may spill, by what is compiled: two tiles on a multiprocessor leave no room for 30 to 50 of
# their registers, and were a seventh faster on an H200 than one tile with room
STACK = {"sm90-all": 120, "sm90-plain": 200, "sm90-int8": 64}


@pytest.fixture(scope="module")
def compiled() -> dict[str, dict[str, Any]]:
    """What the compiler says of every target; in a process of its own, since the interpreter changes Triton's."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    told: dict[str, dict[str, Any]] = json.loads(done.stdout)
    return told


@pytest.mark.parametrize("what", WHATS)
@pytest.mark.parametrize("way", ["pointers", "tma"])
@pytest.mark.parametrize("target", TARGETS)
def test_it_compiles_for_every_gpu_and_keeps_its_tiles_in_registers(
    compiled: dict[str, dict[str, Any]], target: str, way: str, what: str
) -> None:
    capability = TARGETS[target][0]
    if way == "tma" and capability < (9, 0):
        pytest.skip("tensor memory accelerators came with sm90")
    told = compiled[f"{target}-{way}-{what}"]
    assert told["shared"] <= SHARED[capability]
    # a stack means that registers spill to memory
    stack = re.search(r" STACK:(\d+) ", told["usage"])
    assert stack is not None
    assert int(stack[1]) <= STACK.get(f"{target}-{what}", 0)
    assert told["wgmma"] == (capability == (9, 0))


def _compile(target: str, tma: bool, what: str) -> dict[str, Any]:
    """One of WHATS."""
    capability, head_dim, block = TARGETS[target]
    tile_q, tile_k, warps, stages = triton_sparse.launch_shape(capability, block, head_dim, tma=tma)
    code = triton_code.attend
    constants = {
        "BLOCK_Q": block[0], "BLOCK_K": block[1], "TILE_Q": tile_q, "TILE_K": tile_k,
        "HEAD_DIM": head_dim, "REUSE": what == "all", "WITH_LSE": what == "all", "NOTE": False,
        "LEAVE": False, "TMA": tma, "INT8": what == "int8", "SCALE_Q": 128, "SCALE_K": tile_k,
    }  # fmt: skip
    pointers = dict.fromkeys(("q", "k", "v", "out"), "*bf16") | dict.fromkeys(
        ("indices", "counts", "served", "low"), "*i32"
    )
    pointers |= dict.fromkeys(("lse", "q_scales", "k_scales", "thresholds"), "*fp32") | {
        "kinds": "*i8",
        "computed": "*i64",
    }
    multiplied = "i8" if what == "int8" else "bf16"
    pointers |= dict.fromkeys(("q", "k"), f"*{multiplied}")
    types = pointers | dict.fromkeys(constants, "constexpr") | {"scale": "fp32"}
    if tma:
        types |= {
            name: f"tensordesc<{dtype}[1,1,{tile_k},{head_dim}]>" for name, dtype in (("k", multiplied), ("v", "bf16"))
        }
    # pointers and strides are multiples of 16, as torch's are
    aligned = [name for name in code.arg_names if name in pointers or name.endswith(("_batch", "_head", "_token"))]
    source = ASTSource(
        code,
        signature={name: types.get(name, "i32") for name in code.arg_names},
        constexprs={(code.arg_names.index(name),): value for name, value in constants.items()},
        attrs={(code.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    options = {"num_warps": warps, "num_stages": stages}
    made = triton.compile(source, target=GPUTarget("cuda", 10 * capability[0] + capability[1], 32), options=options)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(made.asm["cubin"])
        usage = subprocess.run([str(tool), "-res-usage", file.name], capture_output=True, text=True, check=True)
    return {
        "shared": made.metadata.shared,
        "usage": usage.stdout + usage.stderr,
        "wgmma": "wgmma" in made.asm["ptx"],
    }


if __name__ == "__main__":
    ways = {"pointers": False, "tma": True}
    wanted = [
        (target, way, what)
        for target in TARGETS
        for way in ways
        if way != "tma" or TARGETS[target][0] >= (9, 0)
        for what in WHATS
    ]
    told = {"-".join(one): _compile(one[0], ways[one[1]], one[2]) for one in wanted}
    print(json.dumps(told))
