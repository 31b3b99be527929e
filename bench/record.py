"""The record: one arm on one workload, and the file that holds a run of them.

A run is pytest-benchmark's own JSON. Each benchmark's `extra_info` has the fields of `Record` under their own names;
raw times stay in `stats.data`. Cells that were not timed stand in a top-level list `untimed` with the same fields.
Nothing here imports torch, so that reports can be made anywhere.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import median
from typing import Any, Literal

from calibatt.bench.statistics import Interval, paired_ratio

SCHEMA = 1

Suite = Literal["kernel", "attention", "denoise", "calibration"]
Outcome = Literal["ok", "wrong", "unsupported", "out_of_memory", "failed"]
Samples = tuple[float, ...]

SUITES: tuple[Suite, ...] = ("kernel", "attention", "denoise", "calibration")
OUTCOMES: tuple[Outcome, ...] = ("ok", "wrong", "unsupported", "out_of_memory", "failed")


class UnusableFile(ValueError):
    """A file that is not a run of this suite; the message is one line that says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One arm (a method on a kernel) on one workload. What was not measured is None, never 0 or NaN.

    What was run:
        suite, model, weights, resolution, frames, steps, tokens, heads, head_dim, dtype, compiled: the workload.
        inputs: where attention's inputs come from, if they are not the model's own.
        guidance: classifier-free guidance scale of a whole generation.
        method, preset, mode: `native` is the method's own settings; `matched` has the run's dense schedule in place of
            the method's; `equal_density` has settings that give a density, target_density, or CalibAtt's where there is
            none; `equal_fidelity` those that give target_psnr_db. In the kernel suite the method is `blocks` and the
            preset the density that was asked for.
        dense_steps, dense_layers: shares of the first steps and layers that are dense in every arm of the run.
        kernel, block: the kernel as it was asked for, and tokens of a query and of a key block.
        ran_on: what the default kernel chose, for the sparse plans where there are any.
        block_choice: how the blocks were chosen: `native`, the preset's own, or a size; absent for the model's.
        mask: where a kernel benchmark's mask comes from; `rows` for row reuse, `mixed` for both in one layer.
        baseline: the dense kernel that times are compared with.
        prompts: captions of the samples, in order.
    How it went:
        outcome, reason: a record other than `ok` says why and carries no times.
        throttled: whether the GPU lowered its clocks meanwhile.
    Time, in seconds:
        samples_s: end to end, one a round (in `stats.data` of the file).
        baseline_samples_s: the dense arm, same rounds.
        phases_s: samples of each phase (`plan`, `attend`, …). In the kernel suite on a GPU: `lists`, what it takes to
            make lists of the mask's bits (a part of each sample, taken again by itself), and `launch`, the host's time
            until all is queued, which is in no sample.
        first_call_s: a kernel's first call under this plan in a kernel benchmark, in which it compiles what this run
            and its cache on disk do not have yet; in no sample.
        tflops: of the blocks kept.
        gemm_tflops: rate of a large matrix product on the same device in the same run: the roofline.
    Cost:
        peak_memory_bytes, plan_memory_bytes, energy_j (samples), clocks_mhz (samples).
        preparation_s: seconds of the arm's offline part, where it was done in this run.
        calibration_cost_ratio: time of calibration over that of generating the same videos densely.
    Truth, one value a sample where it is a tuple:
        density: kept fraction of the block products over all calls, text and dense steps included.
        recall: attention mass kept, mean.
        kernel_error: largest error against fp64 under the same plan; kernel_error_budget is what it may be.
        method_error: relative error of attention outputs against dense ones.
        checked_heads: heads of which the last four were taken.
        psnr_db, ssim: generated video against the same-seed dense one.
        alignment, alignment_dense: how much of the caption can be read back from the video, 0 to 1.
        mask_agreement: overlap (intersection over union) of the masks of different prompts.
    artifact: file with pictures' data, relative to the JSON file.

    Raises:
        ValueError: the fields contradict each other.
    """

    suite: Suite
    model: str
    method: str
    kernel: str
    outcome: Outcome
    reason: str | None = None
    weights: str | None = None
    resolution: str | None = None
    frames: int | None = None
    steps: int | None = None
    guidance: float | None = None
    tokens: int | None = None
    heads: int | None = None
    head_dim: int | None = None
    dtype: str | None = None
    compiled: bool | None = None
    preset: str | None = None
    inputs: str | None = None
    mode: Literal["native", "matched", "equal_density", "equal_fidelity"] | None = None
    target_density: float | None = None
    target_psnr_db: float | None = None
    dense_steps: float | None = None
    dense_layers: float | None = None
    block_choice: str | None = None
    ran_on: str | None = None
    block: tuple[int, int] | None = None
    mask: Literal["random", "banded", "captured", "rows", "mixed"] | None = None
    baseline: str | None = None
    prompts: tuple[str, ...] | None = None
    throttled: bool | None = None
    samples_s: Samples | None = None
    baseline_samples_s: Samples | None = None
    phases_s: Mapping[str, Samples] | None = None
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
    checked_heads: int | None = None
    psnr_db: Samples | None = None
    ssim: Samples | None = None
    alignment: Samples | None = None
    alignment_dense: Samples | None = None
    mask_agreement: float | None = None
    artifact: str | None = None

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
            return "an outcome of 'ok' has samples, and only that one"
        if (self.outcome == "ok") == (self.reason is not None):
            return "an outcome other than 'ok' says why, and only such a one"
        if self.baseline_samples_s is not None and len(self.baseline_samples_s) != len(self.samples_s or ()):
            return "samples and baseline samples are not pairs"
        error, budget = self.kernel_error, self.kernel_error_budget
        if self.outcome == "ok" and error is not None and budget is not None and error > budget:
            return f"kernel error {error:.3g} exceeds its budget {budget:.3g}"
        for name, number in _numbers(asdict(self)):
            if not math.isfinite(number):
                return f"{name} is {number}: what was not measured is left out"
        return None

    @property
    def speedup(self) -> Interval | None:
        """Paired speedup over the dense baseline of the same run; None for an arm without one."""
        if self.samples_s is None or self.baseline_samples_s is None:
            return None
        return paired_ratio(self.baseline_samples_s, self.samples_s)

    @property
    def of_ideal(self) -> float | None:
        """Speedup over what leaving blocks out could give at best, 1 / density; for attention calls, not for videos."""
        if self.suite == "denoise" or self.speedup is None or self.density is None:
            return None
        return self.speedup.median * self.density

    @property
    def pays_after(self) -> float | None:
        """Videos after which what the offline part took is saved; None where nothing is, or was not measured."""
        if self.suite != "denoise" or self.preparation_s is None or not (self.samples_s and self.baseline_samples_s):
            return None
        saved = median(self.baseline_samples_s) - median(self.samples_s)
        return self.preparation_s / saved if saved > 0 else None

    @property
    def computed_by(self) -> str:
        """The kernel that ran."""
        return self.kernel if self.ran_on is None else self.ran_on

    @property
    def arm(self) -> str:
        """Short name of the arm within its workload, e.g. `radial/default` or `dense`."""
        name = self.method if self.preset in (None, "default") else f"{self.method}/{self.preset}"
        if self.mode == "equal_density":
            name += " =density" if self.target_density is None else f" ={self.target_density:g}"
        elif self.mode == "equal_fidelity":
            name += f" ={self.target_psnr_db:g} dB"
        if self.dense_steps is not None:
            name += f", {self.dense_steps:.0%} of the steps dense"
        if self.dense_layers:
            name += f", {self.dense_layers:.0%} of the layers dense"
        return name if self.block_choice is None else f"{name}, blocks {self.block_choice}"

    @property
    def workload(self) -> tuple[Any, ...]:
        """What the arms that may be compared have in common."""
        return (self.suite, self.model, self.inputs, self.resolution, self.steps, self.dtype, self.compiled)

    @property
    def key(self) -> tuple[Any, ...]:
        """What is the same measurement in another run, also where it failed there before it knew its blocks."""
        if self.suite == "kernel":
            return (*self.workload, self.method, self.preset, self.kernel, self.block, self.mask)
        # elsewhere a preset or a choice fixes the blocks, and dense runs on whichever kernel is fastest that day
        kernel = None if self.method == "dense" else self.kernel
        wanted = (self.mode, self.target_density, self.target_psnr_db, self.dense_steps, self.dense_layers)
        return (*self.workload, self.method, self.preset, *wanted, self.block_choice, kernel)

    def to_extra_info(self) -> dict[str, Any]:
        """The fields as they stand in the file; what was not measured is absent."""
        info = {name: value for name, value in asdict(self).items() if value is not None and name != "samples_s"}
        if self.speedup is not None:
            info["speedup"] = {name: value for name, value in asdict(self.speedup).items() if value is not None}
        return {"schema": SCHEMA, **info}

    @classmethod
    def from_extra_info(cls, info: Mapping[str, Any], samples_s: Samples | None = None) -> Record:
        """Rebuild a record from a file's fields.

        Raises:
            ValueError: another schema, an unknown or missing field, or a contradiction.
        """
        if info.get("schema") != SCHEMA:
            raise ValueError(f"its schema is {info.get('schema')!r}, this version reads {SCHEMA}")
        known = {field.name for field in fields(cls)}
        given = {name: _tupled(value) for name, value in info.items() if name not in ("schema", "speedup")}
        if unknown := sorted(set(given) - known):
            raise ValueError(f"unknown fields {', '.join(unknown)}")
        try:
            return cls(samples_s=samples_s, **given)
        except TypeError as error:
            raise ValueError(f"fields are missing: {error}") from None


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
        return path if path.is_file() else None


def load_run(path: Path) -> Run:
    """Read a file written by `pytest bench --benchmark-json=FILE`.

    Raises:
        UnusableFile: it is missing, not JSON, not ours, of another schema, or empty of records.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UnusableFile(
            f"{path}: cannot be read ({error.strerror}); give a file of `pytest bench --benchmark-json`"
        ) from None
    except ValueError:
        raise UnusableFile(f"{path}: is not JSON; give a file of `pytest bench --benchmark-json`") from None
    if not isinstance(data, dict) or not isinstance(data.get("benchmarks"), list):
        raise UnusableFile(f"{path}: is not a pytest-benchmark file; make one with `pytest bench --benchmark-json`")
    records: list[Record] = []
    try:
        for benchmark in data["benchmarks"]:
            samples = tuple(float(value) for value in benchmark["stats"]["data"])
            records.append(Record.from_extra_info(benchmark["extra_info"], samples))
        records.extend(Record.from_extra_info(info) for info in data.get("untimed", []))
    except (KeyError, TypeError, AttributeError) as error:
        raise UnusableFile(f"{path}: is not a calibatt run ({type(error).__name__}: {error})") from None
    except ValueError as error:
        raise UnusableFile(f"{path}: is not a usable calibatt run: {error}") from None
    if not records:
        raise UnusableFile(f"{path}: holds no records; was every benchmark deselected?")
    return Run(
        path=path,
        machine=data.get("machine_info") or {},
        commit=data.get("commit_info") or {},
        datetime=str(data.get("datetime", "")),
        command=str(data.get("command", "")),
        records=tuple(records),
    )


def _tupled(value: Any) -> Any:
    """JSON lists as tuples, so that records compare and hash by value."""
    if isinstance(value, list):
        return tuple(_tupled(item) for item in value)
    if isinstance(value, dict):
        return {name: _tupled(item) for name, item in value.items()}
    return value


def _numbers(value: Any, name: str = "") -> Iterator[tuple[str, float]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _numbers(item, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _numbers(item, name)
    elif isinstance(value, float | int) and not isinstance(value, bool):
        yield name, float(value)
