"""Turns a method's knob until it computes a wanted share of attention, or its videos are as near to dense as wanted."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from calibatt.bench.meter import Probe
from calibatt.kernels.base import Attender, Unsupported
from calibatt.methods.base import Knob, Planner

# half a percent of dense attention: below what a 95 % interval of a CPU's times tells apart
DENSITY_TOLERANCE = 0.005
# videos of one arm differ by tens of times as much
PSNR_TOLERANCE_DB = 0.25
# halvings after which a range has shrunk a thousandfold
_HALVINGS = 12
# tolerances beyond which the nearest value is not what was asked for: 0.05 of dense attention, 2.5 dB
_FAR = 10


def density_of(method: Planner, probes: Sequence[Probe], kernel: Attender) -> float:
    """Mean density of the method's plans on the probes, after the kernel has left out what it leaves out by itself."""
    method.reset()
    total = 0.0
    for probe in probes:
        plan = method.plan(probe.q[0], probe.k[0], probe.site)
        if plan.skip is not None:
            kernel.attend(probe.q, probe.k, probe.v, plan)
        total += plan.density().mean().item()
    return total / len(probes)


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
