"""torch's own dense attention, one arm a backend, each pinned: never whatever torch happens to choose."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from calibatt.kernels.base import Task, Unsupported, check
from calibatt.kernels.plan import Plan


class Sdpa:
    """scaled_dot_product_attention on one backend. Dense plans only.

    Args:
        name: what the arm is called.
        backend: the backend it is pinned to.
        devices: device types the backend runs on.
    """

    def __init__(self, name: str, backend: SDPBackend, devices: tuple[str, ...]) -> None:
        self.name = name
        self._backend = backend
        self._devices = devices

    def refusal(self, task: Task) -> Unsupported | None:
        """Why this kernel cannot do the task on this machine, or None when it can."""
        if task.block is not None:
            return Unsupported(f"{self.name} is a dense kernel and would compute every block: choose a sparse one")
        if task.device.type not in self._devices:
            return Unsupported(f"{self.name} runs on {' and '.join(self._devices)}, not on {task.device.type}")
        return None

    def attend(
        self,
        q: Float[Tensor, "batch heads tokens head_dim"],
        k: Float[Tensor, "batch heads tokens head_dim"],
        v: Float[Tensor, "batch heads tokens head_dim"],
        plan: Plan,
    ) -> Float[Tensor, "batch heads tokens head_dim"]:
        """Dense attention.

        Raises:
            ValueError: the plan is not dense, or inputs and plan do not belong together.
        """
        check(q, k, v, plan)
        if set(plan.kinds) != {"dense"}:
            raise ValueError(
                f"{self.name} computes dense plans only, this one has {', '.join(sorted(set(plan.kinds)))}"
            )
        with sdpa_kernel(self._backend):
            return scaled_dot_product_attention(q, k, v)


# on CUDA torch's flash backend is FlashAttention-2; on a CPU it is torch's own tiled kernel
SDPA_FLASH = Sdpa("sdpa-flash", SDPBackend.FLASH_ATTENTION, ("cpu", "cuda"))
SDPA_CUDNN = Sdpa("sdpa-cudnn", SDPBackend.CUDNN_ATTENTION, ("cuda",))
SDPA_MATH = Sdpa("sdpa-math", SDPBackend.MATH, ("cpu", "cuda"))
