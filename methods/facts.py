"""Facts that come out of files: JSON into dataclasses, each value of the type that it is annotated with."""

from __future__ import annotations

import functools
from typing import Any, TypeVar

_T = TypeVar("_T")

# enough for any message of ours; what a file holds can be of any length
_LONGEST = 300


def read_facts(kind: type[_T], text: str | bytes) -> _T:
    """A dataclass from its fields as JSON, lists as tuples, and dataclasses within it likewise.

    Raises:
        ValueError: one line that names the first field that is missing, unknown, of another type, not finite, or that
            the dataclass itself refuses.
    """
    from pydantic import ValidationError

    hashable: Any = kind
    try:
        # one of one: pydantic takes a configuration for what is around a dataclass, not for a dataclass itself
        (facts,) = _reader(hashable).validate_json(b"[" + (text.encode() if isinstance(text, str) else text) + b"]")
    except (ValidationError, UnicodeError) as error:
        raise ValueError(_problem(error)) from None
    found: _T = facts
    return found


def one_line(text: object) -> str:
    """What a file says, fit to be shown: one line of printable characters, and not too long."""
    shown = "".join(c if c.isprintable() else " " for c in str(text))
    return shown if len(shown) <= _LONGEST else f"{shown[:_LONGEST]} …"


@functools.cache
def _reader(kind: Any) -> Any:
    from pydantic import ConfigDict, TypeAdapter

    row: Any = tuple.__class_getitem__(kind)
    return TypeAdapter(row, config=ConfigDict(strict=True, allow_inf_nan=False, extra="forbid"))


def _problem(error: Any) -> str:
    if isinstance(error, UnicodeError):
        return one_line(error)
    # without the input, which can be of any size
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    field = ".".join(map(str, first["loc"][1:]))
    return one_line(f"{field}: {first['msg']}" if field else first["msg"].removeprefix("Value error, "))
