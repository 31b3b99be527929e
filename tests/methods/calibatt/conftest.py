"""A learner, calls, and something learnt, without a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from calibatt.kernels.geometry import Geometry
from calibatt.methods.calibatt.learner import CalibAttLearner
from calibatt.methods.calibatt.schedule import Schedule
from calibatt.methods.learning import Learnt, Origin, Provenance, settings_of
from calibatt.methods.site import Site

SCHEDULE = Schedule(early=0.9, late=0.6, decay=3.0)
# 2 × 6 × 5 tokens in blocks of 16 × 8: a shorter last block on either axis
GEOMETRY = Geometry(grid=(2, 6, 5), heads=2, head_dim=16)
STEPS, LAYERS = 2, 2


@pytest.fixture
def learner() -> Callable[..., CalibAttLearner]:
    """A learner with other settings than some."""

    def made(**other: Any) -> CalibAttLearner:
        settings: dict[str, Any] = {"block": (16, 8), "schedule": SCHEDULE, "rho": 0.5, "gamma": 0.87, "anchors": 2}
        settings |= {"similarity_prompts": None, "query_stride": 1, "levels": False, "output_errors": False}
        settings["share"] = None
        return CalibAttLearner(**{**settings, **other})

    return made


@pytest.fixture
def site() -> Callable[..., Site]:
    """A site with other facts than some."""

    def made(step: int = 0, layer: int = 0, **other: Any) -> Site:
        facts: dict[str, Any] = {"geometry": GEOMETRY, "steps": STEPS, "layers": LAYERS, "branch": "cond", "sigma": 0.5}
        return Site(step=step, layer=layer, **{**facts, **other})

    return made


@pytest.fixture
def inputs() -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """Queries, keys and values of a geometry; video tokens are the same however many text tokens there are."""

    def made(geometry: Geometry = GEOMETRY, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        def drawn(tokens: int, seed: int) -> Tensor:
            shape = (3, geometry.heads, tokens, geometry.head_dim)
            return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).mul(2)

        parts = [drawn(geometry.video_tokens, seed), drawn(geometry.text_tokens, seed + 1000)]
        q, k, v = torch.cat(parts if geometry.text_side == "last" else parts[::-1], dim=2)
        return q, k, v

    return made


@pytest.fixture
def learnt(site: Callable[..., Site], inputs: Callable[..., tuple[Tensor, Tensor, Tensor]]) -> Callable[..., Learnt]:
    """What a learner learns from one video for each of some numbers of text tokens."""

    def made(learner: CalibAttLearner, *, texts: Sequence[int] = (0, 0, 0), geometry: Geometry = GEOMETRY) -> Learnt:
        merged = []
        for place in range(STEPS * LAYERS):
            notes = []
            for prompt, text in enumerate(texts):
                own = replace(geometry, text_tokens=text)
                where = site(place // LAYERS, place % LAYERS, geometry=own)
                notes.append(learner.note(*inputs(own, 10 * place + prompt), where, prompt))
            merged.append(learner.merge(notes))
        tables = {name: torch.stack([one[name] for one in merged]).unflatten(0, (STEPS, LAYERS)) for name in merged[0]}
        provenance = Provenance(
            origin=Origin(model="toy", weights="0123456789abcdef", scheduler="Euler"),
            geometry=replace(geometry, text_tokens=max(texts)), steps=STEPS, layers=LAYERS, guidance=3.0,
            prompts=tuple(f"prompt {number}" for number in range(len(texts))), seed=7, cost_ratio=2.5,
        )  # fmt: skip
        return Learnt(
            method="calibatt", preset="default", settings=settings_of(learner), tables=tables, provenance=provenance
        )

    return made
