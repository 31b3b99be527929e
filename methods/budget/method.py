"""Budget: one budget of blocks for a whole video, spent where leaving a block out would change outputs most; our own.

Without key block c, and with the rest of its attention renormalised, the output o of a query moves by
(a − p·o) / (1 − p), where p is its attention to the block and a what the block adds to o. The importance of a block is
the squared length of a − p·o, which is that to first order in p, mean over the queries of a query block, and relative
to the squared outputs of the layer. So blocks of all steps, layers, heads and rows are comparable, and the most
important are computed, until a share of all query-key products is spent.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from calibatt.kernels.geometry import Geometry
from calibatt.kernels.mask import BlockMask, block_count, block_sizes
from calibatt.kernels.plan import Plan
from calibatt.methods.base import Knob, Method
from calibatt.methods.blocks import text_blocks, video_blocks, video_part
from calibatt.methods.budget.importance import ALWAYS
from calibatt.methods.budget.learner import BudgetLearner
from calibatt.methods.budget.spending import Cut, alike_rows
from calibatt.methods.facts import read_settings
from calibatt.methods.learning import Learnt
from calibatt.methods.site import Site


@dataclass(frozen=True, slots=True, kw_only=True)
class BudgetConfig:
    """Settings of the choice.

    Args:
        density: share of all query-key products of a video that is computed, text included.
        scope: what shares one budget: all steps, layers, heads and rows; each site, that is a step and layer; or each
            row of blocks, so that all rows are equal.
        step_weight: what an importance is multiplied by before steps are compared: nothing, or the squared change of
            the noise level, which is how far a change of the model's output moves the video at that step.
        block, queries, over_prompts: as in `BudgetLearner`.

    Raises:
        ValueError: the density is outside 0 to 1, steps are weighed but not compared, or a setting of the learner is
            out of range.
    """

    # of the densities at which methods are compared (docs/methods.md), the one between
    density: float = 0.35
    scope: Literal["all", "site", "row"] = "all"
    step_weight: Literal["none", "noise"] = "none"
    # CalibAtt's, so that masks are compared and not blocks
    block: tuple[int, int] = (128, 128)
    # a sixteenth of a block, which makes learning cheaper than a dense call
    queries: int = 8
    over_prompts: Literal["mean", "max"] = "mean"

    def __post_init__(self) -> None:
        # written so that NaN fails too
        if not 0 <= self.density <= 1:
            raise ValueError(f"density is a share of the query-key products, 0 to 1: got {self.density}")
        if self.step_weight != "none" and self.scope != "all":
            raise ValueError(f"step_weight {self.step_weight} compares steps, which takes scope all: got {self.scope}")
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
    presets: ClassVar[Mapping[str, BudgetConfig]] = MappingProxyType(
        {
            # ours, as all of them; what the others leave out of it shows what each part is worth
            "default": BudgetConfig(),
            # no site may have more than another
            "site": BudgetConfig(scope="site"),
            # no row may have more than another
            "rows": BudgetConfig(scope="row"),
            # sites count by how far their step moves the video
            "noise": BudgetConfig(step_weight="noise"),
            # a block is as important as to the prompt that needs it most
            "max": BudgetConfig(over_prompts="max"),
        }
    )
    knob: ClassVar[Knob | None] = Knob(field="density", low=0.0, high=1.0)
    config: BudgetConfig
    learnt: Learnt

    def __init__(self, config: BudgetConfig, learnt: Learnt) -> None:
        super().__init__(config, learnt)
        together, weigh = config.scope == "all", config.step_weight == "noise"
        # rows by themselves need to know of no others
        self._cut = (
            None if config.scope == "row" else Cut.of(learnt, density=config.density, together=together, weigh=weigh)
        )
        self._plans: dict[tuple[Geometry, int, int, torch.device], Plan] = {}

    @classmethod
    def learner(cls, config: BudgetConfig) -> BudgetLearner:
        """Learns importances; the same for all presets but `max`."""
        return config.learner()

    @classmethod
    def check_tables(cls, learnt: Learnt) -> None:
        """Refuse tables that Budget cannot have learnt.

        Raises:
            ValueError: one line that names the setting or the table.
        """
        learner = read_settings(BudgetLearner, learnt.settings)
        geometry, tables = learnt.provenance.geometry, learnt.tables
        blocks = (block_count(geometry.video_tokens, size) for size in learner.block)
        expected: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
            "levels": (torch.uint8, (geometry.heads, *blocks)),
            "sigma": (torch.float32, ()),
        }
        learnt.check_tables("Budget", expected)
        if not bool(tables["sigma"].isfinite().all()):
            raise ValueError("sigma: a noise level is not finite")
        for step, levels in enumerate(tables["levels"]):
            if not bool((levels == ALWAYS).any(-1).all()):
                raise ValueError(f"levels: a row at step {step} has no block that is always computed")

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
        key = (site.geometry, site.step, site.layer, q.device)
        if key not in self._plans:
            mask = self._mask(site.step, site.layer, site.geometry, q.device)
            self._plans[key] = Plan.masked(mask, site.geometry.heads)
        return self._plans[key]

    def mean_density(self) -> float:
        """Of all plans of a video, with as much text as the calibration allows."""
        own, device = self.learnt.provenance, self.learnt.tables["levels"].device
        sites = [(step, layer) for step in range(own.steps) for layer in range(own.layers)]
        return sum(self._mask(*site, own.geometry, device).density().mean().item() for site in sites) / len(sites)

    def _mask(self, step: int, layer: int, geometry: Geometry, device: torch.device) -> BlockMask:
        block, tokens = self.config.block, geometry.tokens
        rows, columns = (video_blocks(geometry, size) for size in block)
        levels = video_part(self.learnt.tables["levels"][step, layer], geometry, block).to(device)
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
