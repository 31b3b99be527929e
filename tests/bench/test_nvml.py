"""What a GPU says of itself, by a module that stands for NVML: there need be no GPU, and its figures are test data."""

# ruff: noqa: N801, N802 (names are NVML's)

from __future__ import annotations

import os
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from calibatt.bench.nvml import GpuLost, GpuReader, nvml_handle
from calibatt.bench.record import Telemetry

CUDA = torch.device("cuda", 0)
UUID = "0d2a8e8c-test"
REASONS = (
    "GpuIdle", "ApplicationsClocksSetting", "SwPowerCap", "HwSlowdown", "SyncBoost", "SwThermalSlowdown",
    "HwThermalSlowdown", "HwPowerBrakeSlowdown", "DisplayClockSetting",
)  # fmt: skip


class FakeNvml:
    """NVML of a machine with cards by UUID, of which one may have an instance (MIG).

    Args:
        handles: by the name that NVML takes.
    """

    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = "sm", "memory", "gpu"

    class NVMLError(Exception): ...

    class NVMLError_NotSupported(NVMLError): ...

    class NVMLError_NotFound(NVMLError): ...

    class NVMLError_InvalidArgument(NVMLError): ...

    class NVMLError_GpuIsLost(NVMLError): ...

    def __init__(self, *handles: str) -> None:
        self.handles = handles
        self.errors: dict[str, Exception] = {}
        self.clocks = {"sm": 1980, "memory": 2619}
        self.reasons = 0
        self.pids = [os.getpid()]
        self.samples: list[tuple[int, int, int]] = []
        self.since: list[int] = []
        for i, name in enumerate(REASONS):
            setattr(self, f"nvmlClocksThrottleReason{name}", 1 << i)

    def _may(self, quantity: str, handle: str) -> None:
        if handle.startswith("MIG") and quantity not in ("memory", "processes"):
            raise self.NVMLError_NotSupported
        if quantity in self.errors:
            raise self.errors[quantity]

    def nvmlInit(self) -> None: ...

    def nvmlDeviceGetHandleByUUID(self, name: str) -> str:
        if name not in self.handles:
            raise self.NVMLError_NotFound
        return name

    def nvmlDeviceIsMigDeviceHandle(self, handle: str) -> int:
        return int(handle.startswith("MIG"))

    def nvmlDeviceGetDeviceHandleFromMigDeviceHandle(self, handle: str) -> str:
        assert handle.startswith("MIG")
        return "the card"

    def nvmlDeviceGetClockInfo(self, handle: str, kind: str) -> int:
        self._may("clock", handle)
        return self.clocks[kind]

    def nvmlDeviceGetPowerUsage(self, handle: str) -> int:
        self._may("power", handle)
        return 651_500

    def nvmlDeviceGetTemperature(self, handle: str, sensor: str) -> int:
        self._may("temperature", handle)
        return 71

    def nvmlDeviceGetMemoryInfo(self, handle: str) -> Any:
        self._may("memory", handle)
        return SimpleNamespace(used=30 << 30 if handle.startswith("GPU") else 5 << 30)

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:
        self._may("energy", handle)
        return 12_500

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle: str) -> int:
        self._may("reasons", handle)
        return self.reasons

    def nvmlDeviceGetComputeRunningProcesses(self, handle: str) -> list[Any]:
        self._may("processes", handle)
        return [SimpleNamespace(pid=pid) for pid in self.pids]

    def nvmlDeviceGetProcessUtilization(self, handle: str, since: int) -> list[Any]:
        self._may("utilization", handle)
        self.since.append(since)
        if not self.samples:
            raise self.NVMLError_NotFound
        return [SimpleNamespace(pid=pid, timeStamp=at, smUtil=used) for pid, at, used in self.samples]


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> FakeNvml:
    fake = FakeNvml("GPU-another", f"GPU-{UUID}")
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda device: SimpleNamespace(uuid=UUID))
    return fake


def test_the_gpu_is_found_by_its_uuid_and_so_is_an_instance_of_one(nvml: FakeNvml) -> None:
    assert nvml_handle(CUDA) == f"GPU-{UUID}"
    nvml.handles = ("GPU-another", f"MIG-{UUID}")
    assert nvml_handle(CUDA) == f"MIG-{UUID}"
    nvml.handles = ("GPU-another",)
    with pytest.raises(FakeNvml.NVMLError_NotFound):
        nvml_handle(CUDA)


def test_a_reading_has_what_the_driver_tells_in_units(nvml: FakeNvml) -> None:
    nvml.reasons = nvml.nvmlClocksThrottleReasonSwPowerCap  # type: ignore[attr-defined]
    reader = GpuReader(CUDA)
    assert reader.read() == Telemetry(
        readings=1, clock_mhz=1980, lowest_clock_mhz=1980, memory_clock_mhz=2619, power_w=651.5, temperature_c=71,
        memory_bytes=30 << 30, reasons=("SwPowerCap",), throttled=False, disturbed=0.0,
    )  # fmt: skip
    assert reader.energy_j() == 12.5


@pytest.mark.parametrize("name", REASONS)
def test_heat_and_the_power_supply_throttle_and_nothing_else_does(nvml: FakeNvml, name: str) -> None:
    nvml.reasons = getattr(nvml, f"nvmlClocksThrottleReason{name}")
    found = GpuReader(CUDA).read()
    assert found.reasons == (name,)
    assert found.throttled == found.spoilt == (name.endswith("Slowdown"))


def test_what_a_driver_does_not_support_is_unknown_and_the_rest_is_known(nvml: FakeNvml) -> None:
    nvml.errors = {name: nvml.NVMLError_NotSupported() for name in ("power", "energy", "reasons", "utilization")}
    nvml.pids = [os.getpid(), 1]
    reader = GpuReader(CUDA)
    found = reader.read()
    assert found.power_w is found.reasons is found.throttled is found.disturbed is None
    assert reader.energy_j() is None
    assert (found.clock_mhz, found.temperature_c, found.spoilt) == (1980, 71, False)


@pytest.mark.parametrize("quantity", ["clock", "power", "memory", "reasons", "processes"])
def test_a_gpu_that_is_lost_ends_the_readings(nvml: FakeNvml, quantity: str) -> None:
    reader = GpuReader(CUDA)
    nvml.errors[quantity] = nvml.NVMLError_GpuIsLost()
    with pytest.raises(GpuLost):
        reader.read()


def test_of_an_instance_the_card_tells_clocks_and_heat_and_nobody_the_energy(nvml: FakeNvml) -> None:
    nvml.handles = (f"MIG-{UUID}",)
    reader = GpuReader(CUDA)
    found = reader.read()
    assert (found.clock_mhz, found.temperature_c, found.memory_bytes) == (1980, 71, 5 << 30)
    assert reader.energy_j() is None


def test_others_are_told_by_their_processes_since_the_last_reading(nvml: FakeNvml) -> None:
    nvml.pids = [os.getpid(), 1, 2]
    nvml.samples = [(os.getpid(), 100, 90), (1, 110, 4), (1, 120, 8), (2, 130, 1)]
    reader = GpuReader(CUDA)
    found = reader.read()
    assert found.disturbed == pytest.approx(0.07)
    assert found.spoilt
    nvml.samples = []
    assert reader.read().disturbed == 0.0
    # what was seen is not asked for again
    assert nvml.since == [0, 130]


def test_where_this_process_has_another_number_nothing_is_said_of_others(nvml: FakeNvml) -> None:
    nvml.pids, nvml.samples = [1, 2], [(1, 100, 90)]
    assert GpuReader(CUDA).read().disturbed is None
