"""What every kernel and every method must do, whatever it is: parametrised from the catalogues, nothing by hand."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from calibatt import testing
from calibatt.kernel_cases import CASES, LARGE, SIZES, SMALL, WIDTHS, Case, sized_cases
from calibatt.kernels.base import Kernel, Task
from calibatt.kernels.catalogue import KERNELS
from calibatt.kernels.geometry import Geometry
from calibatt.kernels.plan import Plan
from calibatt.methods.catalogue import METHODS
from calibatt.methods.learning import Learner, Learnt

GEOMETRIES = {"63": SMALL, **testing.GEOMETRIES}
# The same with fewer tokens, for arms in Triton's interpreter, which takes 12 ms for every block of a head. Kernels by
# themselves are interpreted with all of them.
SHORT = {
    "63": GEOMETRIES["63"],
    "1000": Geometry(grid=(3, 6, 9), heads=3, head_dim=128),
    "1000-text-first": Geometry(grid=(2, 6, 12), heads=3, head_dim=128, text_tokens=28, text_side="first"),
    "1000-text-last": Geometry(grid=(2, 6, 12), heads=3, head_dim=128, text_tokens=28, text_side="last"),
}
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


def checked(kernel: Kernel, case: Case, place: Place) -> None:
    """Skips where the kernel says that it cannot."""
    try:
        testing.check_case(kernel, case, device=place[0], dtype=place[1])
    except testing.DoesNotApply as reason:
        pytest.skip(str(reason))


def run(kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, plan: Plan) -> Tensor:
    """The kernel's output; skips where the kernel says that it cannot."""
    if (refusal := kernel.refusal(Task.of(q, plan))) is not None:
        pytest.skip(refusal.reason)
    return testing.attended(kernel, q, k, v, plan)


# --- kernels ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("claim", "name"), [pytest.param(claim, name, id=f"{claim}-{name}") for claim in CASES for name in CASES[claim]]
)
def test_a_kernel_computes_plans_as_they_are(kernel: Kernel, claim: str, name: str, place: Place) -> None:
    checked(kernel, CASES[claim][name], place)


def test_a_kernel_keeps_nothing_of_the_last_plan(kernel: Kernel, place: Place) -> None:
    # one shape, two masks: a compiled kernel must not have baked the first one in
    for name in ("one-block-63", "some-blocks-63"):
        checked(kernel, CASES["computes the blocks that it is given and no others"][name], place)


@pytest.mark.gpu
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_a_kernel_computes_blocks_of_many_sizes(
    kernel: Kernel, size: tuple[int, int], width: str, dtype: torch.dtype
) -> None:
    done, refusals = 0, set()
    for case in sized_cases(WIDTHS[width], size):
        try:
            testing.check_case(kernel, case, device="cuda", dtype=dtype)
            done += 1
        except testing.DoesNotApply as reason:
            refusals.add(str(reason))
    if not done:
        pytest.skip("; ".join(sorted(refusals)))


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


@pytest.mark.parametrize(("name", "preset"), ARMS)
def test_plans_can_be_made_for_some_heads_where_the_method_says_so(name: str, preset: str) -> None:
    testing.check_split(functools.partial(made, name, preset))


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "preset"), ARMS)
def test_a_plan_is_made_where_its_queries_are(name: str, preset: str) -> None:
    q, k, v = inputs(LARGE, ("cuda", torch.bfloat16))
    plan = made(name, preset, LARGE).plan(q[0], k[0], v[0], testing.site(LARGE))
    testing.require_exact(run(KERNELS["flex"], q, k, v, plan), q, k, v, plan)
