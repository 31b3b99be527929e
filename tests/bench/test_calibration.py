"""What calibrating costs beside the same videos made densely, and how far masks from some queries agree."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from calibatt.bench.cells import Arm
from calibatt.bench.context import Context
from calibatt.bench.offline import CALIBRATION_SEED, Lesson, Prepared
from calibatt.bench.record import Record
from calibatt.bench.suites import calibration
from calibatt.calibration.artifact import Calibration
from calibatt.kernels.mask import BlockMask
from calibatt.kernels.plan import Plan
from calibatt.methods.learning import Origin, Provenance
from calibatt.methods.site import Site

PROMPTS = ("one", "two")
EXACT = Arm(method="calibatt", preset="default", mode="native", kernel="flex")
STRIDED = replace(EXACT, query_stride=2)


class Keeps:
    """A mask of two by two blocks, the same at every site, for one head; the other has none."""

    def __init__(self, keep: list[list[bool]]) -> None:
        self._mask = BlockMask.from_keep(torch.tensor([keep, [[True] * 2] * 2]), tokens=16, block_q=8, block_k=8)

    def reset(self) -> None:
        pass

    def plan(self, q: Tensor, k: Tensor, v: Tensor, site: Site) -> Plan:
        return Plan(tokens=16, kinds=("masked", "dense"), mask=self._mask)


@dataclass(frozen=True)
class SlowToCompile:
    """A learner whose first call takes a minute."""

    clock: Any

    def note(self, q: Tensor, k: Tensor, v: Tensor, site: Site, prompt: int) -> dict[str, Tensor]:
        self.clock.now += 60
        return {}

    def merge(self, notes: Any) -> Any:
        raise AssertionError("nothing is merged here")


@pytest.fixture
def measured(fakes: Any) -> Callable[..., Record]:
    """The record of an arm that learns from two videos in 20 seconds; a dense call takes one, of eight a video."""
    fakes.arm("dense")
    whole = fakes.context()
    fakes.seeds = []

    def film(attention: Any, prompt: str, seed: int) -> Tensor:
        fakes.seeds.append((prompt, seed))
        made: Tensor = whole.film(attention, prompt, seed)
        return made

    def prepared(arm: Arm) -> Prepared:
        provenance = Provenance(
            origin=Origin(model="fake", weights="ab", scheduler="flow"), geometry=whole.probes[0].site.geometry,
            steps=2, layers=2, guidance=3.0, prompts=PROMPTS, seed=0, cost_ratio=7.0,
        )  # fmt: skip
        made = Calibration(
            method="calibatt", preset="default", settings={"block": [8, 8]}, tables={"agreement": torch.ones(2, 2, 2)},
            provenance=provenance,
        )  # fmt: skip
        return Prepared(calibration=made, seconds=20.0)

    methods = {EXACT: Keeps([[True, True], [True, False]]), STRIDED: Keeps([[True, False], [True, True]])}
    dense = replace(whole.dense, times=(1.0,))  # type: ignore[type-var]
    context = replace(whole, method=methods.__getitem__, prepared=prepared, film=film, dense=dense)

    def one(arm: Arm, lesson: Lesson | None = None, context: Context = context) -> Record:
        return calibration.one(context, arm, lesson, partial(calibration._dense_s, context))

    return one


def test_the_cost_is_that_of_learning_over_the_same_videos_made_densely(measured: Any, fakes: Any) -> None:
    record = measured(EXACT)
    assert record.outcome == "ok", record.reason
    assert record.samples_s == (20.0,)
    assert record.calibration_cost_ratio == 20 / (2 * 8)
    assert fakes.seeds == [("one", CALIBRATION_SEED), ("two", CALIBRATION_SEED + 1)]


def test_masks_of_some_queries_are_compared_with_those_of_all_over_heads_that_have_one(measured: Any) -> None:
    exact, strided = measured(EXACT), measured(STRIDED)
    assert (exact.outcome, strided.outcome) == ("ok", "ok"), strided.reason
    # of four blocks, two that both keep
    assert (strided.query_stride, strided.mask_iou) == (2, 0.5)
    assert (exact.query_stride, exact.mask_iou) == (None, None)
    assert strided.arm == "calibatt, one query in 2"
    assert strided.key != exact.key


def test_compiling_is_no_part_of_the_cost(measured: Any, clock: Any) -> None:
    lesson = Lesson(
        method="calibatt", learner=SlowToCompile(clock), preset="default", block=(8, 8), settings={}
    )  # fmt: skip
    assert measured(EXACT, lesson).calibration_cost_ratio == 20 / (2 * 8)
    # a minute, and the two videos
    assert clock.now == 60 + 2 * 8
