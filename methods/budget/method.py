"""Budget: one budget of blocks for a whole video, spent where leaving a block out would change the video most; our own.

Without key blocks S, and with the rest of its attention renormalised, the output o of a query moves by
Σ (a − p·o) / (1 − Σ p), sums over S, where p is its attention to a block and a what the block adds to o. Movements
add up or cancel, so blocks of a row are left out one by one, each time the one that costs least beside those before.
The importance of a block is by how much it then makes the squared movement grow, mean over the queries of a query
block, and relative to the squared outputs of the layer; times how far such an error moves the video when it happens at
that step, which is tried out. So blocks of all steps, layers, heads and rows are comparable, and the most important
are computed, until a share of all query-key products is spent.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from types import MappingProxyType
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from calibatt.kernels.geometry import Geometry
from calibatt.kernels.mask import BlockMask, block_count, block_sizes
from calibatt.kernels.plan import Plan
from calibatt.methods.ahead import SitePlans, sent
from calibatt.methods.base import Knob, Method, Trials
from calibatt.methods.blocks import text_blocks, video_blocks, video_part
from calibatt.methods.budget.importance import ALWAYS, level_values
from calibatt.methods.budget.learner import BudgetLearner
from calibatt.methods.budget.sensitivity import AtSteps, sensitivity, step_groups
from calibatt.methods.budget.spending import Cut, alike_rows, tallies
from calibatt.methods.facts import read_settings
from calibatt.methods.learning import Learnt
from calibatt.methods.site import Site
from calibatt.methods.transfer import Blocks, transferred_table


@dataclass(frozen=True, slots=True, kw_only=True)
class BudgetConfig:
    """Settings of the choice.

    Args:
        density: share of all query-key products of a video that is computed, text included.
        scope: what shares one budget: all steps, layers, heads and rows; each site, that is a step and layer; or each
            row of blocks, so that all rows are equal.
        weighed: whether importances are multiplied by the sensitivity of their step before steps are compared.
        block, queries, together, beside, over_prompts, trials: as in `BudgetLearner`.

    Raises:
        ValueError: the density is outside 0 to 1, or a setting of the learner is out of range.
    """

    # of the densities at which methods are compared (docs/methods.md), the one between
    density: float = 0.35
    scope: Literal["all", "site", "row"] = "all"
    weighed: bool = True
    # CalibAtt's, so that masks are compared and not blocks
    block: tuple[int, int] = (128, 128)
    # a sixteenth of a block, which makes learning cheaper than a dense call
    queries: int = 8
    together: bool = True
    # the more the better (docs/methods/budget.md), but a model's activations must fit as often
    beside: int = 8
    over_prompts: Literal["mean", "max"] = "mean"
    # of one prompt alone, a video whose layout turns over would decide by itself
    trials: int = 2

    def __post_init__(self) -> None:
        # written so that NaN fails too
        if not 0 <= self.density <= 1:
            raise ValueError(f"density is a share of the query-key products, 0 to 1: got {self.density}")
        # refuses its own
        self.learner()

    def learner(self) -> BudgetLearner:
        """What learns under these settings."""
        return BudgetLearner(**{field.name: getattr(self, field.name) for field in fields(BudgetLearner)})


class Budget(Method):
    """Computes the most important blocks of a calibration; no input is looked at.

    Masks are made when first asked for, and kept; both branches have the same, learnt on the conditional one.
    """

    name: ClassVar[str] = "budget"
    label: ClassVar[str] = "Budget (ours)"
    colour: ClassVar[str] = "#D55E00"
    marker: ClassVar[str] = "*"
    offline = True
    presets: ClassVar[Mapping[str, BudgetConfig]] = MappingProxyType(
        {
            # ours, as all of them; what the others leave out of it shows what each part is worth
            "default": BudgetConfig(),
            # no site may have more than another
            "site": BudgetConfig(scope="site"),
            # no row may have more than another
            "rows": BudgetConfig(scope="row"),
            # an error counts alike at every step
            "unweighed": BudgetConfig(weighed=False),
            # a block is as important as it is by itself
            "alone": BudgetConfig(together=False),
            # each prompt's blocks are left out by themselves, and the mean of what that comes to counts
            "apart": BudgetConfig(beside=1),
            # a block is as important as to the prompt that needs it most
            "max": BudgetConfig(beside=1, over_prompts="max"),
        }
    )
    knob: ClassVar[Knob | None] = Knob(field="density", low=0.0, high=1.0)
    config: BudgetConfig
    learnt: Learnt

    def __init__(self, config: BudgetConfig, learnt: Learnt) -> None:
        super().__init__(config, learnt)
        # rows by themselves need to know of no others
        self._cut = (
            None
            if config.scope == "row"
            else Cut.of(learnt, density=config.density, together=config.scope == "all", weighed=config.weighed)
        )
        self._plans = SitePlans(self._made)

    @classmethod
    def learner(cls, config: BudgetConfig) -> BudgetLearner:
        """Learns importances; the same for all presets but `alone`, `apart` and `max`."""
        return config.learner()

    @classmethod
    def check_tables(cls, learnt: Learnt) -> None:
        """Refuse tables that Budget cannot have learnt.

        Raises:
            ValueError: one line that names the setting or the table.
        """
        learner = read_settings(BudgetLearner, learnt.settings)
        geometry = learnt.provenance.geometry
        blocks = (block_count(geometry.video_tokens, size) for size in learner.block)
        expected: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
            "levels": (torch.uint8, (geometry.heads, *blocks)),
            "sensitivity": (torch.float32, ()),
        }
        learnt.check_tables("Budget", expected)

    @classmethod
    def check_part(cls, name: str, part: Tensor, settings: Mapping[str, Any], geometry: Geometry) -> None:
        """Refuse a part of a table that Budget cannot have learnt.

        Raises:
            ValueError: one line that says what is wrong.
        """
        if name == "sensitivity" and not bool(((part > 0) & part.isfinite()).all()):
            raise ValueError("a factor is not above 0, or not finite")
        if name == "levels" and not bool((part == ALWAYS).any(-1).all()):
            raise ValueError("a row has no block that is always computed")

    @classmethod
    def transferred_part(cls, learnt: Learnt, name: str, index: tuple[int, ...], source: Blocks, to: Blocks) -> Tensor:
        """Levels by place; how far an error moves the video, as it was at the step of that noise."""
        part = learnt.parts.part(name, index)
        return transferred_table(part, source, to, always=ALWAYS) if name == "levels" else part

    @classmethod
    def trials(cls, learnt: Learnt) -> Trials | None:
        """How far the masks of some steps, with dense attention at all others, move a video."""
        learner = read_settings(BudgetLearner, learnt.settings)
        if learner.trials == 0:
            return None
        method = cls(BudgetConfig(block=learner.block, weighed=False), learnt)
        groups = step_groups(learnt.provenance.steps)
        assert method._cut is not None
        left_out = method._cut.left_out(tallies(learnt)[0], level_values())
        return Trials(
            planners=[AtSteps(method, steps) for steps in groups],
            prompts=learner.trials,
            learn=lambda distances: {
                "sensitivity": sensitivity(distances, left_out, groups)[:, None].repeat(1, learnt.provenance.layers)
            },
        )

    def plan(
        self,
        q: Float[Tensor, "heads tokens head_dim"],
        k: Float[Tensor, "heads tokens head_dim"],
        v: Float[Tensor, "heads tokens head_dim"],
        site: Site,
    ) -> Plan:
        """The site's mask, with as much text as the site has.

        Raises:
            CalibrationMismatch: the calibration is for another geometry, number of steps or of layers.
        """
        self.learnt.check(site)
        return self._plans.at(site, q.device)

    def _made(self, step: int, layer: int, geometry: Geometry, device: torch.device) -> Plan:
        return Plan.masked(self._mask(step, layer, geometry, device), geometry.heads)

    def mean_density(self, text_tokens: int | None = None) -> float:
        """Of all plans of a video, with so many text tokens; as many as the calibration allows where None."""
        own, device = self.learnt.provenance, torch.device("cpu")
        geometry = own.geometry if text_tokens is None else replace(own.geometry, text_tokens=text_tokens)
        sites = [(step, layer) for step in range(own.steps) for layer in range(own.layers)]
        return sum(self._mask(*site, geometry, device).density().mean().item() for site in sites) / len(sites)

    def _mask(self, step: int, layer: int, geometry: Geometry, device: torch.device) -> BlockMask:
        block, tokens = self.config.block, geometry.tokens
        rows, columns = (video_blocks(geometry, size) for size in block)
        levels = video_part(sent(self.learnt.part("levels", step, layer), device), geometry, block)
        if self._cut is None:
            sizes_q, sizes_k = (
                block_sizes(tokens, size, device)[part] for size, part in zip(block, (rows, columns), strict=True)
            )
            queries, keys = int(sizes_q.sum()), int(sizes_k.sum())
            # of each row, so that with the rows and columns of text it comes to the density
            wanted = (self.config.density * tokens**2 - (tokens - queries) * tokens) / max(1, queries)
            chosen = alike_rows(levels, sizes_k, wanted - (tokens - keys))
        else:
            chosen = self._cut.chosen(levels, step, layer)
        keep = text_blocks(geometry, block, device).repeat(geometry.heads, 1, 1)
        keep[:, rows, columns] = chosen
        return BlockMask.from_keep(keep, tokens=tokens, block_q=block[0], block_k=block[1])
