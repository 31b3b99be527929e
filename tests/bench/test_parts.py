"""Time of a pipeline's components."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from calibatt.bench.parts import components_timed, without_attention


class Layer(nn.Module):
    """Adds one."""

    def forward(self, x: torch.Tensor, *, fails: bool = False) -> torch.Tensor:
        if fails:
            raise RuntimeError("it broke")
        return x + 1


class Vae(nn.Module):
    def decode(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2


class Scheduler:
    def step(self, x: torch.Tensor) -> torch.Tensor:
        return x - 1


@pytest.fixture
def pipe() -> Any:
    return SimpleNamespace(
        transformer=Layer(), transformer_2=Layer(), text_encoder=Layer(), vae=Vae(), scheduler=Scheduler(),
        tokenizer=lambda text: text,
    )  # fmt: skip


@pytest.fixture
def entered() -> list[str]:
    return []


@pytest.fixture
def phase(entered: list[str]) -> Any:
    @contextmanager
    def phase(name: str) -> Iterator[None]:
        entered.append(name)
        yield

    return phase


def test_each_component_is_its_phase_and_does_what_it_did(pipe: Any, phase: Any, entered: list[str]) -> None:
    zero = torch.zeros(1)
    with components_timed(pipe, phase):
        made = [pipe.text_encoder(zero), pipe.transformer(zero), pipe.transformer_2(zero), pipe.scheduler.step(zero)]
        made.append(pipe.vae.decode(made[0]))
    assert entered == ["text", "transformer", "transformer", "scheduler", "vae"]
    assert torch.cat(made).tolist() == [1, 1, 1, -1, 2]


def test_afterwards_nothing_is_left_also_where_one_breaks(pipe: Any, phase: Any, entered: list[str]) -> None:
    def before(x: torch.Tensor) -> torch.Tensor:
        return x

    # as another library may have set it
    pipe.vae.decode = before
    with pytest.raises(RuntimeError, match="it broke"), components_timed(pipe, phase):
        pipe.transformer(torch.zeros(1), fails=True)
    assert "forward" not in vars(pipe.transformer)
    assert "step" not in vars(pipe.scheduler)
    assert pipe.vae.decode is before
    entered.clear()
    pipe.transformer(torch.zeros(1))
    assert entered == []


def test_a_transformer_is_counted_without_its_attention() -> None:
    phases = {"plan": 1.0, "attend": 2.0, "observe": 0.5, "transformer": 5.0, "vae": 7.0}
    assert without_attention(phases) == {**phases, "transformer": 1.5}
    assert without_attention({"attend": 2.0}) == {"attend": 2.0}
    # as far as two clocks differ
    assert without_attention({"attend": 2.0, "transformer": 1.999})["transformer"] == 0
