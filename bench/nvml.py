"""What a GPU says of itself, by NVML: clocks, power, heat, what holds its clock down, and who else is on it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch

from calibatt.bench.record import Telemetry

_T = TypeVar("_T")

# as NVML spells what it calls clock-event reasons, once throttle reasons
_REASONS = (
    "GpuIdle", "ApplicationsClocksSetting", "SwPowerCap", "HwSlowdown", "SyncBoost", "SwThermalSlowdown",
    "HwThermalSlowdown", "HwPowerBrakeSlowdown", "DisplayClockSetting",
)  # fmt: skip
# heat, or the power supply: the ordinary power cap is how a GPU always runs
_SLOWDOWNS = {"HwSlowdown", "SwThermalSlowdown", "HwThermalSlowdown", "HwPowerBrakeSlowdown"}


class GpuLost(Exception):
    """The GPU no longer answers, and will not until the machine starts anew."""


def nvml_handle(device: torch.device) -> Any:
    """NVML's name of a GPU, or of the instance of one (MIG)."""
    import pynvml

    pynvml.nvmlInit()
    # CUDA's numbering and NVML's may differ, and CUDA_VISIBLE_DEVICES may hold UUIDs; the UUID is the same in both
    uuid = torch.cuda.get_device_properties(device).uuid
    try:
        return pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
    except (pynvml.NVMLError_NotFound, pynvml.NVMLError_InvalidArgument):
        return pynvml.nvmlDeviceGetHandleByUUID(f"MIG-{uuid}")


class GpuReader:
    """Reads a GPU's state.

    Of an instance (MIG), clocks, heat and power are the whole card's, and energy is unknown: others may use the rest.

    Args:
        device: which one.
    """

    def __init__(self, device: torch.device) -> None:
        import pynvml

        self._nvml = pynvml
        self._handle = nvml_handle(device)
        self._instance = bool(_tried(lambda: pynvml.nvmlDeviceIsMigDeviceHandle(self._handle)))
        self._card = (
            pynvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(self._handle) if self._instance else self._handle
        )
        # of the newest sample of processes, in NVML's microseconds
        self._seen = 0

    def read(self) -> Telemetry:
        """The state now; what the driver does not tell is None.

        Raises:
            GpuLost: there will be no more readings.
        """
        nvml, card = self._nvml, self._card
        clock = _tried(lambda: float(nvml.nvmlDeviceGetClockInfo(card, nvml.NVML_CLOCK_SM)))
        reasons = _tried(lambda: tuple(self._named(nvml.nvmlDeviceGetCurrentClocksThrottleReasons(card))))
        return Telemetry(
            readings=1,
            clock_mhz=clock,
            lowest_clock_mhz=clock,
            memory_clock_mhz=_tried(lambda: float(nvml.nvmlDeviceGetClockInfo(card, nvml.NVML_CLOCK_MEM))),
            # NVML gives milliwatts
            power_w=_tried(lambda: nvml.nvmlDeviceGetPowerUsage(card) / 1e3),
            temperature_c=_tried(lambda: float(nvml.nvmlDeviceGetTemperature(card, nvml.NVML_TEMPERATURE_GPU))),
            memory_bytes=_tried(lambda: int(nvml.nvmlDeviceGetMemoryInfo(self._handle).used)),
            reasons=reasons,
            throttled=None if reasons is None else not _SLOWDOWNS.isdisjoint(reasons),
            disturbed=_tried(self._others),
        )

    def energy_j(self) -> float | None:
        """Energy used since the driver was loaded; None where it is not told, or is others' too."""
        if self._instance:
            return None
        # NVML counts millijoules
        return _tried(lambda: self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._card) / 1e3)

    def _named(self, bits: int) -> Iterable[str]:
        return (name for name in _REASONS if bits & getattr(self._nvml, f"nvmlClocksThrottleReason{name}"))

    def _others(self) -> float | None:
        """Share of the multiprocessors' time that other processes had; None where this one is not told from them."""
        nvml, own = self._nvml, os.getpid()
        running = {one.pid for one in nvml.nvmlDeviceGetComputeRunningProcesses(self._handle)}
        # in a container, processes may have other numbers than NVML's
        if own not in running:
            return None
        if running == {own}:
            return 0.0
        try:
            samples = nvml.nvmlDeviceGetProcessUtilization(self._card, self._seen)
        except nvml.NVMLError_NotFound:
            # nobody did anything since
            return 0.0
        self._seen = max((one.timeStamp for one in samples), default=self._seen)
        used: dict[int, list[int]] = {}
        for one in samples:
            used.setdefault(one.pid, []).append(one.smUtil)
        # in percent
        return min(1.0, sum(sum(each) / len(each) / 100 for pid, each in used.items() if pid != own))


def _tried(read: Callable[[], _T]) -> _T | None:
    """A quantity; None where the driver does not tell it."""
    import pynvml

    try:
        return read()
    except pynvml.NVMLError_GpuIsLost as error:
        raise GpuLost(str(error)) from None
    except pynvml.NVMLError:
        return None
