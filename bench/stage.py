"""What the arms of one workload share: pipeline, prompts, probes, dense baseline and calibration."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

from calibatt.bench.baseline import dense_kernels, fastest_dense
from calibatt.bench.cells import Arm, Workload
from calibatt.bench.console import Console
from calibatt.bench.density import solve
from calibatt.bench.meter import Meter, Probe
from calibatt.bench.timer import timed
from calibatt.calibration.collect import calibrate
from calibatt.calibration.learn import learn
from calibatt.calibration.store import Calibration
from calibatt.kernels.base import Kernel, Unsupported, dtype_name
from calibatt.kernels.catalogue import KERNELS
from calibatt.methods.base import Method
from calibatt.methods.catalogue import METHODS, build, learner
from calibatt.methods.learning import Learnt
from calibatt.models.adapter import attached
from calibatt.models.catalogue import weights_digest
from calibatt.models.generate import generate

# attention calls at which arms are checked: from the first step and layer to the last, evenly
_PROBES = 4
# the seed of round i is this one plus i; calibration draws its own noise far from it
SEED = 0
CALIBRATION_SEED = 10_000


class Stage:
    """Everything that the arms of one workload share; each part is made when first asked for.

    Args:
        workload: what runs.
        prompts: first those to calibrate on, then one for each round.
        calibration_prompts: how many of them are for calibration.
        calibration: a stored calibration to use in place of one made here.
        console: shows how far the work is.
    """

    def __init__(
        self,
        workload: Workload,
        prompts: Sequence[str],
        *,
        calibration_prompts: int,
        calibration: Path | None,
        console: Console,
    ) -> None:
        self.workload = workload
        self.entry = workload.entry
        self.prompts = tuple(prompts[calibration_prompts:])
        self.log = console.line
        self._console = console
        self._calibration_prompts = tuple(prompts[:calibration_prompts])
        self._calibration_file = calibration
        self.calibration_s: float | None = None
        self._learnt: dict[tuple[str, str], tuple[float, Learnt]] = {}

    @cached_property
    def pipe(self) -> Any:
        """The Diffusers pipeline."""
        self.log(f"{self.workload}: loading")
        return self.entry.load(
            resolution=self.workload.resolution, device=self.workload.device, dtype=self.workload.dtype
        )

    def generate(self, arm: Meter, round_: int) -> tuple[float, Float[Tensor, "3 frames height width"]]:
        """Seconds of a whole generation with an arm, and the video; a round fixes prompt and seed."""
        with attached(self.pipe, arm, arm):
            return timed(
                self.workload.device,
                lambda: generate(
                    self.entry,
                    self.pipe,
                    prompt=self.prompts[round_],
                    resolution=self.workload.resolution,
                    seed=SEED + round_,
                    steps=self.workload.steps,
                ),
            )

    @cached_property
    def probes(self) -> tuple[Probe, ...]:
        """Inputs of some attention calls of a dense generation, which is also the pipeline's warm-up."""
        self.log(f"{self.workload}: one dense video to take attention inputs from")
        kernel = dense_kernels(self.workload.device, self.workload.dtype, self.entry.head_dim)[0]
        meter = Meter(build("dense"), kernel, self.workload.device)
        last_step, last_layer = self.workload.steps - 1, self.entry.layers - 1
        share = [i / (_PROBES - 1) for i in range(_PROBES)]
        meter.probe_sites = {(round(last_step * x), round(last_layer * x)) for x in share}
        self.generate(meter, 0)
        return tuple(meter.probes)

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
    def weights(self) -> str:
        """Digest of the model's weights."""
        return weights_digest(self.pipe)

    @cached_property
    def calibration(self) -> Calibration:
        """The stored calibration if one was given, else one made here and now."""
        if self._calibration_file is not None:
            stored = Calibration.load(self._calibration_file)
            stored.check_model(self.entry.name, self.weights)
            return stored.to(self.workload.device)
        dense, prompts = self.dense, self._calibration_prompts
        self.log(f"{self.workload}: calibrating on {len(prompts)} prompts")
        with self._console.open():
            self.calibration_s, learnt = timed(
                self.workload.device,
                lambda: calibrate(
                    self.entry,
                    self.pipe,
                    resolution=self.workload.resolution,
                    steps=self.workload.steps,
                    prompts=prompts,
                    seed=CALIBRATION_SEED,
                    kernel=dense,
                    progress=True,
                ),
            )
        return learnt.to(self.workload.device)

    def learnt(self, arm: Arm) -> Learnt | None:
        """What the arm's preset learns from the calibration prompts, once; None where it learns nothing."""
        key = (arm.method, arm.preset)
        if key not in self._learnt and learner(arm.method, preset=arm.preset) is not None:
            dense, prompts = self.dense, self._calibration_prompts
            self.log(f"{self.workload}: {arm.method}/{arm.preset} learns from {len(prompts)} prompts")
            with self._console.open():
                seconds, learnt = timed(
                    self.workload.device,
                    lambda: learn(
                        self.entry,
                        self.pipe,
                        method=arm.method,
                        preset=arm.preset,
                        resolution=self.workload.resolution,
                        steps=self.workload.steps,
                        prompts=prompts,
                        seed=CALIBRATION_SEED,
                        kernel=dense,
                        block=self.entry.block,
                        progress=True,
                    ),
                )
            self._learnt[key] = (seconds, learnt.to(self.workload.device))
        return self._learnt[key][1] if key in self._learnt else None

    def preparation_s(self, arm: Arm) -> float | None:
        """Seconds that the arm's offline part took here; None where it has none, or was made before."""
        if METHODS[arm.method].offline:
            return self.calibration_s
        return self._learnt[arm.method, arm.preset][0] if self.learnt(arm) is not None else None

    def method(self, arm: Arm) -> Method | Unsupported:
        """The arm's method, its knob turned where the mode asks for it; or why it does not apply."""
        kind = METHODS[arm.method]
        source = self.calibration if kind.offline else self.learnt(arm)

        def at(**knob: float) -> Method:
            return build(arm.method, preset=arm.preset, source=source, block=self.entry.block, **knob)

        refusal = at().refusal(self.entry.geometry(self.workload.resolution))
        if refusal is not None:
            return refusal
        if arm.mode == "native" or kind.knob is None:
            return at()
        field = kind.knob.field
        target = self.calibration.density().mean().item() if arm.density is None else arm.density
        value = solve(lambda x: at(**{field: x}), kind.knob, target, self.probes, KERNELS[arm.kernel])
        if isinstance(value, Unsupported):
            return value
        self.log(f"{self.workload}: {arm} has {field} {value:.4g} for a density of {target:.3f}")
        return at(**{field: value})

    def facts(self) -> dict[str, Any]:
        """The fields of a record that all arms of this workload share."""
        size = self.entry.resolution(self.workload.resolution)
        geometry = self.entry.geometry(self.workload.resolution)
        return {
            "model": self.entry.name,
            "weights": self.weights,
            "resolution": self.workload.resolution,
            "frames": size.frames,
            "steps": self.workload.steps,
            "tokens": geometry.tokens,
            "heads": geometry.heads,
            "head_dim": geometry.head_dim,
            "dtype": dtype_name(self.workload.dtype),
            "compiled": False,
        }
