"""What every kernel and every method must do, whatever it is: parametrised from the catalogues, nothing by hand.

FlexAttention compiles anew for every shape, so all tests share two: 63 tokens × 64 channels, 1000 × 128.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from calibatt import testing
from calibatt.kernels.base import Kernel, Task
from calibatt.kernels.catalogue import KERNELS
from calibatt.kernels.geometry import Geometry
from calibatt.kernels.mask import BlockMask, VariableBlockMask, block_count
from calibatt.kernels.plan import HeadKind, Plan, Remainder, RowReuse, TokenOrder
from calibatt.methods.catalogue import METHODS
from calibatt.methods.learning import Learner, Learnt
from calibatt.testing import BLOCK

HEADS = 3
GEOMETRIES = {
    # neither length is a multiple of a block, no grid one of anything
    "63": Geometry(grid=(1, 7, 9), heads=HEADS, head_dim=64),
    **testing.GEOMETRIES,
}
# The same with fewer tokens, for arms in Triton's interpreter, which takes 12 ms for every block of a head. Kernels by
# themselves are interpreted with all of them.
SHORT = {
    "63": GEOMETRIES["63"],
    "1000": Geometry(grid=(3, 6, 9), heads=HEADS, head_dim=128),
    "1000-text-first": Geometry(grid=(2, 6, 12), heads=HEADS, head_dim=128, text_tokens=28, text_side="first"),
    "1000-text-last": Geometry(grid=(2, 6, 12), heads=HEADS, head_dim=128, text_tokens=28, text_side="last"),
}
NARROW = Geometry(grid=(8, 5, 25), heads=HEADS, head_dim=64)
SMALL, LARGE = GEOMETRIES["63"], GEOMETRIES["1000"]
# draws of the random control differ in the seed alone: the first stands for all
ARMS = [
    (name, preset) for name, method in METHODS.items() for preset in method.presets if not preset.startswith("draw-")
]
# a grid of few blocks has no thresholds for BLASST to be fitted to
REFUSED = [("blasst", "calibrated", "63"), ("blasst", "calibrated-oracle", "63")]
ARMS_BY_GRID = [(*arm, where) for arm in ARMS for where in GEOMETRIES if (*arm, where) not in REFUSED]
# the budget of a device is that of its type: fp32 is what a CPU has, bf16 and fp16 are what GPUs are used with
PLACES = [
    pytest.param(("cpu", torch.float32), id="cpu-fp32"),
    pytest.param(("cuda", torch.bfloat16), id="cuda-bf16", marks=pytest.mark.gpu),
    pytest.param(("cuda", torch.float16), id="cuda-fp16", marks=pytest.mark.gpu),
]
Place = tuple[str, torch.dtype]


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest) -> Place:
    chosen: Place = request.param
    return chosen


# the default hands on to one of the others: tests/kernels/test_default.py
@pytest.fixture(params=[name for name in KERNELS if name != "default"])
def kernel(request: pytest.FixtureRequest) -> Kernel:
    return KERNELS[request.param]


def inputs(geometry: Geometry, place: Place = ("cpu", torch.float32), seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = testing.inputs(geometry, seed=seed, device=place[0], dtype=place[1])
    return q, k, v


def mask_of(keep: Tensor, tokens: int) -> BlockMask:
    return BlockMask.from_keep(keep, tokens=tokens, block_q=BLOCK[0], block_k=BLOCK[1])


def some_blocks(tokens: int, seed: int = 0, share: float = 0.4) -> Tensor:
    """A third row of blocks that is empty, all others not."""
    shape = (HEADS, block_count(tokens, BLOCK[0]), block_count(tokens, BLOCK[1]))
    keep = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < share
    keep[..., 0] = True
    keep[:, 2:3] = False
    return keep


def kinds_plan(geometry: Geometry, kinds: tuple[HeadKind, ...], seed: int = 0) -> Plan:
    return Plan(
        tokens=geometry.tokens,
        kinds=kinds,
        mask=mask_of(some_blocks(geometry.tokens, seed), geometry.tokens) if "masked" in kinds else None,
        reuse=RowReuse.of_anchor_rows(geometry, (0, 2)) if "reused" in kinds else None,
    )


@functools.cache
def learnt_by(learner: Learner, method: str, geometry: Geometry) -> Learnt:
    found = testing.learnt_by(learner, method, geometry)
    if method == "calibatt":
        # one repetitive head beside others
        found.tables["similarity"][:] = torch.tensor([0.0, 1.0, 0.0])
        if "reuse_error" in found.tables:
            found.tables["reuse_error"][:] = torch.tensor([1.0, 0.0, 1.0])
            found.tables["mask_error"][:] = 0.01
    return found


# a method for a geometry; where it does not apply, a test fails
made = functools.partial(testing.made, learn=learnt_by)


def run(kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, plan: Plan) -> Tensor:
    """The kernel's output; skips where the kernel says that it cannot."""
    if (refusal := kernel.refusal(Task.of(q, plan))) is not None:
        pytest.skip(refusal.reason)
    return testing.attended(kernel, q, k, v, plan)


