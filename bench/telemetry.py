"""GPU energy, clocks and throttling during a measurement (NVML, read-only)."""

from __future__ import annotations

from dataclasses import dataclass

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

    pynvml.nvmlInit()
    # CUDA's numbering and NVML's may differ; the UUID is the same in both
    uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
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
