"""What the arms of one workload share: pipeline, prompts, probes, dense baseline and calibration."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

from calibatt.bench.accuracy import psnr_db
from calibatt.bench.baseline import dense_kernels, fastest_dense
from calibatt.bench.cells import Arm, Workload
from calibatt.bench.console import Console
from calibatt.bench.meter import Meter, Probe
from calibatt.bench.resampled import ResampledVideos
from calibatt.bench.solve import DENSITY_TOLERANCE, PSNR_TOLERANCE_DB, density_of, solve
from calibatt.bench.timer import timed
from calibatt.calibration.collect import CalibrationConfig, calibrate_on
from calibatt.calibration.learn import learn_from
from calibatt.calibration.store import Calibration
from calibatt.calibration.videos import DenseVideos, Videos
from calibatt.kernels import oracle
from calibatt.kernels.base import Attender, Kernel, Task, Unsupported, dtype_name
from calibatt.kernels.catalogue import KERNELS
from calibatt.kernels.plan import Plan
from calibatt.methods.base import Foreseen, Knob, Method, Planner
from calibatt.methods.catalogue import METHODS, build, learner
from calibatt.methods.learning import Learnt
from calibatt.methods.scheduled import Scheduled
from calibatt.models.adapter import attached
from calibatt.models.catalogue import SHAPES
from calibatt.models.generate import generate

# attention calls at which arms are checked: from the first step and layer to the last, evenly
_PROBES = 4
# at another model's size, where fp64 takes minutes for all: two calls within the video, and a few heads of each
_RESAMPLED_PROBES = (1 / 3, 2 / 3)
_RESAMPLED_HEADS = 4
# the embedded model's larger size, whose number of frames is nearest to those of large models
_RESAMPLED_FROM = "standard"
# the seed of round i is this one plus i; calibration draws its own noise far from it
SEED = 0
CALIBRATION_SEED = 10_000
# videos on which a fidelity is solved for, of the calibration prompts: an evaluation takes as long as they do
_FIDELITY_VIDEOS = 2


class Stage:
    """Everything that the arms of one workload share; each part is made when first asked for.

    Args:
        workload: what runs.
        prompts: first those to calibrate on, then one for each round.
        calibration_prompts: how many of them are for calibration.
        calibration: a stored calibration to use in place of one made here.
        console: shows how far the work is.
        levels: whether the calibration made here is to have levels, for arms that turn CalibAtt's knob.
    """

    def __init__(
        self,
        workload: Workload,
        prompts: Sequence[str],
        *,
        calibration_prompts: int,
        calibration: Path | None,
        console: Console,
        levels: bool = False,
    ) -> None:
        self.workload = workload
        self.entry = workload.entry
        self.prompts = tuple(prompts[calibration_prompts:])
        self.log = console.line
        self._console = console
        self._calibration_prompts = tuple(prompts[:calibration_prompts])
        self._calibration_file = calibration
        self._levels = levels
        self.calibration_s: float | None = None
        self._learnt: dict[Arm, tuple[float, Learnt]] = {}

    @cached_property
    def pipe(self) -> Any:
        """The Diffusers pipeline; the embedded model's where inputs are resampled from it."""
        self.log(f"{self.workload}: loading")
        entry, resolution = (
            (SHAPES, _RESAMPLED_FROM) if self.workload.resampled else (self.entry, self.workload.resolution)
        )
        return entry.load(resolution=resolution, device=self.workload.device, dtype=self.workload.dtype)

    @cached_property
    def videos(self) -> Videos:
        """Dense videos whose attention calls can be watched."""
        if not self.workload.resampled:
            return DenseVideos(self.entry, self.pipe, resolution=self.workload.resolution, steps=self.workload.steps)
        own = DenseVideos(SHAPES, self.pipe, resolution=_RESAMPLED_FROM, steps=self.workload.steps)
        kernel = dense_kernels(self.workload.device, self.workload.dtype, SHAPES.head_dim)[0]
        return ResampledVideos(
            own, kernel, model=self.workload.model, resolution=self.workload.resolution,
            geometry=self.entry.geometry(self.workload.resolution),
        )  # fmt: skip

    @cached_property
    def _weights(self) -> str:
        return self.videos.weights()

    def generate(self, arm: Meter, round_: int) -> tuple[float, Float[Tensor, "3 frames height width"]]:
        """Seconds of a whole generation with an arm, and the video; a round fixes prompt and seed."""
        return timed(self.workload.device, lambda: self._video(arm, self.prompts[round_], SEED + round_))

    def _video(self, arm: Meter, prompt: str, seed: int) -> Float[Tensor, "3 frames height width"]:
        with attached(self.pipe, arm, arm):
            return generate(
                self.entry, self.pipe, prompt=prompt, resolution=self.workload.resolution, seed=seed,
                steps=self.workload.steps,
            )  # fmt: skip

    @cached_property
    def probes(self) -> tuple[Probe, ...]:
        """Inputs of some attention calls of a dense generation, which is also the pipeline's warm-up."""
        self.log(f"{self.workload}: one dense video to take attention inputs from")
        kernel = dense_kernels(self.workload.device, self.workload.dtype, self.entry.head_dim)[0]
        meter = Meter(build("dense"), kernel, self.workload.device)
        last_step, last_layer = self.videos.steps - 1, self.videos.layers - 1
        share = _RESAMPLED_PROBES if self.workload.resampled else [i / (_PROBES - 1) for i in range(_PROBES)]
        meter.probe_sites = {(round(last_step * x), round(last_layer * x)) for x in share}
        self.videos.show(meter, meter, prompts=self.prompts[:1], seed=SEED)
        return tuple(meter.probes)

    @cached_property
    def checked_heads(self) -> tuple[int, ...]:
        """Heads on which outputs are compared with fp64: all of a small model."""
        heads = self.probes[0].site.geometry.heads
        few = min(_RESAMPLED_HEADS, heads)
        return (
            tuple(round(i * (heads - 1) / (few - 1)) for i in range(few))
            if self.workload.resampled
            else tuple(range(heads))
        )

    @cached_property
    def dense_truth(self) -> tuple[Float[Tensor, "1 checked tokens head_dim"], ...]:
        """Dense attention of the probes in fp64, of the heads that are checked."""
        heads = list(self.checked_heads)
        return tuple(
            oracle.attend(
                probe.q[:, heads], probe.k[:, heads], probe.v[:, heads], Plan.dense(probe.site.geometry).of_heads(heads)
            )
            for probe in self.probes
        )

    @cached_property
    def dense(self) -> Kernel:
        """The fastest dense kernel that is right, on this machine at this geometry, by measurement.

        Raises:
            RuntimeError: none is.
        """
        probe = self.probes[0]
        geometry = probe.site.geometry
        return fastest_dense(probe.q, probe.k, probe.v, geometry, log=lambda line: self.log(f"{self.workload}: {line}"))

    @cached_property
    def calibration(self) -> Calibration:
        """The stored calibration if one was given, else one made here and now."""
        if self._calibration_file is not None:
            stored = Calibration.load(self._calibration_file)
            stored.check_model(self.videos.model, self._weights)
            return stored.to(self.workload.device)
        dense, prompts = self.dense, self._calibration_prompts
        self.log(f"{self.workload}: calibrating on {len(prompts)} prompts")
        with self._console.open():
            self.calibration_s, learnt = timed(
                self.workload.device,
                lambda: calibrate_on(
                    self.videos,
                    prompts=prompts,
                    seed=CALIBRATION_SEED,
                    kernel=dense,
                    config=CalibrationConfig(block=self.entry.block, levels=self._levels),
                    progress=True,
                ),
            )
        return learnt.to(self.workload.device)

    def learnt(self, arm: Arm) -> Learnt | None:
        """What the arm's preset learns from the calibration prompts, once; None where it learns nothing."""
        key = _learner_of(arm)
        if key not in self._learnt and learner(arm.method, preset=arm.preset) is not None:
            dense, prompts = self.dense, self._calibration_prompts
            self.log(f"{self.workload}: {arm.method}/{arm.preset} learns from {len(prompts)} prompts")
            with self._console.open():
                seconds, learnt = timed(
                    self.workload.device,
                    lambda: learn_from(
                        self.videos,
                        method=arm.method,
                        preset=arm.preset,
                        prompts=prompts,
                        seed=CALIBRATION_SEED,
                        kernel=dense,
                        block=self._block(arm),
                        progress=True,
                        **_settings(arm),
                    ),
                )
            self._learnt[key] = (seconds, learnt.to(self.workload.device))
        return self._learnt[key][1] if key in self._learnt else None

    def preparation_s(self, arm: Arm) -> float | None:
        """Seconds that the arm's offline part took here; None where it has none, or was made before.

        Nor is there a figure where inputs are resampled: videos of that model would take longer.
        """
        if self.workload.resampled:
            return None
        if METHODS[arm.method].offline:
            # where the knob is the density, one that is not CalibAtt's needs nothing learnt
            knob = METHODS[arm.method].knob
            free = knob is not None and knob.field == "density" and (arm.density or arm.psnr_db) is not None
            return None if free else self.calibration_s
        return self._learnt[_learner_of(arm)][0] if self.learnt(arm) is not None else None

    def method(self, arm: Arm) -> Planner | Unsupported:
        """The arm's method, its knob turned where the mode asks for it; or why it does not apply."""
        kind = METHODS[arm.method]
        knob = kind.knob if arm.mode in ("equal_density", "equal_fidelity") else None
        low = {} if knob is None else {knob.field: knob.low}
        # before anything is learnt: a preset may be set by another field
        stuck = _stuck(knob, lambda: learner(arm.method, preset=arm.preset, **{**_settings(arm), **low}))
        if stuck is not None:
            return stuck
        source = self.calibration if kind.offline else self.learnt(arm)

        def at(**turned: float) -> Method | Scheduled:
            settings = {**_settings(arm), **turned}
            method = build(arm.method, preset=arm.preset, source=source, block=self._block(arm), **settings)
            if arm.dense_first is None:
                return method
            return Scheduled(method, steps=arm.dense_first[0], layers=arm.dense_first[1])

        # a calibration may have masks of one density only
        stuck = _stuck(knob, lambda: at(**low))
        refusal = stuck or at().refusal(self.videos.geometry)
        if refusal is not None:
            return refusal
        if knob is None:
            return at()
        kernel = KERNELS[arm.kernel]
        # the last is sparse whatever the dense steps are
        probe = self.probes[-1]
        refusal = kernel.refusal(Task.of(probe.q, at().plan(probe.q[0], probe.k[0], probe.site)))
        if refusal is not None:
            return refusal
        if self.workload.resampled and (knob.over_videos or arm.mode == "equal_fidelity"):
            return Unsupported(
                "what it is to be solved for shows in whole videos, and inputs that are resampled have none"
            )
        measure: Callable[[Planner, Attender], float]
        if arm.mode == "equal_fidelity":
            assert arm.psnr_db is not None
            measure, target, quantity, tolerance = self._fidelity_db, arm.psnr_db, "PSNRs in dB", PSNR_TOLERANCE_DB
        else:
            target = self.calibration.density().mean().item() if arm.density is None else arm.density
            measure = self._density_of_video if knob.over_videos else self._density
            quantity, tolerance = "densities", DENSITY_TOLERANCE
        value = solve(
            lambda x: measure(at(**{knob.field: x}), kernel), knob, target, tolerance=tolerance, quantity=quantity
        )
        if isinstance(value, Unsupported):
            return value
        self.log(f"{self.workload}: {arm} has {knob.field} {value:.4g}")
        return at(**{knob.field: value})

    def _fidelity_db(self, method: Planner, kernel: Attender) -> float:
        """Mean PSNR of some videos of calibration prompts against the dense ones."""
        pairs = zip(self._calibration_prompts, self._dense_references, strict=False)
        return statistics.mean(
            psnr_db(self._video(Meter(method, kernel, self.workload.device), prompt, CALIBRATION_SEED + i), reference)
            for i, (prompt, reference) in enumerate(pairs)
        )

    @cached_property
    def _dense_references(self) -> tuple[Float[Tensor, "3 frames height width"], ...]:
        return tuple(
            self._video(Meter(build("dense"), self.dense, self.workload.device), prompt, CALIBRATION_SEED + i)
            for i, prompt in enumerate(self._calibration_prompts[:_FIDELITY_VIDEOS])
        )

    def _density(self, method: Planner, kernel: Attender) -> float:
        """Mean density over all calls of a video where it is known before; else of the plans of the probes."""
        return method.mean_density() if isinstance(method, Foreseen) else density_of(method, self.probes, kernel)

    def _density_of_video(self, method: Planner, kernel: Attender) -> float:
        """Mean density of the plans of one video of a calibration prompt."""
        meter = Meter(method, kernel, self.workload.device)
        meter.keep_plans = True
        self._video(meter, self._calibration_prompts[0], CALIBRATION_SEED)
        return statistics.mean(plan.density().mean().item() for _, plan in meter.plans)

    def _block(self, arm: Arm) -> tuple[int, int] | None:
        """Tokens of the arm's blocks; None for the preset's own."""
        if arm.block == "native":
            return None
        return self.entry.block if arm.block is None else arm.block

    def facts(self) -> dict[str, Any]:
        """The fields of a record that all arms of this workload share."""
        size = self.entry.resolution(self.workload.resolution)
        geometry = self.videos.geometry
        videos = self.videos
        return {
            "model": self.entry.name,
            "weights": self._weights,
            "inputs": videos.origin if isinstance(videos, ResampledVideos) else None,
            "resolution": self.workload.resolution,
            "frames": size.frames,
            "steps": self.workload.steps,
            "tokens": geometry.tokens,
            "heads": geometry.heads,
            "head_dim": geometry.head_dim,
            "dtype": dtype_name(self.workload.dtype),
            "compiled": False,
        }


def _settings(arm: Arm) -> Mapping[str, Any]:
    """Settings of the arm's method that the run asks for: none of its own dense steps where all arms have the same."""
    return {} if arm.dense_first is None else METHODS[arm.method].without_dense


def _stuck(knob: Knob | None, make: Callable[[], object]) -> Unsupported | None:
    """Why a knob cannot be turned, where making something with its lowest value says so."""
    if knob is None:
        return None
    try:
        make()
    except ValueError as error:
        return Unsupported(f"its {knob.field} cannot be turned: {error}")
    return None


def _learner_of(arm: Arm) -> Arm:
    """The arm that stands for all that learn the same: every mode and kernel of a preset in these blocks."""
    return replace(arm, mode="native", kernel="", density=None, psnr_db=None)
