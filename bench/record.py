"""The record: one arm on one workload, and the file that holds a run of them.

A run is pytest-benchmark's own JSON. Each benchmark's `extra_info` has the fields of `Record` under their own names,
raw times included, since pytest-benchmark leaves `stats.data` out unless told otherwise. Cells that were not timed
stand in a top-level list `untimed` with the same fields. What a file may hold is checked when it is read: types by
pydantic, values by the record itself. Nothing here imports torch, so that reports can be made anywhere.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path, PurePath
from statistics import median
from typing import Annotated, Any, Literal, Required, get_args

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, with_config
from typing_extensions import TypedDict

from calibatt.bench.statistics import Interval, paired_ratio
from calibatt.methods.looks import MARKERS as MARKERS
from calibatt.methods.looks import Marker as Marker
from calibatt.methods.looks import look_fault

SCHEMA = 1
# what a file says beside the fields of a record, for readers: it follows from them
_DERIVED = frozenset({"schema", "speedup", "interval_reached"})

# this is the one home of these words: the rest of the benchmark imports them from here
# suites stand in the order in which they run on a workload
Suite = Literal["kernel", "forward", "calibration", "attention", "denoise"]
Outcome = Literal["ok", "wrong", "unsupported", "out_of_memory", "failed"]
Mode = Literal["native", "matched", "equal_density", "equal_fidelity"]
# `rows`: heads that reuse rows; `mixed`: every other head reuses rows, the others have a random mask
Pattern = Literal["random", "even", "banded", "captured", "rows", "mixed"]
Samples = tuple[float, ...]

SUITES: tuple[Suite, ...] = get_args(Suite)
OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)

# first word of what a record says of weights with attention structure built in: for time and memory alone
PLANTED = "planted"

# phases that are in no sample: they come on top of the time, not out of it
OUTSIDE_PHASES = frozenset({"launch"})

# beyond every quantity that is measured here, and so far from overflow that sums and ratios stay finite
_LARGEST = 1e30
# a thousandth of what the finest clock tells, the nanosecond of `time.perf_counter_ns`
_SHORTEST_S = 1e-12
# a run that wants all CPUs, and loses this share of them, is slower by as much: by what the gate must find of a speedup
DISTURBED = 0.05
# an error is read on a terminal, and may quote a file
_LONGEST_LINE = 300
# names stand in tables and figures
_Name = Annotated[str, Field(max_length=200)]

# no string is a number, no NaN a measurement, and what we do not know may mean anything
STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
# pytest-benchmark writes more than we read
_OPEN = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)


def plain(text: str, longest: int | None = None) -> str:
    """Text as one line that a terminal shows as it is: what cannot be printed is escaped, as in a Python string.

    Args:
        text: from a file or an exception.
        longest: characters; of a longer text, the middle is left out.
    """
    line = "".join(one if one.isprintable() else one.encode("unicode_escape").decode("ascii") for one in text)
    if longest is None or len(line) <= longest:
        return line
    end = longest // 3
    return f"{line[: longest - end - 3]} … {line[-end:]}"


@with_config(STRICT)
@dataclass(frozen=True, slots=True, kw_only=True)
class Telemetry:
    """What went on while samples were taken, by readings of the device's state. What could not be read is None.

    Args:
        readings: how many there were, each counted for every sample that it stands for: of milliseconds, for many.
        clock_mhz, lowest_clock_mhz: of a GPU's multiprocessors, or of the CPUs on average: median, and lowest.
        memory_clock_mhz, power_w: of a GPU, median.
        temperature_c, memory_bytes: of a GPU, highest; all memory in use, whoever's.
        reasons: what held a GPU's clock down at any time, as NVML spells its clock-event reasons.
        throttled: whether one of them was heat or the power supply (the ordinary power cap does not count).
        disturbed: share that others had of a GPU's multiprocessors, or of the CPUs; of a virtual machine, its host too.
        load, steal: share of the CPUs that anybody had, and that the host gave to other machines.
        others: names of other processes that had most of the CPUs, with the largest share of each; looked up at most
            twice a minute, where others had much.
    """

    readings: int
    clock_mhz: float | None = None
    lowest_clock_mhz: float | None = None
    memory_clock_mhz: float | None = None
    power_w: float | None = None
    temperature_c: float | None = None
    memory_bytes: int | None = None
    reasons: tuple[_Name, ...] | None = None
    throttled: bool | None = None
    disturbed: float | None = None
    load: float | None = None
    steal: float | None = None
    others: Mapping[str, float] | None = None

    @property
    def spoilt(self) -> bool:
        """Whether a time that was taken meanwhile says little."""
        return bool(self.throttled) or (self.disturbed or 0.0) > DISTURBED


class UnusableFile(ValueError):
    """A file that is not a run of this suite; the message is one line of bounded length that says why."""

    def __init__(self, message: str) -> None:
        super().__init__(plain(message, _LONGEST_LINE))


@with_config(STRICT)
@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One arm (a method on a kernel) on one workload. What was not measured is None, never 0 or NaN.

    What was run:
        suite, model, resolution, frames, steps, tokens, heads, head_dim, dtype, compiled: the workload.
        weights: `random`, or a digest of them; before it stands `planted` where attention structure was planted in a
            model without weights of its own, which says nothing about fidelity.
        layers: of a transformer without weights of its own: of which one forward pass was measured, or whose weights
            are planted and that had others than the model.
        inputs: where attention's inputs come from, if they are not the model's own.
        seed: of the noise of the videos, and of drawn inputs; files without it have 0.
        guidance: classifier-free guidance scale of a whole generation.
        method_label, method_colour, method_marker: how a report shows the method: its authors' spelling, `#RRGGBB`, and
            one of `MARKERS`.
        method, preset, mode: `native` is the method's own settings; `matched` has the run's dense schedule in place of
            the method's; `equal_density` has settings that give a density, target_density, or CalibAtt's where there is
            none; `equal_fidelity` those that give target_psnr_db. In the kernel suite the method is `blocks` and the
            preset the density that was asked for.
        settings: what is set in place of the preset's, `NAME=VALUE` with commas between them; absent for nothing.
        dense_steps, dense_layers: shares of the first steps and layers that are dense in every arm of the run.
        kernel, block: the kernel as it was asked for, and tokens of a query and of a key block.
        ran_on: what the default kernel chose, for the sparse plans where there are any.
        block_choice: how the blocks were chosen: `native`, the preset's own, or a size; absent for the model's.
        remainder: what stands for the blocks that are left out: `zeroth` is the mean of each; absent for nothing.
        own_remainder: whether the method itself has it; absent where `+tail` gave it one, and without a remainder.
        query_stride: of so many queries, what was learnt looked at one; absent for all.
        mask: where a kernel benchmark's mask comes from; `rows` for row reuse, `mixed` for both in one layer.
        baseline: the dense kernel that times are compared with.
        prompts: captions of the samples, in order.
    How it went:
        outcome, reason: a record other than `ok` says why and carries no times.
        throttled: whether heat or the power supply held the GPU's clock down during the samples or their baseline.
        disturbed: share that others had meanwhile of the CPUs, where a CPU computes (other processes, and of a virtual
            machine its host), or of the GPU; over an arm's samples and the baseline's, by their length. In older files
            over the rounds of all arms.
        spoilt: of each sample whether it, or its baseline's, was taken while that was so, others having more than a
            twentieth. It is kept, and decides nothing in the gate. Absent in older files.
        telemetry: what was read during the arm's own samples.
    Time, in seconds:
        samples_s: end to end, one a round.
        baseline_samples_s: the dense arm, same rounds.
        interval_target: half the width of the interval of the paired speedup, as a share of it, at which an arm's
            rounds were to end; absent where their number was fixed. That it was is `interval_reached` in a file.
        phases_s: samples of each phase (`plan`, `attend`, …), none within another. In the denoise suite also
            `transformer` (without its self-attention), `text` (encoders), `vae` and `scheduler`, of one round in eight
            (in older files of each), on a GPU of a video apart from the samples where the host is not far ahead. In the
            kernel suite on
            a GPU: `lists`, what it takes to make lists of the mask's bits (a part of each sample, taken again by
            itself), and `launch`, the host's time until all is queued, which is in no sample (`OUTSIDE_PHASES`).
        first_call_s: a kernel's first call under this plan in a kernel benchmark, in which it compiles what this run
            and its cache on disk do not have yet; in no sample.
        tflops: of the blocks kept.
        gemm_tflops: rate of a large matrix product on the same device in the same run: the roofline.
    Cost:
        peak_memory_bytes, plan_memory_bytes, energy_j (samples), clocks_mhz (samples).
        preparation_s: seconds of the arm's offline part, where it was done in this run.
        calibration_cost_ratio: time of calibration over that of generating the same videos densely, which older files
            have from the calibration's own clock.
    Truth, one value a sample where it is a tuple:
        density: kept fraction of the block products over all calls, text and dense steps included.
        recall: attention mass kept, mean.
        kernel_error: largest error against fp64 under the same plan; kernel_error_budget is what it may be.
        method_error: relative L2 error of attention outputs against dense ones, pooled by norm over calls:
            sqrt(Σ‖out − dense‖² / Σ‖dense‖²). In the denoise suite over all calls (steps, layers, branches, heads) of
            the dense video of the first round's prompt and seed, beside which the arm plans and its kernel computes
            every call; in the attention suite over the probes, in fp64, of the heads that are checked.
        error_calls: how many calls are pooled; absent in older files, whose method_error is the mean of the relative
            errors of some calls.
        checked_heads: heads of which recall and the kernel error were taken, and the method error of probes.
        psnr_db, ssim: generated video against the same-seed dense one.
        alignment, alignment_dense: how much of the caption can be read back from the video, 0 to 1.
        mask_agreement: overlap (intersection over union) of the masks of different prompts.
        mask_iou: overlap of the masks with those that are learnt from all queries; absent where these are.
    artifact: file with pictures' data, relative to the JSON file.

    Raises:
        ValueError: the fields contradict each other, or a value cannot be.
    """

    suite: Suite
    model: _Name
    method: _Name
    kernel: _Name
    outcome: Outcome
    reason: str | None = None
    method_label: _Name | None = None
    method_colour: str | None = None
    method_marker: Marker | None = None
    weights: _Name | None = None
    resolution: _Name | None = None
    frames: int | None = None
    steps: int | None = None
    seed: int | None = None
    guidance: float | None = None
    tokens: int | None = None
    heads: int | None = None
    head_dim: int | None = None
    dtype: _Name | None = None
    compiled: bool | None = None
    layers: int | None = None
    preset: _Name | None = None
    settings: _Name | None = None
    inputs: _Name | None = None
    mode: Mode | None = None
    target_density: float | None = None
    target_psnr_db: float | None = None
    dense_steps: float | None = None
    dense_layers: float | None = None
    block_choice: _Name | None = None
    ran_on: _Name | None = None
    block: tuple[int, int] | None = None
    remainder: Literal["zeroth"] | None = None
    own_remainder: bool | None = None
    query_stride: int | None = None
    mask: Pattern | None = None
    baseline: _Name | None = None
    prompts: tuple[str, ...] | None = None
    throttled: bool | None = None
    disturbed: float | None = None
    spoilt: tuple[bool, ...] | None = None
    telemetry: Telemetry | None = None
    samples_s: Samples | None = None
    baseline_samples_s: Samples | None = None
    interval_target: float | None = None
    phases_s: Mapping[_Name, Samples] | None = None
    first_call_s: float | None = None
    tflops: float | None = None
    gemm_tflops: float | None = None
    peak_memory_bytes: int | None = None
    plan_memory_bytes: int | None = None
    energy_j: Samples | None = None
    clocks_mhz: Samples | None = None
    preparation_s: float | None = None
    calibration_cost_ratio: float | None = None
    density: float | None = None
    recall: float | None = None
    kernel_error: float | None = None
    kernel_error_budget: float | None = None
    method_error: float | None = None
    error_calls: int | None = None
    checked_heads: int | None = None
    psnr_db: Samples | None = None
    ssim: Samples | None = None
    alignment: Samples | None = None
    alignment_dense: Samples | None = None
    mask_agreement: float | None = None
    mask_iou: float | None = None
    artifact: _Name | None = None

    def __post_init__(self) -> None:
        problem = self._contradiction()
        if problem:
            raise ValueError(f"record of {self.method} on {self.model}: {problem}")

    def _contradiction(self) -> str | None:
        if self.suite not in SUITES:
            return f"suite {self.suite!r} is none of {', '.join(SUITES)}"
        if self.outcome not in OUTCOMES:
            return f"outcome {self.outcome!r} is none of {', '.join(OUTCOMES)}"
        if (self.outcome == "ok") != (self.samples_s is not None):
            return "an outcome of 'ok' has samples, and no other outcome has"
        if (self.outcome == "ok") == (self.reason is not None):
            return "an outcome other than 'ok' has a reason, and 'ok' has none"
        if self.baseline_samples_s is not None and len(self.baseline_samples_s) != len(self.samples_s or ()):
            return "samples and baseline samples are not pairs"
        marks = self.spoilt
        if marks is not None and {len(self.samples_s or ()), len(self.energy_j or marks)} != {len(marks)}:
            return "not every sample is marked as spoilt or sound"
        if self.own_remainder and self.remainder is None:
            return "a method with a remainder of its own has a remainder"
        if self.mode == "equal_fidelity" and self.target_psnr_db is None:
            return "mode equal_fidelity has a target_psnr_db"
        truth = (self.psnr_db, self.ssim, self.alignment, self.method_error)
        if self.planted and any(one is not None for one in truth):
            return "planted weights have no fidelity"
        error, budget = self.kernel_error, self.kernel_error_budget
        if self.outcome == "ok" and error is not None and budget is not None and error > budget:
            return f"kernel error {error:.3g} exceeds its budget {budget:.3g}"
        return self._strange_value() or self._strange_look()

    def _strange_value(self) -> str | None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Telemetry):
                # that nothing held a clock down was measured
                value = {name: one for name, one in asdict(value).items() if name != "reasons"}
            if value == () or (isinstance(value, Mapping) and () in value.values()):
                return f"{field.name} is empty: what was not measured is left out"
            for number in _numbers(value):
                # so written that it holds of NaN too
                if not abs(number) <= _LARGEST:
                    shown = f"{number}" if isinstance(number, float) else "too large"
                    return f"{field.name} is {shown}: what was not measured is left out"
        times = (*(self.samples_s or ()), *(self.baseline_samples_s or ()))
        if min(times, default=1.0) < _SHORTEST_S:
            return "a sample is not a positive time"
        phases = self.phases_s or {}
        if len({len(phases[name]) for name in ("permute", "unpermute") if name in phases}) > 1:
            return "permute and unpermute are not pairs"
        if min((sample for samples in phases.values() for sample in samples), default=0.0) < 0:
            return "a phase has a negative time"
        if self.block is not None and min(self.block) < 1:
            return "a block has at least one token"
        if self.density is not None and self.density < 0:
            return f"density {self.density:g} is negative"
        if self.interval_target is not None and self.interval_target <= 0:
            return f"interval_target {self.interval_target:g} is not positive"
        if self.disturbed is not None and not 0 <= self.disturbed <= 1:
            return f"disturbed {self.disturbed:g} is no share"
        return None

    def _strange_look(self) -> str | None:
        if (fault := look_fault(self.method_colour, self.method_marker)) is not None:
            return f"method_{fault}"
        if self.artifact is not None:
            path = PurePath(self.artifact)
            if path.is_absolute() or ".." in path.parts or not path.name:
                return "its artifact is not a file beside the run"
        return None

    @property
    def speedup(self) -> Interval | None:
        """Paired speedup over the dense baseline of the same run; None for an arm without one."""
        if self.samples_s is None or self.baseline_samples_s is None:
            return None
        return paired_ratio(self.baseline_samples_s, self.samples_s)

    @property
    def interval_reached(self) -> bool | None:
        """Whether the speedup is known as well as was asked for; None where nothing was."""
        if self.speedup is None or self.interval_target is None:
            return None
        return self.speedup.within(self.interval_target)

    @property
    def planted(self) -> bool:
        """Whether attention structure was planted in the model."""
        return self.weights is not None and self.weights.split()[:1] == [PLANTED]

    @property
    def of_ideal(self) -> float | None:
        """Speedup over what leaving blocks out could give at best, 1 / density; for attention calls, not for videos."""
        if self.suite in ("denoise", "forward") or self.speedup is None or self.density is None:
            return None
        return self.speedup.median * self.density

    @property
    def pays_after(self) -> float | None:
        """Videos after which what the offline part took is saved; None where nothing surely is, or was not measured."""
        if self.suite != "denoise" or self.preparation_s is None or not (self.samples_s and self.baseline_samples_s):
            return None
        # where dense may be the faster one, as far as this run can tell, there is nothing to count on
        if self.speedup is None or self.speedup.low is None or self.speedup.low <= 1:
            return None
        saved = median(baseline - own for baseline, own in zip(self.baseline_samples_s, self.samples_s, strict=True))
        return self.preparation_s / saved if saved > 0 else None

    def sound(self, values: Samples) -> Samples:
        """Those of the samples that nothing spoilt; all where their times are doubtful as a whole.

        Args:
            values: one a sample.
        """
        if self.spoilt is None or self.doubt is not None:
            return values
        return tuple(value for value, mark in zip(values, self.spoilt, strict=True) if not mark)

    @property
    def doubt(self) -> str | None:
        """What makes its times doubtful, if anything does: where samples are marked, half of them or more must be."""
        # until then a median stands
        if self.spoilt is not None and 2 * sum(self.spoilt) < len(self.spoilt):
            return None
        if self.throttled:
            return "throttled"
        if self.disturbed is not None and (self.spoilt is not None or self.disturbed > DISTURBED):
            of_gpu = self.telemetry is not None and self.telemetry.load is None
            return f"disturbed: others had {self.disturbed:.0%} of the {'GPU' if of_gpu else 'CPUs'}"
        return None

    @property
    def computed_by(self) -> str:
        """The kernel that ran."""
        return self.kernel if self.ran_on is None else self.ran_on

    @property
    def arm(self) -> str:
        """Short name of the arm within its workload, e.g. `radial/no-warmup =0.35` or `dense`."""
        return self._spelt(self.method, "+tail", " =density", " ={:g}", " ={:g} dB")

    @property
    def title(self) -> str:
        """The arm as a report names it, e.g. `SpargeAttn at density 0.35`."""
        label = self.method_label or self.method
        return self._spelt(label, " + tail", " at equal density", " at density {:g}", " at {:g} dB")

    def _spelt(self, method: str, tail: str, equal_density: str, density: str, fidelity: str) -> str:
        name = method if self.preset in (None, "default") else f"{method}/{self.preset}"
        if self.settings is not None:
            name += f"[{self.settings}]"
        if self.remainder is not None and not self.own_remainder:
            name += tail
        if self.mode == "equal_density":
            name += equal_density if self.target_density is None else density.format(self.target_density)
        elif self.mode == "equal_fidelity":
            name += fidelity.format(self.target_psnr_db)
        if self.dense_steps is not None:
            name += f", {self.dense_steps:.0%} of the steps dense"
        if self.dense_layers:
            name += f", {self.dense_layers:.0%} of the layers dense"
        if self.block_choice is not None:
            name += f", blocks {self.block_choice}"
        return name if self.query_stride is None else f"{name}, one query in {self.query_stride}"

    @property
    def workload(self) -> tuple[Any, ...]:
        """What the arms that may be compared have in common."""
        return (
            self.suite, self.model, self.planted, self.inputs, self.resolution, self.layers, self.steps, self.dtype,
            self.compiled, self.seed or 0,
        )  # fmt: skip

    @property
    def key(self) -> tuple[Any, ...]:
        """Identity of a measurement across runs.

        Of a method, the block size is excluded: an arm that failed early never had one.
        """
        # dense runs on whichever kernel is fastest that day
        kernel = None if self.method == "dense" else self.kernel
        if self.suite in ("kernel", "forward"):
            return (*self.workload, self.method, self.preset, kernel, self.block, self.mask, self.remainder)
        # elsewhere a preset or a choice fixes the blocks
        wanted = (
            self.mode, self.target_density, self.target_psnr_db, self.dense_steps, self.dense_layers, self.remainder,
            self.query_stride,
        )  # fmt: skip
        return (*self.workload, self.method, self.preset, self.settings, *wanted, self.block_choice, kernel)

    def to_extra_info(self) -> dict[str, Any]:
        """The fields as they stand in the file; what was not measured is absent."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        info = {name: value for name, value in values.items() if value is not None}
        if self.telemetry is not None:
            info["telemetry"] = {name: value for name, value in asdict(self.telemetry).items() if value is not None}
        if self.speedup is not None:
            info["speedup"] = {name: value for name, value in asdict(self.speedup).items() if value is not None}
        if self.interval_reached is not None:
            info["interval_reached"] = self.interval_reached
        return {"schema": SCHEMA, **info}

    @classmethod
    def from_extra_info(cls, info: Mapping[str, Any], samples_s: Samples | None = None) -> Record:
        """Rebuild a record from a file's fields.

        Args:
            info: the fields, as JSON has them.
            samples_s: `stats.data`, where files of earlier versions have the samples.

        Raises:
            ValueError: another schema, an unknown or missing field, a wrong type, or a contradiction.
        """
        if info.get("schema") != SCHEMA:
            raise ValueError(f"its schema is {info.get('schema')!r}, this version reads {SCHEMA}")
        given = {name: value for name, value in info.items() if name not in _DERIVED}
        if samples_s is not None:
            given.setdefault("samples_s", samples_s)
        try:
            return _RECORD.validate_json(json.dumps(given))
        except ValidationError as error:
            raise ValueError(first_problem(error)) from None


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One benchmark file: where it ran, and its records.

    Args:
        path: the file.
        machine: `machine_info` of the file.
        commit: `commit_info` of the file.
        datetime: when it ran, ISO 8601.
        command: the command line that made it.
        records: timed ones first, then `untimed`.
    """

    path: Path
    machine: Mapping[str, Any]
    commit: Mapping[str, Any]
    datetime: str
    command: str
    records: tuple[Record, ...]

    def artifact(self, record: Record) -> Path | None:
        """File with a record's picture data, if it lies beside the JSON file."""
        if record.artifact is None:
            return None
        path = self.path.parent / record.artifact
        # unlike `path.is_file`, this is False of a name that no file can have
        return path if os.path.isfile(path) else None


