"""Whole pipelines around planted transformers: no text encoder, no autoencoder, no download."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import cache
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from calibatt.models.entry import ModelEntry
from calibatt.models.planted import wan
from calibatt.models.planted.heads import Fit

# the published figures that each model's heads are fitted to (`models/shapes/concentration.py`)
PROFILES: Mapping[str, str] = MappingProxyType({"wan2.1-1.3b": "Wan 2.1 1.3B", "wan2.1-14b": "Wan 2.1 14B"})
# channels of the latents that are handed out in place of a video's colours
_SHOWN = 3


def check_plantable(entry: ModelEntry) -> None:
    """Refuse a model that no weights can be planted in.

    Raises:
        ValueError: no published figures are at hand for it.
    """
    if entry.name not in PROFILES or entry.untrained is None:
        raise ValueError(f"weights can be planted in {', '.join(PROFILES)}: not in {entry.name}")


def plant(entry: ModelEntry, transformer: Any) -> Fit:
    """Fill a model's transformer in place, with any number of layers, the same at every call; returns what is planted.

    Raises:
        ValueError: as `check_plantable`.
    """
    check_plantable(entry)
    # published shares are of the largest size
    largest = max((entry.geometry(name) for name in entry.resolutions), key=lambda geometry: geometry.tokens)
    return wan.plant(transformer, largest, profile=PROFILES[entry.name])


def load_planted(entry: ModelEntry, *, resolution: str, device: torch.device, dtype: torch.dtype) -> Any:
    """A model's pipeline with planted weights, as `ModelEntry.load` gives it with its own.

    A prompt's embedding is drawn from a seed that depends on its text alone. What comes out as a video is the first
    three channels of the latents, which nobody has decoded.

    Raises:
        UnknownName: the model has no such resolution.
        ValueError: as `check_plantable`.
    """
    from diffusers import UniPCMultistepScheduler

    check_plantable(entry)
    assert entry.untrained is not None
    pipe = entry.untrained(entry.geometry(resolution), entry.layers, device, dtype).pipe
    plant(entry, pipe.transformer)
    # Wan's own scheduler: scheduler_config.json of its repositories
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=entry.resolution(resolution).flow_shift
    )
    return _pipeline_class()(**{**pipe.components, "scheduler": scheduler})


@cache
def _pipeline_class() -> Any:
    from diffusers import WanPipeline

    class PlantedPipeline(WanPipeline):
        """Wan's pipeline, but for the text encoder and the autoencoder."""

        transformer: Any

        def _get_t5_prompt_embeds(
            self,
            prompt: str | Sequence[str],
            num_videos_per_prompt: int = 1,
            max_sequence_length: int = 512,
            device: torch.device | None = None,
            dtype: torch.dtype | None = None,
        ) -> Tensor:
            texts = [prompt] if isinstance(prompt, str) else prompt
            drawn = [_embedding(text, max_sequence_length, self.transformer.config.text_dim) for text in texts]
            embeddings = torch.stack(drawn).to(device=device, dtype=dtype or self.transformer.dtype)
            return embeddings.repeat_interleave(num_videos_per_prompt, dim=0)

        def __call__(self, *args: Any, output_type: str = "latent", **keywords: Any) -> Any:
            made = WanPipeline.__call__(self, *args, output_type="latent", **keywords)
            made.frames = made.frames[:, :_SHOWN].transpose(1, 2)
            return made

    return PlantedPipeline


def _embedding(text: str, tokens: int, channels: int) -> Tensor:
    """Normal values for each word and the end, and zeros behind them, as Wan's pipeline pads."""
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
    found = torch.zeros(tokens, channels)
    words = min(tokens, len(text.split()) + 1)
    found[:words] = torch.randn(words, channels, generator=torch.Generator().manual_seed(seed))
    return found
