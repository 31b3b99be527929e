"""Two kernels for one plan, each for the heads that it is fastest at."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from calibatt.kernels.base import Task, Unsupported, check, check_accepted
from calibatt.kernels.flash import Flash4, fa4_blocks
from calibatt.kernels.gluon_hopper import Gluon
from calibatt.kernels.plan import Plan


class Split:
    """Masked and dense heads by FlashAttention-4, then the rows of reused heads by the Gluon kernel, into one output.

    FlashAttention-4 is the faster of the two with masks, and would gather and scatter reused rows around its launch.
    """

    name = "fa4+gluon"

    def __init__(self, flash: Flash4, gluon: Gluon) -> None:
        self._flash, self._gluon = flash, gluon

    def refusal(self, task: Task) -> Unsupported | None:
        """Why it cannot do the task on this machine, or None when it can."""
        if task.block is None or not task.reuses:
            return Unsupported(
                "fa4+gluon is for plans that have both masked heads and heads that reuse rows: name one of the two"
            )
        return self._flash.refusal(task) or self._gluon.refusal(task)

    def attend(
        self,
        q: Float[Tensor, "batch heads tokens head_dim"],
        k: Float[Tensor, "batch heads tokens head_dim"],
        v: Float[Tensor, "batch heads tokens head_dim"],
        plan: Plan,
    ) -> Float[Tensor, "batch heads tokens head_dim"]:
        """Attention under a plan; a row with no block gives zeros.

        Raises:
            ValueError: inputs and plan do not belong together, or a kernel does not have their dtype or sizes.
        """
        check(q, k, v, plan)
        check_accepted(self, q, plan)
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
        out = fa4_blocks(q, k, v, plan)
        self._gluon.add_reused(q, k, v, plan, out)
        return out
