"""Telling pipelines apart by the weights in force and the noise schedule."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from calibatt.models.identity import origin_of
from calibatt.models.shapes.pipeline import assemble, new_transformer


def new_pipe(scale: float = 1.0) -> Any:
    torch.manual_seed(0)
    pipe = assemble(new_transformer(layers=1, heads=1))
    for parameter in pipe.transformer.parameters():
        parameter.data.mul_(scale)
    return pipe


def digest(pipe: Any) -> str:
    return origin_of(pipe).weights


def add_adapter(pipe: Any, name: str = "style") -> None:
    from peft import LoraConfig

    torch.manual_seed(1)
    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False), adapter_name=name)


def test_the_same_weights_have_one_digest_and_others_another() -> None:
    assert digest(new_pipe()) == digest(new_pipe()) != digest(new_pipe(scale=0.9))


def test_compiling_changes_nothing() -> None:
    pipe = new_pipe()
    before = digest(pipe)
    pipe.transformer = torch.compile(pipe.transformer)
    assert digest(pipe) == before


def test_the_second_transformer_counts_and_may_be_the_only_one() -> None:
    one, other = new_pipe(), new_pipe(scale=0.9)

    def both(first: Any, second: Any) -> str:
        return digest(SimpleNamespace(transformer=first, transformer_2=second, scheduler=one.scheduler))

    assert both(one.transformer, other.transformer) != both(one.transformer, one.transformer) != digest(one)
    assert both(None, one.transformer) == digest(one)


def test_an_adapter_counts_while_it_is_on_and_by_its_scale() -> None:
    pipe = new_pipe()
    base = digest(pipe)
    add_adapter(pipe)
    pipe.transformer.set_adapters("style", 1.0)
    once = digest(pipe)
    pipe.transformer.set_adapters("style", 3.0)
    thrice = digest(pipe)
    pipe.transformer.disable_adapters()
    off = digest(pipe)
    pipe.transformer.enable_adapters()
    on = digest(pipe)
    pipe.transformer.delete_adapters("style")
    assert len({base, once, thrice}) == 3
    assert (off, on, digest(pipe)) == (base, thrice, base)


def test_what_an_adapter_is_called_does_not_count() -> None:
    one, other = new_pipe(), new_pipe()
    add_adapter(one, "style")
    add_adapter(other, "look")
    assert digest(one) == digest(other)


def test_weights_that_are_offloaded_are_the_same_weights() -> None:
    from accelerate import cpu_offload

    pipe = new_pipe()
    before = digest(pipe)
    cpu_offload(pipe.transformer, execution_device=torch.device("cpu"))
    assert any(parameter.device.type == "meta" for parameter in pipe.transformer.parameters())
    assert digest(pipe) == before


@pytest.mark.parametrize("shift", [3.0, 5.0])
def test_the_noise_schedule_is_told_by_class_and_shift(shift: float) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

    def told(scheduler: Any) -> str:
        pipe = new_pipe()
        pipe.scheduler = scheduler
        return origin_of(pipe).scheduler

    euler = told(FlowMatchEulerDiscreteScheduler(shift=shift))
    assert euler == told(FlowMatchEulerDiscreteScheduler(shift=shift))
    assert f'"shift": {shift}' in euler
    assert euler != told(FlowMatchEulerDiscreteScheduler(shift=4.0))
    assert euler != told(UniPCMultistepScheduler(use_flow_sigmas=True, flow_shift=shift))
    assert euler != told(FlowMatchEulerDiscreteScheduler(shift=shift, shift_terminal=0.1))


def test_a_schedule_of_variances_is_told_by_what_shifts_it() -> None:
    from diffusers import CogVideoXDDIMScheduler

    def told(**settings: Any) -> str:
        pipe = new_pipe()
        pipe.scheduler = CogVideoXDDIMScheduler(**settings)
        return origin_of(pipe).scheduler

    changes: tuple[dict[str, Any], ...] = (
        {}, {"snr_shift_scale": 1.0}, {"rescale_betas_zero_snr": True}, {"timestep_spacing": "trailing"},
        {"beta_end": 0.02},
    )  # fmt: skip
    assert len({told(**change) for change in changes}) == len(changes)


def test_a_pipeline_is_called_by_its_name_or_its_transformers() -> None:
    pipe = new_pipe()
    assert (origin_of(pipe).model, origin_of(pipe, "mine").model) == ("WanTransformer3DModel", "mine")
