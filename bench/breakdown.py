"""What one step of a generation spends its time on: device kernels, or operators on a CPU, by what they are for."""

from __future__ import annotations

import json
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any, Literal, get_args

import torch

from calibatt.calibration.files import naming, replacing
from calibatt.kernels.base import Attender
from calibatt.methods.base import Planner
from calibatt.methods.call import SparseAttention
from calibatt.models.adapter import installed

# the phases of an attention call, and what is outside of all
Part = Literal["plan", "permute", "attend", "unpermute", "rest"]
PARTS: tuple[Part, ...] = get_args(Part)
# categories of a Chrome trace as torch's profiler writes it; annotations on the device are those of the host around
# what was launched inside
_DEVICE, _HOST = ("kernel", "gpu_memcpy", "gpu_memset"), ("cpu_op",)
_MARKS = (_DEVICE_MARK, _HOST_MARK) = ("gpu_user_annotation", "user_annotation")
# of a CPU: what Inductor compiled is no operator of its own
_COMPILED = "(compiled code and Python)"


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """A kernel of the device, or an operator without those that it calls.

    Args:
        name: as the profiler has it.
        part: what it was for.
        seconds: of all launches.
        launches: how many.
    """

    name: str
    part: Part
    seconds: float
    launches: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Breakdown:
    """One step under torch's profiler, whose own cost is in it: shares are to be believed, times are no benchmark.

    Args:
        seconds: wall-clock time of the step.
        works: the longest first.
    """

    seconds: float
    works: Sequence[Work]

    def of(self, part: Part) -> tuple[float, int]:
        """Seconds and launches of a part."""
        works = [work for work in self.works if work.part == part]
        return sum(work.seconds for work in works), sum(work.launches for work in works)

    @property
    def idle_s(self) -> float:
        """Time in which no kernel ran: the device waited for the host, or, on a CPU, Python ran."""
        return max(self.seconds - sum(work.seconds for work in self.works), 0.0)


class StepProfiler:
    """Profiles one step of a video; tell it of the end of every step.

    Args:
        device: where the model runs.
        step: index of the step.
    """

    def __init__(self, device: torch.device, step: int) -> None:
        self._device = device
        self._step = step
        self._done = 0
        self._profile: Any = torch.profiler.profile()
        self._began = self._took = 0.0
        self._trace = b""

    def begin(self) -> None:
        """A video begins."""
        if self._step == 0:
            self._start()

    def after_step(self) -> None:
        """A step has ended."""
        self._done += 1
        if self._done == self._step:
            self._start()
        elif self._done == self._step + 1:
            self._wait()
            self._took = perf_counter() - self._began
            self._profile.stop()
            self._trace = _exported(self._profile)

    def save(self, path: Path) -> None:
        """Write the Chrome trace, whole or not at all.

        Raises:
            OSError: it cannot be written.
        """
        with replacing(path) as file, naming(path):
            file.write(self._trace)

    def breakdown(self) -> Breakdown:
        """What the step spent its time on."""
        return Breakdown(seconds=self._took, works=works_of(json.loads(self._trace)["traceEvents"]))

    def _start(self) -> None:
        self._wait()
        self._profile.start()
        self._began = perf_counter()

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def _exported(profile: Any) -> bytes:
    """The Chrome trace, which torch hands out once, as a file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        return path.read_bytes()


@contextmanager
def annotated(pipe: Any, method: Planner, kernel: Attender) -> Iterator[None]:
    """A pipeline whose attention is a method's, with the phases of every call named in a profile."""
    phase: Callable[[str], Any] = torch.profiler.record_function
    with installed(pipe, SparseAttention(method, kernel, phase=phase)):
        yield


def works_of(events: Sequence[Mapping[str, Any]]) -> list[Work]:
    """The works of a Chrome trace, the longest first.

    Args:
        events: `traceEvents`; times are microseconds.
    """
    on_device = any(event.get("cat") in _DEVICE for event in events)
    wanted = (*_DEVICE, _DEVICE_MARK) if on_device else (*_HOST, _HOST_MARK)
    lanes: dict[Any, list[Mapping[str, Any]]] = defaultdict(list)
    for event in events:
        if event.get("cat") in wanted and "dur" in event:
            lanes[event.get("pid"), event.get("tid")].append(event)
    totals: dict[tuple[str, Part], list[float]] = defaultdict(lambda: [0.0, 0])
    for lane in lanes.values():
        for event, part, own in _own_times(lane):
            mark = event["cat"] in _MARKS
            # between its kernels, a device does nothing for an annotation
            if mark and on_device:
                continue
            total = totals[_COMPILED if mark else str(event["name"]), part]
            total[0] += own
            total[1] += 1
    found = [
        Work(name=name, part=part, seconds=own / 1e6, launches=int(launches))
        for (name, part), (own, launches) in totals.items()
    ]
    return sorted(found, key=lambda work: -work.seconds)


def _own_times(lane: Sequence[Mapping[str, Any]]) -> Iterator[tuple[Mapping[str, Any], Part, float]]:
    """Each event of a thread or stream, the part that it is in, and its time without those inside of it."""
    parts: list[Part] = []
    inside = [0.0] * len(lane)
    around: list[int] = []
    order = sorted(lane, key=lambda event: (event["ts"], -event["dur"]))
    for number, event in enumerate(order):
        while around and order[around[-1]]["ts"] + order[around[-1]]["dur"] <= event["ts"]:
            around.pop()
        if around:
            inside[around[-1]] += event["dur"]
        own = event["name"] if event["cat"] in _MARKS and event["name"] in PARTS else None
        parts.append(own or (parts[around[-1]] if around else "rest"))
        around.append(number)
    for event, part, within in zip(order, parts, inside, strict=True):
        yield event, part, max(event["dur"] - within, 0.0)
