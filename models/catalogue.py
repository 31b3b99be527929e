"""Every model there is: what it looks like to attention, and where its weights come from."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from calibatt.kernels.geometry import Geometry, TextSide
from calibatt.kernels.names import look_up

# takes device and dtype, and a folder of weights to use in place of the model's own
Loader = Callable[[torch.device, torch.dtype, "Path | None"], Any]


@runtime_checkable
class Alignment(Protocol):
    """Reads back from a video how much of its caption it shows, 0 to 1."""

    def __call__(self, video: Float[Tensor, "3 frames height width"], caption: str) -> float:
        """The score; the video's values are in [-1, 1]."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolution:
    """Size of a video.

    Args:
        height, width: pixels.
        frames: number of frames.
        flow_shift: shift of the flow-matching schedule at this size; None leaves the scheduler as it was saved.
        steps: denoising steps at this size; None takes the model's.
    """

    height: int
    width: int
    frames: int
    flow_shift: float | None = None
    steps: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelEntry:
    """A model: sizes, defaults, and how to load it.

    Args:
        name: as in the catalogue.
        layers, heads, head_dim: of its transformer.
        patch: frames × rows × columns of latents that make one token.
        latent_stride: video frames and pixels per latent (time, space).
        latent_channels: channels of a latent.
        block: tokens of a query and of a key block that its masks use.
        resolutions: by name, the first is the default.
        steps, guidance: defaults of a generation.
        prompt_tokens: length the prompt is padded to.
        negative_prompt: prompt of the unconditional pass.
        loader: makes the pipeline; None where only the attention can be measured, by itself.
        text_tokens, text_side: of the prompt in the sequence of self-attention, where it is there.
        alignment: score of text alignment, where the model has one.
        captions: the model's own prompts (`held_out` of them were never trained on), where it has a grammar for them.
    """

    name: str
    layers: int
    heads: int
    head_dim: int
    patch: tuple[int, int, int]
    latent_stride: tuple[int, int]
    latent_channels: int
    block: tuple[int, int]
    resolutions: Mapping[str, Resolution]
    steps: int
    guidance: float
    prompt_tokens: int
    loader: Loader | None
    text_tokens: int = 0
    text_side: TextSide = "last"
    negative_prompt: str = ""
    alignment: Alignment | None = None
    captions: Callable[[int, int], list[str]] | None = None

    def resolution(self, name: str) -> Resolution:
        """The resolution of that name.

        Raises:
            UnknownName: the model has no such resolution.
        """
        return look_up(self.resolutions, name, f"resolution of {self.name}")

    def steps_at(self, resolution: str) -> int:
        """Default number of denoising steps at a resolution."""
        return self.resolution(resolution).steps or self.steps

    def latent_shape(self, resolution: str) -> tuple[int, int, int, int, int]:
        """Shape of the latents of one video: batch, channels, frames, rows, columns."""
        size = self.resolution(resolution)
        time, space = self.latent_stride
        return (1, self.latent_channels, (size.frames - 1) // time + 1, size.height // space, size.width // space)

    def geometry(self, resolution: str) -> Geometry:
        """Layout of the tokens of one self-attention call."""
        # latents that do not fill their last patch are padded
        frames, rows, columns = (
            -(-extent // patch) for extent, patch in zip(self.latent_shape(resolution)[2:], self.patch, strict=True)
        )
        return Geometry(
            grid=(frames, rows, columns), heads=self.heads, head_dim=self.head_dim, text_tokens=self.text_tokens,
            text_side=self.text_side,
        )  # fmt: skip

    def checked_loader(self) -> Loader:
        """What makes the pipeline.

        Raises:
            ValueError: the model has no loader.
        """
        if self.loader is None:
            raise ValueError(
                f"{self.name} cannot generate here: its attention alone is measured, by pytest bench -k test_kernels"
            )
        return self.loader

    def load(self, *, resolution: str, device: torch.device, dtype: torch.dtype, weights: Path | None = None) -> Any:
        """The Diffusers pipeline, on the device, with the resolution's schedule.

        Args:
            weights: a folder in Diffusers' layout to load instead of the model's own weights.

        Raises:
            UnknownName: the model has no such resolution.
            ValueError: the model has no loader.
            OSError: the weights cannot be had.
        """
        loader = self.checked_loader()
        shift = self.resolution(resolution).flow_shift
        pipe = loader(device, dtype, weights)
        if shift is not None:
            pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, flow_shift=shift)
        return pipe


def weights_digest(pipe: Any) -> str:
    """Sixteen hex digits that tell the weights of a pipeline's transformer from others.

    Hashes every parameter's name, shape and first values, which is cheap at any size.
    """
    digest = hashlib.sha256()
    for name, parameter in pipe.transformer.state_dict().items():
        # 64 values are enough to tell two trainings apart
        head = parameter.detach().flatten()[:64].float().cpu().numpy().tobytes()
        digest.update(f"{name}{tuple(parameter.shape)}".encode() + head)
    return digest.hexdigest()[:16]


def _load_shapes(device: torch.device, dtype: torch.dtype, weights: Path | None) -> Any:
    from calibatt.models.shapes.pipeline import load_pipeline

    return load_pipeline(device=device, dtype=dtype, weights=weights)


def _load_wan(repository: str, device: torch.device, dtype: torch.dtype, weights: Path | None) -> Any:
    from diffusers import AutoencoderKLWan, WanPipeline

    source = repository if weights is None else str(weights)
    # the autoencoder's own precision is fp32: Wan's recipe in Diffusers
    vae = AutoencoderKLWan.from_pretrained(source, subfolder="vae", torch_dtype=torch.float32)
    return WanPipeline.from_pretrained(source, vae=vae, torch_dtype=dtype).to(device)


def _align_shapes(video: Float[Tensor, "3 frames height width"], caption: str) -> float:
    from calibatt.models.shapes.reader import alignment

    return alignment(video, caption)


def _shapes_captions(count: int, seed: int) -> list[str]:
    from calibatt.models.shapes.scenes import held_out_captions

    return held_out_captions(count, seed=seed)


SHAPES = ModelEntry(
    name="shapes",
    layers=8,
    heads=4,
    head_dim=64,
    patch=(1, 4, 4),
    latent_stride=(1, 1),
    latent_channels=3,
    block=(64, 64),
    resolutions=MappingProxyType(
        {
            "quick": Resolution(height=64, width=96, frames=8, steps=6),
            "standard": Resolution(height=64, width=96, frames=16),
        }
    ),
    steps=20,
    guidance=3.0,
    prompt_tokens=24,
    loader=_load_shapes,
    alignment=_align_shapes,
    captions=_shapes_captions,
)

# Wan's sizes, 50 steps, guidance 5 and flow shift 3 (480p) or 5 (720p): Diffusers' documentation of WanPipeline
_WAN_RESOLUTIONS = MappingProxyType(
    {
        "480p": Resolution(height=480, width=832, frames=81, flow_shift=3.0),
        "720p": Resolution(height=720, width=1280, frames=81, flow_shift=5.0),
    }
)


def _wan(name: str, repository: str, *, layers: int, heads: int) -> ModelEntry:
    return ModelEntry(
        name=name,
        layers=layers,
        heads=heads,
        head_dim=128,
        patch=(1, 2, 2),
        latent_stride=(4, 8),
        latent_channels=16,
        block=(128, 128),
        resolutions=_WAN_RESOLUTIONS,
        steps=50,
        guidance=5.0,
        prompt_tokens=512,
        loader=partial(_load_wan, repository),
    )


# Sizes, steps and guidance: the documentation of each one's pipeline in Diffusers, and its transformer's configuration.
_ATTENTION_ONLY = (
    ModelEntry(
        name="wan2.2-ti2v-5b", layers=30, heads=24, head_dim=128, patch=(1, 2, 2), latent_stride=(4, 16),
        latent_channels=48, block=(128, 128), steps=50, guidance=5.0, prompt_tokens=512, loader=None,
        resolutions=MappingProxyType({"720p": Resolution(height=704, width=1280, frames=121)}),
    ),
    ModelEntry(
        name="mochi-1", layers=48, heads=24, head_dim=128, patch=(1, 2, 2), latent_stride=(6, 8),
        latent_channels=12, block=(128, 128), steps=64, guidance=4.5, prompt_tokens=256, loader=None, text_tokens=256,
        resolutions=MappingProxyType({
            "85f": Resolution(height=480, width=848, frames=85),
            "163f": Resolution(height=480, width=848, frames=163),
        }),
    ),
    ModelEntry(
        name="hunyuanvideo", layers=60, heads=24, head_dim=128, patch=(1, 2, 2), latent_stride=(4, 8),
        latent_channels=16, block=(128, 128), steps=50, guidance=6.0, prompt_tokens=256, loader=None, text_tokens=256,
        resolutions=MappingProxyType({"720p": Resolution(height=720, width=1280, frames=129)}),
    ),
    ModelEntry(
        name="cogvideox-5b", layers=42, heads=48, head_dim=64, patch=(1, 2, 2), latent_stride=(4, 8),
        latent_channels=16, block=(128, 128), steps=50, guidance=6.0, prompt_tokens=226, loader=None, text_tokens=226,
        text_side="first",
        resolutions=MappingProxyType({"480p": Resolution(height=480, width=720, frames=49)}),
    ),
    ModelEntry(
        name="cogvideox1.5-5b", layers=42, heads=48, head_dim=64, patch=(2, 2, 2), latent_stride=(4, 8),
        latent_channels=16, block=(128, 128), steps=50, guidance=6.0, prompt_tokens=226, loader=None, text_tokens=226,
        text_side="first",
        resolutions=MappingProxyType({"768p": Resolution(height=768, width=1360, frames=81)}),
    ),
    ModelEntry(
        name="ltx-video-2b", layers=28, heads=32, head_dim=64, patch=(1, 1, 1), latent_stride=(8, 32),
        latent_channels=128, block=(128, 128), steps=50, guidance=3.0, prompt_tokens=128, loader=None,
        resolutions=MappingProxyType({"512p": Resolution(height=512, width=704, frames=161)}),
    ),
)  # fmt: skip

MODELS: Mapping[str, ModelEntry] = MappingProxyType(
    {
        "shapes": SHAPES,
        "wan2.1-1.3b": _wan("wan2.1-1.3b", "Wan-AI/Wan2.1-T2V-1.3B-Diffusers", layers=30, heads=12),
        "wan2.1-14b": _wan("wan2.1-14b", "Wan-AI/Wan2.1-T2V-14B-Diffusers", layers=40, heads=40),
        **{entry.name: entry for entry in _ATTENTION_ONLY},
    }
)
