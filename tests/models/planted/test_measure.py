"""Shares of a planted model's heads, measured without a forward pass."""

from __future__ import annotations

from typing import Any

import pytest

from calibatt.models.entry import ModelEntry
from calibatt.models.planted import measure
from calibatt.models.planted.heads import expected, fit
from calibatt.models.planted.pipeline import PROFILES


def test_shares_of_sampled_queries_are_those_of_the_fit(entry: ModelEntry, pipe: Any) -> None:
    geometry = entry.geometry("tiny")
    planted = fit(PROFILES[entry.name], geometry, layers=entry.layers, seed=0)
    shares = measure.measure(entry, pipe.transformer, resolution="tiny", queries=100, steps=(0.0, 0.6))
    assert shares.shape == (2, entry.layers, entry.heads)
    for step, found in zip((0.0, 0.6), shares, strict=True):
        divisor = planted.divisor(step)
        wanted = [[expected(head, geometry, divisor=divisor) for head in heads] for heads in planted.layers]
        for layer, heads in zip(found.tolist(), wanted, strict=True):
            assert layer == pytest.approx(heads, abs=0.06)
    facts = measure._facts(entry, "tiny", 100, planted, shares)
    assert facts["weights"] == "planted"
    assert sum(facts["kinds"].values()) == entry.layers * entry.heads
    # the second half of the steps in the tables of Wan 1.3B and HunyuanVideo
    late = {"wan2.1-1.3b": 0.114, "mochi-1": 0.142}
    assert facts["late_published"]["mean"] == pytest.approx(late[entry.name], abs=0.015)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "shapes"], "not in shapes"),
        (["--model", "wan2.1-1.3b", "--queries", "0"], "--queries 0: give a whole number"),
        (["--model", "wan2.1-1.3b", "--resolution", "8k"], "unknown resolution"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_a_line(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["measure", *arguments, "--out", "nowhere.json"])
    with pytest.raises(SystemExit):
        measure.main()
    assert message in capsys.readouterr().err
