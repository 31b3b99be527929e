"""What arms learn offline, once for all that learn the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from calibatt.bench.cells import Arm
from calibatt.bench.offline import Lesson, Offline, lesson_of
from calibatt.bench.preparation import Preparation
from calibatt.calibration.artifact import Calibration
from calibatt.kernels.geometry import Geometry
from calibatt.methods.learning import Learnt, Origin, Provenance

BLOCK = (64, 64)


def arm(text: str, **more: Any) -> Arm:
    return Arm.parse(text, "flex", **more)


def learnt(method: str) -> Calibration:
    """As little as can have been learnt."""
    provenance = Provenance(
        origin=Origin(model="shapes", weights="ab", scheduler="flow"),
        geometry=Geometry(grid=(1, 2, 2), heads=1, head_dim=8), steps=1, layers=1, guidance=1.0, prompts=("a",), seed=0,
        cost_ratio=1.5,
    )  # fmt: skip
    tables = {"x": torch.zeros(1, 1)}
    return Calibration(method=method, preset="default", settings={}, tables=tables, provenance=provenance)


def offline(lessons: list[Lesson], *, stored: str | None = None, turned: frozenset[str] = frozenset()) -> Offline:
    """Learns in ten seconds, and writes down what."""

    def learn(lesson: Lesson, folder: Path | None) -> tuple[float, Calibration]:
        lessons.append(lesson)
        return 10.0, learnt(lesson.method)

    load: Callable[[], Learnt] | None = None if stored is None else lambda: learnt(stored)
    return Offline(
        learn, preparation=Preparation(None, "shapes-quick-2", print), stored=load, log=lambda line: None,
        block=BLOCK, turned=turned,
    )  # fmt: skip


def test_arms_that_learn_the_same_share_it() -> None:
    lessons: list[Lesson] = []
    one = offline(lessons)
    made = [one.prepared(arm(text)) for text in ("calibatt", "calibatt/masks-only", "random", "calibatt=0.5")]
    assert [lesson.method for lesson in lessons] == ["calibatt"]
    assert all(prepared is made[0] for prepared in made)
    assert made[0] is not None
    assert made[0].seconds == 10


def test_arms_that_learn_something_else_do_not() -> None:
    lessons: list[Lesson] = []
    one = offline(lessons)
    for text in ("calibatt", "svg/learnt"):
        one.prepared(arm(text))
    one.prepared(Arm(method="calibatt", preset="default", mode="native", kernel="flex", block=(32, 32)))
    assert [(lesson.method, lesson.block) for lesson in lessons] == [
        ("calibatt", BLOCK), ("svg", BLOCK), ("calibatt", (32, 32)),
    ]  # fmt: skip


def test_what_learns_nothing_is_not_prepared() -> None:
    lessons: list[Lesson] = []
    assert offline(lessons).prepared(arm("sparge")) is None
    assert lessons == []


def test_what_is_stored_is_used_for_its_method_alone() -> None:
    lessons: list[Lesson] = []
    one = offline(lessons, stored="calibatt")
    kept = one.prepared(arm("calibatt"))
    assert kept is not None
    assert kept.seconds is None
    one.prepared(arm("svg/learnt"))
    assert [lesson.method for lesson in lessons] == ["svg"]


def test_the_time_is_that_of_what_a_method_was_built_with() -> None:
    one = offline([])
    made = one.prepared(arm("calibatt"))
    assert made is not None

    class Built:
        learnt: Learnt | None = None

        def plan(self, q: Any, k: Any, v: Any, site: Any) -> Any: ...

        def reset(self) -> None: ...

    built = Built()
    assert one.seconds(built) is None
    built.learnt = made.calibration
    assert one.seconds(built) == 10
    # of another run
    built.learnt = learnt("calibatt")
    assert one.seconds(built) is None


def test_a_method_whose_knob_is_turned_learns_what_that_takes() -> None:
    plain, turned = (lesson_of(arm("calibatt"), BLOCK, turned=which) for which in ((), ("calibatt",)))
    assert plain is not None
    assert turned is not None
    assert plain != turned
    assert dict(turned.settings) == {"levels": True}
    # and the arms that go by its tables share them
    assert lesson_of(arm("random"), BLOCK, turned=("calibatt",)) == turned


def test_one_dense_schedule_for_all_is_in_what_is_learnt() -> None:
    own, matched = (lesson_of(one, BLOCK) for one in (arm("svg/learnt"), arm("svg/learnt", dense_first=(0.5, 0.0))))
    assert own is not None
    assert matched is not None
    assert matched.settings.keys() >= own.settings.keys()


def test_a_setting_that_contradicts_the_preset_is_refused() -> None:
    with pytest.raises(ValueError, match="has no setting"):
        lesson_of(arm("calibatt"), BLOCK, nonsense=1.0)


def test_where_there_are_no_videos_only_what_is_stored_serves() -> None:
    def without(stored: str | None) -> Offline:
        load: Callable[[], Learnt] | None = None if stored is None else lambda: learnt(stored)
        return Offline(
            None,
            preparation=Preparation(None, "shapes-quick-2", print),
            stored=load,
            log=lambda line: None,
            block=BLOCK,
        )

    for text in ("calibatt", "random", "calibatt=0.5"):
        missing = without(None).missing(arm(text))
        assert missing is not None
        assert missing.reason == ("calibatt learns from whole videos, of which there are none here: give --calibration")
        assert without("calibatt").missing(arm(text)) is None
    assert without("calibatt").missing(arm("scaling")) is not None
    assert without(None).missing(arm("sparge=0.5")) is None
    # where there are videos, all can be learnt
    assert offline([]).missing(arm("calibatt")) is None
