"""How near a generated video is to another, as frames of 8 bits: the way a video file holds them."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

# identical videos have no finite PSNR; 8-bit frames that differ in one pixel by one level stay below this
PSNR_CAP_DB = 120.0


def eight_bit(video: Float[Tensor, "3 frames height width"]) -> UInt8[Tensor, "3 frames height width"]:
    """Values in [-1, 1] as bytes."""
    return video.clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)


def psnr_db(video: UInt8[Tensor, "3 frames height width"], other: UInt8[Tensor, "3 frames height width"]) -> float:
    """Peak signal-to-noise ratio in dB; identical videos give PSNR_CAP_DB."""
    error = (video.double() - other.double()).square().mean().item()
    return PSNR_CAP_DB if error == 0 else 10 * math.log10(255**2 / error)


def ssim(video: UInt8[Tensor, "3 frames height width"], other: UInt8[Tensor, "3 frames height width"]) -> float:
    """Structural similarity (Wang et al. 2004, Gaussian window of σ 1.5), mean over frames.

    Raises:
        ValueError: a side of the frames is shorter than the window, 11 pixels.
    """
    from skimage.metrics import structural_similarity

    scores = [
        structural_similarity(
            a.numpy(),
            b.numpy(),
            channel_axis=0,
            data_range=255,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
        )
        for a, b in zip(video.unbind(1), other.unbind(1), strict=True)
    ]
    return float(sum(scores) / len(scores))
