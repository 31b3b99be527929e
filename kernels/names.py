"""Catalogues of what has a name: what this package has, what others install, and looking one of them up."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any, TypeVar

_T = TypeVar("_T")


class UnknownName(ValueError):
    """A name that is in no catalogue; the message is one line that says what there is."""


class UnusableEntry(ValueError):
    """What another package offers is none of these; the message is one line that says whose it is and why."""


class Catalogue(Mapping[str, _T]):
    """Everything of one kind, by name: this package's own, then what installed packages offer.

    These name theirs as entry points of the group `calibatt.<kind>s`, each under the name that it has itself; they are
    loaded when first asked for. `package.module:name` stands for what a module has; from then on it has its own name.

    Args:
        kind: what it holds, for messages: "method", "model", …
        own: what this package has.
        fault: why something is none of this kind, or None where it is.
    """

    def __init__(self, kind: str, own: Iterable[_T], *, fault: Callable[[Any], str | None]) -> None:
        self._kind, self._fault = kind, fault
        self._loaded: dict[str, _T] = {_name(one): one for one in own}
        self._own = frozenset(self._loaded)

    @functools.cached_property
    def _offered(self) -> Mapping[str, list[EntryPoint]]:
        offered: dict[str, list[EntryPoint]] = {}
        for entry in entry_points(group=f"calibatt.{self._kind}s"):
            offered.setdefault(entry.name, []).append(entry)
        return offered

    def __getitem__(self, name: str) -> _T:
        """What has the name.

        Raises:
            KeyError: nothing has.
            UnusableEntry: what has it cannot be loaded, or is none of this kind; or two packages have it.
        """
        if ":" in name:
            return self._take(name, EntryPoint(name=name, value=name, group=""))
        entries = self._offered.get(name, [])
        owners = [*(["calibatt"] if name in self._own else []), *map(_owner, entries)]
        if len(owners) > 1:
            raise UnusableEntry(f"{' and '.join(owners)} both have a {self._kind} {name!r}: uninstall one of them")
        if name not in self._loaded and entries:
            found = self._take(f"{owners[0]}'s {self._kind} {name!r}", entries[0])
            if _name(found) != name:
                raise UnusableEntry(f"{owners[0]} offers {_name(found)!r} as {name!r}: name them alike")
        return self._loaded[name]

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys((*self._loaded, *self._offered)))

    def __len__(self) -> int:
        return len(list(iter(self)))

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and (":" in name or name in self._loaded or name in self._offered)

    def _take(self, title: str, entry: EntryPoint) -> _T:
        try:
            found = entry.load()
        except Exception as error:
            said = " ".join(f"{type(error).__name__}: {error}".split())
            raise UnusableEntry(f"{title} cannot be loaded: {said:.200}") from error
        fault = self._fault(found)
        if fault is not None:
            raise UnusableEntry(f"{title} is no {self._kind}: {fault}")
        if self._loaded.setdefault(_name(found), found) is not found:
            raise UnusableEntry(f"{title} has the name of another {self._kind}, {_name(found)!r}: choose another one")
        return found


def look_up(catalogue: Mapping[str, _T], name: str, kind: str) -> _T:
    """The entry of that name.

    Args:
        kind: what the catalogue holds, for the message: "method", "model", …

    Raises:
        UnknownName: there is no such entry.
        UnusableEntry: there is one, of another package, that cannot be used.
    """
    if name in catalogue:
        return catalogue[name]
    near = difflib.get_close_matches(name, catalogue, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(catalogue)}"
    raise UnknownName(f"unknown {kind} {name!r}: {hint}")


def _name(one: Any) -> str:
    return str(one.name)


def _owner(entry: EntryPoint) -> str:
    """The distribution that an entry point is of."""
    return entry.dist.name if entry.dist is not None else "a package"
