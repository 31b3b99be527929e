"""The attention call: who is asked, who computes, who is told, and what is timed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from calibatt.kernels import oracle
from calibatt.kernels.geometry import Geometry
from calibatt.kernels.plan import Plan
from calibatt.methods.base import Planner
from calibatt.methods.call import Attention, Call, Observer, SparseAttention
from calibatt.methods.catalogue import build
from calibatt.methods.site import Site

GEOMETRY = Geometry(grid=(4, 4, 4), heads=2, head_dim=8)
SITE = Site(geometry=GEOMETRY, step=0, steps=2, sigma=1.0, branch="cond", layer=1, layers=2)


class Eager:
    """Computes in the inputs' own type."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, plan: Plan) -> Tensor:
        return oracle.attend(q, k, v, plan, dtype=q.dtype)


@dataclass
class Log:
    """Writes down what happens, as a method, an observer and a clock."""

    method: Planner
    events: list[str] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)

    def plan(self, q: Tensor, k: Tensor, v: Tensor, site: Site) -> Plan:
        self.events.append(f"asked at {site.layer}")
        return self.method.plan(q, k, v, site)

    def reset(self) -> None:
        self.events.append("reset")
        self.method.reset()

    def saw(self, call: Call) -> None:
        self.events.append("told")
        self.calls.append(call)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self.events.append(f"<{name}")
        yield
        self.events.append(f"{name}>")


@pytest.fixture
def qkv() -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = torch.randn(3, 1, 2, 64, 8, generator=torch.Generator().manual_seed(0))
    return q, k, v


def test_a_call_is_planned_computed_and_told_and_only_the_work_is_timed(qkv: tuple[Tensor, Tensor, Tensor]) -> None:
    # a method with an order of tokens, so that there is something to permute
    log = Log(build("sta", preset="no-warmup", tile=(2, 2, 2), window=(1, 1, 1), block=(8, 8)))
    attention = SparseAttention(log, Eager(), observers=[log, log], phase=log.phase)
    assert isinstance(attention, Attention)
    assert isinstance(log, Observer)
    attention.start_video()
    out = attention(*qkv, SITE)
    phases = ["permute", "attend", "unpermute"]
    timed = ["<plan", "asked at 1", "plan>", *(part for name in phases for part in (f"<{name}", f"{name}>"))]
    assert log.events == ["reset", *timed, "told", "told"]
    call = log.calls[0]
    assert call.site is SITE
    assert all(seen is given for seen, given in zip((call.q, call.k, call.v), qkv, strict=True))
    assert call.out is out
    assert 0 < call.plan.density().max() < 1
    torch.testing.assert_close(out, oracle.attend(*qkv, call.plan).float())


def test_inputs_that_do_not_fit_the_plan_are_refused_before_anybody_is_told(
    qkv: tuple[Tensor, Tensor, Tensor],
) -> None:
    log = Log(build("dense"))
    attention = SparseAttention(log, Eager(), observers=[log])
    with pytest.raises(ValueError, match="tokens"):
        attention(*(x[:, :, :60] for x in qkv), SITE)
    assert not log.calls
