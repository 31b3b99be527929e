"""How much attention mass the calibrated masks keep at each denoising step."""

from __future__ import annotations

import math
from dataclasses import dataclass

# fits of arXiv 2603.05503: many-step models (Wan 2.1, Mochi), where the late value grows with the sequence …
_MANY_EARLY, _MANY_DECAY = 0.99, 16.0
_MANY_LATE, _MANY_LATE_PER_TOKEN = 0.796, 1.41e-6
# … and the 4-step distilled LightX2V
_DISTILLED_EARLY, _DISTILLED_LATE, _DISTILLED_DECAY = 0.863, 0.763, 5.64
# as many as it was fitted to: that model is distilled to need no more, and nothing is fitted between 4 and 50
_FEW_STEPS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """ε(t) = late + (early − late)·exp(−decay·t/T): the mass to keep, from the first step to the last.

    Source: arXiv 2603.05503, where late is A, early C and decay k.

    Args:
        early: mass kept at step 0, the noisiest.
        late: mass that the schedule falls (or rises) to.
        decay: how fast, over the whole generation.

    Raises:
        ValueError: a mass is not in (0, 1], or the decay is negative.
    """

    early: float
    late: float
    decay: float

    def __post_init__(self) -> None:
        # written so that NaN fails too
        if not (0 < self.early <= 1 and 0 < self.late <= 1 and 0 <= self.decay < math.inf):
            raise ValueError(f"a schedule needs masses in (0, 1] and a decay of 0 or more: got {self}")

    @classmethod
    def published(cls, tokens: int, steps: int) -> Schedule:
        """The paper's fit that comes nearest: the distilled model's for up to 4 steps, the many-step one for more.

        Args:
            tokens: length of the sequence.
            steps: of a generation.

        Raises:
            ValueError: as `many_step`.
        """
        return cls.distilled() if steps <= _FEW_STEPS else cls.many_step(tokens)

    @classmethod
    def many_step(cls, tokens: int) -> Schedule:
        """The paper's fit for models of some 50 steps.

        Args:
            tokens: length of the sequence.

        Raises:
            ValueError: the sequence is so long (145,000 tokens) that the fit leaves (0, 1].
        """
        return cls(early=_MANY_EARLY, late=_MANY_LATE + _MANY_LATE_PER_TOKEN * tokens, decay=_MANY_DECAY)

    @classmethod
    def distilled(cls) -> Schedule:
        """The paper's fit for a 4-step distilled model."""
        return cls(early=_DISTILLED_EARLY, late=_DISTILLED_LATE, decay=_DISTILLED_DECAY)

    def mass(self, step: int, steps: int) -> float:
        """The mass to keep at a step, of this many."""
        return self.late + (self.early - self.late) * math.exp(-self.decay * step / steps)
