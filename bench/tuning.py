"""Builds the method of an arm, its knob turned until density or fidelity is what the run asks for."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from jaxtyping import Float, UInt8
from torch import Tensor

from calibatt.bench.cells import Arm, Workload
from calibatt.bench.meter import Meter
from calibatt.bench.observers import PlanSummary, Probe
from calibatt.bench.offline import Offline, block_of, run_settings
from calibatt.bench.preparation import Preparation
from calibatt.kernels.base import Attender, Kernel, Task, Unsupported
from calibatt.kernels.catalogue import KERNELS
from calibatt.methods.around import Around
from calibatt.methods.base import Foreseen, Knob, Method, Planner
from calibatt.methods.call import Attention
from calibatt.methods.catalogue import METHODS, build
from calibatt.methods.remainder import WithRemainder
from calibatt.methods.scheduled import Scheduled
from calibatt.models.video_metrics import eight_bit, psnr_db

# makes one video: with an attention, from a prompt and a seed
Film = Callable[[Attention, str, int], Float[Tensor, "3 frames height width"]]

# half a percent of dense attention: below what a 95 % interval of a CPU's times tells apart; and of a small density
# two percent of itself, so that arms of one density are
DENSITY_TOLERANCE, _OWN_TOLERANCE = 0.005, 0.02
# videos of one arm differ by tens of times as much
PSNR_TOLERANCE_DB = 0.25
# halvings after which a range has shrunk a thousandfold
_HALVINGS = 12
# tolerances beyond which the nearest value is not what was asked for: 0.05 of dense attention at the most, 2.5 dB
_FAR = 10
# prompts on whose videos knobs are turned: an evaluation of a fidelity takes as long as their videos
TUNING_PROMPTS = 2
# times that a knob is turned on by what videos had: of what some calls miss, each leaves a small part
_CORRECTIONS = 6
# of the first one's noise: far from that of calibration and of what is measured
TUNING_SEED = 20_000


def solve(
    measure: Callable[[float], float], knob: Knob, target: float, *, tolerance: float, quantity: str
) -> float | Unsupported:
    """The knob's value at which a quantity comes nearest to a target.

    Args:
        measure: the quantity at a value of the knob; monotonic, with steps where blocks are few.
        knob: the range to search.
        target: what is wanted.
        tolerance: near enough.
        quantity: its name in the plural, for the reason.

    Returns:
        The value, or why there is none: the range does not reach the target, or passes it in one large step.
    """
    tried = {value: measure(value) for value in (knob.low, knob.high)}
    least, most = min(tried.values()), max(tried.values())
    if not least - tolerance <= target <= most + tolerance:
        return Unsupported(f"its {knob.field} reaches {quantity} from {least:.3f} to {most:.3f}, not {target:.3f}")
    rising = tried[knob.high] >= tried[knob.low]
    low, high = knob.low, knob.high
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        tried[middle] = measure(middle)
        if abs(tried[middle] - target) <= tolerance:
            break
        if (tried[middle] < target) == rising:
            low = middle
        else:
            high = middle
    best = min(tried, key=lambda value: abs(tried[value] - target))
    if abs(tried[best] - target) > _FAR * tolerance:
        below, above = max(x for x in tried.values() if x <= target), min(x for x in tried.values() if x >= target)
        return Unsupported(f"its {knob.field} gives {quantity} of {below:.3f} and {above:.3f}, none near {target:.3f}")
    return best


def density_of(method: Planner, probes: Sequence[Probe], kernel: Attender) -> float:
    """Mean density of the method's plans on the probes, after the kernel has left out what it leaves out by itself.

    Args:
        method: makes the plans.
        probes: the calls.
        kernel: computes a plan where it may leave blocks out by itself.
    """
    method.reset()
    total = 0.0
    for probe in probes:
        plan = method.plan(probe.q[0], probe.k[0], probe.v[0], probe.site)
        if plan.skip is not None:
            kernel.attend(probe.q, probe.k, probe.v, plan)
        total += plan.density().mean().item()
    return total / len(probes)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Goal:
    """What a knob is turned for.

    Args:
        measure: the quantity that a method on a kernel gives.
        target, tolerance, quantity: as for `solve`.
    """

    measure: Callable[[Planner, Attender], float]
    target: float
    tolerance: float
    quantity: str


class Tuner:
    """Builds the methods of a workload's arms.

    Args:
        workload: where they run.
        offline: what they learn first.
        preparation: knobs that a stopped run has turned, and keeps those of this one.
        probe: a call late in a video, on which arms are asked whether they apply.
        tuning_probes: takes the calls on which densities are measured first, of a video that is not measured or learnt
            from.
        film: makes a video.
        dense: the kernel of the videos that fidelity is measured against.
        prompts: knobs are turned on their videos, which are neither measured nor learnt from.
        filmed: whether a density is to be that of whole videos, and not only of the calls.
        log: says what was found.
    """

    def __init__(
        self,
        workload: Workload,
        *,
        offline: Offline,
        preparation: Preparation,
        probe: Probe,
        tuning_probes: Callable[[], Sequence[Probe]],
        film: Film,
        dense: Kernel,
        prompts: Sequence[str],
        filmed: bool,
        log: Callable[[str], None],
    ) -> None:
        self._workload = workload
        self._offline = offline
        self._preparation = preparation
        self._probe = probe
        self._take_probes = tuning_probes
        self._film = film
        self._dense = dense
        self._prompts = prompts
        self._filmed = filmed
        self._log = log
        self._values: dict[Arm, float | Unsupported] = {}

    def method(self, arm: Arm) -> Planner | Unsupported:
        """The arm's method, its knob turned where the mode asks for it; or why it does not apply."""
        missing = self._offline.missing(arm)
        if missing is not None:
            return missing
        knob = METHODS[arm.method].knob if arm.mode in ("equal_density", "equal_fidelity") else None
        if knob is None:
            return self._refusal(arm, None) or self._built(arm)
        # every suite asks, and some answers take videos
        if arm not in self._values:
            self._values[arm] = self._value(arm, knob)
        value = self._values[arm]
        return value if isinstance(value, Unsupported) else self._built(arm, **{knob.field: value})

    def _value(self, arm: Arm, knob: Knob) -> float | Unsupported:
        """The knob's value, or why it cannot be turned: as a stopped run has found it, or else found now."""
        value = self._preparation.knob(arm)
        if value is None:
            value = self._refusal(arm, knob) or self._solved(arm, knob)
            self._preparation.keep_knob(arm, value)
        if not isinstance(value, Unsupported):
            self._log(f"{arm} has {knob.field} {value:.4g}")
        return value

    def _solved(self, arm: Arm, knob: Knob) -> float | Unsupported:
        goal, calls = self._goal(arm, knob), arm.mode == "equal_density" and not knob.over_videos
        if calls:
            # means are no part of the density: the masks are those of the arm without them
            arm = replace(arm, remainder="none")
        found = self._searched(arm, knob, goal)
        if not calls or not self._filmed or isinstance(found, Unsupported):
            return found
        foreseen = isinstance(self._built(arm, **{knob.field: found}), Foreseen)
        return found if foreseen else self._corrected(arm, knob, goal, found)

    def _searched(self, arm: Arm, knob: Knob, goal: _Goal) -> float | Unsupported:
        kernel = KERNELS[arm.kernel]
        return solve(
            lambda x: goal.measure(self._built(arm, **{knob.field: x}), kernel),
            knob,
            goal.target,
            tolerance=goal.tolerance,
            quantity=goal.quantity,
        )

    def _corrected(self, arm: Arm, knob: Knob, goal: _Goal, found: float) -> float | Unsupported:
        """The knob turned on until whole videos have the density, from where some calls have it.

        What the calls miss is about as much at densities nearby, so they are asked for so much more.
        """
        tried: dict[float, float] = {}
        aim = goal.target
        for _ in range(_CORRECTIONS + 1):
            if found not in tried:
                tried[found] = self._density_of_videos(self._built(arm, **{knob.field: found}), KERNELS[arm.kernel])
            if abs(tried[found] - goal.target) <= goal.tolerance:
                return found
            aim += goal.target - tried[found]
            again = self._searched(arm, knob, replace(goal, target=aim))
            if isinstance(again, Unsupported):
                break
            found = again
        best = min(tried, key=lambda value: abs(tried[value] - goal.target))
        if abs(tried[best] - goal.target) > _FAR * goal.tolerance:
            nearest = f"{tried[best]:.3f} at the nearest, not {goal.target:.3f}"
            return Unsupported(f"its {knob.field} gives whole videos a density of {nearest}")
        return best

    def _built(self, arm: Arm, **turned: float) -> Method | Around:
        prepared = self._offline.prepared(arm, **turned)
        method = build(
            arm.method, preset=arm.preset, calibration=None if prepared is None else prepared.calibration,
            block=block_of(arm, self._workload.block), **{**run_settings(arm), **turned},
        )  # fmt: skip
        planner: Method | Around = method
        if arm.dense_steps is not None and arm.dense_layers is not None:
            planner = Scheduled(method, steps=arm.dense_steps, layers=arm.dense_layers)
        return planner if arm.remainder == "none" else WithRemainder(planner, arm.remainder)

    def _refusal(self, arm: Arm, knob: Knob | None) -> Unsupported | None:
        """Why the arm does not apply here, or its knob cannot be turned."""
        stuck = None if knob is None else self._stuck(arm, knob)
        if stuck is not None:
            return stuck
        # with a knob, at any place of it: a preset may learn what its knob makes needless
        method = self._built(arm, **({} if knob is None else {knob.field: (knob.low + knob.high) / 2}))
        # late in a video it is sparse whatever the dense steps are
        probe = self._probe
        refusal = method.refusal(probe.site.geometry)
        if refusal is not None or knob is None:
            return refusal
        if not self._workload.filmed and (knob.over_videos or arm.mode == "equal_fidelity"):
            return Unsupported("this target is measured on whole videos; calls by themselves have none")
        if self._workload.planted and arm.mode == "equal_fidelity":
            return Unsupported("this target is a fidelity; planted weights have none")
        method.reset()
        plan = method.plan(probe.q[0], probe.k[0], probe.v[0], probe.site)
        return KERNELS[arm.kernel].refusal(Task.of(probe.q, plan))

    def _stuck(self, arm: Arm, knob: Knob) -> Unsupported | None:
        """Why the knob cannot be turned, where its lowest value says so."""
        low = {knob.field: knob.low}
        try:
            # before anything is learnt: a preset may be set by another field
            self._offline.lesson(arm, **low)
        except ValueError as error:
            return _cannot_turn(knob, error)
        # a stored calibration that fits nothing here is no matter of the knob
        self._offline.prepared(arm, **low)
        try:
            # a calibration may have masks of one density only
            self._built(arm, **low)
        except ValueError as error:
            return _cannot_turn(knob, error)
        return None

    def _goal(self, arm: Arm, knob: Knob) -> _Goal:
        if arm.mode == "equal_fidelity":
            assert arm.target_psnr_db is not None
            return _Goal(
                measure=self._fidelity_db, target=arm.target_psnr_db, tolerance=PSNR_TOLERANCE_DB,
                quantity="PSNRs in dB",
            )  # fmt: skip
        target = self._calibatt_density if arm.target_density is None else arm.target_density
        measure = self._density_of_videos if knob.over_videos else self._density
        tolerance = min(DENSITY_TOLERANCE, _OWN_TOLERANCE * target)
        return _Goal(measure=measure, target=target, tolerance=tolerance, quantity="densities")

    @cached_property
    def _calibatt_density(self) -> float:
        """What `=density` asks for: that of CalibAtt, by its calibration of this run."""
        calibatt = self._built(Arm(method="calibatt", preset="default", mode="native", kernel="default"))
        assert isinstance(calibatt, Foreseen)
        return calibatt.mean_density(self._text_tokens)

    def _density(self, method: Planner, kernel: Attender) -> float:
        """Mean density over all calls of a video where it is known before; else of the plans of some calls."""
        if isinstance(method, Foreseen):
            return method.mean_density(self._text_tokens)
        return density_of(method, self._probes, kernel)

    @property
    def _text_tokens(self) -> int:
        """Of a video's prompt: fewer than a calibration allows, where prompts vary in length."""
        return self._probe.site.geometry.text_tokens

    @cached_property
    def _probes(self) -> Sequence[Probe]:
        self._log("one dense video to turn knobs on")
        return self._take_probes()

    def _density_of_videos(self, method: Planner, kernel: Attender) -> float:
        """Mean density of the plans of some videos."""
        plans = PlanSummary()
        meter = Meter(method, kernel, self._workload.device, observers=[plans])
        for number, prompt in enumerate(self._prompts):
            self._film(meter, prompt, TUNING_SEED + number)
        return plans.density()

    def _fidelity_db(self, method: Planner, kernel: Attender) -> float:
        """Mean PSNR of some videos against the dense ones."""
        return statistics.mean(
            psnr_db(self._video(method, kernel, i), reference) for i, reference in enumerate(self._references)
        )

    @cached_property
    def _references(self) -> tuple[UInt8[Tensor, "3 frames height width"], ...]:
        dense = build("dense")
        return tuple(self._video(dense, self._dense, i) for i in range(len(self._prompts)))

    def _video(self, method: Planner, kernel: Attender, number: int) -> UInt8[Tensor, "3 frames height width"]:
        meter = Meter(method, kernel, self._workload.device)
        return eight_bit(self._film(meter, self._prompts[number], TUNING_SEED + number))


def _cannot_turn(knob: Knob, error: ValueError) -> Unsupported:
    return Unsupported(f"its {knob.field} cannot be turned: {error}")
