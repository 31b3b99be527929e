"""What every method and every kernel must do, as checks to run on one's own.

check_method("package.module:Class"), and check_kernel("package.module:kernel").
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from calibatt.kernel_cases import BLOCK, CASES, GEOMETRIES, HEADS, SIZES, WIDTHS, Case, sized_cases
from calibatt.kernels import oracle
from calibatt.kernels.base import Kernel, Task
from calibatt.kernels.catalogue import DEFAULT, KERNELS
from calibatt.kernels.geometry import Geometry
from calibatt.kernels.mask import BlockMask
from calibatt.kernels.names import look_up
from calibatt.kernels.plan import Plan
from calibatt.methods.base import Method
from calibatt.methods.catalogue import METHODS, build, learner, learns_from
from calibatt.methods.learning import CalibrationMismatch, Learner, Learnt, Origin, Provenance, settings_of
from calibatt.methods.site import Site
from calibatt.methods.skipping import without_low

Inputs = tuple[Float[Tensor, "1 heads tokens head_dim"], ...]
# makes a method anew for a geometry, with what it has to learn
Make = Callable[[Geometry], Method]

# where no kernel runs, few channels do; and another one with as many tokens
PLANNED = Geometry(grid=(5, 8, 25), heads=HEADS, head_dim=16)
_OTHER = Geometry(grid=(8, 5, 25), heads=HEADS, head_dim=16)
# with frames and columns enough that wide windows of tiles leave some out
LONG = Geometry(grid=(8, 6, 25), heads=HEADS, head_dim=128)
# where methods are asked: from the first step to one at which no dense schedule holds any more
STEPS, LAYERS = (0, 20, 40), (0, 5)
SITES: Sequence[Mapping[str, int]] = [{"step": step, "layer": layer} for step in STEPS for layer in LAYERS]
# a video: the seed of each call's inputs, and where the call happens
_Call = tuple[int, Mapping[str, Any]]
_FIRST: Sequence[_Call] = [(where["step"], where) for where in SITES]
_SECOND: Sequence[_Call] = [(100 + where["step"], where) for where in SITES]


class ContractBroken(AssertionError):
    """A method or a kernel does not do what every one must; the message is one line that says what."""


def check_method(method: str, *, block: tuple[int, int] = BLOCK) -> list[str]:
    """Run every check on every preset of a method, on the CPU, in fp32 and under the default kernel.

    Small random inputs whose neighbouring tokens are alike stand for a video's; what a method learns offline it learns
    from two such videos.

    Args:
        method: its name, or `package.module:Class`.
        block: tokens of a query and of a key block, where the method has blocks.

    Returns:
        A line for each preset: how many checks it passed, or why it does not apply.

    Raises:
        ContractBroken: a check fails; says which, of which preset.
        UnknownName, UnusableEntry: there is no such method, or it cannot be loaded.
        ValueError: a preset cannot be built.
    """
    said = []
    with torch.no_grad():
        for preset in look_up(METHODS, method, "method").presets:
            for title, check in _CHECKS.items():
                try:
                    check(partial(made, method, preset, block=block))
                except DoesNotApply as reason:
                    said.append(f"{method}/{preset} does not apply: {reason}")
                    break
                except ContractBroken as broken:
                    raise ContractBroken(f"{method}/{preset}: {title}: {broken}") from None
            else:
                said.append(f"{method}/{preset} passes {len(_CHECKS)} checks")
    return said


def check_kernel(kernel: str, *, device: str = "cpu", dtype: torch.dtype = torch.float32) -> list[str]:
    """Have a kernel compute plans that kernels have got wrong, against fp64; what it refuses is left out, and said.

    Args:
        kernel: its name, or `package.module:kernel`.
        device: where to run it; on a GPU also with blocks of many sizes.
        dtype: of the inputs.

    Returns:
        A line for each thing that kernels do: of how many plans it did it, and why not of the others.

    Raises:
        ContractBroken: an output is not that of fp64 but for rounding, an input was changed, or all plans are refused;
            says which plan.
        UnknownName, UnusableEntry: there is no such kernel, or it cannot be loaded.
    """
    asked: dict[str, Mapping[str, Case]] = dict(CASES)
    if torch.device(device).type == "cuda":
        asked["computes blocks of many sizes"] = {
            f"{size[0]}x{size[1]} of {width} channels, plan {number}": case
            for (width, geometry), size in itertools.product(WIDTHS.items(), SIZES)
            for number, case in enumerate(sized_cases(geometry, size))
        }
    found, said, done = look_up(KERNELS, kernel, "kernel"), [], 0
    with torch.no_grad():
        for claim, cases in asked.items():
            refusals = []
            for name, case in cases.items():
                try:
                    check_case(found, case, device=device, dtype=dtype)
                except DoesNotApply as reason:
                    refusals.append(str(reason))
                except ContractBroken as broken:
                    raise ContractBroken(f"{kernel} {claim}: {name}: {broken}") from None
            kept = len(cases) - len(refusals)
            done += kept
            why = f" (else: {'; '.join(dict.fromkeys(refusals))})" if refusals else ""
            said.append(f"{kernel} {claim}: {kept} of {len(cases)} plans{why}")
    if not done:
        raise ContractBroken(f"{said[0]}: there is nothing to check")
    return said


class DoesNotApply(Exception):
    """A method refuses the small videos of these checks, or a kernel the plan of one."""


def inputs(geometry: Geometry, *, seed: int = 0, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Inputs:
    """Queries, keys and values of one sample.

    Neighbouring tokens are alike, as in videos: methods that pool them would not trust mere noise.
    """
    generator = torch.Generator().manual_seed(seed)
    few, tokens = geometry.tokens // 48 + 2, geometry.tokens
    made = []
    for _ in range(3):
        smooth = torch.randn(geometry.heads, geometry.head_dim, few, generator=generator)
        smooth = torch.nn.functional.interpolate(smooth, tokens, mode="linear").mT
        noise = torch.randn(geometry.heads, tokens, geometry.head_dim, generator=generator)
        made.append((smooth + 0.3 * noise)[None].to(device, dtype).contiguous())
    q, k, v = made
    # queries twice as large as is usual: attention that is not nearly uniform
    return 2 * q, k, v


def site(geometry: Geometry, *, step: int = 40, layer: int = 5, **where: Any) -> Site:
    """A call late in a video of 50 steps and 8 layers, where no method's dense schedule holds any more."""
    return Site(geometry=geometry, step=step, steps=50, sigma=0.3, layer=layer, layers=8, **{"branch": "cond", **where})


