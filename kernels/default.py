"""The kernel for those who name none: each plan goes to the one that docs/kernels.md found fastest for its kind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from calibatt.kernels.base import Kernel, Task, Unsupported, check
from calibatt.kernels.plan import Plan


class Default:
    """Hands every plan to the kernel that was measured to be fastest for plans like it, on Hopper and on CPUs.

    On other GPUs the order is that of what each can do there.

    Args:
        kernels: those to choose from, by name.
    """

    name = "default"

    def __init__(self, kernels: Mapping[str, Kernel]) -> None:
        self._kernels = kernels
        self._chosen: dict[Task, Kernel | Unsupported] = {}

    def chosen(self, task: Task) -> Kernel | Unsupported:
        """The first in order that can do the task on this machine; why each cannot where none can."""
        # asked at every call, of a few kinds of task
        if task not in self._chosen:
            self._chosen[task] = self._first(task)
        return self._chosen[task]

    def _first(self, task: Task) -> Kernel | Unsupported:
        reasons = []
        for name in _order(task):
            refusal = self._kernels[name].refusal(task)
            if refusal is None:
                return self._kernels[name]
            reasons.append(refusal.reason)
        return Unsupported("; ".join(reasons))

    def refusal(self, task: Task) -> Unsupported | None:
        """Why no kernel can do the task on this machine, or None when one can."""
        chosen = self.chosen(task)
        return chosen if isinstance(chosen, Unsupported) else None

    def attend(
        self,
        q: Float[Tensor, "batch heads tokens head_dim"],
        k: Float[Tensor, "batch heads tokens head_dim"],
        v: Float[Tensor, "batch heads tokens head_dim"],
        plan: Plan,
    ) -> Float[Tensor, "batch heads tokens head_dim"]:
        """Attention under a plan; a row with no block gives zeros.

        Raises:
            ValueError: inputs and plan do not belong together, or no kernel has their dtype or sizes.
        """
        check(q, k, v, plan)
        chosen = self.chosen(Task.of(q, plan))
        if isinstance(chosen, Unsupported):
            raise ValueError(chosen.reason)
        return chosen.attend(q, k, v, plan)


def ran_on(kernel: Kernel, tasks: Sequence[Task]) -> str | None:
    """Names of what the default chose for some tasks, those that are not plain where any is; None for other kernels."""
    if not isinstance(kernel, Default):
        return None
    names = {task: chosen.name for task in tasks if not isinstance(chosen := kernel.chosen(task), Unsupported)}
    special = [name for task, name in names.items() if not task.plain]
    return "+".join(sorted(set(special or names.values())))


def _order(task: Task) -> Sequence[str]:
    """Names from the fastest to the slowest, by bench/results/h200 where the GPU is Hopper's."""
    if task.device.type != "cuda":
        return ("sdpa-flash", "flex") if task.plain else ("flex", "triton")
    if task.plain:
        return ("fa3", "fa4", "sdpa-cudnn", "sdpa-flash", "flex")
    if torch.cuda.get_device_capability(task.device) != (9, 0):
        return ("fa4", "triton", "flex")
    # Rows that reuse others in the same launch (with FlashAttention-4 for masked heads it is faster where rows keep as
    # many blocks, as a model's masks do not: docs/kernels.md), or loads that FlashAttention-4 does not hide
    small = task.head_dim == 64 or (task.block is not None and task.block[0] % 128 != 0)
    return ("gluon", "fa4", "triton", "flex") if task.reuses or small else ("fa4", "gluon", "triton", "flex")
