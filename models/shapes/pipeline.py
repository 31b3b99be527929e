"""The model as Diffusers' own WanPipeline."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch

from calibatt.models.shapes.codec import PixelCodec
from calibatt.models.shapes.text import TEXT_DIM, SceneTextEncoder, SceneTokenizer

WEIGHTS = Path(__file__).parent / "weights"
# sigmas are shifted towards noise, where layout, colour and motion are decided; Wan's own value at 720p
SHIFT = 5.0


def new_transformer(*, layers: int = 8, heads: int = 4) -> Any:
    """An untrained WanTransformer3DModel of this model's sizes, 8.5 million parameters by default.

    Args:
        layers, heads: fewer make a model for tests.
    """
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(
        patch_size=(1, 4, 4),
        num_attention_heads=heads,
        attention_head_dim=64,
        in_channels=3,
        out_channels=3,
        text_dim=TEXT_DIM,
        freq_dim=256,
        # the widest multiple of 128 that keeps the weights in two files of 9 MB
        ffn_dim=896,
        num_layers=layers,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    )


def assemble(transformer: Any, *, shift: float = SHIFT) -> Any:
    """A WanPipeline around a transformer.

    Args:
        transformer: a WanTransformer3DModel that takes this model's text features.
        shift: of the flow-matching schedule.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline

    _quieten()
    return WanPipeline(
        tokenizer=SceneTokenizer(),
        text_encoder=SceneTextEncoder(),
        vae=PixelCodec(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=shift),
        transformer=transformer,
    )


def load_pipeline(*, device: torch.device, dtype: torch.dtype, weights: Path | None = None) -> Any:
    """The trained model as a WanPipeline.

    Args:
        device, dtype: of the transformer.
        weights: a folder with config.json and safetensors of another training; the shipped weights where None.

    Raises:
        OSError: the folder holds no weights.
    """
    from diffusers import WanTransformer3DModel
    from safetensors.torch import load_file

    folder = WEIGHTS if weights is None else weights
    if not (folder / "config.json").is_file():
        raise OSError(f"{folder} holds no weights: reinstall calibatt, or run python -m calibatt.models.shapes.train")
    # from_pretrained would need the package accelerate, which a model of 17 MB does not
    transformer = WanTransformer3DModel.from_config(WanTransformer3DModel.load_config(folder))
    state = {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}
    transformer.load_state_dict(state)
    transformer.eval().requires_grad_(False)
    return assemble(cast(transformer, dtype)).to(device)


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