def learnt_by(own: Learner, method: str, geometry: Geometry) -> Learnt:
    """Learnt from two videos, whose attention is to what is near; other sites have what the last one asked has.

    Args:
        own: what learns.
        method: the name of the method that it is of.
        geometry: of the videos.
    """
    near = _places(geometry)
    merged = {}
    for where in (site(geometry, **place) for place in SITES):
        notes = []
        for prompt in range(2):
            q, k, v = inputs(geometry, seed=1000 * (prompt + 1) + where.step + where.layer)
            q[..., :4] += near
            k[..., :4] += near
            notes.append(own.note(q[0], k[0], v[0], where, prompt))
        merged[where.step, where.layer] = own.merge(notes)
    asked = [
        (max(at for at in STEPS if at <= step), max(at for at in LAYERS if at <= layer))
        for step in range(50)
        for layer in range(8)
    ]
    return Learnt(
        method=method, preset="default", settings=settings_of(own),
        tables={name: torch.stack([merged[at][name] for at in asked]).unflatten(0, (50, 8)) for name in merged[0, 0]},
        provenance=Provenance(
            origin=Origin(model="none", weights="0", scheduler="none"), geometry=geometry, steps=50, layers=8,
            guidance=1.0, prompts=("one", "two"), seed=0, cost_ratio=1.0,
        ),
    )  # fmt: skip


