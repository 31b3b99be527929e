"""A calibration for another size or number of steps: the same where nothing differs, refused where it cannot be."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from calibatt.calibration.artifact import Calibration
from calibatt.calibration.collect import calibrate_on
from calibatt.calibration.resized import nearest
from calibatt.kernels.geometry import Geometry
from calibatt.kernels.mask import unpacked
from calibatt.methods.base import Foreseen
from calibatt.methods.catalogue import build, settings_beside
from calibatt.methods.learning import CalibrationMismatch, Stage
from calibatt.methods.scaling import shares
from calibatt.methods.site import Site

Made = Callable[..., Any]
SMALL = Geometry(grid=(2, 6, 5), heads=2, head_dim=16)
# odd in every way
LARGE = replace(SMALL, grid=(3, 7, 9))
# of which blocks are learnt
SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "calibatt": {"anchors": 2, "levels": True, "block": (16, 8)},
    # its trials are computed by kernels that have no smaller blocks
    "budget": {"beside": 2, "block": (16, 16)},
    "scaling": {"block": (16, 8)},
}


@pytest.fixture
def learn(prompts: tuple[str, ...]) -> Made:
    """Calibrates a method by its own settings."""

    def made(videos: Any, method: str, **other: Any) -> Calibration:
        return calibrate_on(videos, method=method, prompts=prompts, seed=7, **SETTINGS.get(method, {}), **other)

    return made


@pytest.mark.parametrize(("text", "side"), [(0, "last"), (11, "last"), (11, "first")])
@pytest.mark.parametrize("how", [{"levels": True}, {"share": 0.5}, {"preset": "output-reuse"}], ids=str)
def test_to_the_same_size_and_steps_nothing_changes(
    run: Made, hand_made: Made, how: dict[str, Any], text: int, side: str, tmp_path: Path
) -> None:
    videos = hand_made(geometry=replace(SMALL, text_tokens=text, text_side=side))
    made = run(videos, **how)
    back = made.transferred(videos)
    assert back.tables.keys() == made.tables.keys()
    assert all(torch.equal(back.tables[name], made.tables[name]) for name in made.tables)
    # nothing of it is held
    assert all(table.is_meta for table in back.parts._tables.values())
    back.save(tmp_path / "x")
    again = Calibration.load(tmp_path / "x", verify=True)
    assert all(torch.equal(again.tables[name], made.tables[name]) for name in made.tables)
    assert again.provenance.transferred == (Stage(geometry=videos.geometry, steps=2, scheduler="Euler"),)
    assert replace(again.provenance, transferred=()) == made.provenance


@pytest.mark.parametrize("method", ["budget", "scaling"])
def test_other_maps_of_blocks_do_not_change_either(learn: Made, hand_made: Made, method: str) -> None:
    made = learn(hand_made(), method)
    back = made.transferred(hand_made())
    assert back.tables.keys() == made.tables.keys()
    assert all(torch.equal(back.tables[name], made.tables[name]) for name in made.tables)


@pytest.mark.parametrize("method", SETTINGS)
def test_at_another_size_and_number_of_steps_every_site_has_a_plan(
    learn: Made, hand_made: Made, method: str, tmp_path: Path
) -> None:
    videos = hand_made(geometry=LARGE, steps=5)
    learn(hand_made(), method).transferred(videos, block=(8, 16)).save(tmp_path / "x")
    back = Calibration.load(tmp_path / "x", verify=True)
    assert (back.provenance.geometry, back.provenance.steps, back.settings["block"]) == (LARGE, 5, [8, 16])
    built = build(method, calibration=back, **settings_beside(back))
    q, k, v = torch.randn(3, 2, LARGE.tokens, 16)
    for step in range(5):
        for layer in range(3):
            site = Site(
                geometry=LARGE, step=step, steps=5, sigma=0.0, branch="cond", layer=layer, layers=3
            )  # fmt: skip
            mask = built.plan(q, k, v, site).mask
            if mask is not None:
                assert bool(mask.keep().any(-1).all())
    if isinstance(built, Foreseen):
        assert 0 < built.mean_density() < 1
    if method == "scaling":
        assert torch.equal(back.tables["share"][4, 2], shares(back.tables["map"][4, 2]))


def test_each_step_is_that_of_the_nearest_noise_level(run: Made, hand_made: Made) -> None:
    made = run(hand_made())
    assert made.provenance.sigmas == (1.0, 0.5)
    back = made.transferred(hand_made(steps=5))
    assert back.provenance.sigmas == (1.0, 0.8, 0.6, pytest.approx(0.4), pytest.approx(0.2))
    for step, source in enumerate((0, 0, 1, 1, 1)):
        for name in made.tables:
            assert torch.equal(back.tables[name][step], made.tables[name][source])
    # of two as near the first
    assert nearest((0.75, 0.2), (1.0, 0.5, 0.25, 0.0)) == [0, 2]


def test_a_transfer_of_a_transfer_names_both(run: Made, hand_made: Made) -> None:
    twice = run(hand_made()).transferred(hand_made(steps=4)).transferred(hand_made(geometry=LARGE, steps=3))
    assert [(stage.geometry, stage.steps) for stage in twice.provenance.transferred] == [(SMALL, 2), (SMALL, 4)]
    twice.validate()


def test_blocks_that_share_text_are_kept_on_either_side(run: Made, hand_made: Made) -> None:
    for side in ("first", "last"):
        texts = replace(SMALL, text_tokens=11, text_side=side), replace(LARGE, text_tokens=11, text_side=side)
        back = run(hand_made(geometry=texts[0])).transferred(hand_made(geometry=texts[1]))
        keep = unpacked(back.tables["bits"][0, 0], 24)
        # 200 tokens in 12 and 25 blocks of 16 and 8; the eleven tokens of text are in one block of 16 and two of 8
        assert bool(keep[:, 12:].all())
        assert not bool(keep[:, :11].all())
        method = build("calibatt", preset="masks-only", calibration=back)
        site = Site(geometry=texts[1], step=0, steps=2, sigma=1.0, branch="cond", layer=0, layers=3)
        mask = method.plan(*torch.randn(3, 2, 200, 16), site).mask
        assert mask is not None
        text = slice(0, 2) if side == "first" else slice(-2, None)
        assert bool(mask.keep()[:, :, text].all())


@pytest.mark.parametrize(
    ("other", "says"),
    [
        ({"weights": "fedcba9876543210"}, "toy with weights 0123456789abcdef, not for toy with weights fedcba"),
        ({"layers": 4}, "3 layers, not for 4"),
        ({"geometry": replace(SMALL, heads=4)}, "2 heads × 16, text last, not for 2×6×5 tokens, 4 heads"),
        ({"geometry": replace(SMALL, head_dim=8)}, "2 heads × 8"),
        ({"geometry": replace(SMALL, text_side="first")}, "text last, not for .* first"),
    ],
    ids=["weights", "layers", "heads", "head dim", "text"],
)
def test_another_model_is_refused_in_one_line(run: Made, hand_made: Made, other: dict[str, Any], says: str) -> None:
    with pytest.raises(CalibrationMismatch, match=says) as error:
        run(hand_made()).transferred(hand_made(**other))
    assert "\n" not in str(error.value)


def test_what_cannot_be_transferred_is_refused_in_one_line(run: Made, learn: Made, hand_made: Made) -> None:
    made = run(hand_made())
    with pytest.raises(ValueError, match="a frame of 2 rows has fewer than 2"):
        made.transferred(hand_made(geometry=replace(SMALL, grid=(2, 2, 9))))
    early = replace(made, provenance=replace(made.provenance, sigmas=()))
    with pytest.raises(ValueError, match="does not say how noisy its steps were"):
        early.transferred(hand_made())
    for method, preset, says in (
        ("svoo", "default", "svoo learnt is not of blocks of tokens"),
        ("scaling", "uniform", "learn with dense_steps=0"),
    ):
        with pytest.raises(ValueError, match=says):
            learn(hand_made(), method, preset=preset).transferred(hand_made(geometry=LARGE))
    wrong = replace(made, provenance=replace(made.provenance, sigmas=(1.0,)))
    with pytest.raises(ValueError, match=r"provenance\.sigmas: 1 noise levels of 2 steps"):
        wrong.check_facts()


def test_what_is_not_transferred_is_refused_as_before_and_hears_of_it(run: Made, hand_made: Made) -> None:
    made = run(hand_made())
    for other in ({"geometry": LARGE}, {"steps": 5}):
        site = {"geometry": SMALL, "steps": 2, "step": 0, "sigma": 1.0, "branch": "cond", "layer": 0, "layers": 3}
        with pytest.raises(CalibrationMismatch, match="run `calibatt calibrate` for that, or `calibatt transfer`"):
            build("calibatt", calibration=made).plan(*torch.randn(3, 2, 60, 16), Site(**{**site, **other}))
