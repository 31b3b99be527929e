"""What the Gluon kernel can be asked without a GPU; the contract tests compute with it where there is one."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import subprocess
import sys
from typing import Any, get_args

import pytest
import torch
import triton

from calibatt.kernels import gluon_hopper, oracle
from calibatt.kernels.base import Task
from calibatt.kernels.geometry import Geometry
from calibatt.kernels.gluon_hopper import Gluon, launch_shape
from calibatt.kernels.mask import BlockMask
from calibatt.kernels.plan import Plan, Remainder, RowReuse

# CUDA's programming guide, compute capability 9.0: registers and bytes of shared memory of a multiprocessor, and what
# each of its thread blocks takes of the latter for the system
REGISTERS, SHARED, SYSTEM = 65536, 228 * 1024, 1024
# a plan without a mask has blocks of 128 × 128, and its last tiles of queries are shared out
CASES: dict[str, tuple[tuple[int, int] | None, int, Remainder]] = {
    "rows": (None, 128, "none"),
    "rows-dim64": (None, 64, "none"),
    **{
        "-".join((f"{block[0]}x{block[1]}", f"dim{head_dim}", remainder)): (block, head_dim, remainder)
        for block, head_dim in [
            ((128, 128), 128),
            ((128, 64), 128),
            ((256, 128), 128),
            ((64, 64), 128),
            ((192, 128), 128),
            ((128, 128), 64),
            ((64, 64), 64),
        ]
        for remainder in get_args(Remainder)
    },
}
# with the log-sum-exps of every group of keys
LOGSUMS: dict[str, tuple[None, int, Remainder]] = {
    "logsums": (None, 128, "none"), "logsums-dim64": (None, 64, "none"),
}  # fmt: skip


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
def test_another_gpu_or_an_older_triton_is_refused(
    monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    task = Task(device=torch.device("cuda"), dtype=torch.bfloat16, head_dim=128)
    request.addfinalizer(gluon_hopper._triton_version.cache_clear)
    gluon_hopper._triton_version.cache_clear()
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "3.5.1")
    assert "3.6 or newer, found 3.5" in str(Gluon().refusal(task))
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
    # masked heads come last, to end with short lists
    assert work.tolist() == [0, 1, 8, 9, 10, 11, 7, 5, 4, 6]
    # and stand by themselves where another kernel has the masked ones
    work = gluon_hopper._work(plan, counts, batch=1, tiles=4, tiles_a_block=1, reused_tiles=2, only="reused")
    assert work.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("items", "places", "key_tiles", "expected"),
    [
        # 480p, 5 of 30 rows in 40 heads, on 132 multiprocessors
        (1720, 132, 256, (1716, 32)),
        # 720p, 5 of 45 rows: 20 whole rounds
        (2640, 132, 591, (2640, 1)),
        # the last round is more than half full, or keys are few, or lists differ
        (10_240, 132, 256, (10_240, 1)),
        (1720, 132, 15, (1720, 1)),
        (1720, 132, 0, (1720, 1)),
        # less than a round
        (40, 132, 64, (0, 3)),
    ],
)
def test_the_keys_of_the_last_tiles_are_shared_out_where_places_would_be_empty(
    items: int, places: int, key_tiles: int, expected: tuple[int, int]
) -> None:
    assert gluon_hopper.shared_out(items, places, key_tiles) == expected


@pytest.fixture(scope="module")
def compiled() -> dict[str, dict[str, Any]]:
    """What the compiler says of every case; in a process of its own, where Triton takes this machine for a Hopper."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    told: dict[str, dict[str, Any]] = json.loads(done.stdout)
    return told


