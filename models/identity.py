"""Which pipeline this is, as far as its attention depends on it: weights, adapters that are on, noise schedule."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from calibatt.methods.learning import Origin

# 64 values of a parameter are enough to tell two trainings apart, and cheap at any size
_VALUES = 64
# what decides the noise of each step, of schedulers as Diffusers configures them
_SCHEDULE = (
    "shift", "flow_shift", "base_shift", "max_shift", "use_dynamic_shifting", "prediction_type", "use_flow_sigmas",
    "use_karras_sigmas", "invert_sigmas", "beta_schedule", "beta_start", "beta_end", "rescale_betas_zero_snr",
    "snr_shift_scale", "timestep_spacing", "shift_terminal", "num_train_timesteps",
)  # fmt: skip


def transformers_of(pipe: Any) -> list[Any]:
    """The one or two transformers that a pipeline has, without what torch.compile wraps around them."""
    found = (getattr(pipe, name, None) for name in ("transformer", "transformer_2"))
    return [getattr(transformer, "_orig_mod", transformer) for transformer in found if transformer is not None]


def origin_of(pipe: Any, model: str | None = None) -> Origin:
    """The identity of a pipeline.

    Args:
        pipe: a Diffusers pipeline, with at least one transformer.
        model: what people call it; None takes the class of its transformer.
    """
    transformers = transformers_of(pipe)
    return Origin(
        model=type(transformers[0]).__name__ if model is None else model,
        weights=weights_digest(transformers),
        scheduler=_schedule(pipe.scheduler),
    )


def weights_digest(transformers: Sequence[Any]) -> str:
    """Sixteen hex digits that tell the weights in force from others.

    Hashes the name, shape and first values of every parameter. Adapters (LoRA) count as far as they are switched on,
    with their scale; adapters that were merged show in the weights themselves.
    """
    digest = hashlib.sha256()
    for transformer in transformers:
        for name, tensor in _own_weights(transformer):
            digest.update(f"{name}{tuple(tensor.shape)}".encode() + _head(tensor))
        for name, scale, tensor in _adapters_on(transformer):
            digest.update(f"{name}{scale}{tuple(tensor.shape)}".encode() + _head(tensor))
    return digest.hexdigest()[:16]


def _own_weights(transformer: Any) -> Iterator[tuple[str, Tensor]]:
    """What the model itself holds, by the names that it has without adapters around its layers."""
    for name, tensor in transformer.state_dict().items():
        if "lora_" not in name:
            found = tensor if tensor.device.type != "meta" else _offloaded(transformer, name)
            yield name.replace(".base_layer.", "."), found


def _offloaded(transformer: Any, name: str) -> Tensor:
    """A tensor that lies elsewhere until its module runs, from where accelerate's hook takes it."""
    module, _, own = name.rpartition(".")
    hook = transformer.get_submodule(module)._hf_hook
    # a module that both moves its inputs and loads its weights has a row of hooks
    maps = [one.weights_map for one in getattr(hook, "hooks", (hook,)) if getattr(one, "weights_map", None) is not None]
    tensor: Tensor = maps[0][own]
    return tensor


def _adapters_on(transformer: Any) -> Iterator[tuple[str, float, Tensor]]:
    """Place, scale and tensor of every part of an adapter that has an effect; what the adapter is called has none."""
    for place, module in transformer.named_modules():
        scales = getattr(module, "scaling", None)
        if not isinstance(scales, dict) or module.disable_adapters or module.merged:
            continue
        for adapter in module.active_adapters:
            scale = scales.get(adapter, 0.0)
            for name, tensor in module.named_parameters():
                if scale and "lora_" in name and adapter in name.split("."):
                    yield f"{place}.{name.replace(f'.{adapter}', '')}", scale, tensor


def _head(tensor: Tensor) -> bytes:
    return tensor.detach().flatten()[:_VALUES].float().cpu().numpy().tobytes()


def _schedule(scheduler: Any) -> str:
    """Class of a scheduler, and the settings that decide its noise levels."""
    settings = {name: scheduler.config[name] for name in _SCHEDULE if scheduler.config.get(name) is not None}
    return f"{type(scheduler).__name__} {json.dumps(settings, sort_keys=True)}"
