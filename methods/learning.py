"""What was learnt offline, and from what: tables over steps and layers, whatever the method."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from typing import Any, Protocol, cast, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from calibatt.kernels.geometry import Geometry
from calibatt.methods.site import Site


@runtime_checkable
class Learner(Protocol):
    """What a method learns from dense videos, call by call: a frozen dataclass, whose fields are all it depends on.

    It has no state: notes are kept, merged and stored for it.
    """

    def note(
        self,
        q: Float[Tensor, "heads tokens head_dim"],
        k: Float[Tensor, "heads tokens head_dim"],
        v: Float[Tensor, "heads tokens head_dim"],
        site: Site,
        prompt: int,
    ) -> Mapping[str, Tensor]:
        """What is to be kept of one call of the conditional branch of one prompt's video.

        Args:
            q, k, v: what attention sees.
            site: where; every site of a video is noted once.
            prompt: index of the prompt.

        Returns:
            Tensors by name, on any device; names, shapes and dtypes are the same at every site and for every prompt.
        """
        ...

    def merge(self, notes: Sequence[Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
        """What a site's notes of all prompts, in their order and on the CPU, come to; the same names at every site."""
        ...


# behind the name of a table: the table that says which of its rows a site has, where sites share rows
ROWS = ".rows"
Layout = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]


class Tables:
    """Tables by name, read part by part: the first two dimensions are steps and layers.

    A table may be shorter, and have rows that sites share. Then the table of its name with `ROWS` behind it says, for
    every step and layer, which rows these are. It is used like a mapping, and is none: to look at one's values, as what
    checks types does, would be to read them.

    Args:
        tables: by name.
    """

    def __init__(self, tables: Mapping[str, Tensor]) -> None:
        self._tables = dict(tables)

    def __getitem__(self, name: str) -> Tensor:
        return self._tables[name]

    def __contains__(self, name: object) -> bool:
        return name in self._tables

    def __iter__(self) -> Iterator[str]:
        return iter(self._tables)

    def keys(self) -> Collection[str]:
        """Names of the tables."""
        return self._tables.keys()

    def items(self) -> Iterator[tuple[str, Tensor]]:
        """Names and tables, which are read one by one."""
        return ((name, self[name]) for name in self._tables)

    @property
    def layout(self) -> Layout:
        """Dtype and shape of every table, for which nothing is read."""
        return {name: (table.dtype, tuple(table.shape)) for name, table in self._tables.items()}

    def part(self, name: str, index: tuple[int, ...]) -> Tensor:
        """What lies at a step and layer; of a table that has rows, at a row."""
        return self._tables[name][index]


def sections(layout: Layout, name: str) -> list[tuple[int, ...]]:
    """The indices of all parts of a table, in the order in which they lie."""
    shape = layout[name][1]
    return list(product(*map(range, shape[: 1 if name + ROWS in layout else 2])))


