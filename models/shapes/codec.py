"""The codec that is none: this model's latents are pixels, and Wan's pipeline wants to be told so."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from jaxtyping import Float
from torch import Tensor, nn


class PixelCodec(nn.Module):
    """Stands where Wan's pipeline has its VAE; decoding returns the latents."""

    anchor: Tensor

    def __init__(self) -> None:
        super().__init__()
        # the names that WanPipeline reads
        self.config = SimpleNamespace(
            z_dim=3,
            latents_mean=[0.0, 0.0, 0.0],
            latents_std=[1.0, 1.0, 1.0],
            scale_factor_temporal=1,
            scale_factor_spatial=1,
        )
        # without parameters, something must know the device
        self.register_buffer("anchor", torch.zeros(()))

    @property
    def device(self) -> torch.device:
        """Where it was moved to."""
        return self.anchor.device

    @property
    def dtype(self) -> torch.dtype:
        """What the pipeline casts latents to before decoding."""
        return self.anchor.dtype

    def decode(
        self, latents: Float[Tensor, "batch 3 frames height width"], return_dict: bool = False
    ) -> tuple[Float[Tensor, "batch 3 frames height width"]]:
        """The latents, as they are.

        Raises:
            ValueError: a dictionary is asked for, which Wan's pipeline never does.
        """
        if return_dict:
            raise ValueError("the pixel codec returns a tuple: pass return_dict=False")
        return (latents,)
