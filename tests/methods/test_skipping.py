"""Low blocks, and the two methods that leave them out: at once (BLASST), and from the next step on (LiteAttention)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from calibatt.kernels.base import Unsupported
from calibatt.kernels.catalogue import KERNELS
from calibatt.kernels.geometry import Geometry
from calibatt.kernels.mask import BlockMask
from calibatt.kernels.plan import Plan, Skip
from calibatt.methods.blasst import LAMBDAS, fitted_threshold
from calibatt.methods.catalogue import build, learner
from calibatt.methods.learning import Learnt
from calibatt.methods.site import Site
from calibatt.methods.skipping import all_blocks, score_gaps, without_low

# 60 tokens are 4 blocks of 16, the last one shorter; a head dim that Triton has
GEOMETRY = Geometry(grid=(1, 6, 10), heads=1, head_dim=64)
BLOCK = (16, 16)
ALL = all_blocks(60, BLOCK, torch.device("cpu"))


def site(**where: Any) -> Site:
    given = {"step": 0, "steps": 4, "sigma": 0.5, "branch": "cond", "layer": 3, "layers": 8}
    return Site(**{"geometry": GEOMETRY, **given, **where})


def by_score(*scores: float) -> tuple[Tensor, Tensor]:
    """Every query has these scores, in powers of two, at all keys of each block of keys."""
    q, k = torch.zeros(2, 1, 60, 64)
    q[..., 0] = 8 / math.log2(math.e)
    k[..., 0] = torch.tensor(scores).repeat_interleave(16)[:60]
    return q, k


def kept(mask: BlockMask | None) -> list[bool]:
    """Blocks that the first queries keep."""
    assert mask is not None
    row: list[bool] = mask.keep()[0, 0].tolist()
    return row


def test_a_block_lies_below_the_largest_score_up_to_there_and_not_below_later_ones() -> None:
    q, k = by_score(1.0, 4.0, 3.0, 9.0)
    found = score_gaps(q, k, ALL)
    torch.testing.assert_close(found[0], torch.tensor([0.0, 0.0, -1.0, 0.0]).expand(4, 4))
    assert kept(without_low(q, k, ALL, -0.5)) == [True, True, False, True]
    assert kept(without_low(q, k, ALL, -1.5)) == [True, True, True, True]


def test_one_query_that_needs_a_block_keeps_it() -> None:
    q, k = by_score(4.0, 0.0, 0.0, 0.0)
    q[0, 5, 0] *= -1
    assert kept(without_low(q, k, ALL, -2.0)) == [True, True, True, True]
    assert without_low(q, k, ALL, -2.0).keep()[0, 1].tolist() == [True, False, False, False]


def test_blocks_that_are_not_kept_are_not_looked_at() -> None:
    q, k = by_score(9.0, 4.0, 3.0, 1.0)
    keep = torch.tensor([False, True, True, True]).expand(1, 4, -1)
    mask = BlockMask.from_keep(keep, tokens=60, block_q=16, block_k=16)
    assert kept(without_low(q, k, mask, -2.0)) == [False, True, True, False]


@pytest.mark.parametrize("leave", [True, False], ids=["leave", "note"])
def test_the_triton_kernel_notes_the_low_blocks_and_leaves_them_out_where_asked(leave: bool) -> None:
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    q, k, v = torch.randn(3, 2, 60, 64, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    # the first head's third block is low in every row, and a few others by chance
    k = k * torch.tensor([[3.0, 1, 0.1, 1], [2, 1, 2, 1]]).repeat_interleave(16, 1)[:, :60, None].to(k)
    mask = ALL.to(device)
    plan = Plan.masked(mask, 2, skip=Skip.of(mask, 2, threshold=-2.0, leave=leave))
    kernel = KERNELS["triton"]
    assert plan.density().tolist() == [1.0, 1.0]
    out = kernel.attend(q[None], k[None], v[None], plan)
    expected = without_low(q, k, mask, -2.0)
    assert plan.skip is not None
    assert torch.equal(mask.without(plan.skip.low).keep(), expected.keep())
    share = expected.density()
    assert 0 < share.min() < 1
    after = expected if leave else mask
    torch.testing.assert_close(out, kernel.attend(q[None], k[None], v[None], Plan.masked(after, 2)))
    # scores are always computed: that is half of the work
    torch.testing.assert_close(plan.density(), (1 + share.cpu()) / 2 if leave else torch.ones(2).double())


def test_heads_have_thresholds_of_their_own() -> None:
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    q, k = (x.expand(2, -1, -1).to(device, dtype) for x in by_score(4.0, 1.0, 3.5, 3.0))
    mask = ALL.to(device)
    assert without_low(q, k, mask, (-2.0, -0.75)).keep()[:, 0].tolist() == [
        [True, False, True, True],
        [True, False, True, False],
    ]
    plan = Plan.masked(mask, 2, skip=Skip.of(mask, 2, threshold=(-2.0, -0.75), leave=True))
    KERNELS["triton"].attend(q[None], k[None], q[None], plan)
    assert plan.skip is not None
    assert plan.skip.low.keep()[:, 0].tolist() == [[False, True, False, False], [False, True, False, True]]
    assert plan.of_heads([1]).skip.thresholds == (-0.75,)  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="2 heads have 1 thresholds"):
        Skip.of(mask, 2, threshold=(-2.0,), leave=True)


def test_blasst_is_dense_at_both_ends_of_the_layers_and_leaves_the_choice_to_the_kernel_between() -> None:
    q, k = by_score(1.0, 4.0, 3.0, 9.0)
    method = build("blasst", block=BLOCK)
    plans = [method.plan(q, k, k, site(layer=layer)) for layer in range(8)]
    assert [set(plan.kinds) == {"dense"} for plan in plans] == [True, True, *[False] * 4, True, True]
    skip = plans[3].skip
    assert skip is not None
    assert (skip.thresholds, skip.leave) == ((pytest.approx(math.log2(0.1)),), True)


def test_blassts_oracle_leaves_out_what_its_kernel_would() -> None:
    q, k = by_score(1.0, 9.0, 3.0, 8.0)
    assert kept(build("blasst", preset="oracle", block=BLOCK).plan(q, k, k, site()).mask) == [True, True, False, True]


@pytest.mark.parametrize(
    ("name", "online", "oracle", "settings"),
    [
        ("blasst", "default", "oracle", {"threshold": -2.0, "dense_ends": 0}),
        ("sparge", "pv-skip", "pv-skip-oracle", {"topk": 0.75, "pv_threshold": 2.0}),
    ],
)
def test_an_oracles_density_is_that_of_the_kernel_which_computes_the_scores_of_low_blocks_too(
    name: str, online: str, oracle: str, settings: dict[str, Any]
) -> None:
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    q, k = (x.to(device, dtype) for x in by_score(1.0, 9.0, 3.0, 8.5))
    in_kernel, before = (
        build(name, preset=preset, block=BLOCK, **settings).plan(q, k, k, site()) for preset in (online, oracle)
    )
    KERNELS["triton"].attend(q[None], k[None], k[None], in_kernel)
    assert before.mask is not None
    assert in_kernel.mask is not None
    chosen, left = in_kernel.mask.density().item(), before.mask.density().item()
    assert left < chosen
    assert before.density().tolist() == in_kernel.density().tolist() == [(chosen + left) / 2]


def test_what_was_scored_goes_with_the_plan() -> None:
    q, k = (x.expand(2, -1, -1) for x in by_score(4.0, 1.0, 3.5, 3.0))
    kept = without_low(q, k, ALL, (-2.0, -0.75))
    plan = Plan.masked(kept, 2, scored=ALL)
    assert plan.density().tolist() == ((1 + kept.density()) / 2).tolist()
    assert plan.of_heads([1]).density().tolist() == plan.density()[1:].tolist()
    assert plan.to("cpu").density().tolist() == plan.density().tolist()
    assert plan.nbytes() == kept.bits.nbytes + ALL.bits.nbytes
    with pytest.raises(ValueError, match="60 tokens, its BlockMask for 64"):
        Plan.masked(kept, 2, scored=all_blocks(64, BLOCK, torch.device("cpu")))


def test_blassts_fit_finds_the_law_that_shares_follow() -> None:
    # λ · 60 = 2 · exp(9 · share)
    shares = (torch.tensor(LAMBDAS).mul(60).log() - math.log(2)).div(9).clamp(0, 1)
    wanted = 2 * math.exp(9 * 0.3) / 60
    assert fitted_threshold(shares.expand(2, 3, -1), 60, 0.3) == pytest.approx(math.log2(wanted), rel=1e-4)
    assert isinstance(fitted_threshold(torch.zeros(2, 3, 22), 60, 0.3), Unsupported)


def test_blasst_learns_the_threshold_that_leaves_out_the_share_asked_for(learn: Callable[..., Learnt]) -> None:
    where = site(geometry=replace(GEOMETRY, grid=(4, 16, 16)), step=0, steps=1, layer=2, layers=5)
    q, k, v = torch.randn(3, 1, 1024, 64, generator=torch.Generator().manual_seed(0)).mul(2)
    learning = learner("blasst", preset="calibrated-oracle", block=BLOCK)
    assert learning is not None
    everywhere = {replace(where, layer=layer): [(q, k, v), (q, k, v)] for layer in range(5)}
    learnt = learn("blasst", learning, everywhere)
    assert learnt.tables["left_out"].shape == (1, 5, 22)
    mask = build("blasst", preset="calibrated-oracle", calibration=learnt, block=BLOCK).plan(q, k, v, where).mask
    assert mask is not None
    # an exponential is not quite how shares grow
    assert 1 - mask.density().item() == pytest.approx(0.5, abs=0.1)


def test_blasst_says_that_nothing_could_be_fitted(tabled: Callable[..., Learnt]) -> None:
    learnt = tabled("blasst", site(), {"left_out": torch.zeros(4, 8, 22)}, learner("blasst", preset="calibrated"))
    method = build("blasst", preset="calibrated", calibration=learnt)
    refusal = method.refusal(GEOMETRY)
    assert refusal is not None
    assert "use a preset with a threshold" in refusal.reason
    q, k = by_score(1.0, 4.0, 3.0, 9.0)
    with pytest.raises(ValueError, match="use a preset with a threshold"):
        method.plan(q, k, k, site())


def test_lite_leaves_out_from_the_next_step_on_what_was_low_and_never_takes_it_back() -> None:
    method = build("lite", preset="oracle", threshold=-2.0, block=BLOCK)
    steps = [(9.0, 4.0, 9.0, 8.0), (1.0, 9.0, 9.0, 5.0), (1.0, 9.0, 9.0, 9.0)]
    found = [
        kept(method.plan(*by_score(*scores), by_score(*scores)[1], site(step=step)).mask)
        for step, scores in enumerate(steps)
    ]
    assert found == [[True, True, True, True], [True, False, True, True], [True, False, True, False]]
    method.reset()
    assert kept(method.plan(*by_score(*steps[0]), by_score(*steps[0])[1], site()).mask) == [True, True, True, True]


def test_lite_keeps_layers_apart() -> None:
    method = build("lite", preset="oracle", threshold=-2.0, block=BLOCK)
    q, k = by_score(9.0, 4.0, 9.0, 8.0)
    method.plan(q, k, k, site(layer=2))
    assert kept(method.plan(q, k, k, site(layer=3, step=1)).mask) == [True, True, True, True]
    assert kept(method.plan(q, k, k, site(layer=2, step=1)).mask) == [True, False, True, True]


def test_lite_takes_over_what_its_kernel_noted() -> None:
    method = build("lite", threshold=-2.0, block=BLOCK)
    q, k = by_score(9.0, 4.0, 9.0, 8.0)
    first = method.plan(q, k, k, site())
    assert first.skip is not None
    assert not first.skip.leave
    first.skip.low.bits.copy_(ALL.without(without_low(q, k, ALL, -2.0)).bits)
    assert kept(method.plan(q, k, k, site(step=1)).mask) == [True, False, True, True]


@pytest.mark.parametrize(
    "wrong",
    [
        ("lite", {"threshold": 0.0}),
        ("blasst", {"threshold": 1.0}),
        ("blasst", {"sparsity": 0.5}),
        ("blasst", {"threshold": None, "sparsity": 1.0}),
    ],
)
def test_settings_that_make_no_sense_are_refused(wrong: tuple[str, dict[str, Any]]) -> None:
    with pytest.raises(ValueError, match=wrong[0]):
        build(wrong[0], **wrong[1])
