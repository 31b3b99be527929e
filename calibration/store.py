"""The calibration: masks and row reuse of every site, where they come from, and the file that holds them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from calibatt.calibration.file import UnusableCalibration, read, write
from calibatt.calibration.levels import keep_at
from calibatt.calibration.repetition import anchor_rows
from calibatt.calibration.schedule import Schedule
from calibatt.kernels.geometry import Geometry
from calibatt.kernels.mask import BlockMask
from calibatt.kernels.plan import HeadKind, Plan, RowReuse
from calibatt.methods.site import Site

SCHEMA = "calibatt-calibration-1"


class CalibrationMismatch(ValueError):
    """A calibration for something else than what it is used on; the message is one line that names both."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Provenance:
    """Where a calibration comes from.

    Args:
        model, weights: name in the catalogue, and digest of the weights.
        resolution: name of the model's resolution.
        geometry: layout of the tokens.
        steps, guidance: of the generations.
        prompts: in order; prompt i started from noise of seed + i.
        seed: of the first prompt's noise.
        block: tokens of a query block and of a key block.
        schedule: attention mass kept at each step.
        rho: share of prompts that must keep a block.
        anchors: anchor rows of a frame.
        similarity_prompts: how many of the prompts, from the first, repetition was measured on.
        cost_ratio: time of calibration over that of generating the same videos without recording, same kernel.
        mask_agreement: overlap of the prompts' masks with the aggregated ones, 0 to 1; see `collect.agreement`.
        versions: of calibatt, torch and diffusers.
        created: UTC, ISO 8601.
    """

    model: str
    weights: str
    resolution: str
    geometry: Geometry
    steps: int
    guidance: float
    prompts: tuple[str, ...]
    seed: int
    block: tuple[int, int]
    schedule: Schedule
    rho: float
    anchors: int
    similarity_prompts: int
    cost_ratio: float
    mask_agreement: float
    versions: Mapping[str, str] = field(default_factory=dict)
    created: str = ""

    def to_json(self) -> dict[str, Any]:
        """The fields as plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, facts: Mapping[str, Any]) -> Provenance:
        """Rebuild from plain values.

        Raises:
            TypeError, KeyError, ValueError: a field is missing, unknown or impossible.
        """
        geometry = {**facts["geometry"], "grid": tuple(facts["geometry"]["grid"])}
        return cls(
            **{
                **facts,
                "geometry": Geometry(**geometry),
                "schedule": Schedule(**facts["schedule"]),
                "prompts": tuple(facts["prompts"]),
                "block": tuple(facts["block"]),
            }
        )


# without slots: cached_property keeps its values in the instance's dictionary
@dataclass(frozen=True, kw_only=True, eq=False)
class Calibration:
    """A plan for every site of one model at one resolution and number of steps; a PlanSource.

    Plans are built when first asked for and kept, so that a site always gives the same object; they are views of the
    bits and need no memory of their own.

    Args:
        bits: the masks, packed as in `BlockMask`.
        similarity: how alike each head attends from all rows of a frame, mean over prompts.
        gamma: heads at least this similar reuse rows. To try another: `dataclasses.replace(calibration, gamma=…)`.
        levels: how much loss each block withstands, `levels.loss_levels`; None where no other loss than 1 is asked for.
        loss: what the bits lose of the attention mass, in multiples of what the schedule leaves out.
        provenance: where it comes from.

    Raises:
        ValueError: bits, levels, similarity and provenance do not belong together.
    """

    bits: UInt8[Tensor, "steps layers heads q_blocks row_bytes"]
    similarity: Float[Tensor, "steps layers heads"]
    gamma: float
    provenance: Provenance
    levels: UInt8[Tensor, "steps layers heads q_blocks k_blocks"] | None = None
    loss: float = 1.0

    def __post_init__(self) -> None:
        heads = (self.provenance.steps, self.layers, self.provenance.geometry.heads)
        if tuple(self.bits.shape[:3]) != heads or tuple(self.similarity.shape) != heads:
            raise ValueError(
                f"masks {list(self.bits.shape)} and similarity {list(self.similarity.shape)} are not those of "
                f"{heads[0]} steps, {heads[1]} layers and {heads[2]} heads"
            )
        # the mask itself refuses bits of another number of tokens
        mask = self._mask(0, 0)
        if self.levels is not None and tuple(self.levels.shape) != (*self.bits.shape[:3], mask.q_blocks, mask.k_blocks):
            raise ValueError(
                f"levels {list(self.levels.shape)} are not those of masks {list(self.bits.shape[:3])} of "
                f"{mask.q_blocks} × {mask.k_blocks} blocks"
            )

    @property
    def layers(self) -> int:
        """Layers of the model."""
        return self.bits.shape[1]

    @property
    def repetitive(self) -> Bool[Tensor, "steps layers heads"]:
        """Heads that reuse rows."""
        return self.similarity >= self.gamma

    def at(self, loss: float) -> Calibration:
        """The same calibration with masks that lose another multiple of what the schedule leaves out.

        Raises:
            ValueError: there are no levels, or they do not reach that loss.
        """
        if loss == self.loss:
            return self
        if self.levels is None:
            raise ValueError(
                f"the calibration has masks for a loss of {self.loss:g}, not for {loss:g}: "
                "make one by `calibatt calibrate --levels`"
            )
        block_q, block_k = self.provenance.block
        tokens = self.provenance.geometry.tokens
        # layer by layer: unpacked, all masks of a large model are eight times their size
        bits = [
            BlockMask.from_keep(keep_at(levels, loss), tokens=tokens, block_q=block_q, block_k=block_k).bits
            for levels in self.levels.flatten(0, 1)
        ]
        stacked = torch.stack(bits).view(self.bits.shape).to(self.bits.device)
        return replace(self, bits=stacked, loss=loss)

    def plan(self, site: Site, *, repetition: bool = True) -> Plan:
        """The plan for a site, the same for both branches: repetitive heads reuse rows, the others have a mask.

        Args:
            site: where the call happens.
            repetition: without it, every head has its mask.

        Raises:
            CalibrationMismatch: the site has another geometry, number of steps or of layers.
        """
        self.check_run(site.geometry, site.steps)
        if site.layers != self.layers:
            raise self._mismatch(f"{self.layers} layers", f"{site.layers}")
        return self._plan(site.step, site.layer, repetition)

    def check_model(self, model: str, weights: str) -> None:
        """Refuse another model, or other weights of the same.

        Args:
            model: name in the catalogue.
            weights: digest by `models.catalogue.weights_digest`.

        Raises:
            CalibrationMismatch: it is another.
        """
        own = self.provenance
        if (own.model, own.weights) != (model, weights):
            raise self._mismatch(f"{own.model} with weights {own.weights}", f"{model} with weights {weights}")

    def check_run(self, geometry: Geometry, steps: int) -> None:
        """Refuse another geometry or number of steps.

        Raises:
            CalibrationMismatch: it is another.
        """
        own = self.provenance
        if geometry != own.geometry:
            raise self._mismatch(f"{own.geometry} ({own.resolution})", f"{geometry}")
        if steps != own.steps:
            raise self._mismatch(f"{own.steps} steps", f"{steps}")

    def density(self, *, repetition: bool = True) -> Float[Tensor, "steps layers heads"]:
        """Computed fraction of the query-key products of every head."""
        return torch.stack(
            [
                torch.stack([self._plan(step, layer, repetition).density() for layer in range(self.layers)])
                for step in range(self.provenance.steps)
            ]
        )

    def to(self, device: torch.device | str) -> Calibration:
        """The same calibration with its plans on another device; what decides them stays on the CPU."""
        return replace(self, bits=self.bits.to(device))

    def save(self, path: Path) -> None:
        """Write the file, whole or not at all.

        Raises:
            OSError: it cannot be written.
        """
        facts = {"gamma": self.gamma, "loss": self.loss, "provenance": self.provenance.to_json()}
        tensors = {"bits": self.bits, "similarity": self.similarity}
        write(path, SCHEMA, tensors if self.levels is None else {**tensors, "levels": self.levels}, facts)

    @classmethod
    def load(cls, path: Path) -> Calibration:
        """Read a file that `save` wrote.

        Raises:
            UnusableCalibration: the file is missing, damaged, changed, of another version, or something else.
        """
        tensors, facts = read(path, SCHEMA)
        try:
            provenance = Provenance.from_json(facts["provenance"])
            # files from before there were levels have no loss
            return cls(gamma=facts["gamma"], loss=facts.get("loss", 1.0), provenance=provenance, **tensors)
        except (KeyError, TypeError, ValueError) as error:
            raise UnusableCalibration(f"{path} contradicts itself: {error}") from None

    def _plan(self, step: int, layer: int, repetition: bool) -> Plan:
        key = (step, layer, repetition)
        if key not in self._plans:
            self._plans[key] = self._build(*key)
        return self._plans[key]

    def _build(self, step: int, layer: int, repetition: bool) -> Plan:
        reused = self.repetitive[step, layer].tolist()
        kinds: tuple[HeadKind, ...] = tuple("reused" if repetition and head else "masked" for head in reused)
        return Plan(
            tokens=self.provenance.geometry.tokens,
            kinds=kinds,
            mask=self._mask(step, layer) if "masked" in kinds else None,
            reuse=self._reuse if "reused" in kinds else None,
        )

    def _mask(self, step: int, layer: int) -> BlockMask:
        block_q, block_k = self.provenance.block
        tokens = self.provenance.geometry.tokens
        return BlockMask(bits=self.bits[step, layer], tokens=tokens, block_q=block_q, block_k=block_k)

    @cached_property
    def _plans(self) -> dict[tuple[int, int, bool], Plan]:
        return {}

    @cached_property
    def _reuse(self) -> RowReuse:
        geometry = self.provenance.geometry
        anchors = anchor_rows(geometry.grid[1], self.provenance.anchors)
        return RowReuse.of_anchor_rows(geometry, anchors).to(self.bits.device)

    def _mismatch(self, own: str, other: str) -> CalibrationMismatch:
        return CalibrationMismatch(f"this calibration is for {own}, not for {other}: run `calibatt calibrate` for that")
