"""Every suite there is, in the order in which they run on one workload: each can use what the one before has made.

A suite is a file of this folder, and its name a word of `record.Suite`.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from types import MappingProxyType
from typing import cast

from calibatt.bench import record
from calibatt.bench.suites.suite import Suite

SUITES: Mapping[record.Suite, Suite] = MappingProxyType(
    {name: cast(Suite, import_module(f"calibatt.bench.suites.{name}")) for name in record.SUITES}
)
