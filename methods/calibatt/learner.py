"""What CalibAtt learns offline: which blocks most prompts need, and which heads attend alike from row to row."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from calibatt.kernels.geometry import Geometry
from calibatt.kernels.mask import BlockMask, packed
from calibatt.kernels.plan import anchor_rows
from calibatt.methods.blocks import check_query_stride, text_blocks, video_blocks, video_queries, video_table
from calibatt.methods.calibatt.errors import output_errors
from calibatt.methods.calibatt.levels import MOST_LEVEL, common_levels, loss_levels
from calibatt.methods.calibatt.repetition import energy_and_similarity
from calibatt.methods.calibatt.schedule import Schedule
from calibatt.methods.calibatt.votes import Votes
from calibatt.methods.energy import block_energy, mean_mass
from calibatt.methods.selection import mass_before, top_p
from calibatt.methods.site import Site

# tables of `output_errors`, in its order
OUTPUT_ERRORS = ("reuse_error", "mask_error")


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibAttLearner:
    """Learns block masks and the similarity of rows. `CalibAttConfig` has the defaults of its settings.

    Masks are learnt for blocks without text tokens only, numbered from the first of them; the table is as large as the
    video alone would need, so that prompts of different lengths share it. What is left over in it, and every block with
    a text token, is always kept. Where text comes first and its length varies, blocks of the same number are up to one
    block apart.

    Args:
        block: tokens of a query block and of a key block.
        schedule: attention mass to keep at each step, of what lies in blocks without text; None takes one of the
            paper's fits, by steps and the length of the video (`Schedule.published`).
        rho: share of prompts that must need a block, in (0, 1]: 0.5 is the majority, next to 0 is any prompt.
        gamma: heads whose similarity over rows is at least this are repetitive. Nothing is learnt by it; it is kept
            with the masks that it was chosen with.
        anchors: anchor rows of a frame.
        similarity_prompts: measure repetition on this many prompts only, which saves time; None is all of them.
        query_stride: look at the video's queries in one of so many columns only, which saves time.
        levels: also learn what `CalibAttConfig.loss` needs to be another than 1: a byte a block.
        output_errors: also learn what choosing by outputs needs (`CalibAttConfig.reuse_by`), on the prompts that
            repetition is measured on: two numbers a head, for two more calls of attention at each site.
        share: steps of a layer and head whose masks overlap at least so much, any two of them, have one mask, which
            keeps what any of theirs keeps (`SharedTables`); None leaves each its own.

    Raises:
        ValueError: a value is out of range, or gamma is no number; there are levels, and steps would share masks.
    """

    block: tuple[int, int]
    schedule: Schedule | None
    rho: float
    gamma: float
    anchors: int
    similarity_prompts: int | None
    query_stride: int
    levels: bool
    output_errors: bool
    share: float | None

    def __post_init__(self) -> None:
        # written so that NaN fails too
        if not 0 < self.rho <= 1:
            raise ValueError(f"rho is a share of the prompts, above 0 and up to 1: got {self.rho}")
        if not math.isfinite(self.gamma):
            raise ValueError(f"calibatt's gamma is a similarity: got {self.gamma}")
        if min(self.block) < 1:
            raise ValueError(f"a block has at least one token: got {self.block}")
        if self.anchors < 1:
            raise ValueError(f"repetition needs at least one anchor row: got anchors={self.anchors}")
        if self.similarity_prompts is not None and self.similarity_prompts < 1:
            raise ValueError(f"repetition needs at least one prompt: got similarity_prompts={self.similarity_prompts}")
        check_query_stride(self.query_stride, self.block[0])
        if self.share is not None and not 0 < self.share <= 1:
            raise ValueError(f"steps share masks from an overlap on, above 0 and up to 1: got share={self.share}")
        if self.share is not None and self.levels:
            raise ValueError("steps share masks of one loss: leave out levels, or share")

    def note(
        self,
        q: Float[Tensor, "heads tokens head_dim"],
        k: Float[Tensor, "heads tokens head_dim"],
        v: Float[Tensor, "heads tokens head_dim"],
        site: Site,
        prompt: int,
    ) -> Mapping[str, Tensor]:
        """The blocks that this call needs, and how alike its rows are.

        Returns:
            bits: the mask, packed as in `BlockMask`.
            similarity: of each head; zeros, which `merge` does not read, from prompt `similarity_prompts` on.
            levels: where asked for, the loss that each block withstands.
            reuse_error, mask_error: where asked for, of each head, how far its outputs move where it reuses rows, and
                under this prompt's own mask (`output_errors`); zeros as for the similarity.

        Raises:
            ValueError: a frame has no more rows than there are anchors.
        """
        energy, similarity = self._statistics(q, k, site.geometry, prompt)
        return self._noted(energy, similarity, site, (q, k, v) if self._measures(prompt) else None)

    def weighed(self, site: Site, prompt: int) -> tuple[int, int] | None:
        """The blocks, where all queries are looked at and repetition is not, which takes a pass of its own."""
        return None if self.query_stride > 1 or self._measures(prompt) else self.block

    def note_weighed(self, mass: Float[Tensor, "heads q_blocks k_blocks"], site: Site) -> Mapping[str, Tensor]:
        """As `note`."""
        # of queries with text too, whose blocks are left out
        energy = mean_mass(mass, site.geometry.tokens, self.block[0], None)
        return self._noted(self._without_text(energy, site.geometry), mass.new_zeros(len(mass)), site, None)

    def _noted(
        self,
        energy: Float[Tensor, "heads rows columns"],
        similarity: Float[Tensor, "heads"],
        site: Site,
        measured: tuple[Tensor, Tensor, Tensor] | None,
    ) -> Mapping[str, Tensor]:
        """What `note` returns, by the energy of blocks without text; q, k and v where repetition is measured."""
        geometry = site.geometry
        mass = (self.schedule or Schedule.published(geometry.video_tokens, site.steps)).mass(site.step, site.steps)
        keep = top_p(energy, mass)
        notes = {
            "bits": packed(video_table(keep, geometry, self.block, left_over=True)),
            "similarity": similarity,
        }
        if self.levels:
            levels = loss_levels(1 - mass_before(energy), mass)
            notes["levels"] = video_table(levels, geometry, self.block, left_over=MOST_LEVEL)
        if self.output_errors:
            none = torch.zeros_like(similarity)
            errors = (none, none) if measured is None else self._errors(*measured, keep, geometry)
            notes |= zip(OUTPUT_ERRORS, errors, strict=True)
        return notes

    def merge(self, notes: Sequence[Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
        """The vote over the prompts, by this learner's notes or a `MassLearner`'s.

        Returns:
            bits: the blocks that enough prompts need, packed as in `BlockMask`.
            agreement: of each head, the overlap of the prompts' masks with that one, 0 to 1; see `Votes`.
            similarity: of each head, mean over the prompts that it was measured on.
            levels: where asked for, the loss at which enough prompts still need each block.
            reuse_error, mask_error: where asked for, likewise means.
        """
        notes = [self._decided(note) for note in notes]
        needed = votes_needed(len(notes), self.rho)
        votes = Votes([note["bits"] for note in notes])
        keep = votes.majority(needed)
        measured = notes[: self.similarity_prompts]
        merged = {
            "bits": keep,
            "agreement": votes.agreement(keep),
            "similarity": mean([note["similarity"] for note in measured]),
        }
        if self.output_errors:
            merged |= {name: mean([note[name] for note in measured]) for name in OUTPUT_ERRORS}
        if self.levels:
            merged["levels"] = common_levels([note["levels"] for note in notes], needed)
        return merged

    def _decided(self, note: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """A note as this learner makes it, of a `MassLearner`'s; its own as they are."""
        if "withstood" not in note:
            return note
        # which of the paper's fits it would be depends on more than was noted
        assert self.schedule is not None
        mass = self.schedule.mass(*note["step"].tolist())
        withstood = note["withstood"].double()
        decided = {"bits": packed(withstood > 1 - mass), "similarity": note["similarity"]}
        if self.levels:
            decided["levels"] = loss_levels(withstood, mass)
        return decided

    def _statistics(
        self,
        q: Float[Tensor, "heads tokens head_dim"],
        k: Float[Tensor, "heads tokens head_dim"],
        geometry: Geometry,
        prompt: int,
    ) -> tuple[Float[Tensor, "heads q_blocks k_blocks"], Float[Tensor, "heads"]]:
        """Energy of the blocks without text, of which every row has some; and how alike rows are.

        The similarity is zero where it is not measured on this prompt.
        """
        block_q, block_k = self.block
        if self._measures(prompt):
            anchors = anchor_rows(geometry.grid[1], self.anchors)
            energy, similarity = energy_and_similarity(
                q, k, geometry, anchors, block=self.block, query_stride=self.query_stride
            )
        else:
            places = video_queries(geometry, self.query_stride, q.device)
            energy = block_energy(q[:, places], k, block_q=block_q, block_k=block_k, places=places)
            similarity = q.new_zeros(geometry.heads, dtype=torch.float32)
        return self._without_text(energy, geometry), similarity

    def _without_text(
        self, energy: Float[Tensor, "heads q_blocks k_blocks"], geometry: Geometry
    ) -> Float[Tensor, "heads rows columns"]:
        rows, columns = (video_blocks(geometry, size) for size in self.block)
        energy = energy[:, rows, columns]
        # a row whose attention all goes to text has no energy here, and so no order
        return energy.clamp(min=torch.finfo(energy.dtype).tiny) if geometry.text_tokens else energy

    def _errors(
        self,
        q: Float[Tensor, "heads tokens head_dim"],
        k: Float[Tensor, "heads tokens head_dim"],
        v: Float[Tensor, "heads tokens head_dim"],
        keep: Bool[Tensor, "heads rows columns"],
        geometry: Geometry,
    ) -> tuple[Float[Tensor, "heads"], Float[Tensor, "heads"]]:
        """Output errors of reuse and of the mask that keeps these blocks of those without text, and all others."""
        whole = text_blocks(geometry, self.block, q.device).repeat(geometry.heads, 1, 1)
        rows, columns = (video_blocks(geometry, size) for size in self.block)
        whole[:, rows, columns] = keep
        mask = BlockMask.from_keep(whole, tokens=geometry.tokens, block_q=self.block[0], block_k=self.block[1])
        return output_errors(q, k, v, geometry, anchor_rows(geometry.grid[1], self.anchors), mask)

    def _measures(self, prompt: int) -> bool:
        """Whether repetition is measured on a prompt."""
        return self.similarity_prompts is None or prompt < self.similarity_prompts


