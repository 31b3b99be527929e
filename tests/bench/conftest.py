"""A workload of fakes whose times are known: arms, kernels and a clock that only they move."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import repeat
from typing import Any

import pytest
import torch
from torch import Tensor

from calibatt.bench.cells import DENSE, Arm
from calibatt.bench.context import Context
from calibatt.bench.observers import Probe
from calibatt.bench.record import Telemetry
from calibatt.bench.telemetry import Watch
from calibatt.kernels import oracle
from calibatt.kernels.base import Task, Unsupported
from calibatt.kernels.geometry import Geometry
from calibatt.kernels.mask import BlockMask
from calibatt.kernels.plan import Plan
from calibatt.methods.call import Attention, SparseAttention
from calibatt.methods.site import BRANCHES, Site

GEOMETRY = Geometry(grid=(2, 2, 4), heads=2, head_dim=8)
STEPS = LAYERS = 2


class Clock:
    """Tells a time that stands still until somebody works."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@dataclass
class FakeKernel:
    """The oracle, in the times that it is given: one a call, and the last for ever."""

    name: str
    clock: Clock
    times: Sequence[float] = (1.0,)
    # calls after which it has no memory left
    lasts: int | None = None
    calls: int = 0

    def refusal(self, task: Task) -> Unsupported | None:
        return None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, plan: Plan) -> Tensor:
        if self.lasts is not None and self.calls >= self.lasts:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nand more")
        self.clock.now += self.times[min(self.calls, len(self.times) - 1)]
        self.calls += 1
        return oracle.attend(q, k, v, plan).to(q.dtype)


@dataclass
class FakeMethod:
    """Keeps the first of two key blocks in every row. One that tires takes a second more at every call of a video."""

    clock: Clock
    tires: bool = False
    sparse: bool = True
    resets: int = 0
    calls: int = 0

    def reset(self) -> None:
        self.resets += 1
        self.calls = 0

    def plan(self, q: Tensor, k: Tensor, v: Tensor, site: Site) -> Plan:
        self.calls += 1
        self.clock.now += self.calls if self.tires else 0
        if not self.sparse:
            return Plan.dense(site.geometry)
        keep = torch.tensor([[[True, False], [True, False]]])
        return Plan.masked(BlockMask.from_keep(keep, tokens=16, block_q=8, block_k=8), 2)


class GivenWatch(Watch):
    """Saw what it is given of each sample, in the order in which it is asked, and then nothing."""

    given: Iterator[Telemetry | None] = iter(())

    def __init__(self, device: torch.device) -> None: ...

    def __enter__(self) -> GivenWatch:
        return self

    def __exit__(self, *error: object) -> None: ...

    def between(self) -> None: ...

    def read(self) -> None: ...

    def energy_j(self) -> None: ...

    def during(self, start: float, end: float) -> Telemetry | None:
        return next(self.given, None)


