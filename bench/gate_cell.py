"""The processes of the gate's study (`reports/gate_study.py`): small cells, and one of them slowed by real work.

The cells are a kernel benchmark's: dense attention and two masks, in turns, timed and recorded as the kernel suite
does. Beside them runs one mask with a few percent more to do. Each slowdown is a file of its own, in which the slowed
arm stands in place of the arm that it is, so that the gate reads what it would read of a slower kernel. On a CPU
another process comes and goes meanwhile.
"""

from __future__ import annotations

import argparse
import datetime
import json
import multiprocessing
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from calibatt.bench import fingerprint
from calibatt.bench.baseline import fastest_dense
from calibatt.bench.cells import BlockArm
from calibatt.bench.failure import Failure
from calibatt.bench.masks import make_plan
from calibatt.bench.record import Record
from calibatt.bench.sampling import Course, Goal, Sample, take_samples
from calibatt.bench.suites.attention import ROUNDS
from calibatt.bench.timer import PhaseTimer
from calibatt.kernels.base import dtype_name
from calibatt.kernels.catalogue import DEFAULT
from calibatt.kernels.geometry import Geometry
from calibatt.kernels.plan import Plan
from calibatt.models.device import pick_device, working_dtype

# shares of an arm's own time that are added to it, by the names of the files
SLOWDOWNS = {"plain": 0.0, "slow3": 0.03, "slow5": 0.05}
DENSITIES = (0.25, 0.5)
# on a CPU a call takes some milliseconds, as the embedded model's do; on a GPU it is Wan 1.3B's at 480p
_GEOMETRIES = {
    "cpu": (Geometry(grid=(2, 24, 32), heads=2, head_dim=64), (64, 64)),
    "cuda": (Geometry(grid=(21, 30, 52), heads=12, head_dim=128), (128, 128)),
}
# turns of the loop, or cycles of the GPU, that are timed to know how many a slowdown takes: well above a clock's error
_UNIT = {"cpu": 20_000, "cuda": 2_000_000}
_CALIBRATING_ROUNDS = 15
# seconds that the other process is busy, and those for which it goes: a daemon's work, some 3 % of two CPUs
_BUSY_S, _GONE_S = (0.1, 0.3), (2.0, 5.0)
# a process that has nothing of this one
_SPAWN = multiprocessing.get_context("spawn")


