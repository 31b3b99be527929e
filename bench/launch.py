"""`calibatt bench`: pytest on this folder, wherever the package is installed, under this package's settings alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

_FOLDER = Path(__file__).parent
# -c, or else pytest would take the settings and the conftest.py of a project whose virtual environment this lies in
_OWN = (str(_FOLDER), "-c", str(_FOLDER / "installed.ini"))


def bench(arguments: Sequence[str]) -> int:
    """Run the benchmarks in this process.

    Args:
        arguments: as `pytest bench` takes them.

    Returns:
        pytest's exit code, or the gate's.

    Raises:
        ModuleNotFoundError: pytest or pytest-benchmark is not installed.
    """
    import pytest
    import pytest_benchmark  # noqa: F401  without it, options would be unknown

    return int(pytest.main([*_OWN, *arguments]))


def command_line(arguments: Sequence[str]) -> str:
    """The command that was given, from what pytest was given."""
    own = len(_OWN)
    if tuple(arguments[:own]) == _OWN:
        return " ".join(["calibatt bench", *arguments[own:]])
    return " ".join(["pytest", *arguments])
