"""Dense kernels, each explicit: never whatever torch happens to choose."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from calibatt.kernels.base import Task, Unsupported, check, dtype_name, triton_only
from calibatt.kernels.ordered import in_order
from calibatt.kernels.plan import Plan


class Dense:
    """A kernel for dense plans only.

    Args:
        name: what the arm is called.
        compute: attention of q, k and v, [batch, heads, tokens, head_dim], with every key.
        objection: why it cannot do a dense task on this machine, or None when it can.
    """

    def __init__(
        self, name: str, compute: Callable[[Tensor, Tensor, Tensor], Tensor], objection: Callable[[Task], str | None]
    ) -> None:
        self.name = name
        self._compute = compute
        self._objection = objection

    def refusal(self, task: Task) -> Unsupported | None:
        """Why this kernel cannot do the task on this machine, or None when it can."""
        if task.block is not None or task.variable or task.reuses:
            return Unsupported(f"{self.name} is a dense kernel and would compute every block: choose a sparse one")
        objection = self._objection(task)
        return triton_only(self.name, task) if objection is None else Unsupported(objection)

    @in_order
    def attend(
        self,
        q: Float[Tensor, "batch heads tokens head_dim"],
        k: Float[Tensor, "batch heads tokens head_dim"],
        v: Float[Tensor, "batch heads tokens head_dim"],
        plan: Plan,
    ) -> Float[Tensor, "batch heads tokens head_dim"]:
        """Dense attention.

        Raises:
            ValueError: the plan is not dense or has INT8, or inputs and plan do not belong together.
        """
        check(q, k, v, plan)
        if set(plan.kinds) != {"dense"}:
            raise ValueError(
                f"{self.name} computes dense plans only, this one has {', '.join(sorted(set(plan.kinds)))}"
            )
        if (refusal := triton_only(self.name, Task.of(q, plan))) is not None:
            raise ValueError(refusal.reason)
        return self._compute(q, k, v)


# of FlashAttention-2's and cuDNN's kernels in torch
_LEAST_CAPABILITY = (8, 0)


def _sdpa(name: str, backend: SDPBackend, devices: tuple[str, ...], *, half: bool) -> Dense:
    """scaled_dot_product_attention, pinned to a backend that runs on these types of device; on CUDA in halves only."""

    def compute(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(q, k, v)

    def objection(task: Task) -> str | None:
        if task.device.type not in devices:
            return f"{name} runs on {' and '.join(devices)}, not on {task.device.type}"
        if task.device.type != "cuda" or not half:
            return None
        if task.dtype not in (torch.bfloat16, torch.float16):
            return f"{name} computes bfloat16 and float16 on cuda, not {dtype_name(task.dtype)}"
        capability = torch.cuda.get_device_capability(task.device)
        return (
            f"{name} runs on sm80 and newer, not sm{capability[0]}{capability[1]}"
            if capability < _LEAST_CAPABILITY
            else None
        )

    return Dense(name, compute, objection)


# on CUDA torch's flash backend is FlashAttention-2; on a CPU it is torch's own tiled kernel
SDPA_FLASH = _sdpa("sdpa-flash", SDPBackend.FLASH_ATTENTION, ("cpu", "cuda"), half=True)
SDPA_CUDNN = _sdpa("sdpa-cudnn", SDPBackend.CUDNN_ATTENTION, ("cuda",), half=True)
SDPA_MATH = _sdpa("sdpa-math", SDPBackend.MATH, ("cpu", "cuda"), half=False)
