"""What is special about planted Mochi: its clock runs from noise to data, and text stands among the keys."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from calibatt.methods.call import Call
from calibatt.methods.catalogue import build
from calibatt.models.adapter import attached
from calibatt.models.entry import ModelEntry
from calibatt.models.generate import generate
from calibatt.models.planted.heads import fit
from calibatt.models.planted.mochi import timestep
from calibatt.models.planted.pipeline import PROFILES, load_planted
from calibatt.models.planted.planting import CLOCK, CLOCK_SCALE

# on the conditional branch, a token each and the end
PROMPT = "a cat walks over the stones of a wall"
TEXT = 10


class Attentions:
    """The attention of all heads in the first layer of the last step."""

    def __init__(self) -> None:
        self.found: Tensor | None = None

    def saw(self, call: Call) -> None:
        site = call.site
        if (site.branch, site.step, site.layer) == ("cond", site.steps - 1, 0):
            self.found = (call.q[0] @ call.k[0].mT / call.q.shape[-1] ** 0.5).softmax(-1)


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def mochi(request: pytest.FixtureRequest, small_mochi: ModelEntry) -> Any:
    """A pipeline of that dtype."""
    return load_planted(small_mochi, resolution="tiny", device=torch.device("cpu"), dtype=request.param)


def test_text_has_content_and_no_place(mochi: Any, small_mochi: ModelEntry) -> None:
    seen = Attentions()
    with attached(mochi, build("dense"), observers=(seen,)):
        generate(small_mochi, mochi, prompt=PROMPT, resolution="tiny", seed=0, steps=2)
    assert seen.found is not None
    attention = seen.found.float()
    heads = fit(PROFILES["mochi-1"], small_mochi.geometry("tiny"), layers=small_mochi.layers, seed=0).layers[0]
    kinds = set()
    for head, weights in zip(heads, attention, strict=True):
        video, text = weights[:-TEXT], weights[-TEXT:]
        # what keys of text get of the attention of the video, as a multiple of their number
        lift = float(video[:, -TEXT:].sum(-1).mean()) * weights.shape[1] / TEXT
        if head.amplitude > 2:
            assert lift < 0.5
        if head.kind == "diffuse":
            assert 0.5 < lift < 2
        # text sees all rows of all frames, whatever the head does: 40 of 10 keys
        assert float(text[:, :-TEXT].unflatten(-1, (40, 10)).sum(-1).mean(0).max()) < 3 / 40
        kinds.add(head.kind)
    assert kinds >= {"local", "temporal", "diffuse"}


def test_the_clock_runs_by_the_steps_of_the_pipeline(mochi: Any, small_mochi: ModelEntry) -> None:
    planted = fit(PROFILES["mochi-1"], small_mochi.geometry("tiny"), layers=small_mochi.layers, seed=0)
    generate(small_mochi, mochi, prompt=PROMPT, resolution="tiny", seed=0, steps=4, stop_after=1)
    times = mochi.scheduler.timesteps
    assert times.tolist() == pytest.approx([timestep(step / 4) for step in range(4)], abs=1e-3)
    embedder = mochi.transformer.time_embed
    for step in range(64):
        features = embedder.time_proj(torch.tensor([timestep(step / 64)]).to(mochi.transformer.dtype))
        told = embedder.timestep_embedder(features.to(mochi.transformer.dtype))[0]
        # linear in timesteps between the knots of the course, not in steps
        assert float(told[CLOCK]) / CLOCK_SCALE == pytest.approx(1 / planted.divisor(step / 64), rel=0.015)
        assert not told[CLOCK + 1 :].any()
