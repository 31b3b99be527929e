"""BLASST, or skip-softmax: the kernel leaves out blocks whose scores are low, as soon as it has seen the scores.

Follows arXiv 2512.12087 and github.com/NVIDIA/Model-Optimizer (examples/diffusers/sparsity, torch/sparsity/
attention_sparsity/calibration/calibrator.py). Scores are always computed, so half of the products remain whatever the
threshold. What differs:

- A block is the mask's, 128 × 64 tokens unless told otherwise; there it is the tile that the kernel happens to have.
- Presets named oracle find the same blocks before the call, so that every kernel can compute what is left. Their times
  are no times of this method: the search costs more than attention. Their density is: scores of low blocks count.
- The calibration watches every call of the videos; there it is one pass, over 4 prompts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from calibatt.kernels.base import Unsupported
from calibatt.kernels.geometry import Geometry
from calibatt.kernels.plan import Plan, Skip
from calibatt.methods.base import Knob, Method
from calibatt.methods.learning import Learnt
from calibatt.methods.site import Site
from calibatt.methods.skipping import LEAST, MOST, all_blocks, score_gaps, without_low

# λ of the calibration, from 1e-12 to 0.99: 22 of them, as there; evenly in the logarithm, which is ours
LAMBDAS = tuple(np.geomspace(1e-12, 0.99, 22).tolist())
# shares of blocks between which the fit is made
_FITTED = (0.1, 0.9)


@dataclass(frozen=True, slots=True, kw_only=True)
class BlasstConfig:
    """Settings of the choice.

    Args:
        threshold: blocks whose largest weight is at most 2 to this, against the largest so far, are left out; None
            where it is fitted.
        sparsity: share of the blocks to leave out, by the threshold that was fitted offline; None with a threshold.
        dense_ends: layers at either end that stay dense.
        oracle: whether blocks are found before the call, for kernels that leave nothing out by themselves.
        block: tokens of a query and of a key block.

    Raises:
        ValueError: neither or both of threshold and sparsity are given, or one is out of range.
    """

    threshold: float | None = None
    sparsity: float | None = None
    dense_ends: int = 2
    oracle: bool = False
    block: tuple[int, int] = (128, 64)

    def __post_init__(self) -> None:
        if (self.threshold is None) == (self.sparsity is None):
            raise ValueError("blasst leaves out by a threshold, or by a sparsity that was fitted: give one of them")
        if self.threshold is not None and not self.threshold < 0:
            raise ValueError(f"blasst's threshold is a power of two, below 0: got {self.threshold}")
        if self.sparsity is not None and not 0 <= self.sparsity < 1:
            raise ValueError(f"blasst's sparsity is a share of the blocks, from 0 to below 1: got {self.sparsity}")


class Blasst(Method):
    """Keeps every block until its scores are known; the low ones lose their softmax and their values."""

    name: ClassVar[str] = "blasst"
    label: ClassVar[str] = "BLASST"
    colour: ClassVar[str] = "#E69F00"
    marker: ClassVar[str] = "X"
    headwise: ClassVar[bool] = True
    presets: ClassVar[Mapping[str, BlasstConfig]] = MappingProxyType(
        {
            # λ = 0.1, wan22_skip_softmax.py
            "default": BlasstConfig(threshold=math.log2(0.1)),
            "oracle": BlasstConfig(threshold=math.log2(0.1), oracle=True),
            # the same at every layer, to compare masks
            "no-warmup": BlasstConfig(threshold=math.log2(0.1), dense_ends=0, oracle=True),
            # half of the blocks: the default of its script's --target-sparsity
            "calibrated": BlasstConfig(sparsity=0.5),
            "calibrated-oracle": BlasstConfig(sparsity=0.5, oracle=True),
        }
    )
    knob: ClassVar[Knob | None] = Knob(field="threshold", low=LEAST, high=MOST)
    without_dense: ClassVar[Mapping[str, Any]] = MappingProxyType({"dense_ends": 0})

    def __init__(self, config: BlasstConfig, learnt: Learnt | None = None) -> None:
        super().__init__(config, learnt)
        self._threshold: float | Unsupported | None = config.threshold
        if learnt is not None and config.sparsity is not None:
            tokens = learnt.provenance.geometry.tokens
            self._threshold = fitted_threshold(learnt.tables["left_out"], tokens, config.sparsity)

    @classmethod
    def learner(cls, config: BlasstConfig) -> BlasstLearner | None:
        """Counts how many blocks every threshold would leave out, where a sparsity is asked for."""
        return None if config.sparsity is None else BlasstLearner(block=config.block)

    def refusal(self, geometry: Geometry) -> Unsupported | None:
        """Refuses where no threshold could be fitted."""
        return self._threshold if isinstance(self._threshold, Unsupported) else None

    def plan(
        self,
        q: Float[Tensor, "heads tokens head_dim"],
        k: Float[Tensor, "heads tokens head_dim"],
        v: Float[Tensor, "heads tokens head_dim"],
        site: Site,
    ) -> Plan:
        """All blocks, of which the kernel leaves out the low ones; dense in the first and last layers.

        Raises:
            ValueError: no threshold could be fitted, or for other videos.
        """
        if self.learnt is not None:
            self.learnt.check(site)
        if isinstance(self._threshold, Unsupported):
            raise ValueError(self._threshold.reason)
        assert self._threshold is not None
        if not self.config.dense_ends <= site.layer < site.layers - self.config.dense_ends:
            return Plan.dense(site.geometry)
        heads = site.geometry.heads
        mask = all_blocks(site.geometry.tokens, self.config.block, q.device)
        if self.config.oracle:
            return Plan.masked(without_low(q, k, mask, self._threshold), heads, scored=mask)
        return Plan.masked(mask, heads, skip=Skip.of(mask, heads, threshold=self._threshold, leave=True))


@dataclass(frozen=True, slots=True, kw_only=True)
class BlasstLearner:
    """Shares of the blocks that each of 22 thresholds would leave out.

    Args:
        block: tokens of a query and of a key block.
    """

    block: tuple[int, int]

    def note(
        self,
        q: Float[Tensor, "heads tokens head_dim"],
        k: Float[Tensor, "heads tokens head_dim"],
        v: Float[Tensor, "heads tokens head_dim"],
        site: Site,
        prompt: int,
    ) -> Mapping[str, Tensor]:
        """`left_out`: the shares at one call, by threshold."""
        found = score_gaps(q, k, all_blocks(site.geometry.tokens, self.block, q.device)).flatten()
        thresholds = torch.tensor(LAMBDAS, device=q.device).log2()
        return {"left_out": torch.stack([(found <= threshold).float().mean() for threshold in thresholds])}

    def merge(self, notes: Sequence[Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
        """`left_out`: the mean over the prompts."""
        return {"left_out": torch.stack([note["left_out"] for note in notes]).mean(0)}


def fitted_threshold(
    left_out: Float[Tensor, "steps layers thresholds"], tokens: int, sparsity: float
) -> float | Unsupported:
    """The threshold for a sparsity, as a power of two, by λ · keys = a · exp(b · sparsity).

    a and b are fitted by least squares in the logarithm, over the thresholds that leave out 10 to 90 % of the blocks in
    the mean of all calls. Where fewer than two thresholds do, there is none.

    Args:
        left_out: share of the blocks that each threshold leaves out.
        tokens: of the sequence.
        sparsity: wanted share of the blocks to leave out.
    """
    shares = left_out.flatten(0, 1).mean(0).double().cpu().numpy()
    fitted = (shares >= _FITTED[0]) & (shares <= _FITTED[1])
    if fitted.sum() < 2:
        return Unsupported(
            f"blasst fits between {_FITTED[0]:.0%} and {_FITTED[1]:.0%} of blocks left out, where these videos have "
            f"{fitted.sum()} of {len(LAMBDAS)} thresholds: use a preset with a threshold"
        )
    b, log_a = np.polyfit(shares[fitted], np.log(np.array(LAMBDAS)[fitted] * tokens), 1)
    return float(min((log_a + b * sparsity - math.log(tokens)) / math.log(2), MOST))
