"""What else went on while something was measured: a GPU's energy, clocks and throttling, a CPU's other processes."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import psutil
import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """State of a GPU at one moment.

    Args:
        energy_j: energy used since the driver was loaded.
        clock_mhz: clock of the multiprocessors.
        throttled: whether heat or the power supply holds the clock down (the ordinary power cap does not count).
    """

    energy_j: float
    clock_mhz: float
    throttled: bool


def read(device: torch.device) -> Reading | None:
    """A reading of the device; None on a CPU, which has none of these."""
    if device.type != "cuda":
        return None
    import pynvml

    handle = nvml_handle(device)
    slowdowns = (
        pynvml.nvmlClocksThrottleReasonHwSlowdown
        | pynvml.nvmlClocksThrottleReasonSwThermalSlowdown
        | pynvml.nvmlClocksThrottleReasonHwThermalSlowdown
        | pynvml.nvmlClocksThrottleReasonHwPowerBrakeSlowdown
    )
    return Reading(
        # NVML counts millijoules
        energy_j=pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3,
        clock_mhz=float(pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM)),
        throttled=bool(pynvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle) & slowdowns),
    )


def throttled(*found: Reading | bool | None) -> bool | None:
    """Whether any reading, or what was found before, says so; None where nothing can tell."""
    known = [one.throttled if isinstance(one, Reading) else one for one in found if one is not None]
    return any(known) if known else None


def nvml_handle(device: torch.device) -> Any:
    """NVML's name of a GPU."""
    import pynvml

    pynvml.nvmlInit()
    # CUDA's numbering and NVML's may differ; the UUID is the same in both
    uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    return pynvml.nvmlDeviceGetHandleByUUID(uuid)


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """CPU seconds, since some moment, on the CPUs that this process may use.

    Args:
        there_s: that there were, used or not.
        used_s: that any process had, and that the host gave to other machines (steal).
        own_s: that this process and its children had.
    """

    there_s: float
    used_s: float
    own_s: float


def load(device: torch.device) -> Load | None:
    """The load up to now; None on a GPU, which other processes on the host hardly slow."""
    if device.type != "cpu":
        return None
    own = _own_s()
    now, counted = time.perf_counter(), psutil.cpu_times(percpu=True)
    cpus = [counted[cpu] for cpu in usable_cpus() if cpu < len(counted)]
    # a guest's time is in the user's too
    idle = ("idle", "iowait", "guest", "guest_nice")
    return Load(
        there_s=now * len(cpus),
        used_s=sum(sum(cpu) - sum(getattr(cpu, name, 0.0) for name in idle) for cpu in cpus),
        own_s=own,
    )


def disturbance(before: Load | None, after: Load | None) -> float | None:
    """Share of the CPUs that others had between two readings; None where nothing can tell.

    The system counts in hundredths of a second: of what is shorter than some seconds, this says little.
    """
    # counters that stand still, as in some sandboxes
    if before is None or after is None or after.used_s <= before.used_s:
        return None
    others = (after.used_s - before.used_s) - (after.own_s - before.own_s)
    return min(max(others / (after.there_s - before.there_s), 0.0), 1.0)


def usable_cpus() -> Sequence[int]:
    """Numbers of the CPUs that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return range(psutil.cpu_count() or 1)


def _own_s() -> float:
    """Of this process and its children: a compiler's workers among them, and those that have ended."""
    own, total = psutil.Process(), 0.0
    for one in (own, *own.children(recursive=True)):
        # it may end meanwhile
        with contextlib.suppress(psutil.NoSuchProcess):
            times = one.cpu_times()
            total += times.user + times.system + times.children_user + times.children_system
    return total
