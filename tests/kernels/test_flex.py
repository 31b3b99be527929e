"""How FlexAttention's work is spread over the threads of a CPU."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

import pytest
import torch

from calibatt.kernels import flex, oracle
from calibatt.kernels.base import Task
from calibatt.kernels.flex import Flex
from calibatt.kernels.mask import BlockMask
from calibatt.kernels.plan import Plan, Remainder
from calibatt.kernels.tiles import tile_of

CPU = Task(device=torch.device("cpu"), dtype=torch.float32, head_dim=64)


@pytest.mark.parametrize("remainder", get_args(Remainder))
@pytest.mark.parametrize(("tokens", "shares"), [(128, 2), (1000, 1), (96, 1)])
def test_queries_are_shared_out_where_they_divide_and_the_output_is_the_same(
    tokens: int, shares: int, remainder: Remainder, monkeypatch: pytest.MonkeyPatch
) -> None:
    if (refusal := Flex().refusal(CPU)) is not None:
        pytest.skip(refusal.reason)
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, 3, tokens, 64, generator=generator).unbind()
    # one head has all blocks, one some, one none: the heads of the first thread would have all the work
    keep = torch.rand(3, -(-tokens // 32), -(-tokens // 16), generator=generator) < 0.4
    keep[0], keep[2] = True, False
    mask = BlockMask.from_keep(keep, tokens=tokens, block_q=32, block_k=16)
    plan = replace(Plan.masked(mask, 3), remainder=remainder)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert flex._shares(q, mask) == shares
    with torch.no_grad():
        out = Flex().attend(q, k, v, plan)
    exact = oracle.attend(q, k, v, plan)
    assert (out.double() - exact).abs().max() <= oracle.error_budget(q, k, v, plan, exact)


@pytest.mark.parametrize(
    ("block", "most", "tile"),
    [(128, 128, 128), (128, 64, 64), (80, 64, 16), (192, 128, 64), (48, 64, 16), (256, 128, 128)],
)
def test_a_tile_is_a_power_of_two_that_divides_the_block(block: int, most: int, tile: int) -> None:
    assert tile_of(block, most) == tile
