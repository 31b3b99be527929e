"""Every suite there is, in the order of the record: that in which they run on one workload."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from calibatt.bench.record import SUITES as ORDER
from calibatt.bench.record import Suite as SuiteName
from calibatt.bench.suites import attention, calibration, denoise, forward, kernel
from calibatt.bench.suites.suite import Suite

_EACH: Mapping[SuiteName, Suite] = {suite.NAME: suite for suite in (kernel, forward, calibration, attention, denoise)}
SUITES: Mapping[SuiteName, Suite] = MappingProxyType({name: _EACH[name] for name in ORDER})
