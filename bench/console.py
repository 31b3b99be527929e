"""Where progress is shown."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Protocol, runtime_checkable


@runtime_checkable
class Console(Protocol):
    """Lines that say how far the work is, and room for a progress bar."""

    def line(self, text: str) -> None:
        """Show a line."""
        ...

    def open(self) -> AbstractContextManager[None]:
        """While this is open, what is written to stderr is shown at once."""
        ...
