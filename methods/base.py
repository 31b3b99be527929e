"""What a method is."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, Protocol, runtime_checkable

from jaxtyping import Float, UInt8
from torch import Tensor

from calibatt.kernels.base import Unsupported
from calibatt.kernels.geometry import Geometry
from calibatt.kernels.plan import Plan, Remainder
from calibatt.methods.learning import Learner, Learnt, Tables
from calibatt.methods.site import Site
from calibatt.methods.transfer import Blocks


@dataclass(frozen=True, slots=True, kw_only=True)
class Knob:
    """The one field of a method's config that trades density for fidelity, and the range to search it in.

    Args:
        field: name of the field.
        low, high: the range; density rises or falls monotonically along it.
        over_videos: whether the density of a call depends on the calls before, and shows in whole videos only.
        learnt_with: settings that what is learnt offline must have been learnt with for the knob to be turned.
    """

    field: str
    low: float
    high: float
    over_videos: bool = False
    learnt_with: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@runtime_checkable
class Planner(Protocol):
    """Anything that makes plans, site after site."""

    def plan(
        self,
        q: Float[Tensor, "heads tokens head_dim"],
        k: Float[Tensor, "heads tokens head_dim"],
        v: Float[Tensor, "heads tokens head_dim"],
        site: Site,
    ) -> Plan:
        """Decide what is computed at this site, for one sample; q, k and v are those that attention will see."""
        ...

    def reset(self) -> None:
        """Forget everything about the last video. Called at the start of each."""
        ...


@runtime_checkable
class Foreseen(Protocol):
    """A planner whose plans are known before any call."""

    def mean_density(self, text_tokens: int | None = None) -> float:
        """Of all plans of a video.

        Args:
            text_tokens: of its prompt; as many as are allowed where None.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Trials:
    """Videos that a calibration makes when all prompts have been noted, to see what errors of attention come to.

    Args:
        planners: each plans a video of each of some prompts.
        prompts: of how many, the first.
        learn: from the mean squared difference of each of these videos from the dense one, the tables to put in place
            of those that were learnt without.
    """

    planners: Sequence[Planner]
    prompts: int
    learn: Callable[[Float[Tensor, "planners prompts"]], Mapping[str, Tensor]]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Fit:
    """How a learner's settings are fitted to a model: notes are taken once, and every trial learns from them.

    Args:
        ranges: the least and the most of each number that is searched, by its name.
        published: its authors' values.
        noting: takes notes that do for all values.
        learner: from values, what learns from these notes.
    """

    ranges: Mapping[str, tuple[float, float]]
    published: Mapping[str, float]
    noting: Learner
    learner: Callable[[Mapping[str, float]], Learner]


class Method(ABC):
    """A way to decide plans. A method is a subclass in a file of its own, and a line of the catalogue.

    Built as `cls(config)`; as `cls(config, learnt)` where the config needs something learnt: see `learner` and
    `learns_from`.

    Class attributes:
        name: as in the catalogue.
        label, colour, marker: how reports show it: its name as its authors write it, a colour "#rrggbb", and a marker
            of `methods/looks.py`.
        presets: named configs, each with its source; "default" is always one of them.
        knob: what to turn for a given density; None where there is nothing to turn.
        without_dense: settings with which the method itself keeps no step and no layer dense.
        remainder: what its plans themselves have stand for the blocks that they leave out.
        headwise: whether an online method that has learnt nothing plans a head by this head's queries, keys and values
            alone, so that it can be asked for some heads by themselves.

    Attributes:
        learnt: what it was built with; None where it needs nothing learnt.
        offline: whether its plans follow from the site alone: they are known before there are queries.
    """

    name: ClassVar[str]
    label: ClassVar[str]
    colour: ClassVar[str]
    marker: ClassVar[str]
    presets: ClassVar[Mapping[str, Any]]
    knob: ClassVar[Knob | None] = None
    without_dense: ClassVar[Mapping[str, Any]] = MappingProxyType({})
    remainder: ClassVar[Remainder] = "none"
    headwise: ClassVar[bool] = False
    learnt: Learnt | None = None
    offline: bool = False

    def __init__(self, config: Any, learnt: Learnt | None = None) -> None:
        self.config = config
        self.learnt = learnt

    @classmethod
    def learner(cls, config: Any) -> Learner | None:
        """What learns offline for these settings; None where nothing has to be learnt, as by default."""
        return None

    @classmethod
    def learns_from(cls, config: Any) -> str | None:
        """The method whose learnt tables these settings plan by: by default its own, where it learns."""
        return None if cls.learner(config) is None else cls.name

    @classmethod
    def settled(cls, config: Any, learnt: Learnt) -> Any:
        """The config to build with, given what was learnt; by default the config itself.

        A method whose presets share one calibration takes from it what only its learner reads.
        """
        return config

    @classmethod  # noqa: B027 (most methods have nothing to add)
    def check_tables(cls, learnt: Learnt) -> None:
        """Refuse settings, names, dtypes and shapes that cannot be this method's own; by default nothing.

        Args:
            learnt: of this method; its tables have steps and layers as their first dimensions. Values are not read:
                they are `check_part`'s.

        Raises:
            ValueError: one line that names the setting or the table.
        """

    @classmethod  # noqa: B027 (most methods have nothing to add)
    def check_part(cls, name: str, part: Tensor, settings: Mapping[str, Any], geometry: Geometry) -> None:
        """Refuse values that cannot be this method's own; by default none.

        Args:
            name: of a table.
            part: of one step and layer, or a row that some share; it has no NaN.
            settings, geometry: of what was learnt.

        Raises:
            ValueError: one line that says what is wrong.
        """

    @classmethod
    def fit(cls, config: Any, geometry: Geometry, steps: int) -> Fit | None:
        """What can be fitted to a model's videos of a geometry and a number of steps; nothing by default."""
        return None

    @classmethod
    def condensed(cls, learnt: Learnt) -> Tables | None:
        """Tables that take less room, in place of those that were merged; None keeps those, as by default.

        Args:
            learnt: of this method.
        """
        return None

    @classmethod
    def transferred_part(
        cls, learnt: Learnt, name: str, index: tuple[int, ...], source: Blocks, to: Blocks
    ) -> UInt8[Tensor, "..."] | Float[Tensor, "..."]:
        """A part of a table for other blocks of tokens; nothing can be transferred by default.

        Args:
            learnt: of this method.
            name: of a table.
            index: of the part: step and layer, or of a table that has rows, the row.
            source, to: the blocks that it was learnt of, and those to have it for.

        Raises:
            ValueError: one line that says why it cannot be.
        """
        raise ValueError(f"what {cls.name} learnt cannot be transferred: run `calibatt calibrate` for that size")

    @classmethod
    def trials(cls, learnt: Learnt) -> Trials | None:
        """What a calibration tries out in the end; nothing by default.

        Args:
            learnt: of this method, without trials.
        """
        return None

    def refusal(self, geometry: Geometry) -> Unsupported | None:
        """Why the method does not apply to a geometry, or None when it does, as by default."""
        return None

    @abstractmethod
    def plan(
        self,
        q: Float[Tensor, "heads tokens head_dim"],
        k: Float[Tensor, "heads tokens head_dim"],
        v: Float[Tensor, "heads tokens head_dim"],
        site: Site,
    ) -> Plan:
        """Decide what is computed at this site, for one sample; q, k and v are those that attention will see.

        Raises:
            ValueError: what was learnt is for other videos.
        """

    def reset(self) -> None:  # noqa: B027 (most methods keep no state)
        """Forget everything about the last video. Called at the start of each."""
