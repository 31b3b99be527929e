"""What planted scores do, and how few keys hold most of the attention that they give."""

from __future__ import annotations

import numpy as np
import pytest

from calibatt.kernels.geometry import Geometry
from calibatt.models.planted.structure import AXES, KINDS, Kind, Shares, frequencies, scores, structured_pairs

GEOMETRY = Geometry(grid=(5, 8, 10), heads=1, head_dim=128)


def test_frequencies_are_those_of_wans_rope() -> None:
    from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed

    for head_dim in (64, 128):
        rope = WanRotaryPosEmbed(head_dim, (1, 2, 2), 16)
        # one token on: the cosine of the frequency; each stands there twice
        np.testing.assert_allclose(np.cos(np.concatenate(frequencies(head_dim))), rope.freqs_cos[1, ::2], rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_highest_at_the_query_and_change_along_the_kinds_axes_alone(kind: Kind) -> None:
    found = scores(kind, GEOMETRY, (2, 3, 4))
    assert found[2, 3, 4] == found.max()
    changes = tuple(axis for axis in range(3) if np.abs(np.diff(found, axis=axis)).max() > 1e-9)
    assert changes == AXES[kind]
    # the peak is one √head_dim-th for each pair
    assert found.max() == pytest.approx(structured_pairs(kind, GEOMETRY).sum() / 128**0.5)


@pytest.mark.parametrize(
    ("kind", "amplitude", "content"), [("local", 2.0, 1.0), ("row", 2.5, 0.3), ("diffuse", 0.0, 2.0)]
)
def test_the_expected_share_is_that_of_drawn_scores(kind: Kind, amplitude: float, content: float) -> None:
    geometry = Geometry(grid=(9, 16, 20), heads=1, head_dim=128)
    generator = np.random.default_rng(1)
    shares = []
    for time, row, column in generator.integers(0, geometry.grid, size=(100, 3)).tolist():
        drawn = amplitude**2 * scores(kind, geometry, (time, row, column)).ravel()
        weights = np.sort(np.exp(drawn + content * generator.standard_normal(geometry.tokens)))[::-1]
        shares.append((1 + (weights.cumsum() < 0.95 * weights.sum()).sum()) / geometry.tokens)
    (expected,) = Shares(kind, geometry, 0.95).at(np.array([amplitude]), np.array([content]))
    assert expected == pytest.approx(np.mean(shares), abs=0.03)


def test_sharper_heads_need_fewer_keys() -> None:
    shares = Shares("local", GEOMETRY, 0.95).at(np.linspace(0, 4, 9), np.zeros(9))
    assert shares[0] == pytest.approx(0.95, abs=0.01)
    assert (np.diff(shares) < 0).all()