def at_every_site(layout: Layout, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
    """Dtype and shape of what `Learnt.part` gives of a table."""
    dtype, shape = layout[name]
    if name + ROWS not in layout:
        return dtype, shape[2:]
    return dtype, (*layout[name + ROWS][1][2:], *shape[1:])


# what else there is to do about another size or number of steps
_TRANSFER = ", or `calibatt transfer`"
# q, k and v of a call, [heads, tokens, head_dim], and where it happened
Seen = tuple[Tensor, Tensor, Tensor, Site]


@runtime_checkable
class TogetherLearner(Learner, Protocol):
    """A learner that notes the videos of several prompts as one.

    Attributes:
        beside: of how many, at most. Their videos are made side by side.
    """

    @property
    def beside(self) -> int: ...

    def note_together(self, calls: Sequence[Seen]) -> Mapping[str, Tensor]:
        """What is to be kept of the calls of one site, one of each prompt's video; as `note` otherwise.

        Args:
            calls: in the order of the prompts; some may have fewer text tokens than others.
        """
        ...


@runtime_checkable
class WeighingLearner(Learner, Protocol):
    """A learner that notes some calls by the mass of their blocks, which attention can sum while it is computed."""

    def weighed(self, site: Site, prompt: int) -> tuple[int, int] | None:
        """Tokens of the query and key blocks by whose mass `note_weighed` notes a call; None where `note` has to."""
        ...

    def note_weighed(self, mass: Float[Tensor, "heads q_blocks k_blocks"], site: Site) -> Mapping[str, Tensor]:
        """As `note`, to which it comes but for rounding.

        Args:
            mass: attention weights summed over the queries and keys of each block.
            site: where the call happened.
        """
        ...


def settings_of(learner: Learner) -> dict[str, Any]:
    """A learner's fields, as JSON has them: what a calibration says that it was learnt under."""
    settings: dict[str, Any] = json.loads(json.dumps(asdict(cast("Any", learner))))
    return settings


class CalibrationMismatch(ValueError):
    """Something learnt for other videos than it is used on; the message is one line that names both."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """A pipeline, as far as its attention depends on it.

    Args:
        model: what people call it; not compared, since a pipeline of one's own may have no name.
        weights: digest of all its transformers, with the adapters that are switched on.
        scheduler: class and shift of the noise schedule.
    """

    model: str
    weights: str
    scheduler: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """What something was learnt for before it was transferred.

    Args:
        geometry, steps: as in `Provenance`.
        scheduler: as in `Origin`.
    """

    geometry: Geometry
    steps: int
    scheduler: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Provenance:
    """Where something learnt comes from.

    Args:
        origin: the pipeline.
        geometry: layout of the tokens; where the prompt's length varies, with the most text tokens a prompt may have.
        steps, layers: of the videos; layers of a pipeline with two transformers are those of one.
        guidance: classifier-free guidance scale of the videos.
        prompts: in order; prompt i started from noise of seed + i.
        seed: of the first prompt's noise.
        cost_ratio: time of the videos while notes were taken over that of the same videos without, same kernel.
        versions: of calibatt, torch and diffusers.
        created: UTC, ISO 8601.
        sigmas: noise level of each step, 1 is pure noise; none where it was made before this was kept.
        transferred: what it was for before, the first first, where it was transferred. Geometry, steps, scheduler and
            noise levels are those that it is for; guidance, prompts, cost and versions those of the calibration.
    """

    origin: Origin
    geometry: Geometry
    steps: int
    layers: int
    guidance: float
    prompts: tuple[str, ...]
    seed: int
    cost_ratio: float
    versions: Mapping[str, str] = field(default_factory=dict)
    created: str = ""
    sigmas: tuple[float, ...] = ()
    transferred: tuple[Stage, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Learnt:
    """What a method's learner learnt, and from what.

    Args:
        method, preset: names in the catalogue.
        settings: the learner's fields, as `settings_of` gives them.
        tables: by name, as `Tables` has them.
        provenance: where they come from.

    Raises:
        ValueError: a table has other dimensions.
    """

    method: str
    preset: str
    settings: Mapping[str, Any]
    tables: Tables | Mapping[str, Tensor]
    provenance: Provenance

    def __post_init__(self) -> None:
        own = self.provenance
        object.__setattr__(self, "tables", self.tables if isinstance(self.tables, Tables) else Tables(self.tables))
        layout = self.parts.layout
        for name, (_, shape) in layout.items():
            if not shape or (name + ROWS not in layout and shape[:2] != (own.steps, own.layers)):
                raise ValueError(
                    f"{self.method}'s table {name} is {list(shape)}, for {own.steps} steps and {own.layers} layers"
                )

    def at(self, name: str, site: Site) -> Tensor:
        """A table's part for one site, on the CPU.

        Raises:
            CalibrationMismatch: the site is of other videos than were watched.
        """
        self.check(site)
        return self.part(name, site.step, site.layer)

    def part(self, name: str, step: int, layer: int) -> Tensor:
        """A table's part for a step and layer, of rows that sites share put together."""
        if name + ROWS not in self.tables:
            return self.parts.part(name, (step, layer))
        rows = self.parts.part(name + ROWS, (step, layer))
        each = [self.parts.part(name, (row,)) for row in rows.flatten().tolist()]
        return torch.stack(each).view(*rows.shape, *each[0].shape)

    @property
    def parts(self) -> Tables:
        """The tables, to be read part by part."""
        return cast(Tables, self.tables)

    def check_tables(self, method: str, expected: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> None:
        """Refuse tables that a method cannot have learnt.

        Args:
            method: whose they should be.
            expected: type and shape at every site of each table, by name.

        Raises:
            ValueError: one line that names the table.
        """
        layout = self.parts.layout
        rows = {name + ROWS for name in layout}
        found = {name: at_every_site(layout, name) for name in layout if name not in rows}
        if found.keys() != expected.keys():
            raise ValueError(f"tables: {method} has {', '.join(expected)}, not {', '.join(found) or 'none'}")
        for name, (dtype, shape) in expected.items():
            if found[name] != (dtype, shape):
                raise ValueError(
                    f"{name}: {list(shape)} of {dtype} at every site, not {list(found[name][1])} of {found[name][0]}"
                )

    def check(self, site: Site) -> None:
        """Refuse a site of other videos than were watched; a prompt may have fewer text tokens.

        Raises:
            CalibrationMismatch: geometry, steps or layers differ.
        """
        self.check_run(site.geometry, site.steps)
        if site.layers != self.provenance.layers:
            raise self._mismatch(f"{self.provenance.layers} layers", f"{site.layers}")

    def check_blocks(self, site: Site) -> None:
        """Refuse a site as `check` does, and one with fewer text tokens: for tables that have a value a token block.

        Raises:
            CalibrationMismatch: geometry, text tokens, steps or layers differ.
        """
        self.check(site)
        if site.geometry.text_tokens != self.provenance.geometry.text_tokens:
            raise self._mismatch(f"{self.provenance.geometry.text_tokens} text tokens", f"{site.geometry.text_tokens}")

    def check_run(self, geometry: Geometry, steps: int) -> None:
        """Refuse another geometry or number of steps.

        Raises:
            CalibrationMismatch: it is another.
        """
        own = self.provenance
        fitting = replace(geometry, text_tokens=min(geometry.text_tokens, own.geometry.text_tokens))
        if fitting != geometry or replace(geometry, text_tokens=own.geometry.text_tokens) != own.geometry:
            raise self._mismatch(f"{own.geometry}", f"{geometry}", or_else=_TRANSFER)
        if steps != own.steps:
            raise self._mismatch(f"{own.steps} steps", f"{steps}", or_else=_TRANSFER)

    def check_origin(self, origin: Origin) -> None:
        """Refuse another model, other weights of it, another adapter, or another noise schedule.

        Raises:
            CalibrationMismatch: it is another.
        """
        self._check_weights(origin)
        own = self.provenance.origin
        if origin.scheduler != own.scheduler:
            raise self._mismatch(own.scheduler, origin.scheduler)

    def check_model(self, origin: Origin, geometry: Geometry, layers: int) -> None:
        """Refuse what nothing is transferred to: another model, other weights of it, another adapter.

        Raises:
            CalibrationMismatch: it is another, or has other heads, layers or another side for text.
        """
        self._check_weights(origin)
        own = self.provenance
        if layers != own.layers:
            raise self._mismatch(f"{own.layers} layers", f"{layers}")
        if replace(geometry, grid=own.geometry.grid, text_tokens=own.geometry.text_tokens) != own.geometry:
            raise self._mismatch(f"{own.geometry}, text {own.geometry.text_side}", f"{geometry}, {geometry.text_side}")

    def nbytes(self) -> int:
        """Bytes of all tables."""
        return sum(math.prod(shape) * dtype.itemsize for dtype, shape in self.parts.layout.values())

    def _check_weights(self, origin: Origin) -> None:
        own = self.provenance.origin
        if origin.weights != own.weights:
            raise self._mismatch(
                f"{own.model} with weights {own.weights}", f"{origin.model} with weights {origin.weights}"
            )

    def _mismatch(self, own: str, other: str, *, or_else: str = "") -> CalibrationMismatch:
        return CalibrationMismatch(
            f"what {self.method} learnt is for {own}, not for {other}: run `calibatt calibrate` for that{or_else}"
        )