def _places(geometry: Geometry) -> Float[Tensor, "tokens 4"]:
    """Channels by which tokens that lie near each other, in time and across a frame, are alike; none for text."""
    frame, _, column = torch.meshgrid(*(torch.arange(extent) / extent for extent in geometry.grid), indexing="ij")
    channels = torch.zeros(geometry.tokens, 4)
    angles = math.pi * torch.stack((frame.flatten(), column.flatten()), -1)
    video = slice(geometry.video_start, geometry.video_start + geometry.video_tokens)
    channels[video] = 8 * torch.cat((angles.cos(), angles.sin()), -1)
    return channels


def made(
    name: str, preset: str, geometry: Geometry, *, block: tuple[int, int] = BLOCK,
    learn: Callable[[Learner, str, Geometry], Learnt] = learnt_by,
) -> Method:  # fmt: skip
    """A method for a geometry, with what it has to learn.

    Args:
        name, preset, block: as for `calibatt.build`.
        geometry: of its videos.
        learn: as `learnt_by`.

    Raises:
        DoesNotApply: the method refuses the geometry.
        ContractBroken: it is to be built on what another one learns, which learns nothing.
        UnknownName, UnusableEntry, ValueError: as `calibatt.build`.
    """
    source, known = learns_from(name, preset), None
    if source is not None:
        # presets of another method's calibration have names of their own
        found = learner(source, preset=preset if source == METHODS[name].name else "default", block=block)
        if found is None:
            raise ContractBroken(f"it is to be built on what {source} learns, which learns nothing")
        known = learn(found, source, geometry)
    method = build(name, preset=preset, calibration=known, block=block)
    if (refusal := method.refusal(geometry)) is not None:
        raise DoesNotApply(refusal.reason)
    return method


def same(one: Plan, other: Plan) -> bool:
    """Whether two plans compute the same."""
    parts = one.tensors(), other.tensors()
    alike = (one.tokens, one.kinds, len(parts[0])) == (other.tokens, other.kinds, len(parts[1]))
    return alike and all(map(torch.equal, *parts))


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise ContractBroken(otherwise)


def attended(kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, plan: Plan) -> Tensor:
    """A kernel's output, which is like the queries; inputs are as they were."""
    before = [x.clone() for x in (q, k, v)]
    out = kernel.attend(q, k, v, plan)
    _require(all(map(torch.equal, (q, k, v), before)), "the inputs were changed")
    _require((out.shape, out.dtype, out.device) == (q.shape, q.dtype, q.device), "the output is not like the queries")
    return out


def check_case(kernel: Kernel, case: Case, *, device: str, dtype: torch.dtype) -> None:
    """A kernel computes a plan as it is.

    Raises:
        DoesNotApply: it refuses to.
        ContractBroken: it does not.
    """
    plan = case.plan().to(device)
    samples = [inputs(case.geometry, seed=seed, device=device, dtype=dtype) for seed in range(case.batch)]
    q, k, v = (torch.cat(parts) for parts in zip(*samples, strict=True))
    q = case.scale * q
    if case.views:
        q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    if (refusal := kernel.refusal(Task.of(q, plan))) is not None:
        raise DoesNotApply(refusal.reason)
    out = attended(kernel, q, k, v, plan)
    require_exact(out, q, k, v, plan)
    if case.twice:
        _require(torch.equal(attended(kernel, q, k, v, plan), out), "the same inputs have another output")


def require_exact(out: Tensor, q: Tensor, k: Tensor, v: Tensor, plan: Plan) -> None:
    """An output is that of fp64, but for rounding, and zero where nothing is computed."""
    plan = plan.realised()
    exact = oracle.attend(q, k, v, plan)
    error, budget = (out.double() - exact).abs().max().item(), oracle.error_budget(q, k, v, plan, exact)
    # memory that was not written is NaN, which is not smaller than anything
    _require(error <= budget, f"the output is {error:.3g} off that of fp64, allowed {budget:.3g}")
    _require(not out[~exact.any(-1)].any(), "queries without a key have an output")


