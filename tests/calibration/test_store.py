"""The store: plans for sites, mismatches, and a file that is whole or refused."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from calibatt.calibration import file, store
from calibatt.calibration.levels import keep_at
from calibatt.calibration.repetition import anchor_rows
from calibatt.calibration.schedule import Schedule
from calibatt.calibration.store import Calibration, CalibrationMismatch, Provenance, UnusableCalibration
from calibatt.kernels.geometry import Geometry
from calibatt.kernels.mask import BlockMask
from calibatt.kernels.plan import RowReuse
from calibatt.methods.site import Site

STEPS, LAYERS, HEADS = 3, 2, 4
# 2 × 8 × 7 tokens in blocks of 16 × 10: a shorter last block along the keys
GEOMETRY = Geometry(grid=(2, 8, 7), heads=HEADS, head_dim=16)
KEEP = torch.rand(STEPS, LAYERS, HEADS, 7, 12, generator=torch.Generator().manual_seed(0)) < 0.5


@pytest.fixture
def calibration() -> Calibration:
    masks = [BlockMask.from_keep(keep, tokens=112, block_q=16, block_k=10).bits for keep in KEEP.flatten(0, 1)]
    # by head: never, always, in layer 0 only, never repetitive
    similarity = torch.tensor([0.1, 0.99, 0.5, 0.86]).repeat(STEPS, LAYERS, 1)
    similarity[:, 0, 2] = 0.87
    return Calibration(
        bits=torch.stack(masks).view(STEPS, LAYERS, HEADS, 7, -1),
        similarity=similarity,
        gamma=0.87,
        provenance=Provenance(
            model="toy",
            weights="0123456789abcdef",
            resolution="small",
            geometry=GEOMETRY,
            steps=STEPS,
            guidance=3.0,
            prompts=("a circle, “red”", "a square"),
            seed=7,
            block=(16, 10),
            schedule=Schedule(early=0.99, late=0.8, decay=16.0),
            rho=0.5,
            anchors=2,
            similarity_prompts=1,
            cost_ratio=2.5,
            mask_agreement=0.75,
            versions={"torch": torch.__version__},
            created="2026-01-02T03:04:05+00:00",
        ),
    )


def site(step: int = 1, layer: int = 0, **other: Any) -> Site:
    facts: dict[str, Any] = {"geometry": GEOMETRY, "steps": STEPS, "layers": LAYERS, "branch": "cond", "sigma": 0.5}
    return Site(step=step, layer=layer, **{**facts, **other})


def test_repetitive_heads_reuse_rows_and_the_others_have_their_mask(calibration: Calibration) -> None:
    plan = calibration.plan(site(step=2, layer=0))
    assert plan.kinds == ("masked", "reused", "reused", "masked")
    assert calibration.plan(site(step=2, layer=1)).kinds == ("masked", "reused", "masked", "masked")
    assert plan.mask is not None
    assert torch.equal(plan.mask.keep(), KEEP[2, 0])
    expected = RowReuse.of_anchor_rows(GEOMETRY, anchor_rows(8, 2))
    assert plan.reuse is not None
    assert torch.equal(plan.reuse.computed[plan.reuse.source], expected.computed[expected.source])


def test_without_repetition_every_head_has_its_mask(calibration: Calibration) -> None:
    plan = calibration.plan(site(), repetition=False)
    assert plan.kinds == ("masked",) * HEADS
    assert plan.reuse is None


def test_a_lower_threshold_makes_all_heads_reuse_rows(calibration: Calibration) -> None:
    plan = replace(calibration, gamma=0.0).plan(site())
    assert plan.kinds == ("reused",) * HEADS
    assert plan.mask is None


def test_a_site_always_gets_the_same_plan_on_both_branches_and_masks_are_not_copied(calibration: Calibration) -> None:
    plan = calibration.plan(site())
    assert calibration.plan(site(branch="uncond", sigma=0.1, sample=1)) is plan
    assert plan.mask is not None
    assert plan.mask.bits.untyped_storage().data_ptr() == calibration.bits.untyped_storage().data_ptr()
    assert calibration.plan(site(layer=1)).reuse is plan.reuse


def test_density_is_that_of_the_plans(calibration: Calibration) -> None:
    density = calibration.density()
    assert density.shape == (STEPS, LAYERS, HEADS)
    assert torch.equal(density[2, 1], calibration.plan(site(step=2, layer=1)).density())
    # repetitive: 2 of 8 rows are computed
    assert density[2, 1, 1].item() == pytest.approx(0.25)
    assert calibration.density(repetition=False)[2, 1, 1].item() == pytest.approx(
        KEEP[2, 1, 1].double().mean().item(), abs=0.05
    )


@pytest.mark.parametrize(
    ("other", "says"),
    [
        ({"geometry": replace(GEOMETRY, grid=(2, 7, 8))}, r"2×8×7 .* not for 2×7×8"),
        ({"steps": 4}, "3 steps, not for 4"),
        ({"layers": 3}, "2 layers, not for 3"),
    ],
)
def test_another_site_is_refused_by_naming_both(calibration: Calibration, other: dict[str, Any], says: str) -> None:
    with pytest.raises(CalibrationMismatch, match=says):
        calibration.plan(site(**other))


@pytest.mark.parametrize("other", [("other", "0123456789abcdef"), ("toy", "fedcba9876543210")])
def test_another_model_or_other_weights_are_refused(calibration: Calibration, other: tuple[str, str]) -> None:
    calibration.check_model("toy", "0123456789abcdef")
    with pytest.raises(CalibrationMismatch, match="run `calibatt calibrate`") as error:
        calibration.check_model(*other)
    assert "\n" not in str(error.value)


def test_bits_of_another_number_of_tokens_or_steps_cannot_be_a_calibration(calibration: Calibration) -> None:
    with pytest.raises(ValueError, match="uint8 bits"):
        replace(calibration, bits=calibration.bits[..., :6, :])
    with pytest.raises(ValueError, match="3 steps"):
        replace(calibration, bits=calibration.bits[:2], similarity=calibration.similarity[:2])


LEVELS = torch.randint(0, 255, KEEP.shape, generator=torch.Generator().manual_seed(1)).to(torch.uint8)


def test_masks_of_another_loss_come_from_levels_and_those_of_the_schedule_from_the_bits(
    calibration: Calibration,
) -> None:
    adjustable = replace(calibration, levels=LEVELS)
    for loss in (0.0, 1.0, 4.0):
        other = adjustable.at(loss)
        assert other.loss == loss
        mask = other.plan(site(step=2, layer=0), repetition=False).mask
        assert mask is not None
        assert torch.equal(mask.keep(), KEEP[2, 0] if loss == 1 else keep_at(LEVELS[2, 0], loss))
    assert adjustable.at(0.25).density().mean() > adjustable.at(4.0).density().mean()
    # from there to any other
    assert torch.equal(adjustable.at(4.0).at(0.25).bits, adjustable.at(0.25).bits)


def test_without_levels_another_loss_is_refused(calibration: Calibration) -> None:
    assert calibration.at(1.0) is calibration
    with pytest.raises(ValueError, match=r"a loss of 1, not for 2: make one by `calibatt calibrate --levels`"):
        calibration.at(2.0)


def test_levels_of_other_blocks_cannot_be_a_calibrations(calibration: Calibration) -> None:
    with pytest.raises(ValueError, match="7 × 12 blocks"):
        replace(calibration, levels=LEVELS[..., :-1])


@pytest.mark.parametrize("levels", [None, LEVELS])
def test_a_saved_calibration_comes_back_bit_for_bit(
    calibration: Calibration, tmp_path: Path, levels: torch.Tensor | None
) -> None:
    path = tmp_path / "new folder" / "toy.safetensors"
    calibration = calibration if levels is None else replace(calibration, levels=levels).at(2.0)
    calibration.save(path)
    back = Calibration.load(path)
    assert back.loss == (1.0 if levels is None else 2.0)
    assert (back.levels is None) == (levels is None)
    assert levels is None or (back.levels is not None and torch.equal(back.levels, levels))
    assert torch.equal(back.bits, calibration.bits)
    assert torch.equal(back.similarity, calibration.similarity)
    assert (back.gamma, back.provenance) == (calibration.gamma, calibration.provenance)
    assert list(path.parent.iterdir()) == [path]


def test_nothing_is_left_behind_when_saving_fails(
    calibration: Calibration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "toy.safetensors"
    path.write_bytes(b"what was there before")

    def fail_half_way(tensors: object, aside: Path, metadata: object) -> None:
        aside.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(file, "save_file", fail_half_way)
    with pytest.raises(OSError, match="disk full"):
        calibration.save(path)
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == b"what was there before"


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def flip_a_bit_of_a_mask(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def change(name: str, edit: Callable[[str], str]) -> Callable[[Path], None]:
    def changed(path: Path) -> None:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata()
        tensors = safetensors.torch.load_file(path)
        safetensors.torch.save_file(tensors, path, metadata={**metadata, name: edit(metadata[name])})

    return changed


def save_something_else(path: Path) -> None:
    safetensors.torch.save_file({"weights": torch.zeros(3)}, path)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (Path.unlink, "does not exist"),
        (lambda path: path.write_text("{}"), "cannot be read"),
        (cut_short, "cut short"),
        (flip_a_bit_of_a_mask, "changed or damaged"),
        (change("facts", lambda facts: facts.replace("0123456789abcdef", "fedcba9876543210")), "changed or damaged"),
        (change("schema", lambda schema: "calibatt-calibration-0"), "calibatt-calibration-0.*calibrate. again"),
        (save_something_else, "is not a calibration"),
        (lambda path: (path.unlink(), path.mkdir()), "cannot be read"),
    ],
)
def test_an_unusable_file_is_refused_in_one_line(
    calibration: Calibration, tmp_path: Path, damage: Callable[[Path], object], says: str
) -> None:
    path = tmp_path / "toy.safetensors"
    calibration.save(path)
    damage(path)
    with pytest.raises(UnusableCalibration, match=says) as error:
        Calibration.load(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_with_a_right_checksum_and_contradicting_facts_is_refused(
    calibration: Calibration, tmp_path: Path
) -> None:
    path = tmp_path / "toy.safetensors"
    tensors = {"bits": calibration.bits, "similarity": calibration.similarity}
    facts = {"gamma": 0.87, "provenance": {**calibration.provenance.to_json(), "steps": 9}}
    file.write(path, store.SCHEMA, tensors, facts)
    with pytest.raises(UnusableCalibration, match=r"contradicts itself: .* 9 steps"):
        Calibration.load(path)
