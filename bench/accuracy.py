"""How true an attention output is: against fp64 under the same plan, and against dense attention."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from calibatt.bench.observers import Probe
from calibatt.kernels import oracle
from calibatt.kernels.base import Attender
from calibatt.kernels.permute import permute
from calibatt.kernels.plan import Plan
from calibatt.methods.call import Attention
from calibatt.methods.energy import CHUNK, exponentials
from calibatt.methods.site import Site


@dataclass(frozen=True, slots=True, kw_only=True)
class Truth:
    """How an arm did on the probes, worst or mean as each field says.

    Args:
        kernel_error, kernel_error_budget: largest absolute error against fp64 under the same plan, and what it may be,
            on the probe where it comes nearest to its budget.
        method_error: relative L2 error of attention outputs against dense attention, both in fp64, pooled by norm.
        recall: attention mass in the kept blocks, mean over heads that compute all their queries; None without any.
    """

    kernel_error: float
    kernel_error_budget: float
    method_error: float
    recall: float | None

    @property
    def right(self) -> bool:
        """Whether the kernel stayed within its budget."""
        return self.kernel_error <= self.kernel_error_budget


class PooledError:
    """Relative L2 error of attention outputs, pooled by norm over calls: sqrt(Σ‖out − dense‖² / Σ‖dense‖²).

    Attributes:
        calls: that are in it.
    """

    def __init__(self) -> None:
        self.calls = 0
        self._squares: Float[Tensor, "2"] | None = None

    def add(
        self,
        out: Float[Tensor, "batch heads tokens head_dim"],
        dense: Float[Tensor, "batch heads tokens head_dim"],
    ) -> None:
        """Add one call; nothing waits for the device.

        Args:
            out: what an arm computes.
            dense: what dense attention does.
        """
        if self._squares is None:
            self._squares = torch.zeros(2, dtype=torch.float64, device=out.device)
        # a head at a time: all heads of a large model take gigabytes in fp64
        for own, reference in zip(out.unbind(1), dense.unbind(1), strict=True):
            exact = reference.double()
            self._squares += torch.stack(((own.double() - exact).square().sum(), exact.square().sum()))
        self.calls += 1

    def value(self) -> float:
        """The error; waits for the device.

        Raises:
            ValueError: no call is in it, or outputs have NaN or infinite values, or are all zero.
        """
        if self._squares is None:
            raise ValueError("no attention call was seen: is the pipeline's self-attention replaced?")
        difference, reference = self._squares.tolist()
        error = math.sqrt(difference / reference) if reference else math.nan
        if not math.isfinite(error):
            raise ValueError("attention outputs have NaN or infinite values, or those of dense attention are all zero")
        return error


class Shadow:
    """Dense attention, beside which an arm plans and computes every call: what goes on into the model is dense.

    Args:
        arm: what is compared.
        dense: what it is compared with.

    Attributes:
        error: of the arm's outputs, over the calls of the video.
    """

    def __init__(self, arm: Attention, dense: Attention) -> None:
        self.error = PooledError()
        self._arm = arm
        self._dense = dense

    def start_video(self) -> None:
        """A new video."""
        self.error = PooledError()
        self._arm.start_video()
        self._dense.start_video()

    def __call__(
        self,
        q: Float[Tensor, "1 heads tokens head_dim"],
        k: Float[Tensor, "1 heads tokens head_dim"],
        v: Float[Tensor, "1 heads tokens head_dim"],
        site: Site,
    ) -> Float[Tensor, "1 heads tokens head_dim"]:
        """The dense output, once the arm's has been compared with it.

        Raises:
            ValueError: the arm does not take these inputs.
        """
        out = self._dense(q, k, v, site)
        self.error.add(self._arm(q, k, v, site), out)
        return out


def judge(
    plans: Iterable[Plan],
    kernel: Attender,
    probes: Sequence[Probe],
    dense: Sequence[Float[Tensor, "1 checked tokens head_dim"]],
    heads: Sequence[int],
) -> Truth:
    """Compute plans, one a probe, with a kernel and compare with fp64.

    Args:
        plans, kernel, probes: what is computed; each plan is asked for when the one before has been computed.
        dense: dense attention of each probe in fp64, of the checked heads.
        heads: which to check.

    Raises:
        ValueError: the kernel does not apply to a plan, or dense outputs are all zero.
    """
    errors: list[tuple[float, float]] = []
    method_error = PooledError()
    recalls: list[float] = []
    for plan, probe, reference in zip(plans, probes, dense, strict=True):
        out = kernel.attend(probe.q, probe.k, probe.v, plan)[:, heads]
        # what a kernel leaves out by itself is known now
        plan = plan.realised().of_heads(heads)
        q, k, v = (x[:, heads] for x in (probe.q, probe.k, probe.v))
        exact = oracle.attend(q, k, v, plan)
        errors.append((_largest_error(out, exact), oracle.error_budget(q, k, v, plan, exact)))
        method_error.add(exact, reference)
        recalls.extend(recall(q[0], k[0], plan))
    worst = max(errors, key=lambda pair: pair[0] / pair[1])
    return Truth(
        kernel_error=worst[0],
        kernel_error_budget=worst[1],
        method_error=method_error.value(),
        recall=sum(recalls) / len(recalls) if recalls else None,
    )


def spot_error(
    kernel: Attender,
    q: Float[Tensor, "batch heads tokens head_dim"],
    k: Float[Tensor, "batch heads tokens head_dim"],
    v: Float[Tensor, "batch heads tokens head_dim"],
    plan: Plan,
) -> tuple[float, float]:
    """Largest absolute error of a kernel against fp64 in the first and the last head, and what it may be.

    For inputs of full size, on whose heads fp64 takes a thousand times as long as a kernel.

    Args:
        kernel: that is checked.
        q, k, v: inputs of full size.
        plan: to compute them under.

    Raises:
        ValueError: the kernel does not apply to the plan.
    """
    heads = sorted({0, q.shape[1] - 1})
    out = kernel.attend(q, k, v, plan)[:, heads]
    q, k, v = (x[:, heads] for x in (q, k, v))
    some = plan.of_heads(heads)
    exact = oracle.attend(q, k, v, some)
    return _largest_error(out, exact), oracle.error_budget(q, k, v, some, exact)


def _largest_error(out: Tensor, exact: Tensor) -> float:
    # NaN compares false with everything: it must count as an infinite error
    return (out.double() - exact).abs().max().nan_to_num(math.inf).item()


def recall(
    q: Float[Tensor, "heads tokens head_dim"], k: Float[Tensor, "heads tokens head_dim"], plan: Plan
) -> list[float]:
    """Attention mass in the kept blocks, for each head that computes all its queries.

    Args:
        q, k: what attention sees.
        plan: what is kept of it.
    """
    kept = [1.0 for kind in plan.kinds if kind == "dense"]
    if plan.mask is not None:
        if plan.order is not None:
            q, k = permute((q[None],), plan.order.queries)[0][0], permute((k[None],), plan.order.keys)[0][0]
        for head in plan.heads_of("masked"):
            mass = 0.0
            for rows in torch.arange(plan.tokens, device=q.device).split(max(1, CHUNK // plan.tokens)):
                weights = exponentials(q[head, rows], k[head])
                seen = plan.mask.seen(head, rows)
                mass += ((weights * seen).sum(-1) / weights.sum(-1)).sum().item()
            kept.append(mass / plan.tokens)
    return kept
