"""Methods are told apart by colour and marker, by colour-blind readers too."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from skimage.color import deltaE_ciede2000, rgb2lab

from calibatt.bench.record import MARKERS, load_run
from calibatt.methods.catalogue import METHODS
from calibatt.reports.rows import COLOURS

RESULTS = sorted((Path(__file__).resolve().parents[2] / "bench" / "results").glob("*/*.json"))
# of dense and the control, which choose no blocks
GREY = METHODS["dense"].colour
PALETTE = (*COLOURS, GREY)
LOOKS = {name: (method.colour, method.marker) for name, method in METHODS.items()}
# markers that differ by a turn alone are one shape, from afar
SHAPES = {
    "o": "circle", "s": "square", "D": "diamond", "*": "star", "P": "cross", "X": "cross", "^": "triangle",
    "v": "triangle", "<": "triangle", ">": "triangle",
}  # fmt: skip
# Machado, Oliveira and Fernandes, "A physiologically-based model for simulation of color vision deficiency" (2009),
# at full severity, for linear RGB; red and green blindness, which one man in twelve has to some degree
SEEN = {
    "everyone": np.eye(3),
    "deuteranopia": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    ),
    "protanopia": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
}
# CIEDE2000: 1 is what can just be told apart side by side. Ten and more of it is another colour across a figure; below
# 16, a marker that both colours have would be mistaken
APART, MISTAKEN = 12.0, 16.0


def _lab(colour: str, eyes: str) -> np.ndarray:
    """A colour as it is seen, in CIELAB."""
    encoded = np.array([int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)])
    # sRGB's transfer function (IEC 61966-2-1) and its inverse
    linear = np.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4)
    seen = np.clip(SEEN[eyes] @ linear, 0, 1)
    return rgb2lab(np.where(seen <= 0.0031308, 12.92 * seen, 1.055 * seen ** (1 / 2.4) - 0.055))


def _difference(one: str, other: str, eyes: str) -> float:
    return float(deltaE_ciede2000(_lab(one, eyes), _lab(other, eyes)))


def test_the_simulation_makes_red_and_green_alike_and_leaves_blue_and_yellow_apart() -> None:
    # of one lightness
    red, green = "#B06060", "#708050"
    assert _difference(red, green, "deuteranopia") < _difference(red, green, "everyone") / 3
    assert _difference("#4060C0", "#A09020", "deuteranopia") > 30


def test_each_method_has_a_look_of_the_palette_and_of_its_own() -> None:
    assert len(set(LOOKS.values())) == len(METHODS) == 26
    assert {colour for colour, _ in LOOKS.values()} == set(PALETTE)
    assert {marker for _, marker in LOOKS.values()} <= set(MARKERS)


@pytest.mark.parametrize("colour", PALETTE)
def test_methods_of_one_colour_have_different_shapes(colour: str) -> None:
    shapes = [SHAPES[marker] for one, marker in LOOKS.values() if one == colour]
    assert len(shapes) == len(set(shapes)) <= 5


@pytest.mark.parametrize("eyes", SEEN)
def test_colours_differ_for_colour_blind_readers_and_those_that_come_near_share_no_marker(eyes: str) -> None:
    for one, other in itertools.combinations(PALETTE, 2):
        difference = _difference(one, other, eyes)
        assert difference >= APART, (one, other)
        markers = [{marker for colour, marker in LOOKS.values() if colour == own} for own in (one, other)]
        assert difference >= MISTAKEN or not markers[0] & markers[1], (one, other, markers)


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.name)
def test_a_method_looks_the_same_in_every_committed_result(path: Path) -> None:
    for record in load_run(path).records:
        if record.method in METHODS:
            method = METHODS[record.method]
            shown = (record.method_label, record.method_colour, record.method_marker)
            assert shown == (method.label, method.colour, method.marker)


def test_the_committed_results_have_all_methods() -> None:
    assert {record.method for path in RESULTS for record in load_run(path).records} >= set(METHODS)
