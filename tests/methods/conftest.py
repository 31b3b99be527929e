"""What tests of several methods share: shapes that nothing divides, and learning without a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import pytest
import torch
from torch import Tensor

from calibatt.kernels.geometry import Geometry
from calibatt.methods.learning import Learner, Learnt, Origin, Provenance, settings_of
from calibatt.methods.site import Site

# shapes that neither patches, curves nor blocks divide
_RAGGED = (
    Geometry(grid=(1, 7, 9), heads=3, head_dim=8),
    Geometry(grid=(8, 5, 25), heads=3, head_dim=8),
    Geometry(grid=(6, 6, 27), heads=3, head_dim=8, text_tokens=28, text_side="first"),
    Geometry(grid=(6, 6, 27), heads=3, head_dim=8, text_tokens=28, text_side="last"),
)


@pytest.fixture
def all_ragged() -> tuple[Geometry, ...]:
    """All shapes that nothing divides, for what goes from one to the next."""
    return _RAGGED


@pytest.fixture(params=_RAGGED, ids=str)
def ragged(request: pytest.FixtureRequest) -> Geometry:
    """Each of them."""
    geometry: Geometry = request.param
    return geometry


Inputs = tuple[Tensor, Tensor, Tensor]
# what a method's learner learns from the inputs of some sites, one of each prompt; a site without any has zeros
Learn = Callable[[str, Learner, Mapping[Site, Sequence[Inputs]]], Learnt]


@pytest.fixture
def learn() -> Learn:
    """Notes and merges as a calibration does, without a model."""

    def learnt(method: str, learner: Learner, videos: Mapping[Site, Sequence[Inputs]]) -> Learnt:
        merged = {
            site: learner.merge([learner.note(*qkv, site, prompt) for prompt, qkv in enumerate(prompts)])
            for site, prompts in videos.items()
        }
        any_site = next(iter(merged))
        steps, layers = any_site.steps, any_site.layers
        tables = {name: torch.zeros(steps, layers, *part.shape).to(part) for name, part in merged[any_site].items()}
        for site, parts in merged.items():
            for name, part in parts.items():
                tables[name][site.step, site.layer] = part
        return learnt_tables(method, any_site, tables, learner)

    return learnt


Tabled = Callable[..., Learnt]


@pytest.fixture
def tabled() -> Tabled:
    """Wraps tables as what a method learnt from videos like a site's."""
    return learnt_tables


def learnt_tables(method: str, site: Site, tables: Mapping[str, Tensor], learner: Learner | None = None) -> Learnt:
    provenance = Provenance(
        origin=Origin(model="none", weights="0", scheduler="none"), geometry=site.geometry, steps=site.steps,
        layers=site.layers, guidance=1.0, prompts=("one", "two"), seed=0, cost_ratio=1.0,
    )  # fmt: skip
    settings = {} if learner is None else settings_of(learner)
    return Learnt(method=method, preset="default", settings=settings, tables=tables, provenance=provenance)
