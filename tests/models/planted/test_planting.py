"""Structure planted in transformers, seen through their own forward pass."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from calibatt.calibration.collect import calibrate
from calibatt.kernels.geometry import Geometry
from calibatt.methods.call import Call
from calibatt.methods.catalogue import build
from calibatt.models.adapter import attached
from calibatt.models.entry import ModelEntry
from calibatt.models.generate import generate
from calibatt.models.planted.heads import Fit, expected, fit
from calibatt.models.planted.pipeline import PROFILES, load_planted, planter
from calibatt.models.planted.structure import AXES
from calibatt.models.shapes.concentration import NeededShares


def _stock(entry: ModelEntry) -> Any:
    return getattr(diffusers, entry.checked_family().transformer)


class Lifts:
    """How much more attention than their number the keys of a query's own frame, row and column get, by head."""

    def __init__(self) -> None:
        self.layers: list[Tensor] = []

    def saw(self, call: Call) -> None:
        site = call.site
        if (site.branch, site.step) != ("cond", site.steps - 1):
            return
        grid = site.geometry.grid
        tokens = site.geometry.video_tokens
        # text takes its part of it, where there is any
        attention = (call.q[0] @ call.k[0].mT / call.q.shape[-1] ** 0.5).softmax(-1)[:, :tokens, :tokens]
        places = torch.unravel_index(torch.arange(tokens), grid)
        self.layers.append(
            torch.stack(
                [
                    (attention * (place[:, None] == place)).sum(-1).mean(-1) * extent
                    for place, extent in zip(places, grid, strict=True)
                ],
                dim=-1,
            )
        )


@pytest.fixture(scope="module")
def planted(entry: ModelEntry) -> Fit:
    """What is in the model."""
    return fit(PROFILES[entry.name], entry.geometry("tiny"), layers=entry.layers, seed=0)


@pytest.fixture(scope="module")
def seen(entry: ModelEntry, pipe: Any) -> tuple[Lifts, NeededShares]:
    """A video, watched."""
    observers = Lifts(), NeededShares(queries=400)
    with attached(pipe, build("dense"), observers=observers):
        video = generate(entry, pipe, prompt="a cat", resolution="tiny", seed=0)
    assert video.isfinite().all()
    return observers


def test_each_head_falls_along_the_axes_of_its_kind_and_no_other(
    planted: Fit, seen: tuple[Lifts, NeededShares]
) -> None:
    checked = set()
    for heads, lifts in zip(planted.layers, seen[0].layers, strict=True):
        for head, lift in zip(heads, lifts, strict=True):
            if head.amplitude > 2 or head.kind == "diffuse":
                checked.add(head.kind)
                for axis in range(3):
                    assert (lift[axis] > 1.5) if axis in AXES[head.kind] else (0.8 < lift[axis] < 1.25)
    assert checked >= {"local", "temporal", "diffuse"}


def test_measured_shares_are_those_of_the_fit_and_fall_over_the_steps(
    entry: ModelEntry, planted: Fit, seen: tuple[Lifts, NeededShares]
) -> None:
    shares = seen[1].shares()
    geometry = entry.geometry("tiny")
    for step in range(entry.steps):
        divisor = planted.divisor(step / entry.steps)
        wanted = torch.tensor(
            [[expected(head, geometry, divisor=divisor) for head in heads] for heads in planted.layers]
        )
        # of 400 keys and latents of 64 channels; 0.01 on average
        torch.testing.assert_close(shares[step], wanted.float(), atol=0.06, rtol=0)
        assert float((shares[step] - wanted).abs().mean()) < 0.02
    assert float(shares[0].mean()) > float(shares[1].mean()) + 0.02


def test_the_weights_load_into_an_unmodified_transformer(pipe: Any, entry: ModelEntry) -> None:
    stock = _stock(entry).from_config(pipe.transformer.config)
    assert type(pipe.transformer) is _stock(entry)
    stock.load_state_dict(pipe.transformer.state_dict(), strict=True)


def test_a_seed_means_the_same_weights(pipe: Any, entry: ModelEntry) -> None:
    transformer = _stock(entry).from_config(pipe.transformer.config)
    how, at = planter(entry).plant, {"profile": PROFILES[entry.name]}
    how(transformer, entry.geometry("tiny"), **at)
    for name, weight in transformer.state_dict().items():
        assert torch.equal(weight, pipe.transformer.state_dict()[name]), name
    before = transformer.proj_out.weight.clone()
    how(transformer, entry.geometry("tiny"), **at, seed=1)
    assert not torch.equal(transformer.proj_out.weight, before)


def test_only_what_diffusers_keeps_in_fp32_is_fp32_in_a_bf16_model(pipe: Any, entry: ModelEntry) -> None:
    transformer = _stock(entry).from_config(pipe.transformer.config).to(torch.bfloat16)
    planter(entry).plant(transformer, entry.geometry("tiny"), profile=PROFILES[entry.name])
    wide = {name for name, weight in transformer.named_parameters() if weight.dtype == torch.float32}
    kept = transformer._keep_in_fp32_modules or ()
    assert wide == {name for name, _ in transformer.named_parameters() if any(k in name for k in kept)}
    assert all(bool(weight.isfinite().all()) for weight in transformer.parameters())


def test_another_transformer_is_refused(entry: ModelEntry) -> None:
    kind = entry.checked_family().transformer
    with pytest.raises(ValueError, match=f"planted in a {kind}: this is a Linear"):
        planter(entry).plant(torch.nn.Linear(2, 2), Geometry(grid=(1, 2, 2), heads=1, head_dim=8), profile="any")


def test_calibatt_finds_structure_that_random_weights_do_not_have(entry: ModelEntry) -> None:
    few = replace(entry, layers=2, heads=4)
    assert few.untrained is not None
    at: dict[str, Any] = {"device": torch.device("cpu"), "dtype": torch.float32}
    planted = load_planted(few, resolution="tiny", **at)
    random = few.untrained(few.geometry("tiny"), few.layers, *at.values()).pipe.transformer
    densities = []
    for transformer in (planted.transformer, random):
        one = type(planted)(**{**planted.components, "transformer": transformer})
        learnt = calibrate(few, one, resolution="tiny", prompts=("a cat",), seed=7, steps=2, block=(16, 16), anchors=2)
        densities.append(build("calibatt", calibration=learnt).mean_density())
    assert densities[0] < densities[1] - 0.1
