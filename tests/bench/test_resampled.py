"""Attention inputs of the embedded model at another one's size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from calibatt.bench.resampled import ResampledVideos, check_resampled, product_scale, resample
from calibatt.kernels.catalogue import KERNELS
from calibatt.kernels.geometry import Geometry
from calibatt.methods.call import Attention
from calibatt.methods.learning import Origin
from calibatt.methods.site import Branch, Site

SMALL = Geometry(grid=(2, 3, 4), heads=2, head_dim=8)


def test_a_channel_that_rises_along_an_axis_does_so_on_the_other_grid() -> None:
    columns = torch.arange(4.0).expand(2, 3, 4)
    x = columns.reshape(1, 24, 1).expand(1, 24, 64).contiguous()
    large = Geometry(grid=(4, 6, 8), heads=3, head_dim=128)
    out = resample(x, (2, 3, 4), large)
    assert out.shape == (1, 3, 4 * 6 * 8, 128)
    # twice as many places, each a quarter of a token beside the old ones; beyond the outermost there is nothing to read
    expected = torch.tensor([0.0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3.0])
    torch.testing.assert_close(out[0, 2, :, 127].view(4, 6, 8)[3, 2], expected)


def test_the_own_grid_gives_the_inputs_back_and_heads_come_in_turns() -> None:
    x = torch.randn(2, 24, 8, generator=torch.Generator().manual_seed(0))
    out = resample(x, SMALL.grid, replace(SMALL, heads=5))
    torch.testing.assert_close(out[0], x[[0, 1, 0, 1, 0]])


def test_repeated_channels_leave_the_attention_as_it_was() -> None:
    q, k = torch.randn(2, 1, 24, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    wide = replace(SMALL, heads=1, head_dim=32)
    scale = product_scale(8, 32)
    wide_q, wide_k = (resample(x.float(), SMALL.grid, wide)[0].double() * scale for x in (q, k))
    torch.testing.assert_close(wide_q @ wide_k.mT / 32**0.5, q @ k.mT / 8**0.5, atol=1e-5, rtol=1e-5)


def test_text_and_other_head_dims_are_refused() -> None:
    check_resampled(Geometry(grid=(2, 3, 4), heads=2, head_dim=128))
    for other in ({"text_tokens": 3}, {"head_dim": 96}):
        with pytest.raises(ValueError, match="without text"):
            check_resampled(Geometry(**{"grid": (2, 3, 4), "heads": 2, "head_dim": 128, **other}))


class TwoLayers:
    """Videos of one step, two layers and both branches, of constant inputs that tell layers and videos apart."""

    resolution = "tiny"
    geometry, steps, layers, guidance = SMALL, 1, 2, 3.0

    def origin(self) -> Origin:
        return Origin(model="small", weights="ab", scheduler="flow")

    def sigmas(self, prompt: str) -> tuple[float, ...]:
        return (1.0,)

    def show(
        self,
        attention: Attention,
        *,
        prompts: Sequence[str],
        seed: int,
        after_step: Callable[[], object] = lambda: None,
    ) -> None:
        attention.start_video()
        branches: tuple[Branch, ...] = ("cond", "uncond")
        for branch in branches:
            for layer in range(2):
                where = {"geometry": SMALL, "step": 0, "steps": 1, "sigma": 1.0, "layer": layer, "layers": 2}
                for sample in range(len(prompts)):
                    x = torch.full((1, 2, 24, 8), float(layer) + 20 * sample + (10 if branch == "uncond" else 0))
                    x[:, 1] += 0.5
                    attention(x, x, x, Site(**where, branch=branch, sample=sample))
        after_step()


class Seen:
    """Keeps what it is shown."""

    def __init__(self) -> None:
        self.videos = 0
        self.calls: list[tuple[Site, Tensor]] = []

    def start_video(self) -> None:
        self.videos += 1

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, site: Site) -> Tensor:
        self.calls.append((site, q))
        return v


def test_the_heads_of_all_layers_make_one_call_of_the_conditional_pass() -> None:
    seen, steps = Seen(), []
    large = Geometry(grid=(3, 4, 5), heads=6, head_dim=8)
    videos = ResampledVideos(TwoLayers(), KERNELS["sdpa-math"], model="large", resolution="480p", geometry=large)
    videos.show(seen, prompts=("a", "b"), seed=0, after_step=lambda: steps.append(1))
    (site, q), (other, of_other) = seen.calls
    assert (seen.videos, len(steps)) == (1, 1)
    assert (site.sample, other.sample) == (0, 1)
    torch.testing.assert_close(of_other, q + 20)
    assert (site.geometry, site.layer, site.layers, site.steps, site.branch) == (large, 0, 1, 1, "cond")
    # layer 0's two heads, layer 1's two, and layer 0's again
    torch.testing.assert_close(q[0, :, 7, 3], torch.tensor([0.0, 0.5, 1.0, 1.5, 0.0, 0.5]))
    assert videos.inputs == f"resampled from small, {SMALL}"
    # what is learnt from them is for the large model's size, and the small one's weights
    assert videos.origin() == Origin(model="large", weights="ab", scheduler="flow")
