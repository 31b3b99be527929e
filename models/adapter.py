"""Installs a method into a Diffusers pipeline, layer by layer, and takes it out again without a trace."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor

from calibatt.kernels.base import Attender
from calibatt.kernels.geometry import Geometry
from calibatt.methods.base import Planner
from calibatt.methods.site import Branch, Site


@dataclass(slots=True)
class _Where:
    """Where the pipeline is right now; one instance is shared by all layers of a transformer."""

    geometry: Geometry | None = None
    step: int = 0
    steps: int = 1
    sigma: float = 1.0
    branch: Branch = "cond"


@contextmanager
def attached(pipe: Any, method: Planner, kernel: Attender) -> Iterator[None]:
    """While this context is open, the pipeline's self-attention is planned by the method and run by the kernel.

    Works on every Diffusers pipeline whose `transformer` (and `transformer_2`, as in Wan 2.2) is a
    `WanTransformer3DModel` and which announces step and branch through `cache_context`, as `WanPipeline` does. On
    leaving, the processors, hooks and methods that were there before are back.

    Args:
        pipe: the pipeline.
        method: asked for a plan at every self-attention call, once for each sample; reset at the start of each video.
        kernel: computes attention under that plan.

    Raises:
        ValueError: the pipeline has no transformer that this adapter knows.
    """
    transformers = [
        t for t in (getattr(pipe, "transformer", None), getattr(pipe, "transformer_2", None)) if t is not None
    ]
    unknown = [type(t).__name__ for t in transformers if type(t).__name__ != "WanTransformer3DModel"]
    if unknown or not transformers:
        found = ", ".join(unknown) or "no transformer"
        raise ValueError(f"{type(pipe).__name__} has {found}: this adapter knows WanTransformer3DModel")
    undo: list[Callable[[], object]] = []
    try:
        for transformer in transformers:
            undo += _attach(transformer, method, kernel)
        yield
    finally:
        for step in reversed(undo):
            step()


def _attach(transformer: Any, method: Planner, kernel: Attender) -> list[Callable[[], object]]:
    """Hook one transformer; returns what undoes it."""
    where = _Where()
    undo: list[Callable[[], object]] = []

    announce = transformer.cache_context

    def cache_context(name: str, **progress: Any) -> AbstractContextManager[None]:
        if "step_index" not in progress:
            raise ValueError("this pipeline does not announce its steps: Diffusers 0.42 or newer and WanPipeline do")
        where.branch, where.step = cast(Branch, name), progress["step_index"]
        where.steps, where.sigma = progress["num_inference_steps"], progress["sigma"]
        if where.step == 0 and where.branch == "cond":
            method.reset()
        return cast(AbstractContextManager[None], announce(name, **progress))

    transformer.cache_context = cache_context
    undo.append(lambda: transformer.__dict__.pop("cache_context"))

    def see_shape(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden_states = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        where.geometry = _geometry(module.config, hidden_states.shape)

    undo.append(transformer.register_forward_pre_hook(see_shape, with_kwargs=True).remove)

    for layer, block in enumerate(transformer.blocks):
        attention = block.attn1
        undo.append(partial(setattr, attention, "processor", attention.processor))
        attention.processor = _SelfAttention(method, kernel, where, layer, len(transformer.blocks))
    return undo


def _geometry(config: Any, shape: torch.Size) -> Geometry:
    frames, rows, columns = (extent // patch for extent, patch in zip(shape[2:], config.patch_size, strict=True))
    return Geometry(grid=(frames, rows, columns), heads=config.num_attention_heads, head_dim=config.attention_head_dim)


class _SelfAttention:
    """Wan's self-attention with the attention itself left to a method and a kernel."""

    def __init__(self, method: Planner, kernel: Attender, where: _Where, layer: int, layers: int) -> None:
        self._method = method
        self._kernel = kernel
        self._where = where
        self._layer = layer
        self._layers = layers

    def __call__(
        self,
        attn: Any,
        hidden_states: Float[Tensor, "batch tokens channels"],
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Float[Tensor, "batch tokens channels"]:
        if encoder_hidden_states is not None or attention_mask is not None or rotary_emb is None:
            raise ValueError("this processor is for Wan's self-attention, without a mask and with rotary embeddings")
        if getattr(attn, "fused_projections", False):
            q, k, v = attn.to_qkv(hidden_states).chunk(3, dim=-1)
        else:
            q, k, v = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
        q, k = attn.norm_q(q), attn.norm_k(k)
        q, k, v = (x.unflatten(-1, (attn.heads, -1)) for x in (q, k, v))
        q, k = rotate(q, *rotary_emb), rotate(k, *rotary_emb)
        out = self._attend(*(x.transpose(1, 2) for x in (q, k, v)))
        out = out.transpose(1, 2).flatten(2).type_as(q)
        return cast(Tensor, attn.to_out[1](attn.to_out[0](out)))

    def _attend(
        self,
        q: Float[Tensor, "batch heads tokens head_dim"],
        k: Float[Tensor, "batch heads tokens head_dim"],
        v: Float[Tensor, "batch heads tokens head_dim"],
    ) -> Float[Tensor, "batch heads tokens head_dim"]:
        outs = []
        for sample in range(q.shape[0]):
            one = slice(sample, sample + 1)
            plan = self._method.plan(q[sample], k[sample], self._site(sample))
            outs.append(self._kernel.attend(q[one], k[one], v[one], plan))
        return outs[0] if len(outs) == 1 else torch.cat(outs)

    def _site(self, sample: int) -> Site:
        where = self._where
        if where.geometry is None:
            raise ValueError("call the whole transformer, not one of its layers: the layer cannot know its geometry")
        return Site(
            geometry=where.geometry,
            step=where.step,
            steps=where.steps,
            sigma=where.sigma,
            branch=where.branch,
            layer=self._layer,
            layers=self._layers,
            sample=sample,
        )


def rotate(
    x: Float[Tensor, "batch tokens heads head_dim"],
    cosines: Float[Tensor, "1 tokens 1 head_dim"],
    sines: Float[Tensor, "1 tokens 1 head_dim"],
) -> Float[Tensor, "batch tokens heads head_dim"]:
    """Rotary position embedding of neighbouring pairs of channels, by Wan's tables (each angle stands twice)."""
    even, odd = x[..., 0::2], x[..., 1::2]
    cosine, sine = cosines[..., 0::2], sines[..., 0::2]
    turned = torch.stack((even * cosine - odd * sine, even * sine + odd * cosine), dim=-1)
    return turned.flatten(-2).type_as(x)
