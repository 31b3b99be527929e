"""CalibAtt: block masks and row reuse learnt offline for every step, layer and head (arXiv 2603.05503)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from types import MappingProxyType
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from calibatt.kernels.geometry import Geometry
from calibatt.kernels.mask import block_count, packed, row_bytes, unpacked
from calibatt.kernels.plan import Plan
from calibatt.methods.base import Fit, Knob, Method
from calibatt.methods.calibatt.learner import OUTPUT_ERRORS, CalibAttLearner, MassLearner
from calibatt.methods.calibatt.levels import MOST_LEVEL
from calibatt.methods.calibatt.plans import Plans
from calibatt.methods.calibatt.schedule import Schedule
from calibatt.methods.calibatt.sharing import SharedTables
from calibatt.methods.facts import read_settings
from calibatt.methods.learning import Learnt
from calibatt.methods.site import Site
from calibatt.methods.transfer import Blocks, transferred_table

# The numbers that the paper fits. Its values lie well inside: masses of 0.76 to 0.99, decays of 5.6 and 16, ρ = 0.5,
# γ = 0.87. ρ next to 0 is any prompt; a similarity of 1 has nobody, and nobody would call one of 0.5 alike.
_FITTED: Mapping[str, tuple[float, float]] = MappingProxyType(
    {"late": (0.5, 1.0), "early": (0.5, 1.0), "decay": (0.0, 32.0), "rho": (0.05, 1.0), "gamma": (0.5, 1.0)}
)


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibAttConfig:
    """Settings of CalibAtt; the defaults are the paper's.

    The first four count when a video is made. The others are its learner's (`CalibAttLearner`): they count when
    calibrating, and a method that is built on a calibration has the calibration's.

    Args:
        repetition: some heads compute their anchor rows only; without it they have a block mask like the others.
        reuse_by: which heads: those whose attention is at least as similar from row to row as gamma, the paper's
            criterion; or those whose outputs lose as little as `error_ratio` says, ours. The latter needs
            `output_errors`.
        error_ratio: reuse may move a head's outputs, squared, so many times as far as its masks of the schedule do.
        loss: attention mass that masks may lose, in multiples of what the schedule that was calibrated with leaves out.
            Another than 1 needs a calibration with levels.
        block, schedule, rho, gamma, anchors, similarity_prompts, query_stride, levels, output_errors, share: as in
            `CalibAttLearner`.

    Raises:
        ValueError: the loss or the ratio is negative, or a setting of the learner is out of range.
    """

    repetition: bool = True
    reuse_by: Literal["similarity", "output"] = "similarity"
    # no more than masks lose; docs/methods/calibatt.md has what other ratios come to
    error_ratio: float = 1.0
    loss: float = 1.0
    block: tuple[int, int] = (128, 128)
    schedule: Schedule | None = None
    rho: float = 0.5
    gamma: float = 0.87
    anchors: int = 5
    similarity_prompts: int | None = None
    query_stride: int = 1
    levels: bool = False
    output_errors: bool = False
    share: float | None = None

    def __post_init__(self) -> None:
        # written so that NaN fails too
        if not self.loss >= 0:
            raise ValueError(f"calibatt's loss is a multiple, 0 or more: got {self.loss}")
        if not 0 <= self.error_ratio < math.inf:
            raise ValueError(f"calibatt's error_ratio is a finite multiple, 0 or more: got {self.error_ratio}")
        if self.reuse_by not in ("similarity", "output"):
            raise ValueError(f"rows are reused by similarity or by output: got {self.reuse_by!r}")
        # refuses its own
        self.learner()

    def learner(self) -> CalibAttLearner:
        """What learns under these settings."""
        return CalibAttLearner(**{field.name: getattr(self, field.name) for field in fields(CalibAttLearner)})


class CalibAtt(Method):
    """Looks every plan up in a calibration; nothing is estimated while a video is made."""

    name: ClassVar[str] = "calibatt"
    label: ClassVar[str] = "CalibAtt"
    colour: ClassVar[str] = "#0072B2"
    marker: ClassVar[str] = "o"
    offline = True
    presets: ClassVar[Mapping[str, CalibAttConfig]] = MappingProxyType(
        {
            # the paper's method
            "default": CalibAttConfig(),
            # the paper's reduced calibration: repetition of one prompt only
            "reduced": CalibAttConfig(similarity_prompts=1),
            # block masks alone: shows what repetition adds
            "masks-only": CalibAttConfig(repetition=False),
            # ours: reuse where outputs stand it, not where attention is alike
            "output-reuse": CalibAttConfig(reuse_by="output", output_errors=True),
        }
    )
    # nearly all that a calibration's levels tell apart
    knob: ClassVar[Knob | None] = Knob(field="loss", low=0.0, high=15.0, learnt_with=MappingProxyType({"levels": True}))

    def __init__(self, config: CalibAttConfig, learnt: Learnt) -> None:
        super().__init__(config, learnt)
        self.plans = Plans(
            learnt=learnt, gamma=config.gamma, loss=config.loss, repetition=config.repetition,
            error_ratio=config.error_ratio if config.reuse_by == "output" else None,
        )  # fmt: skip

    @classmethod
    def learner(cls, config: CalibAttConfig) -> CalibAttLearner:
        """Learns masks and repetition, and where asked for output errors; otherwise the same for all presets."""
        return config.learner()

    @classmethod
    def settled(cls, config: CalibAttConfig, learnt: Learnt) -> CalibAttConfig:
        """The config with the learner's settings as they were when it learnt."""
        own = read_settings(CalibAttLearner, learnt.settings)
        return replace(config, **{field.name: getattr(own, field.name) for field in fields(own)})

    @classmethod
    def condensed(cls, learnt: Learnt) -> SharedTables | None:
        """With fewer masks, where steps are to share them."""
        share = read_settings(CalibAttLearner, learnt.settings).share
        return None if share is None else SharedTables(learnt, share)

    @classmethod
    def transferred_part(cls, learnt: Learnt, name: str, index: tuple[int, ...], source: Blocks, to: Blocks) -> Tensor:
        """Masks and levels by place; what is known of whole heads as it is.

        Anchor rows follow from the size where plans are made.
        """
        part = learnt.parts.part(name, index)
        if name == "levels":
            # a row without any has what it needs most (`keep_at`)
            return transferred_table(part, source, to, always=MOST_LEVEL, one_a_row=False)
        if name != "bits":
            return part
        # of a row that steps share: the mask of one head
        masks = part.view(-1, *part.shape[-2:])
        keep = unpacked(masks, block_count(source.geometry.video_tokens, source.block[1])).to(torch.uint8)
        bits = packed(transferred_table(keep, source, to, always=1) > 0)
        return bits.view(*part.shape[:-2], *bits.shape[1:])

    @classmethod
    def fit(cls, config: CalibAttConfig, geometry: Geometry, steps: int) -> Fit:
        """The schedule, ρ and γ, which the paper fits for each model, from one set of notes.

        Raises:
            ValueError: output errors are asked for.
        """
        if config.output_errors:
            raise ValueError(
                "output errors are those of one schedule's masks, and a fit tries many: calibrate with the fitted one"
            )
        own = config.learner()
        schedule = config.schedule or Schedule.published(geometry.video_tokens, steps)

        def learner(values: Mapping[str, float]) -> CalibAttLearner:
            fitted = Schedule(early=values["early"], late=values["late"], decay=values["decay"])
            return replace(own, schedule=fitted, rho=values["rho"], gamma=values["gamma"])

        return Fit(
            ranges=_FITTED,
            published={**asdict(schedule), "rho": own.rho, "gamma": own.gamma},
            noting=MassLearner(**{field.name: getattr(own, field.name) for field in fields(own)}),
            learner=learner,
        )

    @classmethod
    def check_tables(cls, learnt: Learnt) -> None:
        """Refuse tables that CalibAtt cannot have learnt.

        Raises:
            ValueError: one line that names the setting or the table.
        """
        learner = read_settings(CalibAttLearner, learnt.settings)
        geometry = learnt.provenance.geometry
        if learner.anchors >= geometry.grid[1]:
            raise ValueError(f"anchors: a frame of {geometry.grid[1]} rows has fewer than {learner.anchors} of them")
        q_blocks, k_blocks = (block_count(geometry.video_tokens, size) for size in learner.block)
        expected: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
            "bits": (torch.uint8, (geometry.heads, q_blocks, row_bytes(k_blocks))),
            "agreement": (torch.float32, (geometry.heads,)),
            "similarity": (torch.float32, (geometry.heads,)),
        }
        if learner.levels:
            expected["levels"] = (torch.uint8, (geometry.heads, q_blocks, k_blocks))
        if learner.output_errors:
            expected |= dict.fromkeys(OUTPUT_ERRORS, (torch.float32, (geometry.heads,)))
        learnt.check_tables(cls.label, expected)

    @classmethod
    def check_part(cls, name: str, part: Tensor, settings: Mapping[str, Any], geometry: Geometry) -> None:
        """Refuse a part of a table that CalibAtt cannot have learnt.

        Raises:
            ValueError: one line that says what is wrong.
        """
        # both are 0 to 1, but for rounding
        if name in ("agreement", "similarity") and not bool(((part >= -1e-3) & (part <= 1 + 1e-3)).all()):
            raise ValueError("a value is not within 0 to 1")
        if name in OUTPUT_ERRORS and not bool(((part >= 0) & part.isfinite()).all()):
            raise ValueError("a value is below 0, or not finite")
        if name == "bits":
            k_blocks = block_count(geometry.video_tokens, read_settings(CalibAttLearner, settings).block[1])
            # the bits of a row that belong to blocks
            own = packed(torch.ones(1, 1, k_blocks, dtype=torch.bool))[0, 0]
            if not bool((part & own).ne(0).any(-1).all()):
                raise ValueError("a row of a mask has no block")

    def plan(
        self,
        q: Float[Tensor, "heads tokens head_dim"],
        k: Float[Tensor, "heads tokens head_dim"],
        v: Float[Tensor, "heads tokens head_dim"],
        site: Site,
    ) -> Plan:
        """The calibration's plan for the site, the same for both branches.

        Raises:
            CalibrationMismatch: the calibration is for another geometry, number of steps or of layers.
        """
        return self.plans.plan(site, q.device)

    def mean_density(self, text_tokens: int | None = None) -> float:
        """Of all plans of a video, with so many text tokens; as many as the calibration allows where None."""
        return self.plans.density(text_tokens).mean().item()
