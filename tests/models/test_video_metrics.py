"""Fidelity of videos."""

from __future__ import annotations

import math

import pytest
import torch

from calibatt.models.video_metrics import PSNR_CAP_DB, eight_bit, psnr_db, ssim


def test_bytes_are_those_of_a_video_file() -> None:
    video = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0]).view(1, 1, 1, 5).expand(3, -1, -1, -1)
    assert eight_bit(video)[0, 0, 0].tolist() == [0, 0, 128, 255, 255]


def test_psnr_of_one_level_of_grey_everywhere() -> None:
    dark = torch.zeros((3, 2, 16, 16), dtype=torch.uint8)
    assert psnr_db(dark, dark + 1) == pytest.approx(20 * math.log10(255))
    # no byte below zero
    assert psnr_db(dark + 1, dark) == psnr_db(dark, dark + 1)
    assert psnr_db(dark, dark) == PSNR_CAP_DB


def test_ssim_is_one_for_the_same_and_falls_with_noise() -> None:
    video = torch.rand(3, 2, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    noise = torch.randn(video.shape, generator=torch.Generator().manual_seed(1))
    same, little, much = (ssim(eight_bit(video), eight_bit(video + share * noise)) for share in (0.0, 0.05, 0.5))
    assert same == pytest.approx(1.0)
    assert 0.9 < little < 1.0
    assert much < 0.8 * little