@dataclass
class Fakes:
    """What a test may set before it asks for the context.

    Args:
        kernels, methods: of each arm.
        videos: weak references to all videos that were made.
        brightness: of an arm's video, by its kernel's name, added to the round's.
    """

    clock: Clock
    kernels: dict[Arm, FakeKernel] = field(default_factory=dict)
    methods: dict[Arm, FakeMethod] = field(default_factory=dict)
    videos: list[weakref.ref[Tensor]] = field(default_factory=list)
    alive: list[int] = field(default_factory=list)
    brightness: dict[str, float] = field(default_factory=dict)
    said: list[str] = field(default_factory=list)

    def arm(self, name: str, times: Sequence[float] = (1.0,), **settings: Any) -> Arm:
        """An arm on a kernel of that name, which takes these times; `dense` is the baseline."""
        arm = DENSE if name == "dense" else Arm(method="radial", preset="default", mode="native", kernel=name)
        own = {name: settings.pop(name) for name in ("lasts",) if name in settings}
        self.kernels[arm] = FakeKernel(name, self.clock, times, **own)
        self.methods[arm] = FakeMethod(self.clock, sparse=arm != DENSE, **settings)
        return arm

    def context(self, *, prompts: int = 4) -> Context:
        """The context of these arms, whose probes are three calls of a video."""
        generator = torch.Generator().manual_seed(0)
        probes = []
        for step, layer in ((0, 0), (0, 1), (1, 1)):
            q, k, v = torch.randn(3, 1, 2, 16, 8, generator=generator)
            probes.append(Probe(site=site(step, layer), q=q, k=k, v=v))
        return Context(
            name="fake-tiny-2", device=torch.device("cpu"), prompts=tuple(f"prompt {i}" for i in range(prompts)),
            probes=tuple(probes), checked_heads=(0, 1), dense=FakeKernel("dense", self.clock, (0.0,)),
            kernel=self.kernels.__getitem__, method=self.methods.__getitem__, prepared=lambda arm: None,
            preparation_s=lambda method: None, film=self._film, alignment=None, guidance=3.0, facts={"model": "fake"},
            log=self.said.append,
        )  # fmt: skip

    def _film(self, attention: Attention, prompt: str, seed: int) -> Tensor:
        self.alive.append(sum(video() is not None for video in self.videos))
        attention.start_video()
        for q, k, v, where in calls(seed):
            attention(q, k, v, where)
        # beside an arm, it is the dense video
        name = attention.kernel.name if isinstance(attention, SparseAttention) else "dense"
        video = torch.full((3, 2, 16, 16), -0.5 + seed / 10 + self.brightness.get(name, 0.0))
        self.videos.append(weakref.ref(video))
        return video


def calls(seed: int) -> Iterator[tuple[Tensor, Tensor, Tensor, Site]]:
    """Inputs and places of all attention calls of a fake video."""
    generator = torch.Generator().manual_seed(seed)
    for step in range(STEPS):
        for branch in BRANCHES:
            for layer in range(LAYERS):
                q, k, v = torch.randn(3, 1, 2, 16, 8, generator=generator)
                yield q, k, v, site(step, layer, branch)


def site(step: int, layer: int, branch: Any = "cond") -> Site:
    """A place in the fake model."""
    return Site(geometry=GEOMETRY, step=step, steps=STEPS, sigma=0.5, branch=branch, layer=layer, layers=LAYERS)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The time that the benchmark reads."""
    clock = Clock()
    for module in ("timer", "sampling"):
        monkeypatch.setattr(f"calibatt.bench.{module}.perf_counter", clock)
    # what others do meanwhile is no part of these tests
    for module in ("sampling", "suites.denoise"):
        monkeypatch.setattr(f"calibatt.bench.{module}.Watch", GivenWatch)
    return clock


@pytest.fixture
def see(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Says what the watch saw of each sample, in order: dense first where an arm's samples are asked for together."""
    return lambda *states: monkeypatch.setattr(GivenWatch, "given", iter(states))


@pytest.fixture
def fakes(clock: Clock) -> Fakes:
    """Arms to be made by the test."""
    return Fakes(clock)


@pytest.fixture
def calls_of_video() -> Callable[[int], Iterator[tuple[Tensor, Tensor, Tensor, Site]]]:
    """Gives the attention calls of the fake video of a seed."""
    return calls


@pytest.fixture
def by_round() -> Callable[..., list[float]]:
    """The times of a kernel whose calls take as long in one round as in another: some first, then those of rounds."""

    def times(first: int, calls: int, rounds: Sequence[float]) -> list[float]:
        return [*repeat(0.0, first), *(second for second in rounds for _ in range(calls))]

    return times


@pytest.fixture(scope="session")
def as_a_user_has_it() -> dict[str, str]:
    """The environment of `pytest bench`, without what these tests and their workers set in it.

    With Triton's interpreter its kernels would be timed on a CPU, for minutes; in a worker there are no benchmarks.
    """
    return {name: value for name, value in os.environ.items() if not name.startswith(("TRITON_INTERPRET", "PYTEST_"))}