def check_output(make: Make, geometry: Geometry) -> None:
    """The default kernel computes the plan, and only what is left out or rounded changes the output."""
    q, k, v = inputs(geometry)
    plan = make(geometry).plan(q[0], k[0], v[0], site(geometry))
    out = attended(DEFAULT, q, k, v, plan)
    require_exact(out, q, k, v, plan)
    require_change(out, q, k, v, plan, geometry)


def require_change(out: Tensor, q: Tensor, k: Tensor, v: Tensor, plan: Plan, geometry: Geometry) -> None:
    """In fp32, an output differs from dense attention's where something is left out or rounded, and nowhere else."""
    dense = Plan.dense(geometry)
    whole = oracle.attend(q, k, v, dense)
    change, budget = (out.double() - whole).abs().max().item(), oracle.error_budget(q, k, v, dense, whole)
    if plan.density().min() < 1 or plan.int8 is not None:
        _require(change > 100 * budget, f"blocks are left out, and the output changes by {change:.3g} only")
    else:
        _require(change <= budget, f"nothing is left out, and the output changes by {change:.3g}")


def check_site(make: Make, geometry: Geometry) -> None:
    """A plan is for its site, leaves its inputs alone, and draws nothing from the generator of the video."""
    method = make(geometry)
    q, k, v = inputs(geometry)
    before = q.clone(), k.clone(), v.clone()
    state = torch.get_rng_state()
    plan = method.plan(q[0], k[0], v[0], site(geometry))
    _require(
        (plan.tokens, len(plan.kinds)) == (geometry.tokens, geometry.heads),
        f"the plan is for {plan.tokens} tokens and {len(plan.kinds)} heads, not {geometry.tokens} and {geometry.heads}",
    )
    own = "none" if plan.mask is None else method.remainder
    _require(
        plan.remainder == own,
        f"the plan has the remainder {plan.remainder!r}, not {own!r}: say so in the class attribute `remainder`",
    )
    _require(all(map(torch.equal, (q, k, v), before)), "the inputs were changed")
    _require(
        torch.equal(torch.get_rng_state(), state),
        "the plan drew from the generator that the video is made with: use a torch.Generator of your own",
    )


def check_sparsity(make: Make, geometry: Geometry) -> None:
    """Late in a long video, a method that has a knob leaves something out."""
    method = make(geometry)
    q, k, v = inputs(geometry)
    plan = method.plan(q[0], k[0], v[0], site(geometry))
    if plan.skip is not None and isinstance(plan.mask, BlockMask):
        # what a kernel would note and leave out by itself
        kept = without_low(q[0], k[0], plan.mask, plan.skip.thresholds)
        plan.skip.low.bits.copy_(plan.mask.without(kept).bits)
    density = plan.density()
    _require(0 < float(density.min()) <= float(density.max()) <= 1, f"densities are {density.tolist()}, not 0 to 1")
    # what has neither a knob nor anything learnt has nothing to be sparse by, and some know nothing at a first call
    if method.knob is not None and not method.knob.over_videos:
        _require(float(density.mean()) < 0.95, f"the mean density is {float(density.mean()):.3f}: nothing is left out")


def check_rows(make: Make, geometry: Geometry) -> None:
    """No query is left without a key."""
    q, k, v = inputs(geometry)
    plan = make(geometry).plan(q[0], k[0], v[0], site(geometry))
    if plan.mask is not None:
        # an empty block has no key
        keys = (plan.mask.keep() & (plan.mask.sizes()[1] > 0)[:, None]).any(-1)
        _require(bool(keys.all()), f"{int((~keys).sum())} query blocks keep no key block")


