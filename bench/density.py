"""Turns a method's knob until it computes a wanted share of attention: one solver for every method."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from calibatt.bench.meter import Probe
from calibatt.kernels.base import Attender, Unsupported
from calibatt.methods.base import Knob, Planner

# half a percent of dense attention: below what a 95 % interval of a CPU's times tells apart
TOLERANCE = 0.005
# halvings after which a range has shrunk a thousandfold
_HALVINGS = 12


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
    build: Callable[[float], Planner], knob: Knob, target: float, probes: Sequence[Probe], kernel: Attender
) -> float | Unsupported:
    """The knob's value at which the mean density on the probes comes nearest to the target.

    Args:
        build: the method at a value of its knob.
        knob: the range to search; density is monotonic along it, with steps where blocks are few.
        target: wanted density.
        probes: inputs of real attention calls.
        kernel: of the arm.

    Returns:
        The value, or why there is none: the range does not reach the target.
    """
    ends = {value: density_of(build(value), probes, kernel) for value in (knob.low, knob.high)}
    least, most = min(ends.values()), max(ends.values())
    if not least - TOLERANCE <= target <= most + TOLERANCE:
        return Unsupported(f"its {knob.field} reaches densities from {least:.3f} to {most:.3f}, not {target:.3f}")
    rising = ends[knob.high] >= ends[knob.low]
    low, high = knob.low, knob.high
    tried = dict(ends)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        tried[middle] = density_of(build(middle), probes, kernel)
        if abs(tried[middle] - target) <= TOLERANCE:
            break
        if (tried[middle] < target) == rising:
            low = middle
        else:
            high = middle
    return min(tried, key=lambda value: abs(tried[value] - target))