class _Cpu(TypedDict, total=False):
    vendor_id_raw: str | None
    # text where an architecture names them
    family: int | str | None
    model: int | str | None
    stepping: int | str | None
    brand_raw: str | None
    flags: list[str] | None
    flags_sha256: str | None
    caches: dict[str, int] | None
    count: int | None
    cores: int | None
    usable: float | None


@with_config(_OPEN)
class _Machine(TypedDict, total=False):
    gpu: str | None
    gpu_power_limit_w: float | None
    driver: str | None
    cpu: _Cpu | None
    system: str | None
    python_version: str | None
    cuda: str | None
    cudnn: int | None
    torch_build: str | None
    threads: int | None
    versions: dict[str, str | None] | None


@with_config(_OPEN)
class _Commit(TypedDict, total=False):
    id: str | None
    dirty: bool | None
    branch: str | None


@with_config(_OPEN)
class _Stats(TypedDict, total=False):
    data: Samples


@with_config(_OPEN)
class _Benchmark(TypedDict):
    stats: _Stats
    extra_info: dict[str, Any]


@with_config(_OPEN)
class _File(TypedDict, total=False):
    benchmarks: Required[list[_Benchmark]]
    untimed: list[dict[str, Any]]
    machine_info: _Machine | None
    commit_info: _Commit | None
    datetime: str
    command: str


