"""Whole pipelines around planted transformers: no text encoder, no autoencoder, no download."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from calibatt.models.entry import ModelEntry, Resolution
from calibatt.models.planted import mochi, wan
from calibatt.models.planted.heads import Fit

# The published figures that each model's heads are fitted to (`models/shapes/concentration.py`). Mochi's are published
# nowhere: it borrows those of the one model among them that has as many heads and text in the same sequence.
PROFILES: Mapping[str, str] = MappingProxyType(
    {"wan2.1-1.3b": "Wan 2.1 1.3B", "wan2.1-14b": "Wan 2.1 14B", "mochi-1": "HunyuanVideo"}
)
# channels of the latents that are handed out in place of a video's colours
_SHOWN = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Planter:
    """How weights are planted in one class of transformers.

    Args:
        plant: fills one.
        queries_and_keys: of its layers, without a forward pass.
        pipeline: from a size, the class of its pipeline and a scheduler.
    """

    plant: Callable[..., Fit]
    queries_and_keys: Callable[[Any, Tensor, float], Iterator[tuple[Tensor, Tensor]]]
    pipeline: Callable[[Resolution], tuple[Any, Any]]


def check_plantable(entry: ModelEntry) -> None:
    """Refuse a model that no weights can be planted in.

    Raises:
        ValueError: no published figures are at hand for it.
    """
    if entry.name not in PROFILES or entry.untrained is None:
        raise ValueError(f"weights can be planted in {', '.join(PROFILES)}: not in {entry.name}")


def planter(entry: ModelEntry) -> Planter:
    """How weights are planted in a model.

    Raises:
        ValueError: as `check_plantable`.
    """
    check_plantable(entry)
    return _PLANTERS[entry.checked_family().transformer]


def plant(entry: ModelEntry, transformer: Any) -> Fit:
    """Fill a model's transformer in place, with any number of layers, the same at every call; returns what is planted.

    Raises:
        ValueError: as `check_plantable`.
    """
    how = planter(entry)
    # published shares are of the largest size
    largest = max((entry.geometry(name) for name in entry.resolutions), key=lambda geometry: geometry.tokens)
    return how.plant(transformer, largest, profile=PROFILES[entry.name])


def load_planted(entry: ModelEntry, *, resolution: str, device: torch.device, dtype: torch.dtype) -> Any:
    """A model's pipeline with planted weights, as `ModelEntry.load` gives it with its own.

    A prompt's embedding is drawn from a seed that depends on its text alone. What comes out as a video is the first
    three channels of the latents, which nobody has decoded.

    Raises:
        UnknownName: the model has no such resolution.
        ValueError: as `check_plantable`.
    """
    how = planter(entry)
    assert entry.untrained is not None
    pipe = entry.untrained(entry.geometry(resolution), entry.layers, device, dtype).pipe
    plant(entry, pipe.transformer)
    kind, scheduler = how.pipeline(entry.resolution(resolution))
    return kind(**{**pipe.components, "scheduler": scheduler})


def _wan(size: Resolution) -> tuple[Any, Any]:
    from diffusers import UniPCMultistepScheduler, WanPipeline

    # Wan's own scheduler: scheduler_config.json of its repositories
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=size.flow_shift
    )
    return _pipeline_class(WanPipeline, width="text_dim", masked=False), scheduler


def _mochi(size: Resolution) -> tuple[Any, Any]:
    from diffusers import FlowMatchEulerDiscreteScheduler, MochiPipeline

    # Mochi's own counts from data to noise; its pipeline gives the steps
    scheduler = FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
    return _pipeline_class(MochiPipeline, width="text_embed_dim", masked=True), scheduler


_PLANTERS: Mapping[str, Planter] = MappingProxyType(
    {
        "WanTransformer3DModel": Planter(plant=wan.plant, queries_and_keys=wan.queries_and_keys, pipeline=_wan),
        "MochiTransformer3DModel": Planter(plant=mochi.plant, queries_and_keys=mochi.queries_and_keys, pipeline=_mochi),
    }
)


@cache
def _pipeline_class(stock: Any, *, width: str, masked: bool) -> Any:
    """A pipeline of Diffusers, but for the text encoder and the autoencoder.

    Args:
        stock: its class.
        width: where the transformer's config has the channels of text.
        masked: whether prompts come with a mask of what is no padding.
    """

    class PlantedPipeline(stock):  # type: ignore[misc]
        def _get_t5_prompt_embeds(
            self,
            prompt: str | Sequence[str],
            num_videos_per_prompt: int = 1,
            max_sequence_length: int = 512,
            device: torch.device | None = None,
            dtype: torch.dtype | None = None,
        ) -> Tensor | tuple[Tensor, Tensor]:
            texts = [prompt] if isinstance(prompt, str) else prompt
            channels = self.transformer.config[width]
            drawn = torch.stack([_embedding(text, max_sequence_length, channels) for text in texts])
            drawn = drawn.repeat_interleave(num_videos_per_prompt, dim=0).to(device)
            embeddings = drawn.to(dtype or self.transformer.dtype)
            return (embeddings, drawn.any(-1)) if masked else embeddings

        def __call__(self, *args: Any, output_type: str = "latent", **keywords: Any) -> Any:
            made = super().__call__(*args, output_type="latent", **keywords)
            made.frames = made.frames[:, :_SHOWN].transpose(1, 2)
            return made

    return PlantedPipeline


def _embedding(text: str, tokens: int, channels: int) -> Tensor:
    """Normal values for each word and the end, and zeros behind them, as pipelines pad."""
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
    found = torch.zeros(tokens, channels)
    words = min(tokens, len(text.split()) + 1)
    found[:words] = torch.randn(words, channels, generator=torch.Generator().manual_seed(seed))
    return found
