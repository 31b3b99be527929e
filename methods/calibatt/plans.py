"""CalibAtt's plans: what was learnt, as a plan for every site."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from calibatt.kernels.geometry import Geometry
from calibatt.kernels.mask import BlockMask, block_count, packed, unpacked
from calibatt.kernels.plan import HeadKind, Plan, RowReuse, anchor_rows
from calibatt.methods.ahead import SitePlans, sent
from calibatt.methods.blocks import text_blocks, video_blocks, video_part
from calibatt.methods.calibatt.learner import CalibAttLearner
from calibatt.methods.calibatt.levels import keep_at, level_of
from calibatt.methods.facts import read_settings
from calibatt.methods.learning import Learnt
from calibatt.methods.site import Site

_CPU = torch.device("cpu")


# without slots: cached_property keeps its values in the instance's dictionary
@dataclass(frozen=True, kw_only=True, eq=False)
class Plans:
    """A plan for every site: some heads reuse rows, the others have a mask; the same for both branches.

    On a CPU and without text, masks of a table without shared rows are views of it.

    Args:
        learnt: by a `CalibAttLearner`.
        gamma: heads at least this similar over rows reuse rows.
        loss: attention mass that masks may lose, in multiples of what the schedule leaves out.
        repetition: without it, every head has its mask.
        error_ratio: in place of gamma, heads reuse rows where that moves their outputs, squared, at most so many times
            as far as masks of the schedule do; None for gamma.

    Raises:
        ValueError: a loss other than 1 needs levels, and there are none, or they do not reach it; an error ratio needs
            output errors, and there are none.
    """

    learnt: Learnt
    gamma: float
    loss: float = 1.0
    repetition: bool = True
    error_ratio: float | None = None

    def __post_init__(self) -> None:
        if self.error_ratio is not None and not self._learner.output_errors:
            raise ValueError(
                "the calibration has no output errors to reuse rows by: "
                "make one by `calibatt calibrate --preset output-reuse`"
            )
        if self.loss != 1 and "levels" not in self.learnt.tables:
            raise ValueError(
                f"the calibration has masks for a loss of 1, not for {self.loss:g}: "
                "make one by `calibatt calibrate --levels`"
            )
        # a loss that levels do not reach is refused at once
        level_of(self.loss)

    def plan(self, site: Site, device: torch.device | None = None) -> Plan:
        """The plan for a site, with as many text tokens as it has.

        Args:
            site: where the call happens.
            device: of the plan; the CPU where None.

        Raises:
            CalibrationMismatch: the site has another geometry, number of steps or of layers.
        """
        self.learnt.check(site)
        return self._ahead.at(site, device or _CPU)

    def density(self, text_tokens: int | None = None) -> Float[Tensor, "steps layers heads"]:
        """Computed fraction of the query-key products of every head.

        Args:
            text_tokens: of the video's prompt; as many as the calibration allows where None.
        """
        own = self.learnt.provenance
        geometry = own.geometry if text_tokens is None else replace(own.geometry, text_tokens=text_tokens)
        each = [
            self._plan(step, layer, geometry, _CPU).density()
            for step in range(own.steps)
            for layer in range(own.layers)
        ]
        return torch.stack(each).view(own.steps, own.layers, -1)

    @cached_property
    def repetitive(self) -> Bool[Tensor, "steps layers heads"]:
        """Heads that reuse rows, on the CPU."""
        tables = self.learnt.tables
        if not self.repetition:
            return torch.zeros_like(tables["similarity"], dtype=torch.bool)
        if self.error_ratio is None:
            return tables["similarity"] >= self.gamma
        return tables["reuse_error"] <= self.error_ratio * tables["mask_error"]

    def _plan(self, step: int, layer: int, geometry: Geometry, device: torch.device) -> Plan:
        kinds: tuple[HeadKind, ...] = tuple(
            "reused" if reused else "masked" for reused in self.repetitive[step, layer].tolist()
        )
        return Plan(
            tokens=geometry.tokens,
            kinds=kinds,
            mask=self._mask(self._bits(step, layer, device), geometry) if "masked" in kinds else None,
            reuse=self._reuse(geometry, device) if "reused" in kinds else None,
        )

    def _mask(self, bits: UInt8[Tensor, "heads q_blocks row_bytes"], geometry: Geometry) -> BlockMask:
        block_q, block_k = self._learner.block
        if geometry.text_tokens:
            table = unpacked(bits, block_count(geometry.video_tokens, block_k))
            rows, columns = (video_blocks(geometry, size) for size in self._learner.block)
            keep = text_blocks(geometry, self._learner.block, bits.device).repeat(len(bits), 1, 1)
            keep[:, rows, columns] = video_part(table, geometry, self._learner.block)
            bits = packed(keep)
        return BlockMask(bits=bits, tokens=geometry.tokens, block_q=block_q, block_k=block_k)

    def _reuse(self, geometry: Geometry, device: torch.device) -> RowReuse:
        key = (geometry.text_tokens, device)
        if key not in self._reuses:
            anchors = anchor_rows(geometry.grid[1], self._learner.anchors)
            self._reuses[key] = RowReuse.of_anchor_rows(geometry, anchors).to(device)
        return self._reuses[key]

    def _bits(self, step: int, layer: int, device: torch.device) -> UInt8[Tensor, "heads q_blocks row_bytes"]:
        """The masks at this loss."""
        if self.loss == 1:
            return sent(self.learnt.part("bits", step, layer), device)
        return packed(keep_at(sent(self.learnt.part("levels", step, layer), device), self.loss))

    def nbytes(self) -> int:
        """Memory of the plans that are kept."""
        return self._ahead.nbytes()

    @cached_property
    def _ahead(self) -> SitePlans:
        return SitePlans(self._plan)

    @cached_property
    def _learner(self) -> CalibAttLearner:
        return read_settings(CalibAttLearner, self.learnt.settings)

    @cached_property
    def _reuses(self) -> dict[tuple[int, torch.device], RowReuse]:
        """By the number of text tokens and the device."""
        return {}
