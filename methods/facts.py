"""Facts that come out of files: JSON into dataclasses, each value of the type that it is annotated with."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from types import GenericAlias
from typing import TYPE_CHECKING, Any, TypeVar, cast

if TYPE_CHECKING:
    from pydantic import ValidationError

_T = TypeVar("_T")

# enough for any message of ours; what a file holds can be of any length
_LONGEST = 300


def read_facts(kind: type[_T], text: str) -> _T:
    """A dataclass from its fields as JSON, lists as tuples, and dataclasses within it likewise.

    Raises:
        ValueError: one line that names the first field that is missing, unknown, of another type, not finite, or that
            the dataclass itself refuses.
    """
    from pydantic import ValidationError

    try:
        # one of one: pydantic takes a configuration for what is around a dataclass, not for a dataclass itself
        (found,) = _reader(cast(Any, kind)).validate_json(f"[{text}]")
    except ValidationError as error:
        raise ValueError(_problem(error)) from None
    except UnicodeError as error:
        raise ValueError(one_line(error)) from None
    return cast(_T, found)


def read_settings(kind: type[_T], settings: Mapping[str, Any]) -> _T:
    """A dataclass from its fields by name, as JSON has them: a learner from what a calibration was learnt under.

    Raises:
        ValueError: as `read_facts`.
    """
    return read_facts(kind, json.dumps(dict(settings)))


def one_line(text: object) -> str:
    """What a file says, fit to be shown: one line of printable characters, and not too long."""
    shown = "".join(c if c.isprintable() else " " for c in str(text))
    return shown if len(shown) <= _LONGEST else f"{shown[:_LONGEST]} …"


@functools.cache
def _reader(kind: type[Any]) -> Any:
    from pydantic import ConfigDict, TypeAdapter

    one: Any = GenericAlias(tuple, (kind,))
    return TypeAdapter(one, config=ConfigDict(strict=True, allow_inf_nan=False, extra="forbid"))


def _problem(error: ValidationError) -> str:
    # without the input, which can be of any size
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    field = ".".join(map(str, first["loc"][1:]))
    return one_line(f"{field}: {first['msg']}" if field else first["msg"].removeprefix("Value error, "))
