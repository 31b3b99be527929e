"""What only the Triton kernel has: two ways to load, blocks of any size, code for every GPU."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from calibatt.kernels import oracle, tiles, triton_code, triton_sparse
from calibatt.kernels.base import Task
from calibatt.kernels.fused import bonuses_of_blocks, means_of_blocks
from calibatt.kernels.geometry import Geometry
from calibatt.kernels.mask import BlockMask, VariableBlockMask, block_count
from calibatt.kernels.plan import Plan, RowReuse, TokenOrder
from calibatt.kernels.remainder import block_means
from calibatt.kernels.triton_sparse import Triton

pytestmark = pytest.mark.skipif(
    not (tiles.interpreted() or torch.cuda.is_available()), reason="needs Triton's interpreter or a CUDA GPU"
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
    inputs = _inputs()
    asked: list[bool] = []

    def answer(tma: bool) -> Any:
        return lambda *tensors: asked.append(tma) or tma

    for tma in (True, False):
        if tma and DEVICE == "cuda" and torch.cuda.get_device_capability() < (9, 0):
            continue
        monkeypatch.setattr(triton_sparse, "has_tma", answer(tma))
        both = _mixed(), _variable()
        for plan in (*both, *(replace(plan, remainder="zeroth") for plan in both)):
            assert _within_budget(Triton().attend(*inputs, plan), inputs, plan)
    assert False in asked


@pytest.mark.parametrize("block", [(48, 48), (96, 32), (16, 80)])
def test_blocks_that_are_no_power_of_two_are_walked_in_tiles(block: tuple[int, int]) -> None:
    inputs, plan = _inputs(), Plan.masked(_mask(*block), 3)
    for one in (plan, replace(plan, remainder="zeroth")):
        assert _within_budget(Triton().attend(*inputs, one), inputs, one)


def test_means_of_blocks_are_those_of_their_own_tokens_in_whatever_strides() -> None:
    _, k, v = _inputs()
    k, v = k.expand(2, -1, -1, -1), torch.cat((v, -v)).transpose(1, 2).contiguous().transpose(1, 2)
    for plan in (replace(Plan.masked(_mask(32, 16), 3), remainder="zeroth"), replace(_variable(), remainder="zeroth")):
        assert plan.mask is not None
        sizes = plan.mask.sizes()[1]
        for means, x in zip(means_of_blocks(k, v, plan, plan.mask), (k, v), strict=False):
            expected = block_means(x.double(), sizes)
            torch.testing.assert_close(means.double(), expected, rtol=torch.finfo(DTYPE).eps, atol=1e-6)


def test_bonuses_are_logarithms_of_sizes_where_a_mask_leaves_a_block_out() -> None:
    mask, scale, tile = _mask(32, 16), 0.5, 5
    assert mask.k_blocks % tile != 0
    bonuses = bonuses_of_blocks(replace(Plan.masked(mask, 3), remainder="zeroth"), scale, tile).cpu()
    keep, sizes = mask.keep().cpu(), mask.sizes()[1].cpu()
    expected = torch.where(keep, -math.inf, (sizes.double().log2() / scale)[:, None])
    torch.testing.assert_close(bonuses[..., : mask.k_blocks].double(), expected, rtol=1e-6, atol=1e-6)
    assert bonuses.shape[-1] % tile == 0
    assert bool(bonuses[..., mask.k_blocks :].isneginf().all())


def test_log_sum_exps_hold_the_remainder() -> None:
    # keys that are alike within a block: its mean stands for it exactly
    q, k, v = _inputs()
    k = k[:, :, ::16].repeat_interleave(16, 2)[:, :, : GEOMETRY.tokens]
    plan = replace(Plan.masked(_mask(32, 16), 3), remainder="zeroth")
    lse = Triton().attend_with_lse(q, k, v, plan)[1]
    scores = q.double() @ k.double().mT / math.sqrt(GEOMETRY.head_dim)
    torch.testing.assert_close(lse.double(), scores.logsumexp(-1), rtol=1e-5, atol=1e-5)


def _variable() -> Plan:
    """Blocks that differ in size, in an order by lot; the second of queries is empty, the third keeps nothing."""
    generator = torch.Generator().manual_seed(2)
    keep = torch.rand((3, 4, 9), generator=generator) < 0.4
    keep[:, 2] = False
    q_sizes, k_sizes = torch.tensor([[40, 0, 5, 81]] * 3), torch.tensor([[1, 0, 30, 17, 2, 65, 0, 1, 10]] * 3)
    mask = VariableBlockMask.from_keep(keep, q_sizes=q_sizes, k_sizes=k_sizes, tokens=GEOMETRY.tokens)
    lots = torch.rand((2, 3, GEOMETRY.tokens), generator=generator).argsort(-1).int()
    order = TokenOrder(queries=lots[0], keys=lots[1])
    return Plan(tokens=GEOMETRY.tokens, kinds=("masked", "dense", "masked"), mask=mask, order=order).to(DEVICE)


def test_variable_blocks_have_log_sum_exps_in_the_sequences_order() -> None:
    q, k, v = _inputs()
    plan = _variable()
    out, lse = Triton().attend_with_lse(q, k, v, plan)
    assert _within_budget(out, [q, k, v], plan)
    scores = q.double() @ k.double().mT / math.sqrt(GEOMETRY.head_dim)
    assert plan.mask is not None
    assert plan.order is not None
    for head, kind in enumerate(plan.kinds):
        own = scores[0, head]
        if kind == "masked":
            seen = torch.zeros_like(own, dtype=torch.bool)
            queries, keys = plan.order.queries[head].long(), plan.order.keys[head].long()
            seen[queries[:, None], keys] = plan.mask.seen(head, torch.arange(GEOMETRY.tokens, device=DEVICE))
            assert bool(lse[0, head][queries[40:45]].isneginf().all())
            own = own.masked_fill(~seen, -math.inf)
        torch.testing.assert_close(lse[0, head].double(), own.logsumexp(-1), rtol=1e-5, atol=1e-5)


def test_variable_blocks_are_written_nowhere_but_in_the_output() -> None:
    q, k, v = _inputs()
    plan = _variable().unordered()
    room, tokens = 128, GEOMETRY.tokens
    around = q.new_full((1, 3, tokens + 2 * room, GEOMETRY.head_dim), 7.0)
    sums_around = q.new_full((3 * tokens + 2 * room,), 7.0, dtype=torch.float32)
    out, lse = around[:, :, room : room + tokens], sums_around[room:-room].view(1, 3, tokens)
    Triton()._launch(q, k, v, out, lse, plan)
    assert torch.equal(out, Triton().attend(q, k, v, plan))
    assert bool((around[:, :, :room] == 7).all() and (around[:, :, room + tokens :] == 7).all())
    assert bool((sums_around[:room] == 7).all() and (sums_around[-room:] == 7).all())


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
# with neither row reuse nor log-sum-exps, with both, with queries and keys in INT8, with a remainder; and blocks that
# differ in size, without and with one
WHATS = ("plain", "all", "int8", "remainder", "variable", "variable-remainder")
# bytes of shared memory that a block of threads may have: CUDA's programming guide, table of compute capabilities
SHARED = {(8, 0): 163 * 1024, (8, 6): 99 * 1024, (8, 9): 99 * 1024, (9, 0): 227 * 1024, (12, 0): 99 * 1024}
# bytes of a thread that may spill, by what is compiled: two tiles on a multiprocessor leave no room for 30 to 60 of
# their registers, and were a seventh faster on an H200 than one tile with room. Of variable blocks, what spills is
# outside the loop over whole tiles.
STACK = {
    "sm90-all": 120,
    "sm90-plain": 200,
    "sm90-int8": 72,
    "sm90-variable": 232,
    "sm90-remainder": 192,
    "sm90-variable-remainder": 144,
}


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
    from compiling import compiled_for

    capability, head_dim, block = TARGETS[target]
    variable = what.startswith("variable")
    if variable:
        code, block = triton_code.attend_variable, triton_sparse._VARIABLE
    else:
        code = triton_code.attend
    tile_q, tile_k, warps, stages = triton_sparse.launch_shape(
        capability, block, head_dim, tma=tma, int8=what == "int8"
    )
    constants = {
        "TILE_Q": tile_q,
        "TILE_K": tile_k,
        "HEAD_DIM": head_dim,
        "WITH_LSE": what == "all" or variable,
        "TMA": tma,
        "REMAINDER": what.endswith("remainder"),
    }
    if not variable:
        constants |= {
            "BLOCK_Q": block[0], "BLOCK_K": block[1], "REUSE": what == "all", "NOTE": False, "LEAVE": False,
            "INT8": what == "int8", "SCALE_Q": 128, "SCALE_K": tile_k,
        }  # fmt: skip
    multiplied = "i8" if what == "int8" else "bf16"
    lists = ("indices", "counts", "served", "low", "query_tiles", "key_tiles", "starts", "words")
    pointers = dict.fromkeys(("q", "k"), f"*{multiplied}")
    pointers |= dict.fromkeys(("v", "out", "k_means", "v_means"), "*bf16")
    pointers |= dict.fromkeys(lists, "*i32") | {"kinds": "*i8", "computed": "*i64"}
    pointers |= dict.fromkeys(("lse", "q_scales", "k_scales", "thresholds"), "*fp32")
    types = {**pointers, "scale": "fp32"}
    if tma:
        types |= {
            name: f"tensordesc<{dtype}[1,1,{tile_k},{head_dim}]>" for name, dtype in (("k", multiplied), ("v", "bf16"))
        }
    aligned = [name for name in code.arg_names if name in pointers or name.endswith(("_batch", "_head", "_token"))]
    return compiled_for(capability, code, types, constants, aligned, warps, stages)


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