_RECORD = TypeAdapter(Record)
_FILE = TypeAdapter(_File)


def load_run(path: Path) -> Run:
    """Read a file written by `pytest bench --benchmark-json=FILE`.

    Raises:
        UnusableFile: it is missing, not JSON, not ours, of another schema, or empty of records.
    """
    try:
        data = _FILE.validate_json(path.read_bytes())
    except OSError as error:
        raise UnusableFile(
            f"{path}: cannot be read ({error.strerror}); give a file of `pytest bench --benchmark-json`"
        ) from None
    except ValidationError as error:
        raise UnusableFile(f"{path}: {first_problem(error)}; give a file of `pytest bench --benchmark-json`") from None
    records = [
        _record(f"{path}: benchmarks[{place}].extra_info", benchmark["extra_info"], benchmark["stats"].get("data"))
        for place, benchmark in enumerate(data["benchmarks"])
    ]
    records += [_record(f"{path}: untimed[{place}]", info) for place, info in enumerate(data.get("untimed", []))]
    if not records:
        raise UnusableFile(f"{path}: holds no records; was every benchmark deselected?")
    return Run(
        path=path,
        machine=data.get("machine_info") or {},
        commit=data.get("commit_info") or {},
        datetime=data.get("datetime", ""),
        command=data.get("command", ""),
        records=tuple(records),
    )


def _record(where: str, info: Mapping[str, Any], samples_s: Samples | None = None) -> Record:
    try:
        return Record.from_extra_info(info, samples_s)
    except ValueError as error:
        raise UnusableFile(f"{where}: {error}") from None


def first_problem(error: ValidationError) -> str:
    """The first thing that is wrong: where, and what."""
    found = error.errors(include_url=False, include_context=False, include_input=False)[0]
    where = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in found["loc"]).lstrip(".")
    said = found["msg"].removeprefix("Value error, ")
    return f"{where}: {said}" if where else said


def _numbers(value: Any) -> Iterator[float]:
    if isinstance(value, Mapping):
        value = tuple(value.values())
    if isinstance(value, tuple):
        for item in value:
            yield from _numbers(item)
    elif isinstance(value, float | int) and not isinstance(value, bool):
        yield value