class Cells:
    """Inputs, masks and kernels, the same in every process."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.dtype = device, working_dtype(device)
        self.geometry, self.block = _GEOMETRIES[device.type]
        generator = torch.Generator(device).manual_seed(0)
        # tokens before heads in memory, as models hand them over
        shape = (1, self.geometry.tokens, self.geometry.heads, self.geometry.head_dim)
        self._q, self._k, self._v = (
            torch.randn(shape, generator=generator, device=device, dtype=self.dtype).transpose(1, 2) for _ in range(3)
        )
        self.dense = fastest_dense(self._q, self._k, self._v, self.geometry, log=lambda line: None)
        self.plans = {
            density: make_plan("even", density, self.geometry, self.block, lambda: torch.empty(0)).to(device)
            for density in DENSITIES
        }

    def attend(self, density: float | None) -> Tensor:
        """One call under a mask; dense for None."""
        if density is None:
            return self.dense.attend(self._q, self._k, self._v, Plan.dense(self.geometry))
        return DEFAULT.attend(self._q, self._k, self._v, self.plans[density])

    def works(self, timer: PhaseTimer) -> dict[str, Callable[[], object]]:
        """Dense attention, each mask, and in place of the first one each slowdown of it, by name."""
        slowed, *others = DENSITIES
        densities: dict[str, float | None] = {"dense": None, **{str(density): density for density in others}}
        works: dict[str, Callable[[], object]] = {
            name: partial(self.attend, density) for name, density in densities.items()
        }
        work = partial(self.attend, slowed)
        unit = _unit_per_share(self.device, timer, work)
        for name, share in SLOWDOWNS.items():
            works[name] = _Slowed(work, self.device, round(share * unit))
        return works

    def record(self, course: Course, density: float | None) -> Record:
        """What an arm has done, as the kernel suite records it."""
        facts = {
            "suite": "kernel", "model": "gate-study", "outcome": "ok", "tokens": self.geometry.tokens,
            "heads": self.geometry.heads, "head_dim": self.geometry.head_dim, "dtype": dtype_name(self.dtype),
            **course.facts(),
        }  # fmt: skip
        if density is None:
            return Record(**facts, method="dense", kernel=self.dense.name)
        arm = BlockArm(kernel=DEFAULT.name, density=density, mask="even", block=self.block)
        kept = self.plans[density].density().mean().item()
        return Record(**facts, **arm.facts(), baseline=self.dense.name, density=kept)


@torch.no_grad()
def measure(device: torch.device, rounds: int) -> dict[str, list[Record]]:
    """Time the cells; the records of each file, by its name.

    Args:
        device: where they run.
        rounds: samples an arm, as many of each: the gate is told how often it is wrong for this many.

    Raises:
        RuntimeError: an arm failed.
    """
    cells, timer = Cells(device), PhaseTimer(device)
    works = cells.works(timer)
    taken = take_samples(
        list(works), lambda name: Sample(seconds=time_call(timer, works[name])),
        Goal(least=rounds, most=rounds, interval=None), device, partner="dense",
    )  # fmt: skip
    courses = {name: course for name, course in taken.items() if not isinstance(course, Failure)}
    if failures := [f"{name}: {one.reason}" for name, one in taken.items() if isinstance(one, Failure)]:
        raise RuntimeError("; ".join(failures))
    slowed, *others = DENSITIES
    first = cells.record(courses["dense"], None)
    rest = [cells.record(courses[str(density)], density) for density in others]
    return {name: [first, cells.record(courses[name], slowed), *rest] for name in SLOWDOWNS}


class _Slowed:
    """Work, and then more of it: turns of a loop on a CPU, cycles on a GPU."""

    def __init__(self, work: Callable[[], object], device: torch.device, count: int) -> None:
        self._work, self._device, self._count = work, device, count

    def __call__(self) -> None:
        self._work()
        if self._count:
            _spin(self._device, self._count)


def _spin(device: torch.device, count: int) -> None:
    if device.type == "cuda":
        torch.cuda._sleep(count)
        return
    for _ in range(count):
        pass


def _unit_per_share(device: torch.device, timer: PhaseTimer, work: Callable[[], object]) -> float:
    """Turns or cycles that take as long as the work: both are timed in turns, under the same load."""
    unit = _UNIT[device.type]
    works: list[Callable[[], object]] = [work, lambda: _spin(device, unit)]
    pairs = [[time_call(timer, one) for one in works] for _ in range(_CALIBRATING_ROUNDS + 1)]
    # the first round warms up; a quarter of the way up, another process's share is in neither
    call, spin = (statistics.quantiles(samples)[0] for samples in zip(*pairs[1:], strict=True))
    return float(unit * call / spin)


def time_call(timer: PhaseTimer, work: Callable[[], object]) -> float:
    """Seconds of a piece of work, as the kernel suite takes a sample."""
    timer.lead()
    with timer.phase("attend"):
        work()
    return timer.collect_s()["attend"]


def write(folder: Path, measured: dict[str, list[Record]], arguments: Sequence[str]) -> None:
    """Write a result file for each slowdown into a folder."""
    facts: dict[str, Any] = {
        "machine_info": fingerprint.machine(), "commit_info": fingerprint.commit(),
        "datetime": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python -m calibatt.bench.gate_cell", *arguments]), "untimed": [],
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    for name, records in measured.items():
        benchmarks = [{"stats": {}, "extra_info": record.to_extra_info()} for record in records]
        (folder / f"{name}.json").write_text(json.dumps({**facts, "benchmarks": benchmarks}), encoding="utf-8")


def _one_process(folder: Path, device: torch.device, rounds: int, arguments: Sequence[str]) -> None:
    write(folder, measure(device, rounds), arguments)


@contextmanager
def background_load(device: torch.device) -> Iterator[None]:
    """Another process that comes and goes, where a CPU computes."""
    if device.type != "cpu":
        yield
        return
    other = _SPAWN.Process(target=_come_and_go, daemon=True)
    other.start()
    try:
        yield
    finally:
        other.terminate()
        other.join()


def _come_and_go() -> None:
    draw = random.Random(0)
    while True:
        time.sleep(draw.uniform(*_GONE_S))
        end = time.monotonic() + draw.uniform(*_BUSY_S)
        while time.monotonic() < end:
            pass


def main(arguments: Sequence[str]) -> None:
    """Measure in processes of their own, one after the other, each into a folder of its own.

    Raises:
        RuntimeError: a process failed; what it said is on stderr.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="for a folder of result files for each process")
    parser.add_argument("--device", help="cpu or cuda; default: cuda where there is one")
    parser.add_argument("--processes", type=int, default=60, help="how many; default: %(default)s")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="samples an arm; default: %(default)s")
    given = parser.parse_args(arguments)
    device = pick_device(given.device)
    with background_load(device):
        for number in range(given.processes):
            place = given.folder / f"{number:03}"
            one = _SPAWN.Process(target=_one_process, args=(place, device, given.rounds, arguments))
            one.start()
            one.join()
            if one.exitcode:
                raise RuntimeError(f"process {number} ended with {one.exitcode}")
            print(f"{number + 1} of {given.processes} processes", file=sys.stderr)


if __name__ == "__main__":
    main(sys.argv[1:])
