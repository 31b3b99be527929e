"""Shapes that tests of several methods share."""

from __future__ import annotations

import pytest

from calibatt.kernels.geometry import Geometry

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
