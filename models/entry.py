"""A model: what it looks like to attention, how it is called, and where its weights come from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from calibatt.kernels.geometry import Geometry, TextSide
from calibatt.kernels.names import look_up
from calibatt.methods.site import Branch
from calibatt.models.identity import transformers_of

# takes device and dtype, and a folder of weights to use in place of the model's own
Loader = Callable[[torch.device, torch.dtype, "Path | None"], Any]
Grid = tuple[int, int, int]
# takes a geometry, layers, device and dtype
Untrained = Callable[[Geometry, int, torch.device, torch.dtype], "ForwardPass"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ForwardPass:
    """One forward pass of a transformer with random weights, which needs no text encoder and no autoencoder.

    Args:
        pipe: a pipeline with a transformer and a scheduler.
        inputs: keywords of the transformer's forward.
        name: that its pipeline announces the pass by.
    """

    pipe: Any
    inputs: Mapping[str, Any]
    name: str

    @torch.no_grad()
    def run(self) -> Any:
        """The transformer's output, at the first step of a schedule."""
        self.pipe.scheduler.set_timesteps(2)
        self.pipe.scheduler.set_begin_index(0)
        with self.pipe.transformer.cache_context(self.name):
            return self.pipe.transformer(**self.inputs, return_dict=False)[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """Models that share a transformer of Diffusers: all that the adapter and `generate` have to know of it.

    Args:
        transformer: name of the transformer's class.
        attentions: its self-attention modules, layer by layer; each has a `processor`.
        extents: from the arguments of the transformer's forward, by name, frames × rows × columns of latents.
        patch: from the transformer's config, frames × rows × columns of latents that make one token.
        processor: class of the processors that stand in its self-attention; see `processor.AttentionProcessor`.
        branches: from the pipeline and the name that it announces a forward pass by (`cache_context`), the branches
            that the batch holds, in order and in equal parts; empty for a name that the family does not use.
        passes: names of the passes of one step, in their order, for pipelines that announce none; empty where such a
            pipeline is refused.
        text_side: where text tokens stand in self-attention; None where there are none.
        keywords: from a model and a size, the arguments of its pipeline that fix them.
        noise: starting noise as its pipeline takes it.
        parallel: whether processes may share its tokens by Diffusers' context parallelism, each with some heads of its
            self-attention (`models/parallel.py`).
    """

    transformer: str
    attentions: Callable[[Any], Sequence[Any]]
    extents: Callable[[Mapping[str, Any]], Grid]
    patch: Callable[[Any], Grid]
    processor: Callable[..., Any]
    branches: Callable[[Any, str], tuple[Branch, ...]]
    passes: tuple[str, ...]
    text_side: TextSide | None
    keywords: Callable[[ModelEntry, Resolution], Mapping[str, Any]]
    noise: Callable[[Float[Tensor, "batch channels frames rows columns"]], Tensor]
    parallel: bool = False


def branch_a_pass(pipe: Any, name: str) -> tuple[Branch, ...]:
    """Of pipelines that make a pass for each branch of guidance, and name it so."""
    return (cast(Branch, name),) if name in ("cond", "uncond") else ()


def branches_in_a_batch(pipe: Any, name: str) -> tuple[Branch, ...]:
    """Of pipelines that make one pass for both branches of guidance, the unconditional one first."""
    if name != "cond_uncond":
        return ()
    return ("uncond", "cond") if pipe.do_classifier_free_guidance else ("cond",)


def video_extents(arguments: Mapping[str, Any]) -> Grid:
    """Those of latents that most transformers take: batch, channels, frames, rows, columns."""
    _, _, frames, rows, columns = arguments["hidden_states"].shape
    return frames, rows, columns


def video_noise(
    noise: Float[Tensor, "batch channels frames rows columns"],
) -> Float[Tensor, "batch channels frames rows columns"]:
    """As it is drawn, as most of Diffusers' pipelines take it."""
    return noise


def video_keywords(entry: ModelEntry, size: Resolution) -> Mapping[str, Any]:
    """The keywords that most of Diffusers' text-to-video pipelines share."""
    return {
        "negative_prompt": entry.negative_prompt,
        "height": size.height,
        "width": size.width,
        "num_frames": size.frames,
        "max_sequence_length": entry.prompt_tokens,
        **entry.options,
    }


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
        block: tokens of a query and of a key block at this size; None takes the model's.
    """

    height: int
    width: int
    frames: int
    flow_shift: float | None = None
    steps: int | None = None
    block: tuple[int, int] | None = None


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
        options: further arguments of its pipeline, at any size.
        family: what the adapter knows of its transformer; None where only the attention can be measured, by itself.
        loader: makes the pipeline; None likewise.
        untrained: makes a forward pass of the model's shape with random weights; None where it cannot be had.
        text_tokens, text_side: of the prompt in the sequence of self-attention, where it is there.
        alignment: score of text alignment, where the model has one.
        captions: the model's own prompts (`held_out` of them were never trained on), where it has a grammar for them.
        read: raises a ValueError for a prompt that is not in the model's language; None where any text is.
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
    family: Family | None = None
    untrained: Untrained | None = None
    loader: Loader | None = None
    text_tokens: int = 0
    text_side: TextSide = "last"
    negative_prompt: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    alignment: Alignment | None = None
    captions: Callable[[int, int], list[str]] | None = None
    read: Callable[[str], object] | None = None

    def check_prompt(self, prompt: object) -> None:
        """Refuse, before any work is done, a prompt of which no video can be made.

        Raises:
            ValueError: it is empty or not in the model's language; one line.
        """
        # callers without a type checker pass lists, and None
        if not isinstance(prompt, str) or not prompt.strip():
            raise ValueError(f"a prompt is a text that says what the video should show: got {prompt!r}")
        if self.read is not None:
            self.read(prompt)

    def resolution(self, name: str) -> Resolution:
        """The resolution of that name.

        Raises:
            UnknownName: the model has no such resolution.
        """
        return look_up(self.resolutions, name, f"resolution of {self.name}")

    def steps_at(self, resolution: str) -> int:
        """Default number of denoising steps at a resolution."""
        return self.resolution(resolution).steps or self.steps

    def block_at(self, resolution: str) -> tuple[int, int]:
        """Tokens of a query and of a key block that masks use at a resolution."""
        return self.resolution(resolution).block or self.block

    def latent_shape(self, resolution: str) -> tuple[int, int, int, int, int]:
        """Shape of the latents of one video: batch, channels, frames, rows, columns; their last patch is filled."""
        size = self.resolution(resolution)
        time, space = self.latent_stride
        extents = ((size.frames - 1) // time + 1, size.height // space, size.width // space)
        frames, rows, columns = (-(-extent // patch) * patch for extent, patch in zip(extents, self.patch, strict=True))
        return (1, self.latent_channels, frames, rows, columns)

    def geometry(self, resolution: str) -> Geometry:
        """Layout of the tokens of one self-attention call."""
        frames, rows, columns = (
            extent // patch for extent, patch in zip(self.latent_shape(resolution)[2:], self.patch, strict=True)
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
            raise ValueError(self._attention_only())
        return self.loader

    def checked_family(self) -> Family:
        """What the adapter knows of its transformer.

        Raises:
            ValueError: the adapter knows none.
        """
        if self.family is None:
            raise ValueError(self._attention_only())
        return self.family

    def _attention_only(self) -> str:
        return f"{self.name} cannot generate videos here: only its attention is measured, by pytest bench -k kernel"

    def load(self, *, resolution: str, device: torch.device, dtype: torch.dtype, weights: Path | None = None) -> Any:
        """The Diffusers pipeline, on the device, with the resolution's schedule.

        Args:
            weights: a folder in Diffusers' layout to load instead of the model's own weights.

        Raises:
            UnknownName: the model has no such resolution.
            ValueError: the model has no loader.
            OSError: the weights cannot be had, or are another model's.
        """
        loader = self.checked_loader()
        shift = self.resolution(resolution).flow_shift
        pipe = loader(device, dtype, weights)
        other = self._other_model(pipe)
        if other is not None:
            raise OSError(f"{weights or 'what its loader makes'} does not hold {self.name}, which is {other}")
        if shift is not None:
            pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, flow_shift=shift)
        return pipe

    def _other_model(self, pipe: Any) -> str | None:
        """What the model is, and what a pipeline has in its place; None where that is the model, or nobody knows."""
        if self.family is None:
            return None
        own = f"a {self.family.transformer} of {self.layers} layers and {self.heads} heads"
        for transformer in transformers_of(pipe):
            if type(transformer).__name__ != self.family.transformer:
                return f"{own}: it holds a {type(transformer).__name__}"
            attentions = self.family.attentions(transformer)
            if (len(attentions), attentions[0].heads) != (self.layers, self.heads):
                return f"{own}: it holds one of {len(attentions)} and {attentions[0].heads}"
        return None
