"""Attention that sums the mass of blocks on the way: with device code where there is a Hopper, else with a stand-in."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from calibatt.kernels import estimates, oracle, tiles, weighed
from calibatt.kernels.base import Task
from calibatt.kernels.plan import Plan
from calibatt.methods.energy import block_mass

# fp32 logarithms of sums of a few tens, to 2⁻²² by the hardware, and exponentials of their differences
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def qkv(heads: int, tokens: int, head_dim: int, *, device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """As models have them: tokens before heads in memory."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn((3, 1, tokens, heads, head_dim), generator=generator).to(device, dtype).transpose(2, 3)
    return 2 * q, k, v


class StandIn:
    """What the Gluon kernel does, in plain torch."""

    def __init__(self) -> None:
        self.heads: list[int] = []

    def attend_with_logsums(self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, logsums: Tensor) -> None:
        self.heads.append(q.shape[1])
        scores = q.float() @ k.float().mT / math.sqrt(q.shape[-1])
        out.copy_(scores.softmax(-1) @ v.float())
        lse.copy_(scores.logsumexp(-1))
        for group, keys in enumerate(scores[0].split(weighed.GROUP, dim=-1)):
            logsums[: q.shape[1], group] = keys.logsumexp(-1) / math.log(2)


@pytest.mark.skipif(not tiles.interpreted(), reason="needs Triton's interpreter")
@pytest.mark.parametrize("block", [(128, 128), (96, 256)])
def test_some_heads_at_a_time_come_to_what_all_do(block: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = StandIn()
    monkeypatch.setattr(weighed, "_GLUON", kernel)
    # three groups of 300 keys: two heads of them fit
    monkeypatch.setattr(estimates, "_HELD", 2 * 3 * 300)
    q, k, v = qkv(5, 300, 64, device="cpu", dtype=torch.float32)
    out, mass = weighed.attend_and_weigh(q, k, v, block=block)
    assert kernel.heads == [2, 2, 1]
    torch.testing.assert_close(mass, block_mass(q[0], k[0], block=block)[0], **CLOSE)
    torch.testing.assert_close(out, (q @ k.mT / 8).softmax(-1) @ v, **CLOSE)


def test_what_the_kernel_refuses_is_not_taken() -> None:
    q, _, _ = qkv(2, 64, 128, device="cpu", dtype=torch.bfloat16)
    assert not weighed.takes_weighed(q, (128, 128))


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("heads", "tokens", "head_dim", "block"),
    [
        (2, 300, 128, (128, 128)),
        (3, 300, 64, (64, 256)),
        # whole tiles; keys of the last tiles shared out; more heads than are held at once
        (1, 512, 128, (128, 128)),
        (3, 2700, 128, (192, 128)),
        (40, 2700, 128, (128, 128)),
    ],
)
def test_outputs_are_the_oracle_s_and_mass_is_that_of_plain_torch(
    heads: int, tokens: int, head_dim: int, block: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(estimates, "_HELD", 2**24)
    q, k, v = qkv(heads, tokens, head_dim, device="cuda", dtype=torch.bfloat16)
    refusal = weighed._GLUON.refusal(Task(device=q.device, dtype=q.dtype, head_dim=head_dim))
    if refusal is not None:
        pytest.skip(refusal.reason)
    assert weighed.takes_weighed(q, block)
    assert not weighed.takes_weighed(q, (64, 64))
    out, mass = weighed.attend_and_weigh(q, k, v, block=block)
    plan = Plan(tokens=tokens, kinds=("dense",) * heads)
    exact = oracle.attend(q, k, v, plan)
    assert (out.double() - exact).abs().max().item() <= oracle.error_budget(q, k, v, plan, exact)
    torch.testing.assert_close(mass, block_mass(q[0].float(), k[0].float(), block=block)[0], **CLOSE)
