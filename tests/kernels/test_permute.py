"""Tokens go where the order says, and come back."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from calibatt.kernels import permute as permute_module
from calibatt.kernels.permute import permute, unpermute

HEADS, TOKENS, HEAD_DIM = 3, 150, 64
PLACES = [
    pytest.param(("cpu", torch.float32), id="cpu"),
    pytest.param(("cuda", torch.bfloat16), id="cuda", marks=pytest.mark.gpu),
]


def _inputs(place: tuple[str, torch.dtype], batch: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    # tokens before heads in memory, as models hand them over
    shape = (batch, TOKENS, HEADS, HEAD_DIM)
    return [torch.randn(shape, generator=generator).to(*place).transpose(1, 2) for _ in range(3)]


def _order(rows: int, device: str) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.stack([torch.randperm(TOKENS, generator=generator) for _ in range(rows)]).to(device, torch.int32)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("rows", [1, HEADS])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_tokens_go_where_the_order_says_and_back(count: int, rows: int, place: tuple[str, torch.dtype]) -> None:
    tensors, order = _inputs(place)[:count], _order(rows, place[0])
    moved = permute(tensors, order)
    index = order.long().expand(HEADS, -1)[None, :, :, None].expand(2, -1, -1, HEAD_DIM)
    for x, y in zip(tensors, moved, strict=True):
        assert torch.equal(y, x.gather(2, index))
        assert torch.equal(unpermute(y, order), x)


@pytest.mark.parametrize("back", [False, True])
def test_the_device_code_does_the_same(back: bool) -> None:
    # in Triton's interpreter, where there is no GPU
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tensors, order = _inputs((device, torch.float32)), _order(HEADS, device)
    index = order.long()[None, :, :, None].expand(tensors[0].shape)
    for x, y in zip(tensors, permute_module._launch(tensors, order, back=back), strict=True):
        assert torch.equal(y, torch.empty_like(x).scatter_(2, index, x) if back else x.gather(2, index))


def test_what_does_not_belong_together_is_refused_naming_both_sides() -> None:
    q, k, _ = _inputs(("cpu", torch.float32))
    with pytest.raises(ValueError, match=r"strides .* and"):
        permute([q, k.contiguous()], _order(1, "cpu"))
    with pytest.raises(ValueError, match=r"\[3 or 1, 150\]: got \[2, 150\]"):
        permute([q], _order(2, "cpu"))
    with pytest.raises(ValueError, match="up to 3 tensors, not 0"):
        permute([], _order(1, "cpu"))