# --- kernels ---------------------------------------------------------------------------------------------------------


def _one(heads: int, rows: int, columns: int, where: tuple[Any, Any]) -> Tensor:
    keep = torch.zeros(heads, rows, columns, dtype=torch.bool)
    keep[:, where[0], where[1]] = True
    return keep


# what to keep, given the number of query and of key blocks
ADVERSARIES = {
    "all-blocks": lambda rows, columns: torch.ones(HEADS, rows, columns, dtype=torch.bool),
    "nothing-at-all": lambda rows, columns: torch.zeros(HEADS, rows, columns, dtype=torch.bool),
    "one-block": lambda rows, columns: _one(HEADS, rows, columns, (rows // 2, columns // 2)),
    "first-block-of-each-row": lambda rows, columns: _one(HEADS, rows, columns, (slice(None), 0)),
    "last-block-of-each-row": lambda rows, columns: _one(HEADS, rows, columns, (slice(None), -1)),
    "first-row-empty": lambda rows, columns: ~_one(HEADS, rows, columns, (0, slice(None))),
    "last-row-empty": lambda rows, columns: ~_one(HEADS, rows, columns, (-1, slice(None))),
    "one-head-empty": lambda rows, columns: torch.arange(HEADS)[:, None, None].expand(-1, rows, columns) != 1,
    "shared-by-all-heads": lambda rows, columns: _one(1, rows, columns, (slice(None), slice(1, 3))),
}


@pytest.mark.parametrize("geometry", [SMALL, LARGE], ids=["63", "1000"])
@pytest.mark.parametrize("adversary", ADVERSARIES)
def test_a_kernel_computes_the_blocks_it_is_given_and_no_others(
    kernel: Kernel, adversary: str, geometry: Geometry, place: Place
) -> None:
    keep = ADVERSARIES[adversary](block_count(geometry.tokens, BLOCK[0]), block_count(geometry.tokens, BLOCK[1]))
    plan = Plan.masked(mask_of(keep, geometry.tokens), HEADS).to(place[0])
    q, k, v = inputs(geometry, place)
    out = run(kernel, q, k, v, plan)
    testing.require_exact(out, q, k, v, plan)
    empty = ~keep.any(-1).expand(HEADS, -1).repeat_interleave(BLOCK[0], 1)[:, : geometry.tokens]
    assert not out[0].cpu()[empty].any()


@pytest.mark.parametrize(
    "kinds",
    [
        ("dense", "dense", "dense"),
        ("reused", "reused", "reused"),
        ("dense", "reused", "dense"),
        ("masked", "dense", "masked"),
        ("reused", "masked", "masked"),
        ("masked", "reused", "dense"),
    ],
    ids="-".join,
)
@pytest.mark.parametrize("geometry", [SMALL, GEOMETRIES["1000-text-first"]], ids=["63", "1000-text-first"])
def test_a_kernel_mixes_the_kinds_of_heads(
    kernel: Kernel, kinds: tuple[HeadKind, ...], geometry: Geometry, place: Place
) -> None:
    plan = kinds_plan(geometry, kinds).to(place[0])
    q, k, v = inputs(geometry, place)
    testing.require_exact(run(kernel, q, k, v, plan), q, k, v, plan)


def _parted(tokens: int, blocks: int, heads: int = HEADS) -> Tensor:
    """Random sizes of so many blocks, some of them empty or of one token."""
    generator = torch.Generator().manual_seed(blocks)
    ends = torch.randint(0, tokens + 1, (heads, blocks - 1), generator=generator).sort(-1).values
    ends[:, 1], ends[:, 2] = ends[:, 0], ends[:, 0] + 1
    ends = torch.cat((ends, torch.full((heads, 1), tokens)), 1).clamp(max=tokens).sort(-1).values
    return ends.diff(dim=-1, prepend=torch.zeros(heads, 1, dtype=ends.dtype))


def variable_plan(keep: Tensor, tokens: int, kinds: tuple[HeadKind, ...], *, order: bool = False) -> Plan:
    """Blocks of any size, of tokens in a random order where one is asked for."""
    heads, rows, columns = keep.shape
    q_sizes, k_sizes = (
        _parted(tokens, count, heads) if count > 1 else torch.full((heads, 1), tokens) for count in (rows, columns)
    )
    orders = torch.rand((2, len(kinds), tokens), generator=torch.Generator().manual_seed(0)).argsort(-1).int()
    return Plan(
        tokens=tokens,
        kinds=kinds,
        mask=VariableBlockMask.from_keep(keep, q_sizes=q_sizes, k_sizes=k_sizes, tokens=tokens),
        order=TokenOrder(queries=orders[0], keys=orders[1]) if order else None,
    )


@pytest.mark.parametrize("geometry", [SMALL, LARGE], ids=["63", "1000"])
@pytest.mark.parametrize("adversary", [*ADVERSARIES, "some-blocks", "one-block-in-all"])
def test_a_kernel_computes_variable_blocks_as_they_are(
    kernel: Kernel, adversary: str, geometry: Geometry, place: Place
) -> None:
    rows, columns = (6, 9) if geometry is SMALL else (9, 21)
    if adversary == "one-block-in-all":
        keep = torch.ones(HEADS, 1, 1, dtype=torch.bool)
    elif adversary == "some-blocks":
        keep = torch.rand((HEADS, rows, columns), generator=torch.Generator().manual_seed(0)) < 0.4
    else:
        keep = ADVERSARIES[adversary](rows, columns)
    plan = variable_plan(keep, geometry.tokens, ("masked",) * HEADS).to(place[0])
    q, k, v = inputs(geometry, place)
    out = run(kernel, q, k, v, plan)
    testing.require_exact(out, q, k, v, plan)
    assert plan.mask is not None
    tokens = torch.arange(geometry.tokens, device=q.device)
    seen = torch.stack([plan.mask.seen(head, tokens).any(-1) for head in range(HEADS)])
    assert not out[0][~seen].any()


@pytest.mark.parametrize("scale", [1, 50], ids=["", "large-logits"])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("kinds", [("masked",) * 3, ("masked", "dense", "masked")], ids="-".join)
def test_a_kernel_takes_variable_blocks_of_tokens_that_lie_apart_beside_dense_heads(
    kernel: Kernel, kinds: tuple[HeadKind, ...], batch: int, scale: int, place: Place
) -> None:
    keep = torch.rand((HEADS, 6, 9), generator=torch.Generator().manual_seed(1)) < 0.4
    keep[:, 2] = False
    plan = variable_plan(keep, SMALL.tokens, kinds, order=True).to(place[0])
    samples = [inputs(SMALL, place, seed) for seed in range(batch)]
    q, k, v = (torch.cat(parts) for parts in zip(*samples, strict=True))
    q = scale * q
    testing.require_exact(run(kernel, q, k, v, plan), q, k, v, plan)


@pytest.mark.parametrize("adversary", [*ADVERSARIES, "some-blocks", "some-of-many-blocks"])
def test_a_kernel_approximates_the_blocks_that_it_does_not_compute(
    kernel: Kernel, adversary: str, place: Place
) -> None:
    # more key blocks than a tile of means has, and than a word of the mask
    geometry = LARGE if adversary == "some-of-many-blocks" else SMALL
    rows, columns = (block_count(geometry.tokens, size) for size in BLOCK)
    keep = ADVERSARIES[adversary](rows, columns) if adversary in ADVERSARIES else some_blocks(geometry.tokens)
    plan = replace(Plan.masked(mask_of(keep, geometry.tokens), HEADS), remainder="zeroth").to(place[0])
    q, k, v = inputs(geometry, place)
    out = run(kernel, q, k, v, plan)
    testing.require_exact(out, q, k, v, plan)
    assert bool(out.any(-1).all()), "some query has nothing"


@pytest.mark.parametrize("scale", [1, 50], ids=["", "large-logits"])
@pytest.mark.parametrize(
    ("kinds", "ordered"),
    [
        (("masked", "dense", "masked"), False),
        # heads that reuse rows have no order
        (("masked", "dense", "masked"), True),
        (("reused", "masked", "masked"), False),
        (("masked", "reused", "dense"), False),
    ],
)
def test_a_remainder_is_of_masked_heads_in_the_plans_order(
    kernel: Kernel, kinds: tuple[HeadKind, ...], ordered: bool, scale: int, place: Place
) -> None:
    order = torch.rand((2, HEADS, SMALL.tokens), generator=torch.Generator().manual_seed(0)).argsort(-1).int()
    plan = replace(
        kinds_plan(SMALL, kinds), remainder="zeroth",
        order=TokenOrder(queries=order[0], keys=order[1]) if ordered else None,
    ).to(place[0])  # fmt: skip
    samples = [inputs(SMALL, place, seed) for seed in range(2)]
    q, k, v = (torch.cat(parts) for parts in zip(*samples, strict=True))
    q = scale * q
    testing.require_exact(run(kernel, q, k, v, plan), q, k, v, plan)


@pytest.mark.parametrize("adversary", [*ADVERSARIES, "some-blocks", "some-of-many-blocks"])
def test_a_kernel_approximates_variable_blocks(kernel: Kernel, adversary: str, place: Place) -> None:
    # more key blocks than a tile of means has
    geometry, rows, columns = (LARGE, 9, 71) if adversary == "some-of-many-blocks" else (SMALL, 6, 9)
    kinds: tuple[HeadKind, ...] = ("masked",) * HEADS
    if adversary in ADVERSARIES:
        keep = ADVERSARIES[adversary](rows, columns)
    else:
        keep = torch.rand((HEADS, rows, columns), generator=torch.Generator().manual_seed(0)) < 0.4
        kinds = ("masked", "dense", "masked")
    plan = replace(variable_plan(keep, geometry.tokens, kinds, order=True), remainder="zeroth").to(place[0])
    q, k, v = inputs(geometry, place)
    testing.require_exact(run(kernel, q, k, v, plan), q, k, v, plan)


# what rivals and kernels have; the last two divide by no power of two
SIZES = [(128, 128), (128, 64), (64, 64), (256, 128), (64, 128), (128, 80), (192, 48)]


@pytest.mark.gpu
@pytest.mark.parametrize("geometry", [GEOMETRIES["1000-text-last"], NARROW], ids=["128", "64"])
@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_a_kernel_walks_blocks_of_every_size(
    kernel: Kernel, size: tuple[int, int], geometry: Geometry, dtype: torch.dtype
) -> None:
    rows, columns = (block_count(1000, block) for block in size)
    q, k, v = inputs(geometry, ("cuda", dtype))
    # a kernel may be for only one of the two
    refusals = {}
    some = torch.rand((HEADS, rows, columns), generator=torch.Generator().manual_seed(0)) < 0.4
    some[:, 1] = False
    for keep in (some, *(adversary(rows, columns) for adversary in ADVERSARIES.values())):
        mask = BlockMask.from_keep(keep, tokens=1000, block_q=size[0], block_k=size[1])
        reuse = RowReuse.of_anchor_rows(geometry, (0, 2))
        for kinds in (("masked",) * 3, ("masked", "reused", "dense")):
            plan = Plan(tokens=1000, kinds=kinds, mask=mask, reuse=reuse if "reused" in kinds else None)
            for remainder in get_args(Remainder):
                plan = replace(plan, remainder=remainder).to("cuda")
                refusals[kinds, remainder] = kernel.refusal(Task.of(q, plan))
                if refusals[kinds, remainder] is None:
                    testing.require_exact(kernel.attend(q, k, v, plan), q, k, v, plan)
    if None not in refusals.values():
        pytest.skip("; ".join(sorted({refusal.reason for refusal in refusals.values() if refusal is not None})))


@pytest.mark.parametrize("remainder", get_args(Remainder))
def test_keeping_all_blocks_is_dense_attention(kernel: Kernel, remainder: Remainder, place: Place) -> None:
    keep = torch.ones(HEADS, block_count(1000, BLOCK[0]), block_count(1000, BLOCK[1]), dtype=torch.bool)
    plan = replace(Plan.masked(mask_of(keep, 1000), HEADS), remainder=remainder).to(place[0])
    q, k, v = inputs(LARGE, place)
    testing.require_exact(run(kernel, q, k, v, plan), q, k, v, Plan.dense(LARGE))


@pytest.mark.parametrize("shared", [True, False], ids=["one-order", "queries-apart"])
@pytest.mark.parametrize("kinds", [("masked", "masked", "masked"), ("masked", "dense", "masked")], ids="-".join)
def test_a_kernel_takes_blocks_of_tokens_that_lie_apart(
    kernel: Kernel, kinds: tuple[HeadKind, ...], shared: bool, place: Place
) -> None:
    generator = torch.Generator().manual_seed(3)
    tokens = SMALL.tokens
    each = torch.stack([torch.randperm(tokens, generator=generator) for _ in range(HEADS)])
    order = TokenOrder.of_all(each)
    if not shared:
        order = TokenOrder(
            queries=order.queries, keys=torch.randperm(tokens, generator=generator)[None].to(torch.int32)
        )
    plan = replace(kinds_plan(SMALL, kinds), order=order).to(place[0])
    q, k, v = inputs(SMALL, place)
    testing.require_exact(run(kernel, q, k, v, plan), q, k, v, plan)


@pytest.mark.parametrize("kinds", [("dense",) * 3, ("masked", "reused", "dense")], ids="-".join)
def test_large_logits_neither_overflow_nor_vanish(kernel: Kernel, kinds: tuple[HeadKind, ...], place: Place) -> None:
    plan = kinds_plan(SMALL, kinds).to(place[0])
    q, k, v = inputs(SMALL, place)
    # scores of several hundreds, which exp overflows on unless the maximum is taken off
    q = 50 * q
    testing.require_exact(run(kernel, q, k, v, plan), q, k, v, plan)


@pytest.mark.parametrize("kind", ["dense", "masked"])
@pytest.mark.parametrize(("batch", "heads"), [(1, 1), (2, HEADS)])
def test_a_kernel_takes_one_head_and_a_batch(kernel: Kernel, batch: int, heads: int, kind: str, place: Place) -> None:
    geometry = Geometry(grid=SMALL.grid, heads=heads, head_dim=64)
    masked = Plan.masked(mask_of(some_blocks(63)[:heads], 63), heads)
    plan = (masked if kind == "masked" else Plan.dense(geometry)).to(place[0])
    samples = [inputs(geometry, place, seed) for seed in range(batch)]
    q, k, v = (torch.cat(parts) for parts in zip(*samples, strict=True))
    testing.require_exact(run(kernel, q, k, v, plan), q, k, v, plan)


@pytest.mark.parametrize("kinds", [("dense",) * 3, ("masked", "reused", "dense")], ids="-".join)
def test_inputs_may_be_views(kernel: Kernel, kinds: tuple[HeadKind, ...], place: Place) -> None:
    # as the adapter hands them over: tokens before heads in memory
    plan = kinds_plan(SMALL, kinds).to(place[0])
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs(SMALL, place))
    assert not q.is_contiguous()
    testing.require_exact(run(kernel, q, k, v, plan), q, k, v, plan)


@pytest.mark.parametrize("kinds", [("dense",) * 3, ("masked", "reused", "dense")], ids="-".join)
def test_a_kernel_gives_the_same_output_twice(kernel: Kernel, kinds: tuple[HeadKind, ...], place: Place) -> None:
    plan = kinds_plan(LARGE, kinds).to(place[0])
    q, k, v = inputs(LARGE, place)
    assert torch.equal(run(kernel, q, k, v, plan), run(kernel, q, k, v, plan))


def test_a_kernel_keeps_nothing_of_the_last_plan(kernel: Kernel, place: Place) -> None:
    # one shape, two masks: a compiled kernel must not have baked the first one in
    q, k, v = inputs(SMALL, place)
    for seed in (1, 2):
        plan = kinds_plan(SMALL, ("masked",) * 3, seed=seed).to(place[0])
        testing.require_exact(run(kernel, q, k, v, plan), q, k, v, plan)


# --- methods ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "preset", "where"), ARMS_BY_GRID)
def test_an_arm_computes_its_plan_and_only_what_is_left_out_or_rounded_changes_the_output(
    name: str, preset: str, kernel: Kernel, where: str, place: Place
) -> None:
    interpreted = place[0] == "cpu" and kernel.name == "triton"
    geometry = (SHORT if interpreted else GEOMETRIES)[where]
    q, k, v = inputs(geometry, place)
    plan = made(name, preset, geometry).plan(q[0], k[0], v[0], testing.site(geometry))
    out = run(kernel, q, k, v, plan)
    testing.require_exact(out, q, k, v, plan)
    # half precision hides what leaving out a little changes
    if place[0] == "cpu":
        testing.require_change(out, q, k, v, plan, geometry)


@pytest.mark.parametrize(("name", "preset", "where"), ARMS_BY_GRID)
def test_a_plan_is_for_its_site_and_leaves_its_inputs_alone(name: str, preset: str, where: str) -> None:
    testing.check_site(functools.partial(made, name, preset), GEOMETRIES[where])


@pytest.mark.parametrize(("name", "preset", "where"), REFUSED)
def test_a_method_that_does_not_apply_says_so(name: str, preset: str, where: str) -> None:
    with pytest.raises(testing.DoesNotApply, match="0 of 22 thresholds"):
        made(name, preset, GEOMETRIES[where])


@pytest.mark.parametrize(("name", "preset"), ARMS)
def test_what_can_be_sparse_is_sparse_late_in_a_long_video(name: str, preset: str) -> None:
    testing.check_sparsity(functools.partial(made, name, preset), testing.LONG)


@pytest.mark.parametrize("where", ["1000-text-first", "1000-text-last"])
@pytest.mark.parametrize(("name", "preset"), ARMS)
def test_no_query_is_left_without_a_key(name: str, preset: str, where: str) -> None:
    testing.check_rows(functools.partial(made, name, preset), GEOMETRIES[where])


@pytest.mark.parametrize(("name", "preset"), ARMS)
def test_a_reset_leaves_no_trace_of_the_last_video(name: str, preset: str) -> None:
    testing.check_reset(functools.partial(made, name, preset))


@pytest.mark.parametrize("apart", [{"branch": "uncond"}, {"sample": 1}], ids=["branch", "sample"])
@pytest.mark.parametrize(("name", "preset"), ARMS)
def test_branches_and_samples_are_kept_apart(name: str, preset: str, apart: dict[str, Any]) -> None:
    testing.check_apart(functools.partial(made, name, preset), apart)


@pytest.mark.parametrize(("name", "preset"), ARMS)
def test_another_geometry_gets_its_own_plan_or_a_refusal(name: str, preset: str) -> None:
    testing.check_geometry(functools.partial(made, name, preset))


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "preset"), ARMS)
def test_a_plan_is_made_where_its_queries_are(name: str, preset: str) -> None:
    q, k, v = inputs(LARGE, ("cuda", torch.bfloat16))
    plan = made(name, preset, LARGE).plan(q[0], k[0], v[0], testing.site(LARGE))
    testing.require_exact(run(KERNELS["flex"], q, k, v, plan), q, k, v, plan)