@pytest.mark.parametrize("case", CASES | LOGSUMS)
def test_as_many_thread_blocks_fit_a_multiprocessor_as_it_counts_on(
    compiled: dict[str, dict[str, Any]], case: str
) -> None:
    block, head_dim, _ = (CASES | LOGSUMS)[case]
    told, shape = compiled[case], launch_shape(block or (128, 128), head_dim)
    # one warpgroup alone takes one tile a thread block
    assert told["shared_out"] == (block is None and head_dim == 128)
    threads = 32 * told["warps"]
    # the hardware gives registers to warps in units of 256, that is 8 a thread
    assert shape.thread_blocks * threads * -(-shape.registers // 8) * 8 <= REGISTERS
    assert shape.thread_blocks * (told["shared"] + SYSTEM) <= SHARED
    assert told["wgmma"]


def _compile(
    block: tuple[int, int] | None, head_dim: int, remainder: Remainder, *, logsums: bool = False
) -> dict[str, Any]:
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

    from calibatt.kernels import gluon_code, triton_code

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
    tokens, heads = 2500, 3
    reuse = RowReuse(computed=torch.tensor([0]), source=torch.zeros(tokens, dtype=torch.int64))
    shape = (heads, 1, 1)
    if logsums:
        plan = Plan(tokens=tokens, kinds=("dense",) * heads)
    elif block is None:
        plan = Plan(tokens=tokens, kinds=("reused", "reused", "dense"), reuse=reuse)
    else:
        shape = (heads, -(-tokens // block[0]), -(-tokens // block[1]))
        keep = torch.ones(shape, dtype=torch.bool)
        mask = BlockMask.from_keep(keep, tokens=tokens, block_q=block[0], block_k=block[1])
        plan = Plan(tokens=tokens, kinds=("masked", "reused", "dense"), mask=mask, reuse=reuse, remainder=remainder)
    q = torch.zeros((1, tokens, heads, head_dim), dtype=torch.bfloat16).transpose(1, 2)
    lists = (torch.zeros(shape, dtype=torch.int32), torch.zeros(shape[:2], dtype=torch.int32))
    import calibatt.kernels.fused

    calibatt.kernels.fused.block_lists = lambda plan: lists
    entries = [
        (gluon_code, "attend"), (gluon_code, "attend_alone"), (triton_code, "merge"), (triton_code, "block_means"),
        (triton_code, "bonuses"),
    ]  # fmt: skip
    functions = [getattr(module, name) for module, name in entries]
    for (module, name), function in zip(entries, functions, strict=True):
        setattr(module, name, Entry(function))
    groups = torch.empty(heads, -(-tokens // 128), tokens) if logsums else None
    Gluon()._launch(q, q, q, torch.empty_like(q), torch.empty(q.shape[:3]), plan, logsums=groups)
    for (module, name), function in zip(entries, functions, strict=True):
        setattr(module, name, function)
    # means and their bonuses are made before, and shares put together behind
    code = made[2 * (remainder != "none")]
    return {
        "shared_out": len(made) == 2 + 2 * (remainder != "none"),
        "shared": code.metadata.shared,
        "warps": code.metadata.num_warps,
        "wgmma": "wgmma" in code.asm["ptx"],
    }


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("reused", [True, False])
def test_shares_of_keys_are_put_together_as_if_there_were_one(device: str, reused: bool) -> None:
    from calibatt.kernels import triton_code

    # two heads of which the second is cut in tiles of 32 queries, the last of them with 8; three shares of 40 keys
    heads, tokens, head_dim, tile, shares = 2, 40, 64, 32, 3
    generator = torch.Generator().manual_seed(0)
    scores = 4 * torch.randn(2 * tile, 3, 40, generator=generator)
    values = torch.randn(3, 40, head_dim, generator=generator)
    computed = 36 if reused else tokens
    # all tokens take the output of a computed one, four of them that of another
    served = torch.full((computed, 2), -1)
    served[:, 0] = torch.arange(computed)
    served[: tokens - computed, 1] = torch.arange(computed, tokens)
    most = scores.amax(-1)
    weights = (scores - most[..., None]).exp2()
    mean = torch.einsum("rsk,skd->rsd", weights, values)

    def parts(x: torch.Tensor) -> torch.Tensor:
        # tile after tile, of each its shares
        return x.unflatten(0, (2, tile)).transpose(1, 2).contiguous().to(device)

    out = torch.full((1, heads, tokens, head_dim), 7.0, device=device)
    lse = torch.full((1, heads, tokens), 7.0, device=device)
    kinds = torch.tensor([0, 2 if reused else 1], dtype=torch.int32, device=device)
    work = torch.tensor([2, 3], dtype=torch.int32, device=device)
    triton_code.merge[(2, 2)](
        parts(mean), parts(most), parts(weights.sum(-1)), work, out, lse, kinds, served.to(torch.int32).to(device),
        shares, tokens, 2, heads, computed, 2, *out.stride()[:3],
        TILE_Q=tile, ROWS=16, HEAD_DIM=head_dim, REUSE=reused, WITH_LSE=True,
    )  # fmt: skip
    together = scores.flatten(1)
    expected = (together * math.log(2)).softmax(-1) @ values.flatten(0, 1)
    sums = (together * math.log(2)).logsumexp(-1)
    source = torch.arange(tokens)
    if reused:
        source[computed:] = torch.arange(tokens - computed)
    torch.testing.assert_close(out[0, 1].cpu(), expected[source], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse[0, 1].cpu(), sums[source], rtol=1e-5, atol=1e-5)
    # the other head's are not touched
    assert bool((out[0, 0] == 7).all() and (lse[0, 0] == 7).all())


@pytest.mark.gpu
@pytest.mark.parametrize("kinds", [("reused",) * 3, ("dense",) * 3, ("reused", "dense", "reused")])
def test_tiles_whose_keys_are_shared_out_come_out_as_they_should(kinds: Any) -> None:
    geometry = Geometry(grid=(5, 30, 18), heads=3, head_dim=128)
    reuse = RowReuse.of_anchor_rows(geometry, (3, 9, 15, 21, 27)).to("cuda") if "reused" in kinds else None
    plan = Plan(tokens=geometry.tokens, kinds=kinds, reuse=reuse)
    kernel = Gluon()
    q, k, v = torch.randn((3, 1, 3, geometry.tokens, 128), device="cuda").bfloat16()
    refusal = kernel.refusal(Task.of(q, plan))
    if refusal is not None:
        pytest.skip(refusal.reason)
    out, lse = kernel.attend_with_lse(q, k, v, plan)
    exact = oracle.attend(q, k, v, plan)
    assert (out.double() - exact).abs().max().item() <= oracle.error_budget(q, k, v, plan, exact)
    scores = (q.double() @ k.double().mT / math.sqrt(128)).logsumexp(-1)
    for head, kind in enumerate(kinds):
        expected = scores[0, head]
        if kind == "reused":
            assert reuse is not None
            expected = expected[reuse.computed[reuse.source].long()]
        torch.testing.assert_close(lse[0, head].double(), expected, rtol=1e-5, atol=1e-5)
    # which share is done when is of no matter
    assert torch.equal(kernel.attend(q, k, v, plan), out)


if __name__ == "__main__":
    whole = {name: _compile(*case) for name, case in CASES.items()}
    print(json.dumps(whole | {name: _compile(*case, logsums=True) for name, case in LOGSUMS.items()}))


def test_work_of_a_plan_that_comes_again_is_found_once() -> None:
    found = []

    def counted() -> torch.Tensor:
        found.append(1)
        return torch.arange(3)

    def asked(plan: Plan, items: int = 8, **where: Any) -> torch.Tensor:
        how = {"batch": 1, "tiles": 4, "only": None, "device": torch.device("cpu"), **where}
        return gluon_hopper._kept(plan, tuple(how.values()), items, counted)

    before = len(gluon_hopper._WORK)
    one, other = (Plan(tokens=512, kinds=("dense", "dense")) for _ in range(2))
    assert asked(one) is asked(one)
    assert len(found) == 1
    asked(other)
    # of another batch, of one kind of head, or on another GPU there is other work: a dense plan is on none
    asked(one, batch=2)
    asked(one, only="dense")
    asked(one, device=torch.device("cuda", 1))
    assert len(found) == 5
    # what is much is found each time
    for _ in range(2):
        asked(one, items=2**14 + 1)
    assert len(found) == 7
    del one, other
    assert len(gluon_hopper._WORK) == before
