"""Truth of arms."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch

from calibatt.bench.accuracy import PooledError, Shadow, Truth, judge, recall
from calibatt.bench.arms import block_of
from calibatt.bench.observers import Probe
from calibatt.kernels import oracle
from calibatt.kernels.geometry import Geometry
from calibatt.kernels.mask import BlockMask, VariableBlockMask
from calibatt.kernels.plan import Plan, TokenOrder
from calibatt.methods.call import SparseAttention
from calibatt.methods.site import Site

GEOMETRY = Geometry(grid=(2, 6, 8), heads=2, head_dim=16)


@pytest.fixture
def probe() -> Probe:
    q, k, v = torch.randn(3, 1, 2, 96, 16, generator=torch.Generator().manual_seed(0))
    site = Site(geometry=GEOMETRY, step=0, steps=1, sigma=1.0, branch="cond", layer=0, layers=1)
    return Probe(site=site, q=q, k=k, v=v)


@pytest.fixture
def plan() -> Plan:
    keep = torch.tensor([[True, False, True], [False, True, True], [True, True, True]])
    return Plan.masked(BlockMask.from_keep(keep[None], tokens=96, block_q=32, block_k=32), 2)


class Kernel:
    """The oracle, with an error added."""

    def __init__(self, error: float) -> None:
        self.error = error

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: Plan) -> torch.Tensor:
        out = oracle.attend(q, k, v, plan, dtype=q.dtype)
        out[0, 0, 0, 0] += self.error
        return out


def _judged(plan: Plan, kernel: Kernel, probe: Probe, heads: Sequence[int] = (0, 1)) -> Truth:
    chosen = list(heads)
    q, k, v = (x[:, chosen] for x in (probe.q, probe.k, probe.v))
    return judge([plan], kernel, [probe], [oracle.attend(q, k, v, Plan.dense(GEOMETRY).of_heads(chosen))], chosen)


def test_a_right_kernel_is_right(probe: Probe, plan: Plan) -> None:
    assert _judged(plan, Kernel(0.0), probe).right


def test_heads_that_are_not_checked_are_not_looked_at(probe: Probe, plan: Plan) -> None:
    # the error is in head 0
    assert _judged(plan, Kernel(1.0), probe, [1]).right
    assert not _judged(plan, Kernel(1.0), probe, [0]).right


@pytest.mark.parametrize("error", [1e-3, math.nan, math.inf])
def test_one_wrong_value_is_wrong(probe: Probe, plan: Plan, error: float) -> None:
    assert not _judged(plan, Kernel(error), probe).right


def test_dense_has_no_method_error_and_full_recall(probe: Probe) -> None:
    truth = _judged(Plan.dense(GEOMETRY), Kernel(0.0), probe)
    assert truth.method_error == 0.0
    assert truth.recall == 1.0


def test_the_method_error_of_probes_is_pooled_by_norm(probe: Probe, plan: Plan) -> None:
    # outputs a hundred times as large, computed densely
    large = Probe(site=probe.site, q=probe.q, k=probe.k, v=100 * probe.v)
    dense = [oracle.attend(one.q, one.k, one.v, Plan.dense(GEOMETRY)) for one in (probe, large)]
    truth = judge([plan, Plan.dense(GEOMETRY)], Kernel(0.0), [probe, large], dense, [0, 1])
    lost = (oracle.attend(probe.q, probe.k, probe.v, plan) - dense[0]).norm()
    assert truth.method_error == pytest.approx((lost / torch.stack(dense).norm()).item())


class WrongAt:
    """Plans by a mask at one call of a video, counted from its reset, and densely at all others."""

    def __init__(self, call: int | None, plan: Plan) -> None:
        self._wrong_at, self._plan = call, plan
        self._calls = 0

    def reset(self) -> None:
        self._calls = 0

    def plan(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, site: Site) -> Plan:
        self._calls += 1
        return self._plan if self._calls - 1 == self._wrong_at else Plan.dense(GEOMETRY)


def _shadow(call: int | None, plan: Plan) -> Shadow:
    kernel = Kernel(0.0)
    return Shadow(SparseAttention(WrongAt(call, plan), kernel), SparseAttention(WrongAt(None, plan), kernel))


@pytest.mark.parametrize("call", [0, 2])
def test_beside_a_dense_video_an_arm_that_is_wrong_at_one_call_has_the_pooled_error(
    probe: Probe, plan: Plan, call: int
) -> None:
    scales = (1.0, 5.0, 20.0)
    shadow = _shadow(call, plan)
    # the second video is as the first: state and error are its own
    for _ in range(2):
        shadow.start_video()
        outs = [shadow(probe.q, probe.k, scale * probe.v, probe.site) for scale in scales]
        dense = oracle.attend(probe.q, probe.k, probe.v, Plan.dense(GEOMETRY))
        for out, scale in zip(outs, scales, strict=True):
            torch.testing.assert_close(out, (scale * dense).float())
        lost = scales[call] * (oracle.attend(probe.q, probe.k, probe.v, plan) - dense).norm()
        size = dense.norm() * sum(scale**2 for scale in scales) ** 0.5
        assert shadow.error.value() == pytest.approx((lost / size).item(), rel=1e-5)
        assert shadow.error.calls == 3


def test_beside_a_dense_video_a_dense_arm_has_no_error(probe: Probe, plan: Plan) -> None:
    shadow = _shadow(None, plan)
    shadow.start_video()
    shadow(probe.q, probe.k, probe.v, probe.site)
    assert shadow.error.value() == 0.0


@pytest.mark.parametrize("out", [math.nan, math.inf])
def test_an_output_that_is_no_number_gives_no_error(probe: Probe, out: float) -> None:
    error = PooledError()
    with pytest.raises(ValueError, match="no attention call"):
        error.value()
    error.add(torch.full_like(probe.q, out), probe.q)
    with pytest.raises(ValueError, match="NaN or infinite"):
        error.value()


def test_recall_is_the_softmax_mass_of_the_kept_blocks(probe: Probe, plan: Plan) -> None:
    weights = (probe.q @ probe.k.transpose(-1, -2) / 4).softmax(-1)[0]
    assert plan.mask is not None
    tokens = plan.mask.keep()[0].repeat_interleave(32, 0).repeat_interleave(32, 1)
    expected = (weights * tokens).sum(-1).mean(-1)
    assert recall(probe.q[0], probe.k[0], plan) == pytest.approx(expected.tolist(), rel=1e-4)


def test_recall_of_variable_blocks_is_the_mass_of_the_pairs_they_keep(
    probe: Probe, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(1)
    orders = torch.rand((2, 2, 96), generator=generator).argsort(-1).to(torch.int32)
    order = TokenOrder(queries=orders[0], keys=orders[1])
    q_sizes, k_sizes = torch.tensor([[90, 0, 6], [1, 31, 64]]), torch.tensor([[40, 56], [96, 0]])
    keep = torch.tensor([[[1, 0], [0, 0], [1, 1]], [[1, 0], [0, 1], [1, 0]]], dtype=torch.bool)
    mask = VariableBlockMask.from_keep(keep, q_sizes=q_sizes, k_sizes=k_sizes, tokens=96)
    weights = (probe.q @ probe.k.transpose(-1, -2) / 4).softmax(-1)[0]
    expected = []
    for head in range(2):
        tokens = keep[head].repeat_interleave(q_sizes[head], 0).repeat_interleave(k_sizes[head], 1)
        own = weights[head][order.queries[head].long()][:, order.keys[head].long()]
        expected.append((own * tokens).sum(-1).mean().item())
    plan = Plan.masked(mask, 2, order)
    assert recall(probe.q[0], probe.k[0], plan) == pytest.approx(expected, rel=1e-4)
    # some rows at a time
    monkeypatch.setattr("calibatt.bench.accuracy.CHUNK", 7 * 96)
    assert recall(probe.q[0], probe.k[0], plan) == pytest.approx(expected, rel=1e-4)
    assert block_of((Plan.dense(GEOMETRY), plan)) is None
    assert block_of((Plan.dense(GEOMETRY), Plan.masked(mask.cover((32, 16)), 2))) == (32, 16)