@dataclass(frozen=True, slots=True, kw_only=True)
class MassLearner(CalibAttLearner):
    """Notes by which a `CalibAttLearner` with any schedule, rho and gamma can vote: two bytes a block.

    It comes to what it would learn by itself, but for blocks that are as near to its schedule as half precision rounds,
    0.05 % of what the schedule leaves out.
    """

    def _noted(
        self,
        energy: Float[Tensor, "heads rows columns"],
        similarity: Float[Tensor, "heads"],
        site: Site,
        measured: tuple[Tensor, Tensor, Tensor] | None,
    ) -> Mapping[str, Tensor]:
        """What every block withstands, and how alike the call's rows are.

        Returns:
            withstood: share of its row's energy that is not in heavier blocks, half precision; infinite for a block
                that is always kept. A block is needed where this is more than the schedule leaves out.
            similarity: as `CalibAttLearner.note`.
            step: the site's, and their number.
        """
        withstood = (1 - mass_before(energy)).half()
        return {
            "withstood": video_table(withstood, site.geometry, self.block, left_over=math.inf),
            "similarity": similarity,
            "step": torch.tensor([site.step, site.steps]),
        }


def votes_needed(prompts: int, rho: float) -> int:
    """Votes that a block needs: ceil(rho · prompts), at least one."""
    # 0.07 * 100 is a little more than 7 in floating point: that must not ask for an eighth vote
    return max(1, math.ceil(rho * prompts - 1e-9))


def mean(values: Sequence[Float[Tensor, "heads"]]) -> Float[Tensor, "heads"]:
    """Of one value a prompt, for each head."""
    # added one by one, since how torch sums a dimension differs between machines
    return sum((value / len(values) for value in values), start=torch.zeros_like(values[0]))
