"""What a kernel is, what it says when it cannot run, and the check that all of them share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from calibatt.kernels.plan import Plan


@dataclass(frozen=True, slots=True)
class Unsupported:
    """Why something does not apply here, and what would help: a value, not an error."""

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What a kernel would be asked to do: enough to say whether it can.

    Args:
        device, dtype: of q, k and v.
        head_dim: channels of one head.
        block: tokens of a query block and of a key block; None where no head has a mask, or blocks differ in size.
        variable: whether blocks differ in size (`plan.VariableBlockMask`).
        reuses: whether heads reuse rows.
        skips: whether the kernel is to note low blocks, or leave them out, by itself (`plan.Skip`).
        int8: queries and keys that have one scale, where it is to multiply them in INT8.
        approximates: whether means stand for the blocks that are not computed (`plan.Plan.remainder`).
    """

    device: torch.device
    dtype: torch.dtype
    head_dim: int
    block: tuple[int, int] | None = None
    variable: bool = False
    reuses: bool = False
    skips: bool = False
    int8: tuple[int, int] | None = None
    approximates: bool = False

    @property
    def plain(self) -> bool:
        """Whether it is dense attention: nothing is left out, nor rounded on purpose."""
        return self.block is None and not (self.variable or self.reuses or self.skips or self.int8)

    @classmethod
    def of(cls, q: Tensor, plan: Plan) -> Task:
        """What a plan on these inputs asks for."""
        block = None if plan.mask is None else plan.mask.block
        return cls(
            device=q.device, dtype=q.dtype, head_dim=q.shape[-1], block=block,
            variable=plan.mask is not None and block is None, reuses=plan.reuse is not None,
            skips=plan.skip is not None, int8=plan.int8, approximates=plan.remainder != "none",
        )  # fmt: skip


def triton_only(name: str, task: Task) -> Unsupported | None:
    """What kernels refuse that neither leave blocks out by themselves nor multiply in INT8."""
    if task.skips:
        return Unsupported(
            f"{name} leaves no blocks out by itself: the Triton kernel does, and a preset named oracle needs no such "
            "kernel"
        )
    if task.int8 is not None:
        return Unsupported(f"{name} does not multiply queries and keys in INT8: the Triton kernel does")
    return None


def variable_refusal(name: str) -> Unsupported:
    """What kernels say whose blocks have one size."""
    return Unsupported(
        f"{name} has blocks of one size: the Triton kernel has variable ones, other presets cover them by fixed blocks"
    )


def remainder_refusal(name: str) -> Unsupported:
    """What kernels say that drop the blocks they do not compute."""
    return Unsupported(
        f"{name} drops what it does not compute: the Gluon and Triton kernels and FlexAttention approximate it"
    )


@runtime_checkable
class Attender(Protocol):
    """Anything that computes attention under a plan."""

    def attend(
        self,
        q: Float[Tensor, "batch heads tokens head_dim"],
        k: Float[Tensor, "batch heads tokens head_dim"],
        v: Float[Tensor, "batch heads tokens head_dim"],
        plan: Plan,
    ) -> Float[Tensor, "batch heads tokens head_dim"]:
        """Softmax attention, scaled by 1/√head_dim, over the blocks of the plan; a row with no block gives zeros.

        Where the plan has a remainder, it is of the blocks that are not computed.

        Raises:
            ValueError: inputs and plan do not belong together.
        """
        ...


@runtime_checkable
class Kernel(Attender, Protocol):
    """A way to compute attention. Importing one is free; optional packages load inside the calls."""

    name: str

    def refusal(self, task: Task) -> Unsupported | None:
        """Why this kernel cannot do the task on this machine, or None when it can."""
        ...


def dtype_name(dtype: torch.dtype) -> str:
    """As people write it: bfloat16."""
    return str(dtype).removeprefix("torch.")


def check_accepted(kernel: Kernel, q: Tensor, plan: Plan) -> None:
    """Raise what a kernel would refuse.

    Args:
        kernel: that is asked.
        q: the queries, whose device, dtype and head dim count.
        plan: to compute them under.

    Raises:
        ValueError: the kernel does not have these inputs' device, dtype or head dim, or the plan's blocks.
    """
    refusal = kernel.refusal(Task.of(q, plan))
    if refusal is not None:
        raise ValueError(refusal.reason)


def check(q: Tensor, k: Tensor, v: Tensor, plan: Plan) -> None:
    """Refuse inputs that do not belong together, naming both sides.

    Args:
        q, k, v: [batch, heads, tokens, head_dim].
        plan: to compute them under.

    Raises:
        ValueError: shapes, dtypes or devices differ, or the plan is for other heads or tokens.
    """
    for name, other in (("k", k), ("v", v)):
        if other.shape != q.shape or other.dtype != q.dtype or other.device != q.device:
            raise ValueError(
                f"q is {list(q.shape)} {q.dtype} on {q.device}, "
                f"{name} is {list(other.shape)} {other.dtype} on {other.device}"
            )
    if q.ndim != 4 or (q.shape[1], q.shape[2]) != (len(plan.kinds), plan.tokens):
        raise ValueError(
            f"the plan is for {len(plan.kinds)} heads × {plan.tokens} tokens, "
            f"q is [batch, heads, tokens, head_dim] = {list(q.shape)}"
        )
    if plan.skip is not None and q.shape[0] != 1:
        raise ValueError(f"a plan whose low blocks are noted is for one sample: q has {q.shape[0]}")
    for part in plan.tensors():
        if part.device != q.device:
            raise ValueError(f"the plan is on {part.device}, q on {q.device}: move it with .to()")
