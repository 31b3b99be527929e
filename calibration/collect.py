"""Calibrating: make videos densely, have a learner note every attention call, and merge the notes."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import psutil
import torch
from jaxtyping import Float
from torch import Tensor

from calibatt.calibration.artifact import Calibration
from calibatt.calibration.files import UnusableCalibration, naming
from calibatt.calibration.in_flight import InFlight
from calibatt.calibration.sections import Index, label
from calibatt.calibration.shards import Units, UnitWriter
from calibatt.calibration.videos import DenseVideos, Videos
from calibatt.kernels.base import Attender
from calibatt.kernels.catalogue import DEFAULT
from calibatt.kernels.mask import block_count
from calibatt.kernels.plan import Plan
from calibatt.kernels.weighed import attend_and_weigh, takes_weighed
from calibatt.methods.base import Trials
from calibatt.methods.call import SparseAttention
from calibatt.methods.catalogue import METHODS, build, learns_from
from calibatt.methods.catalogue import learner as learner_of
from calibatt.methods.facts import one_line
from calibatt.methods.learning import (
    Learner,
    Origin,
    Provenance,
    Seen,
    TogetherLearner,
    WeighingLearner,
    at_every_site,
    settings_of,
)
from calibatt.methods.site import Site
from calibatt.models.entry import ModelEntry

# What merging a site holds, in notes of a site: of each unit the notes, which ScalingAttention stacks; fp64 of Budget's
# bytes takes 20 more, votes 28 (docs/calibration-sizes.json)
_MERGING_EACH, _MERGING = 2, 32
# sites whose notes may be under way: more than there are layers between a GPU and a host that is ahead of it, and few
# enough for pinned memory: of Wan 14B at 720p, 112 MB of levels (40 heads, 591 × 591 blocks, a byte each)
_UNDER_WAY = 8


def calibrate(
    entry: ModelEntry,
    pipe: Any,
    *,
    resolution: str,
    prompts: Sequence[str],
    seed: int,
    method: str = "calibatt",
    preset: str = "default",
    kernel: Attender = DEFAULT,
    steps: int | None = None,
    guidance: float | None = None,
    block: tuple[int, int] | None = None,
    folder: Path | None = None,
    progress: bool = False,
    **settings: Any,
) -> Calibration:
    """Learn offline what a method needs for a model, from one densely generated video per prompt.

    Args:
        entry, pipe: the model and its loaded pipeline.
        resolution: name of one of the model's resolutions.
        prompts: for CalibAtt, 16 are nearly as good as the paper's 64.
        seed: prompt i starts from noise of seed + i.
        method, preset: as `calibatt methods` lists them.
        kernel: computes the dense attention.
        steps, guidance: the model's defaults where None. A calibration fits videos of this many steps only.
        block: tokens of a query and of a key block; the model's own where None.
        folder: where the notes of each video are kept, so that a stopped run can be resumed; they stay
            there. None keeps them in a temporary folder until they are merged.
        progress: whether to show a progress bar over prompts × steps on stderr.
        settings: fields of the method's config, in place of the preset's.

    Raises:
        UnknownName: there is no such resolution, method or preset.
        UnusableCalibration: the folder is that of another run, in use, or damaged.
        ValueError: there is no prompt, or one is empty or not in the model's language; the preset learns nothing; a
            setting does not exist or is out of range; attention is not finite; a call is missing or comes twice.
        OSError: notes cannot be written.
    """
    check_prompts(prompts)
    # all of them before the first video: the last may be the one that the model cannot read
    for prompt in prompts:
        entry.check_prompt(prompt)
    videos = DenseVideos(entry, pipe, resolution=resolution, steps=steps, guidance=guidance)
    return calibrate_on(
        videos, method=method, preset=preset, prompts=prompts, seed=seed, kernel=kernel,
        block=block or entry.block_at(resolution), folder=folder, progress=progress, **settings,
    )  # fmt: skip


def calibrate_on(
    videos: Videos,
    *,
    method: str = "calibatt",
    preset: str = "default",
    prompts: Sequence[str],
    seed: int,
    kernel: Attender = DEFAULT,
    block: tuple[int, int] | None = None,
    folder: Path | None = None,
    progress: bool = False,
    **settings: Any,
) -> Calibration:
    """Learn offline what a method needs, from videos of any source.

    Args:
        videos: made with dense attention.
        method, preset: names in the catalogue.
        prompts, seed: prompt i starts from noise of seed + i.
        kernel: computes the dense attention.
        block: tokens of a query and of a key block; the preset's where None.
        folder: where the notes of each video are kept; None keeps them in a temporary folder until they are merged.
        progress: whether to show a progress bar over prompts × steps on stderr.
        settings: fields of the method's config, in place of the preset's.

    Raises:
        UnknownName: there is no such method or preset.
        UnusableCalibration: the folder is that of another run, in use, or damaged.
        ValueError: there is no prompt, or an empty one; the preset learns nothing; a setting does not exist or is out
            of range; attention is not finite; a call is missing or comes twice.
        OSError: notes cannot be written.
    """
    run = Run.of(videos, method=method, preset=preset, prompts=prompts, seed=seed, block=block, **settings)
    with notes_in(folder) as place:
        units = run.units(place)
        run.note(units, kernel=kernel, progress=progress)
        return run.merge(units, progress=progress)


@dataclass(frozen=True, kw_only=True)
class Run:
    """One calibration: who learns, and from what. Several processes that have the same run may share its prompts.

    Args:
        videos: of dense attention.
        origin: whose they are.
        method, preset: names in the catalogue.
        learner: of the method.
        prompts: in order; prompt i starts from noise of seed + i.
        seed: of the first prompt's noise.
    """

    videos: Videos
    origin: Origin
    method: str
    preset: str
    learner: Learner
    prompts: tuple[str, ...]
    seed: int

    @classmethod
    def of(
        cls,
        videos: Videos,
        *,
        method: str = "calibatt",
        preset: str = "default",
        prompts: Sequence[str],
        seed: int,
        block: tuple[int, int] | None = None,
        **settings: Any,
    ) -> Run:
        """A run of a method of the catalogue.

        Args:
            videos, method, preset, prompts, seed, block, settings: as for `calibrate_on`.

        Raises:
            UnknownName: there is no such method or preset.
            ValueError: there is no prompt, or an empty one; the preset learns nothing; a setting does not exist or is
                out of range.
        """
        check_prompts(prompts)
        learner = learner_for(method, preset=preset, block=block, **settings)
        # before any video, so that a pipeline that cannot be told from others costs no work
        origin = videos.origin()
        return cls(
            videos=videos, origin=origin, method=method, preset=preset, learner=learner, prompts=tuple(prompts),
            seed=seed,
        )  # fmt: skip

    def units(self, folder: Path) -> Units:
        """The units of this run in a folder, which is made where it is missing.

        Raises:
            UnusableCalibration: it is that of another run.
            OSError: it cannot be written.
        """
        return Units(
            folder,
            {
                "method": self.method,
                "settings": settings_of(self.learner),
                "prompts": self.prompts,
                "seed": self.seed,
                "origin": asdict(self.origin),
                "geometry": asdict(self.videos.geometry),
                "steps": self.videos.steps,
                "layers": self.videos.layers,
                "guidance": self.videos.guidance,
                "versions": _versions(),
            },
            self.groups,
        )

    @property
    def groups(self) -> list[range]:
        """Indices of the prompts whose videos are made side by side, as many as the learner wants or one less."""
        count = len(self.prompts)
        groups = block_count(count, self.learner.beside) if isinstance(self.learner, TogetherLearner) else count
        ends = [count * number // groups for number in range(groups + 1)]
        return [range(*ends_of) for ends_of in pairwise(ends)]

    def note(
        self, units: Units, *, kernel: Attender = DEFAULT, rank: int = 0, world: int = 1, progress: bool = False
    ) -> None:
        """Make the videos whose notes are not there yet.

        Args:
            units: of this run.
            kernel: computes the dense attention, but where a Hopper sums on the way what is noted (`attend_and_weigh`).
            rank, world: of `world` processes, that number `rank` takes units rank, rank + world, …
            progress: whether to show a progress bar over prompts × steps on stderr.

        Raises:
            UnusableCalibration: another process works on one of these prompts.
            ValueError: attention is not finite; a call is missing or comes twice; disk or memory are too small.
            OSError: notes cannot be written.
        """
        from tqdm import tqdm

        own = self.groups[rank::world]
        steps = self.videos.steps
        with units.claimed([group.start for group in own]):
            finished = units.finished()
            done = sum(len(group) for group in own if group.start in finished)
            with tqdm(
                total=sum(map(len, own)) * steps, initial=done * steps, desc="calibrating", unit="step",
                disable=not progress,
            ) as bar:  # fmt: skip
                left = [group for group in own if group.start not in finished]
                for group in left:
                    say = partial(bar.write, file=sys.stderr) if progress and group is left[0] else None
                    with units.writing(group.start) as unit:
                        self._note(group, unit, kernel, bar, partial(self._check_room, units, say))

    def merge(self, units: Units, path: Path | None = None, *, progress: bool = False) -> Calibration:
        """What the notes of all prompts come to, and the trials that the method makes with that.

        Tables go to a file site by site, and are mapped from there.

        Args:
            units: of this run.
            path: of the file; None for one without a name, which is gone with the calibration.
            progress: whether to show a progress bar over the steps of trials on stderr.

        Raises:
            UnusableCalibration: notes are missing, damaged, of another run, or not what the method can learn.
            OSError: the file cannot be written.
        """
        aside = units.aside
        try:
            self._write(units, aside)
            calibration = Calibration.load(aside)
            written, method = calibration, METHODS[self.method]
            if (trials := method.trials(calibration)) is not None:
                calibration = self._tried(calibration, trials, progress)
            if (condensed := method.condensed(calibration)) is not None:
                calibration = replace(calibration, tables=condensed)
            if path is None:
                return calibration
            if calibration is written:
                with naming(path):
                    path.parent.mkdir(parents=True, exist_ok=True)
                    os.replace(aside, path)
            else:
                calibration.save(path)
            return Calibration.load(path)
        finally:
            aside.unlink(missing_ok=True)

    def _write(self, units: Units, path: Path) -> None:
        """Write what the notes come to, each part checked."""
        own = self.videos
        provenance = Provenance(
            origin=self.origin, geometry=own.geometry, steps=own.steps, layers=own.layers, guidance=own.guidance,
            prompts=self.prompts, seed=self.seed, cost_ratio=units.cost_ratio(), versions=_versions(),
            created=datetime.now(UTC).isoformat(timespec="seconds"), sigmas=own.sigmas(self.prompts[0]),
        )  # fmt: skip
        merged = units.merged(self.learner)
        first = next(merged)
        # as large as all tables will be, and nothing in them
        empty = {
            name: torch.empty(own.steps, own.layers, *part.shape, dtype=part.dtype, device="meta")
            for name, part in first.items()
        }
        try:
            calibration = Calibration(
                method=self.method, preset=self.preset, settings=settings_of(self.learner), tables=empty,
                provenance=provenance,
            )  # fmt: skip
            calibration.check_facts()
            calibration.write(path, self._parts(chain((first,), merged), calibration))
        except UnusableCalibration:
            raise
        except ValueError as error:
            raise UnusableCalibration(
                f"{units.folder} does not hold what {self.method} learns: {one_line(error)}"
            ) from None

    def _parts(
        self, merged: Iterable[Mapping[str, Tensor]], calibration: Calibration
    ) -> Iterator[tuple[str, Index, Tensor]]:
        for site, parts in enumerate(merged):
            for name, part in parts.items():
                index = divmod(site, self.videos.layers)
                if (part.dtype, tuple(part.shape)) != at_every_site(calibration.parts.layout, name):
                    raise ValueError(f"{label(name, index)}: it is of another shape or type than at the first site")
                calibration.check_part(name, index, part)
                yield name, index, part

    def _tried(self, calibration: Calibration, trials: Trials, progress: bool) -> Calibration:
        """The calibration after trials; as it is, where these videos do not show what attention computes."""
        from tqdm import tqdm

        prompts = self.prompts[: trials.prompts]
        planners = [build("dense"), *trials.planners]
        total = len(prompts) * len(planners) * self.videos.steps
        distances = torch.zeros(len(trials.planners), len(prompts))
        with tqdm(total=total, desc="trying out", unit="step", disable=not progress) as bar:
            for number, prompt in enumerate(prompts):
                reference = None
                for which, planner in enumerate(planners):
                    shown = self.videos.show(
                        SparseAttention(planner, DEFAULT), prompts=(prompt,), seed=self.seed + number,
                        after_step=bar.update,
                    )  # fmt: skip
                    if shown is None:
                        return calibration
                    (video,) = shown
                    if reference is None:
                        reference = video
                    else:
                        distances[which - 1, number] = (video - reference).square().mean()
        return replace(calibration, tables={**calibration.tables, **trials.learn(distances)})

    def _check_room(self, units: Units, say: Callable[[str], object] | None, notes: Mapping[str, Tensor]) -> None:
        """Refuse to go on where there is not the room for what is still to be noted, and for merging it."""
        site = sum(note.nbytes for note in notes.values())
        left = len(units.groups) - len(units.finished())
        # what notes are merged to is about as large as those of one unit
        disk = (left + 1) * site * self.videos.steps * self.videos.layers
        memory = site * (_MERGING_EACH * len(units.groups) + _MERGING)
        free = shutil.disk_usage(units.folder).free, psutil.virtual_memory().available
        done, wanted = units.videos()
        if say is not None:
            say(
                f"videos to make: {wanted - done}; their notes take up to {disk / 1e9:.3g} GB in {units.folder} "
                f"({free[0] / 1e9:.3g} free), and merging them {memory / 1e9:.2g} GB of host memory"
            )
        for what, needed, there in (("disk", disk, free[0]), ("host memory", memory, free[1])):
            if there < needed:
                raise ValueError(
                    f"calibrating takes {needed / 1e9:.3g} GB more of {what}, and {there / 1e9:.3g} are free: make room"
                    + (f" in {units.folder}, or write elsewhere" if what == "disk" else "")
                )

    def _note(
        self, group: range, unit: UnitWriter, kernel: Attender, bar: Any, check_room: Callable[[Any], None]
    ) -> None:
        watcher = _Watcher(self.learner, self.videos, group, unit, kernel, check_room)
        start = time.perf_counter()
        try:
            self.videos.show(
                watcher, prompts=[self.prompts[prompt] for prompt in group], seed=self.seed + group.start,
                after_step=partial(bar.update, len(group)),
            )  # fmt: skip
        except torch.OutOfMemoryError:
            if len(group) == 1:
                raise
            raise ValueError(
                f"{len(group)} videos side by side take more memory than there is: learn with a smaller `beside` "
                "(--set beside=2)"
            ) from None
        watching = watcher.finish()
        unit.finish(total=time.perf_counter() - start, watching=watching)


def learner_for(
    method: str, *, preset: str = "default", block: tuple[int, int] | None = None, **settings: Any
) -> Learner:
    """What a preset of a method learns by.

    Args:
        method, preset: names in the catalogue.
        block: tokens of a query and of a key block; the preset's where None.
        settings: fields of the method's config, in place of the preset's.

    Raises:
        UnknownName: there is no such method or preset.
        ValueError: the preset learns nothing; a setting does not exist or is out of range.
    """
    found = learner_of(method, preset=preset, block=block, **settings)
    if found is None:
        source = learns_from(method, preset, **settings)
        hint = "it can be used as it is" if source is None else f"it uses what {source} learns"
        raise ValueError(f"{method}/{preset} learns nothing of its own: {hint}")
    return found


@contextmanager
def notes_in(folder: Path | None) -> Iterator[Path]:
    """A folder for the units of a run: the given one, which stays, or a temporary one."""
    if folder is not None:
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="calibatt-") as temporary:
        yield Path(temporary)


def _weighed(q: Tensor, k: Tensor, v: Tensor, block: tuple[int, int] | None) -> tuple[Tensor, Tensor] | None:
    """Outputs and mass where a block is given and both can be had at once."""
    return attend_and_weigh(q, k, v, block=block) if block is not None and takes_weighed(q, block) else None


def rehearse(learner: Learner, q: Tensor, k: Tensor, v: Tensor, site: Site) -> None:
    """Note a call in vain, as that of a first and as that of a later prompt, so that the code for it is compiled.

    Args:
        learner: that notes.
        q, k, v: what attention sees, [1, heads, tokens, head_dim].
        site: where.
    """
    learner.note(q[0], k[0], v[0], site, 0)
    if isinstance(learner, WeighingLearner):
        weighed = _weighed(q, k, v, learner.weighed(site, 1))
        if weighed is None:
            learner.note(q[0], k[0], v[0], site, 1)
        else:
            learner.note_weighed(weighed[1], site)


class _Watcher:
    """Dense attention of some videos made side by side, which has a learner note the conditional calls, each site once.

    A kernel computes it, but where mass of blocks is noted and can be summed on the way.

    A GPU goes on while notes are on their way and are written: what is wrong with them is found some calls later.
    """

    def __init__(
        self,
        learner: Learner,
        videos: Videos,
        group: range,
        unit: UnitWriter,
        kernel: Attender,
        check_room: Callable[[Any], None],
    ) -> None:
        self._kernel = kernel
        self._check_room = check_room
        self._learner = learner
        self._videos = videos
        self._group = group
        self._unit = unit
        self._seen: set[tuple[int, int]] = set()
        # of the site at hand, and whether each output is finite
        self._calls: list[Seen] = []
        self._finite: list[Tensor] = []
        self._sent: deque[_Sent] = deque()
        self._clock = _Clock()
        self._room_unknown = True

    def start_video(self) -> None:
        """What is seen is told apart by its site."""

    def __call__(
        self,
        q: Float[Tensor, "1 heads tokens head_dim"],
        k: Float[Tensor, "1 heads tokens head_dim"],
        v: Float[Tensor, "1 heads tokens head_dim"],
        site: Site,
    ) -> Float[Tensor, "1 heads tokens head_dim"]:
        """Compute the call; note it, or keep it until all videos' are there.

        Raises:
            ValueError: it is of another geometry or number of steps or layers than was announced, comes a second time,
                or it or an earlier one is not finite.
            OSError: the notes cannot be written.
        """
        weighed = _weighed(q, k, v, self._block(site))
        out, mass = (self._kernel.attend(q, k, v, Plan.dense(site.geometry)), None) if weighed is None else weighed
        self._saw((q[0], k[0], v[0], site), out, mass)
        return out

    def _block(self, site: Site) -> tuple[int, int] | None:
        """Blocks whose mass the learner can do with, of a call that is to be noted by itself."""
        if site.branch != "cond" or len(self._group) > 1 or not isinstance(self._learner, WeighingLearner):
            return None
        return self._learner.weighed(site, self._group.start)

    def _saw(self, call: Seen, out: Tensor, mass: Tensor | None) -> None:
        q, *_, site = call
        self._check_announced(site)
        if site.branch != "cond":
            return
        where = f"step {site.step}, layer {site.layer}"
        if (site.step, site.layer) in self._seen or site.sample != len(self._calls):
            raise ValueError(
                f"attention was called twice at {where} of one video: calibrate with a scheduler that calls the model "
                "once a step"
            )
        self._clock.device = q.device
        with self._clock.running():
            self._calls.append(call)
            self._finite.append(out.isfinite().all())
            if len(self._calls) == len(self._group):
                notes = self._notes(mass)
                tensors = InFlight([torch.stack(self._finite), *notes.values()])
                self._sent.append(_Sent(site=site, names=tuple(notes), tensors=tensors, dtype=q.dtype))
                self._seen.add((site.step, site.layer))
                self._calls.clear()
                self._finite.clear()
            while self._sent and (len(self._sent) > _UNDER_WAY or self._sent[0].tensors.arrived):
                self._write(self._sent.popleft())

    def finish(self) -> float:
        """Write what is still under way, and refuse videos that lacked a call.

        Returns:
            Seconds that notes took of the device: a GPU's own, and those in which it had to wait for the host.

        Raises:
            ValueError: naming the first call that was missing, or is not finite.
            OSError: the notes cannot be written.
        """
        with self._clock.running():
            while self._sent:
                self._write(self._sent.popleft())
        self._check_complete()
        return self._clock.seconds()

    def _write(self, sent: _Sent) -> None:
        finite, *received = sent.tensors.received()
        where = f"step {sent.site.step}, layer {sent.site.layer}"
        if not bool(finite.all()):
            raise ValueError(
                f"attention at {where} is not finite: the weights hold NaN or infinity, or overflow in {sent.dtype}"
            )
        notes = dict(zip(sent.names, received, strict=True))
        wrong = [name for name, note in notes.items() if note.is_floating_point() and bool(note.isnan().any())]
        if wrong:
            raise ValueError(f"{', '.join(wrong)} at {where} is NaN: nothing can be learnt from this call")
        if self._room_unknown:
            self._check_room(notes)
            self._room_unknown = False
        self._unit.put(sent.site.step * sent.site.layers + sent.site.layer, notes)

    def _notes(self, mass: Tensor | None) -> Mapping[str, Tensor]:
        if isinstance(self._learner, TogetherLearner):
            return self._learner.note_together(self._calls)
        ((q, k, v, site),) = self._calls
        if mass is not None and isinstance(self._learner, WeighingLearner):
            return self._learner.note_weighed(mass, site)
        return self._learner.note(q, k, v, site, self._group.start)

    def _check_complete(self) -> None:
        every = [(step, layer) for step in range(self._videos.steps) for layer in range(self._videos.layers)]
        missing = [site for site in every if site not in self._seen]
        if missing:
            step, layer = missing[0]
            raise ValueError(
                f"prompt {self._group.start}'s video had no conditional attention call at step {step}, layer {layer}, "
                f"nor at {len(missing) - 1} of {len(every)} others: does the pipeline skip layers, or was it stopped?"
            )

    def _check_announced(self, site: Site) -> None:
        own = self._videos
        text = min(site.geometry.text_tokens, own.geometry.text_tokens)
        if site.geometry != replace(own.geometry, text_tokens=text) or site.layers != own.layers:
            raise ValueError(
                f"calibrating {own.geometry} in {own.layers} layers, but the pipeline has {site.geometry} in "
                f"{site.layers} layers: is it the pipeline of this model, at this resolution?"
            )
        if site.steps != own.steps:
            raise ValueError(
                f"calibrating {own.steps} steps, but the pipeline runs {site.steps}: take a scheduler that calls the "
                "model once a step"
            )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Sent:
    """Notes of a site on their way, behind whether its outputs are finite."""

    site: Site
    names: tuple[str, ...]
    tensors: InFlight
    dtype: torch.dtype


def check_prompts(prompts: Any) -> None:
    """Refuse what is no list of texts.

    Raises:
        ValueError: it is one text, or empty, or something in it is no text or an empty one.
    """
    if isinstance(prompts, str):
        raise ValueError("prompts is a single string: give a list of strings, one per video")
    # callers without a type checker pass other things
    if not prompts or not all(isinstance(prompt, str) and prompt.strip() for prompt in prompts):
        raise ValueError("give at least one prompt to calibrate on, and no empty ones; each is a text")


def _versions() -> Mapping[str, str]:
    return {package: version(package) for package in ("calibatt", "torch", "diffusers")}


class _Clock:
    """Adds up seconds of a device; a GPU's by events, so that the host need not wait for it.

    Attributes:
        device: that works.
    """

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self._marks: list[tuple[Any, Any]] = []

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count what happens inside, and how long a GPU waits there for the host."""
        start = self._mark()
        yield
        self._marks.append((start, self._mark()))

    def seconds(self) -> float:
        """So far; waits until a GPU has done all that it was asked to."""
        if self.device.type != "cuda":
            return float(sum(end - start for start, end in self._marks))
        torch.cuda.synchronize(self.device)
        # events count in milliseconds
        return float(sum(start.elapsed_time(end) for start, end in self._marks)) / 1e3

    def _mark(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event: Any = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event
