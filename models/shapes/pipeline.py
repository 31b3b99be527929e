"""The model as Diffusers' own WanPipeline."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from calibatt.models.shapes.codec import PixelCodec
from calibatt.models.shapes.lora import FILE, merge
from calibatt.models.shapes.text import TEXT_DIM, SceneTextEncoder, SceneTokenizer

WEIGHTS = Path(__file__).parent / "weights"
# sigmas are shifted towards noise, where layout, colour and motion are decided; Wan's own value at 720p
SHIFT = 5.0
# of the 4-step student: an adapter of these weights
STUDENT_WEIGHTS = Path(__file__).parent / "student"
# The student's last step begins here; with the schedule of 20 steps, which reaches 0.02 a step before its end, the last
# of four would have nothing to do. So its sigmas are 1, 0.965, 0.891, 0.625 and 0, much as those that Wan's 4-step
# students were distilled for (t = 1, ¾, ½, ¼, shifted: 1, 0.938, 0.833, 0.625, 0)
STUDENT_TERMINAL = 0.625
# of its transformer, but for layers, heads and head dim
SIZES: Mapping[str, Any] = MappingProxyType(
    {
        "patch_size": (1, 4, 4),
        "in_channels": 3,
        "out_channels": 3,
        "text_dim": TEXT_DIM,
        "freq_dim": 256,
        # the widest multiple of 128 that keeps the weights in two files of 9 MB
        "ffn_dim": 896,
        "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads",
        # positions along each axis; the largest videos have 52 columns of tokens
        "rope_max_seq_len": 128,
    }
)


def new_transformer(*, layers: int = 8, heads: int = 4) -> Any:
    """An untrained WanTransformer3DModel of this model's sizes, 8.5 million parameters by default.

    Args:
        layers, heads: fewer make a model for tests.
    """
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(num_layers=layers, num_attention_heads=heads, attention_head_dim=64, **SIZES)


def assemble(transformer: Any, *, shift: float = SHIFT, terminal: float | None = None) -> Any:
    """A WanPipeline around a transformer.

    Args:
        transformer: a WanTransformer3DModel that takes this model's text features.
        shift: of the flow-matching schedule.
        terminal: noise level at which the last step begins, to which the schedule is stretched; None leaves it alone.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler

    _quieten()
    return _pipeline_class()(
        tokenizer=SceneTokenizer(),
        text_encoder=SceneTextEncoder(),
        vae=PixelCodec(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=shift, shift_terminal=terminal),
        transformer=transformer,
    )


@functools.cache
def _pipeline_class() -> Any:
    from diffusers import WanPipeline

    class ShapesPipeline(WanPipeline):
        """Makes as many frames as it is asked for.

        Wan's own pipeline rounds to one more than a multiple of its codec's stride in time, which is 1 here: to one
        frame more than was asked for.
        """

        def __call__(self, *args: Any, num_frames: int = 8, **keywords: Any) -> Any:
            return WanPipeline.__call__(self, *args, num_frames=num_frames - 1, **keywords)

        def check_inputs(
            self, prompt: Any, negative_prompt: Any, height: int, width: int, *others: Any, **keywords: Any
        ) -> None:
            """As Wan's, which wants multiples of 16, but for height and width: patches of 4 pixels want those of 4."""
            patch = SIZES["patch_size"][1]
            if height % patch or width % patch:
                raise ValueError(f"height and width are multiples of {patch}: got {height} × {width}")
            WanPipeline.check_inputs(self, prompt, negative_prompt, 16, 16, *others, **keywords)

    return ShapesPipeline


def load_pipeline(*, device: torch.device, dtype: torch.dtype, weights: Path | None = None) -> Any:
    """The trained model as a WanPipeline.

    Args:
        device, dtype: of the transformer.
        weights: a folder with config.json and safetensors of another training, or with such a folder `transformer`, as
            on the hub; the shipped weights where None.

    Raises:
        OSError: the folder holds no weights, or others than this model's.
    """
    transformer = _transformer(WEIGHTS if weights is None else weights)
    return assemble(cast(transformer, dtype)).to(device)


def load_student(*, device: torch.device, dtype: torch.dtype, weights: Path | None = None) -> Any:
    """The 4-step student as a WanPipeline: the shipped weights with its adapter merged, and its own noise levels.

    Args:
        device, dtype: of the transformer.
        weights: a folder with another adapter of the shipped weights; the shipped one where None.

    Raises:
        OSError: the folder holds no adapter, or one of other weights.
    """
    transformer = _transformer(WEIGHTS)
    merge(transformer, (STUDENT_WEIGHTS if weights is None else weights) / FILE)
    return assemble(cast(transformer, dtype), terminal=STUDENT_TERMINAL).to(device)


def _transformer(folder: Path) -> Any:
    """The transformer of a folder, in fp32.

    Raises:
        OSError: as `load_pipeline`.
    """
    from diffusers import WanTransformer3DModel
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if (folder / "transformer").is_dir():
        folder /= "transformer"
    files = sorted(folder.glob("*.safetensors"))
    if not (folder / "config.json").is_file() or not files:
        raise OSError(
            f"{folder} has no config.json with .safetensors beside it: save a transformer there by save_pretrained, or "
            "leave out --weights for the model's own"
        )
    # from_pretrained would need the package accelerate, which a model of 17 MB does not
    try:
        transformer = WanTransformer3DModel.from_config(WanTransformer3DModel.load_config(folder))
        state = {name: tensor for file in files for name, tensor in load_file(file).items()}
        transformer.load_state_dict(state)
    except (SafetensorError, RuntimeError, TypeError, ValueError) as error:
        # torch lists every parameter that does not fit, one a line
        reason = " ".join(str(error).split())
        raise OSError(f"{folder} does not hold this model: {reason:.200}") from None
    return transformer.eval().requires_grad_(False)


def cast(transformer: Any, dtype: torch.dtype) -> Any:
    """The transformer in another dtype, but for the small modules that Wan keeps in fp32, as Diffusers does it."""
    for name, parameter in transformer.named_parameters():
        if not any(kept in name for kept in transformer._keep_in_fp32_modules):
            parameter.data = parameter.data.to(dtype)
    return transformer


def _quieten() -> None:
    """Drop Wan's warning that frames - 1 "has to be divisible by 1", which it gives for every number of frames."""
    logging.getLogger("diffusers.pipelines.wan.pipeline_wan").addFilter(_divisible_by_one)


def _divisible_by_one(record: logging.LogRecord) -> bool:
    return "has to be divisible by 1." not in record.getMessage()
