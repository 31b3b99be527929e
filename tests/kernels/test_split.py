"""fa4+gluon: each of its two kernels is asked for its own heads; the contract tests compute with it where a GPU is."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from calibatt.kernels import oracle, split
from calibatt.kernels.base import Task, Unsupported
from calibatt.kernels.flash import Flash4
from calibatt.kernels.geometry import Geometry
from calibatt.kernels.gluon_hopper import Gluon
from calibatt.kernels.mask import BlockMask
from calibatt.kernels.plan import Plan, RowReuse
from calibatt.kernels.split import Split

GEOMETRY = Geometry(grid=(2, 8, 8), heads=4, head_dim=16)


class Flash(Flash4):
    """Refuses what it is told to."""

    def __init__(self, reason: str | None) -> None:
        self.reason = reason

    def refusal(self, task: Task) -> Unsupported | None:
        return None if self.reason is None else Unsupported(self.reason)


class Rows(Gluon):
    """Likewise; reused heads are the oracle's."""

    def __init__(self, reason: str | None) -> None:
        self.reason = reason

    def refusal(self, task: Task) -> Unsupported | None:
        return None if self.reason is None else Unsupported(self.reason)

    def add_reused(self, q: Tensor, k: Tensor, v: Tensor, plan: Plan, out: Tensor) -> None:
        reused = plan.heads_of("reused")
        out[:, reused] = oracle.attend(q, k, v, plan).to(out.dtype)[:, reused]


@pytest.fixture
def plan() -> Plan:
    keep = torch.rand(4, 4, 8, generator=torch.Generator().manual_seed(0)) < 0.5
    return Plan(
        tokens=128,
        kinds=("masked", "reused", "dense", "reused"),
        mask=BlockMask.from_keep(keep, tokens=128, block_q=32, block_k=16),
        reuse=RowReuse.of_anchor_rows(GEOMETRY, (1, 5)),
    )


def made(flash: str | None = None, gluon: str | None = None) -> Split:
    return Split(Flash(flash), Rows(gluon))


def test_each_head_comes_from_the_kernel_that_is_meant_to_have_it(monkeypatch: pytest.MonkeyPatch, plan: Plan) -> None:
    def blocks(q: Tensor, k: Tensor, v: Tensor, plan: Plan) -> Tensor:
        out = oracle.attend(q, k, v, plan).to(q.dtype)
        # what it gives for reused heads means nothing
        out[:, plan.heads_of("reused")] = torch.nan
        return out

    monkeypatch.setattr(split, "fa4_blocks", blocks)
    q, k, v = torch.randn(3, 1, 4, 128, 16, generator=torch.Generator().manual_seed(1))
    out = made().attend(q, k, v, plan)
    exact = oracle.attend(q, k, v, plan)
    assert (out.double() - exact).abs().max().item() <= oracle.error_budget(q, k, v, plan, exact)


def test_it_refuses_what_either_kernel_refuses_and_plans_for_one_alone(plan: Plan) -> None:
    q = torch.zeros(1, 4, 128, 16)
    assert made().refusal(Task.of(q, plan)) is None
    assert made(flash="not here").refusal(Task.of(q, plan)) == Unsupported("not here")
    assert made(gluon="nor there").refusal(Task.of(q, plan)) == Unsupported("nor there")
    assert plan.mask is not None
    for other in (Plan.dense(GEOMETRY), Plan.masked(plan.mask, 4)):
        refusal = made().refusal(Task.of(q, other))
        assert refusal is not None
        assert "both masked heads and heads that reuse rows" in refusal.reason
