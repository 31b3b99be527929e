"""What Budget learns offline: how important each block is, and how far an error at each step moves the video."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from calibatt.kernels.mask import block_sizes
from calibatt.methods.blocks import video_blocks, video_table
from calibatt.methods.budget.importance import ALWAYS, Sample, importance, to_importance, to_levels
from calibatt.methods.learning import Seen
from calibatt.methods.site import Site


@dataclass(frozen=True, slots=True, kw_only=True)
class BudgetLearner:
    """Learns how important each block is; `BudgetConfig` has the defaults of its settings, `Budget.trials` the rest.

    As CalibAtt's, the table is as large as the video alone would need, for blocks without text, numbered from the first
    of them, so that prompts of different lengths share it; what is left over in it is always computed. It has a byte a
    block, and so has each note: 28 GB for Wan 14B at 720p and 50 steps.

    Args:
        block: tokens of a query block and of a key block.
        queries: of each query block that are looked at, evenly spaced; all where a block has no more.
        together: whether a block's importance is beside those that are left out before it, or by itself.
        beside: prompts whose videos are made side by side, and which have one importance: what a block does to the
            outputs of all of them.
        over_prompts: what counts of several such importances, their mean or the largest.
        trials: prompts of whose videos it is tried out how far an error at each step moves them; without any, all
            steps count alike.

    Raises:
        ValueError: a block has no token, no query is looked at, no prompt's video is made, or there are fewer trials
            than none.
    """

    block: tuple[int, int]
    queries: int
    together: bool
    beside: int
    over_prompts: Literal["mean", "max"]
    trials: int

    def __post_init__(self) -> None:
        if min(self.block) < 1:
            raise ValueError(f"a block has at least one token: got {self.block}")
        if self.queries < 1:
            raise ValueError(f"importance takes at least one query of a block: got queries={self.queries}")
        if self.beside < 1:
            raise ValueError(f"videos are made side by side of at least one prompt: got beside={self.beside}")
        if self.trials < 0:
            raise ValueError(f"steps are tried out on a number of prompts: got trials={self.trials}")

    def note(
        self,
        q: Float[Tensor, "heads tokens head_dim"],
        k: Float[Tensor, "heads tokens head_dim"],
        v: Float[Tensor, "heads tokens head_dim"],
        site: Site,
        prompt: int,
    ) -> Mapping[str, Tensor]:
        """As `note_together`, of one prompt."""
        return self.note_together([(q, k, v, site)])

    def note_together(self, calls: Sequence[Seen]) -> Mapping[str, Tensor]:
        """`levels`: of each block, by its importance for what it costs."""
        parts = [[video_blocks(site.geometry, size) for size in self.block] for *_, site in calls]
        # where text makes them differ, what some have beyond the others is computed for all
        counts = [min(part.stop - part.start for part in one) for one in zip(*parts, strict=True)]
        samples = [
            Sample(q, k, v, *(slice(part.start, part.start + count) for part, count in zip(own, counts, strict=True)))
            for (q, k, v, _), own in zip(calls, parts, strict=True)
        ]
        found = importance(samples, block=self.block, queries=self.queries, together=self.together)
        # of two blocks as important, the shorter costs less
        sizes = [
            block_sizes(len(sample.k[0]), self.block[1], found.device)[sample.columns].float() for sample in samples
        ]
        levels = to_levels(found / (torch.stack(sizes).mean(0) / self.block[1]))
        return {"levels": video_table(levels, calls[0][-1].geometry, self.block, left_over=ALWAYS)}

    def merge(self, notes: Sequence[Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
        """`levels` of the common importances, the most important block of each row always; `sensitivity`: 1."""
        # one by one, and in fp64: all at once they are eight times as large
        each = (to_importance(note["levels"]) for note in notes)
        if self.over_prompts == "max":
            common = functools.reduce(torch.maximum, each)
        else:
            common = functools.reduce(torch.add, each) / len(notes)
        # of those that are not computed always anyway
        most = common.masked_fill(common.isinf(), -1).argmax(-1, keepdim=True)
        levels = to_levels(common).scatter_(-1, most, ALWAYS)
        return {"levels": levels, "sensitivity": torch.ones(())}