def _planned(
    method: Method, calls: Sequence[_Call], seen: Callable[[Tensor], Tensor] = lambda heads: heads
) -> list[Plan]:
    plans = []
    for seed, where in calls:
        q, k, v = (seen(x[0]) for x in inputs(PLANNED, seed=seed))
        plans.append(method.plan(q, k, v, site(replace(PLANNED, heads=len(q)), **where)))
    return plans


def check_reset(make: Make) -> None:
    """After a reset nothing of the last video is left, and the same video has the same plans."""
    used = make(PLANNED)
    first = _planned(used, _FIRST)
    used.reset()
    _require(
        all(map(same, _planned(used, _SECOND), _planned(make(PLANNED), _SECOND))),
        "after reset() plans of another video differ from a new method's: something of the last one is kept",
    )
    used.reset()
    _require(all(map(same, _planned(used, _FIRST), first)), "the same video twice has other plans")


def check_apart(make: Make, apart: Mapping[str, Any]) -> None:
    """Calls of another branch or sample in between change no plan.

    Args:
        make: makes the method.
        apart: what the other calls' sites have.
    """
    other = [(seed, {**where, **apart}) for seed, where in _SECOND]
    both = _planned(make(PLANNED), [call for pair in zip(_FIRST, other, strict=True) for call in pair])
    for part, calls in ((both[::2], _FIRST), (both[1::2], other)):
        _require(
            all(map(same, part, _planned(make(PLANNED), calls))),
            f"plans depend on calls of another {' and '.join(apart)} in between",
        )


def check_geometry(make: Make) -> None:
    """Tokens of another grid get a plan of their own, or what was learnt is refused."""
    method = make(PLANNED)
    q, k, v = inputs(PLANNED)
    # the same number of tokens: a plan kept by length would pass unseen
    method.plan(q[0], k[0], v[0], site(PLANNED))
    method.reset()
    if method.learnt is None:
        fresh = make(_OTHER).plan(q[0], k[0], v[0], site(_OTHER))
        again = method.plan(q[0], k[0], v[0], site(_OTHER))
        _require(same(again, fresh), "the plan for another grid is not the one that a new method makes")
        return
    try:
        method.plan(q[0], k[0], v[0], site(_OTHER))
    except CalibrationMismatch:
        return
    raise ContractBroken("what was learnt for one grid is used for another: call self.learnt.check(site)")


def check_split(make: Make) -> None:
    """Plans of an offline method do not depend on values, and some heads alone have the plans of a headwise one."""
    method = make(PLANNED)
    whole = _planned(method, _FIRST)
    if method.offline:
        blind = _planned(make(PLANNED), _FIRST, seen=lambda x: torch.full_like(x, math.nan))
        _require(all(map(same, blind, whole)), "its plans depend on values: it is not offline")
    elif method.headwise and method.learnt is None:
        own = list(range(PLANNED.heads))[1:]
        alone = _planned(make(PLANNED), _FIRST, seen=lambda x: x[own])
        parts = [plan.of_heads(own) for plan in whole]
        _require(all(map(same, alone, parts)), "some heads alone have other plans: it is not headwise")


def _everywhere(check: Callable[[Make, Geometry], None]) -> Callable[[Make], None]:
    def checked(make: Make) -> None:
        for geometry in GEOMETRIES.values():
            check(make, geometry)

    return checked


# in words, as a message has them
_CHECKS: Mapping[str, Callable[[Make], None]] = {
    "a plan is for its site": _everywhere(check_site),
    "no query is left without a key": _everywhere(check_rows),
    "late in a video something is left out": lambda make: check_sparsity(make, LONG),
    "its plans are computed as they are": _everywhere(check_output),
    "a reset leaves no trace": check_reset,
    "branches are kept apart": lambda make: check_apart(make, {"branch": "uncond"}),
    "samples are kept apart": lambda make: check_apart(make, {"sample": 1}),
    "another grid has its own plan": check_geometry,
    "what it says of heads and values holds": check_split,
}
