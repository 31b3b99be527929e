"""Steps that share a mask: which do, what the mask keeps, and what it takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from calibatt.kernels.mask import packed, unpacked
from calibatt.methods.calibatt.method import CalibAtt
from calibatt.methods.calibatt.sharing import SharedTables, cliques, overlaps
from calibatt.methods.catalogue import build
from calibatt.methods.learning import Learnt

Made = Callable[..., Any]


def test_overlaps_are_intersection_over_union() -> None:
    keep = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0], [0, 0, 1, 1]], dtype=torch.bool)
    expected = torch.tensor([[1, 2 / 3, 0], [2 / 3, 1, 1 / 4], [0, 1 / 4, 1]])
    torch.testing.assert_close(overlaps(packed(keep[:, None])), expected)


def test_a_group_is_of_steps_that_are_all_alike() -> None:
    # 0 and 1, 1 and 2 are alike, and 0 and 2 are not; 3 is like all of them
    alike = torch.eye(4, dtype=torch.bool)
    for one, other in ((0, 1), (1, 2), (0, 3), (1, 3), (2, 3)):
        alike[one, other] = alike[other, one] = True
    assert cliques(alike) == [[0, 1, 3], [2]]
    assert cliques(torch.eye(3, dtype=torch.bool)) == [[0], [1], [2]]


@pytest.fixture
def near(learnt: Made, learner: Made) -> Learnt:
    """Head 0 of layer 0 has one mask at both steps, but for a block of the second step; all other masks differ."""
    made: Learnt = learnt(learner())
    bits = made.tables["bits"].clone()
    keep = torch.zeros(1, 4, 8, dtype=torch.bool)
    keep[..., :5] = True
    bits[0, 0, 0] = packed(keep)[0]
    keep[0, 0, 7] = True
    bits[1, 0, 0] = packed(keep)[0]
    return replace(made, tables={**made.tables, "bits": bits})


def test_steps_whose_masks_overlap_have_one_that_keeps_what_either_keeps(near: Learnt) -> None:
    shared = replace(near, tables=SharedTables(near, 0.95))
    bits = near.tables["bits"]
    either = bits[0, 0, 0] | bits[1, 0, 0]
    for step in range(2):
        assert torch.equal(shared.part("bits", step, 0)[0], either)
        for layer, head in ((0, 1), (1, 0), (1, 1)):
            assert torch.equal(shared.part("bits", step, layer)[head], bits[step, layer, head])
    # 7 masks in place of 8
    assert shared.tables["bits"].shape == (7, 4, 4)
    assert shared.nbytes() == near.nbytes() - 16 + 4 * 8
    CalibAtt.check_tables(shared)
    # 20 of 21 blocks overlap
    assert SharedTables(near, 0.96)["bits"].shape[0] == 8


def test_a_plan_of_shared_masks_keeps_at_least_what_it_would(near: Learnt, site: Made, inputs: Made) -> None:
    shared = replace(near, tables=SharedTables(near, 0.3), settings={**near.settings, "share": 0.3})
    for step in range(2):
        for layer in range(2):
            one, other = (
                build("calibatt", preset="masks-only", calibration=made).plan(*inputs(), site(step, layer)).mask
                for made in (near, shared)
            )
            assert one is not None
            assert other is not None
            assert bool((one.keep() <= other.keep()).all())
            assert torch.equal(other.keep(), unpacked(shared.part("bits", step, layer), 8))


@pytest.mark.parametrize("wrong", [{"share": 0.0}, {"share": 1.1}, {"share": 0.97, "levels": True}], ids=str)
def test_sharing_that_makes_no_sense_is_refused(learner: Made, wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="steps share masks"):
        learner(**wrong)
