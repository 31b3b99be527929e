"""JSON into dataclasses: typed, finite, and refused in one short line."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from calibatt.kernels.geometry import Geometry
from calibatt.methods.facts import one_line, read_facts


@dataclass(frozen=True, kw_only=True)
class Outer:
    """Holds another."""

    geometry: Geometry
    share: float = 0.5


def test_lists_are_tuples_and_dataclasses_lie_within_each_other() -> None:
    found = read_facts(Outer, '{"geometry": {"grid": [1, 2, 3], "heads": 4, "head_dim": 8}, "share": 1}')
    assert found == Outer(geometry=Geometry(grid=(1, 2, 3), heads=4, head_dim=8), share=1.0)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"grid": [1, 2, 3], "heads": 4}', "^head_dim: Field required"),
        ('{"grid": [1, 2, 3], "heads": 4, "head_dim": true}', "^head_dim: .*integer"),
        ('{"grid": [1, 2, 3], "heads": 4, "head_dim": 8, "depth": 1}', "^depth: "),
        ('{"grid": [1, 2, 0], "heads": 4, "head_dim": 8}', "^a geometry needs"),
        ("{}, {}", "at most 1 item"),
        ("[" * 100_000, "recursion limit"),
        ("", "at least 1 item|Field required"),
        ("\ud800", "unicode string"),
    ],
    ids=["missing", "type", "unknown", "own", "two", "deep", "none", "surrogate"],
)
def test_what_does_not_fit_is_refused_in_one_line_that_names_it(text: str, says: str) -> None:
    with pytest.raises(ValueError, match=says) as error:
        read_facts(Geometry, text)
    assert len(str(error.value)) < 400
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1e999"])
def test_a_number_that_is_not_finite_is_refused(number: str) -> None:
    with pytest.raises(ValueError, match=r"share: .*finite"):
        read_facts(Outer, f'{{"geometry": {{"grid": [1, 2, 3], "heads": 4, "head_dim": 8}}, "share": {number}}}')


def test_what_is_shown_of_a_file_is_one_short_line() -> None:
    assert one_line("a\nb\x1b[31m×") == "a b [31m×"
    assert len(one_line("x" * 10_000)) < 310
