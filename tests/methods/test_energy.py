"""Block energy against softmax written out in fp64, and how many keys hold most of the attention."""

import math

import pytest
import torch
from torch import Tensor

from calibatt.methods import energy
from calibatt.methods.energy import block_energy, needed_share


def brute_force(q: Tensor, k: Tensor, block_q: int, block_k: int) -> Tensor:
    weights = torch.softmax(q.double() @ k.double().mT / math.sqrt(q.shape[-1]), dim=-1)
    return torch.stack(
        [
            torch.stack([part.sum(-1).mean(-1) for part in torch.split(rows, block_k, dim=-1)], dim=-1)
            for rows in torch.split(weights, block_q, dim=-2)
        ],
        dim=-2,
    )


# a tail on both axes, on none, and one block that holds everything
@pytest.mark.parametrize(("tokens", "block_q", "block_k"), [(1000, 128, 64), (256, 64, 128), (63, 64, 128)])
def test_energy_is_the_softmax_mass_of_the_blocks(tokens: int, block_q: int, block_k: int) -> None:
    q, k = torch.randn(2, 3, tokens, 32).mul(2)
    torch.testing.assert_close(
        block_energy(q, k, block_q=block_q, block_k=block_k).double(),
        brute_force(q, k, block_q, block_k),
        # fp32 sums of fp32 exponentials of scores up to some tens, against fp64
        rtol=1e-4,
        atol=1e-6,
    )


def test_every_row_of_energy_sums_to_one() -> None:
    # large scores: a softmax without its maximum taken out would overflow
    q, k = torch.randn(2, 2, 1000, 64).mul(30).bfloat16()
    sums = block_energy(q, k, block_q=128, block_k=128).sum(-1)
    torch.testing.assert_close(sums, torch.ones_like(sums))


def test_the_size_of_the_chunks_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k = torch.randn(2, 2, 1000, 16)
    whole = block_energy(q, k, block_q=64, block_k=64)
    monkeypatch.setattr(energy, "CHUNK", 3 * 64 * 1000)
    torch.testing.assert_close(block_energy(q, k, block_q=64, block_k=64), whole)


def by_weight(weights: list[list[float]]) -> tuple[Tensor, Tensor]:
    """A query for each row of weights, which are its attention to as many keys."""
    scores = torch.tensor(weights, dtype=torch.float64).log().float()
    keys = scores.shape[1]
    return math.sqrt(keys) * scores[None], torch.eye(keys)[None]


def test_the_share_is_of_the_fewest_keys_that_reach_the_coverage() -> None:
    q, k = by_weight([[0.05, 0.8, 0.1, 0.05], [0.25, 0.25, 0.25, 0.25], [0.96, 0.02, 0.01, 0.01]])
    # three, four and one of four keys hold 0.92; two, three and one hold 0.7
    assert needed_share(q, k, 0.92).item() == pytest.approx((3 + 4 + 1) / 3 / 4)
    assert needed_share(q, k, 0.7).item() == pytest.approx((1 + 3 + 1) / 3 / 4)
    assert needed_share(q, k, 1.0).item() == 1


def test_uniform_attention_needs_as_many_keys_as_mass_and_one_hot_attention_one_key() -> None:
    keys = 999
    q, k = torch.zeros(1, 7, 8), torch.randn(1, keys, 8)
    # 949.05 keys hold 0.95: 950, and sums in fp32 may end one earlier or later
    assert needed_share(q, k, 0.95).item() == pytest.approx(950 / keys, abs=1.1 / keys)
    one_hot = 1e4 * torch.eye(keys)[None]
    assert needed_share(one_hot, torch.eye(keys)[None], 0.95).item() == pytest.approx(1 / keys)


def test_queries_taken_in_parts_need_the_same_share(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k = torch.randn(2, 2, 1000, 8)
    q = q * torch.tensor([1.0, 4.0])[:, None, None]
    whole = needed_share(q[:, :50], k, 0.95)
    monkeypatch.setattr(energy, "_SORTED", 7 * 2 * 1000)
    torch.testing.assert_close(needed_share(q[:, :50], k, 0.95), whole)
    assert whole[0] != whole[1]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_real_720p_sequence_needs_little_memory_and_gives_the_softmax_mass() -> None:
    tokens, block = 75_600, 128
    q, k = torch.randn(2, 1, tokens, 128, device="cuda").mul(2).bfloat16()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    energy_of_blocks = block_energy(q, k, block_q=block, block_k=block)
    # some chunks of fp32 and what sums them; all of the attention would be 23 GB
    assert torch.cuda.max_memory_allocated() - before < 4 * 4 * energy.CHUNK
    # the first block and the last one, which is shorter
    for row, rows in ((0, slice(0, block)), (-1, slice(tokens // block * block, tokens))):
        weights = torch.softmax(q[:, rows].double() @ k.double().mT / 128**0.5, dim=-1).mean(1)
        expected = torch.stack([part.sum(-1) for part in torch.split(weights, block, dim=-1)], dim=-1)
        torch.testing.assert_close(energy_of_blocks[:, row].double(), expected, rtol=1e-4, atol=1e-6)
