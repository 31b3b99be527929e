"""What was learnt offline, and from what: tables over steps and layers, whatever the method."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from types import MappingProxyType
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


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Learnt:
    """What a method's learner learnt, and from what.

    Args:
        method, preset: names in the catalogue.
        settings: the learner's fields, as `settings_of` gives them.
        tables: by name; the first two dimensions of each are steps and layers.
        provenance: where they come from.

    Raises:
        ValueError: a table has other dimensions.
    """

    method: str
    preset: str
    settings: Mapping[str, Any]
    tables: Mapping[str, Tensor]
    provenance: Provenance

    def __post_init__(self) -> None:
        own = self.provenance
        for name, table in self.tables.items():
            if tuple(table.shape[:2]) != (own.steps, own.layers):
                raise ValueError(
                    f"{self.method}'s table {name} is {list(table.shape)}, "
                    f"for {own.steps} steps and {own.layers} layers"
                )
        object.__setattr__(self, "tables", MappingProxyType(dict(self.tables)))

    def at(self, name: str, site: Site) -> Tensor:
        """A table's part for one site.

        Raises:
            CalibrationMismatch: the site is of other videos than were watched.
        """
        self.check(site)
        return self.tables[name][site.step, site.layer]

    def check_tables(self, method: str, expected: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> None:
        """Refuse tables that a method cannot have learnt.

        Args:
            method: whose they should be.
            expected: type and shape at every site of each table, by name.

        Raises:
            ValueError: one line that names the table.
        """
        if self.tables.keys() != expected.keys():
            raise ValueError(f"tables: {method} has {', '.join(expected)}, not {', '.join(self.tables) or 'none'}")
        for name, (dtype, shape) in expected.items():
            table = self.tables[name]
            if table.dtype != dtype or tuple(table.shape[2:]) != shape:
                raise ValueError(
                    f"{name}: {list(shape)} of {dtype} at every site, not {list(table.shape[2:])} of {table.dtype}"
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
            raise self._mismatch(f"{own.geometry}", f"{geometry}")
        if steps != own.steps:
            raise self._mismatch(f"{own.steps} steps", f"{steps}")

    def check_origin(self, origin: Origin) -> None:
        """Refuse another model, other weights of it, another adapter, or another noise schedule.

        Raises:
            CalibrationMismatch: it is another.
        """
        own = self.provenance.origin
        if origin.weights != own.weights:
            raise self._mismatch(
                f"{own.model} with weights {own.weights}", f"{origin.model} with weights {origin.weights}"
            )
        if origin.scheduler != own.scheduler:
            raise self._mismatch(own.scheduler, origin.scheduler)

    def to(self, device: torch.device | str) -> Learnt:
        """The same tables on another device."""
        return replace(self, tables={name: table.to(device) for name, table in self.tables.items()})

    def nbytes(self) -> int:
        """Bytes of all tables."""
        return sum(table.nbytes for table in self.tables.values())

    def _mismatch(self, own: str, other: str) -> CalibrationMismatch:
        return CalibrationMismatch(
            f"what {self.method} learnt is for {own}, not for {other}: run `calibatt calibrate` for that"
        )
