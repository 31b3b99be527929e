"""Calibrating on hand-made videos: what is learnt, and what is refused because it would be learnt wrongly."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from calibatt.calibration import collect
from calibatt.calibration.artifact import Calibration
from calibatt.calibration.collect import calibrate, calibrate_on
from calibatt.kernels.catalogue import DEFAULT, KERNELS
from calibatt.kernels.mask import unpacked
from calibatt.kernels.plan import Plan
from calibatt.methods.calibatt.learner import CalibAttLearner
from calibatt.methods.energy import block_mass
from calibatt.methods.learning import Learner, Origin
from calibatt.methods.site import Site
from calibatt.models.catalogue import MODELS

Made = Callable[..., Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Means:
    """Learns the mean of the values of every site, in a method that there is not."""

    scale: float = 1.0

    def note(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, site: Site, prompt: int) -> Any:
        return {"mean": v.mean((1, 2)) * self.scale, "prompt": torch.tensor(prompt)}

    def merge(self, notes: Any) -> Any:
        return {"mean": sum(note["mean"] for note in notes), "prompts": torch.stack([note["prompt"] for note in notes])}


def test_a_calibration_knows_where_it_comes_from(calibration: Calibration, prompts: tuple[str, ...]) -> None:
    own = calibration.provenance
    assert (calibration.method, calibration.preset) == ("calibatt", "default")
    assert own.origin == Origin(model="toy", weights="0123456789abcdef", scheduler="Euler")
    assert (own.prompts, own.seed, own.steps, own.layers, own.guidance) == (prompts, 7, 2, 3, 3.0)
    assert calibration.settings["block"] == [16, 8]
    assert own.cost_ratio > 1
    assert 0 < calibration.tables["agreement"].mean() <= 1
    assert set(own.versions) == {"calibatt", "torch", "diffusers"}
    assert set(calibration.tables) == {"bits", "agreement", "similarity", "levels"}
    assert {table.shape[:2] for _, table in calibration.tables.items()} == {(2, 3)}


def test_every_site_is_learnt_from_the_conditional_calls_of_all_prompts(hand_made: Made, run: Made) -> None:
    learner = CalibAttLearner(
        block=(16, 8), schedule=None, rho=0.5, gamma=0.87, anchors=2, similarity_prompts=None, query_stride=1,
        levels=False, output_errors=False, share=None,
    )  # fmt: skip
    seen: dict[tuple[int, int], list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, Site]]] = {}

    class Spy:
        def start_video(self) -> None:
            pass

        def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, site: Site) -> torch.Tensor:
            if site.branch == "cond":
                seen.setdefault((site.step, site.layer), []).append((q[0], k[0], v[0], site))
            return q

    videos = hand_made()
    videos.show(Spy(), prompts=("one", "two"), seed=7)
    made = run(prompts=("one", "two"))
    for (step, layer), calls in seen.items():
        notes = [learner.note(*call, number) for number, call in enumerate(calls)]
        for name, table in learner.merge(notes).items():
            assert torch.equal(made.tables[name][step, layer], table), name


@pytest.mark.parametrize(
    ("method", "settings", "noted"),
    [
        # repetition of the first prompt takes a pass of its own
        ("calibatt", {"similarity_prompts": 1, "anchors": 2}, 2 * 2 * 3),
        ("calibatt", {"anchors": 2}, 0),
        ("calibatt", {"similarity_prompts": 1, "anchors": 2, "query_stride": 2}, 0),
        ("scaling", {}, 3 * 2 * 3),
        ("scaling", {"dense_steps": 0.5}, 3 * 1 * 3),
    ],
)
def test_mass_that_attention_sums_on_the_way_is_learnt_from_as_if_it_were_summed_apart(
    hand_made: Made,
    prompts: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    settings: dict[str, Any],
    noted: int,
) -> None:
    run = partial(calibrate_on, method=method, prompts=prompts, seed=7, block=(16, 8), **settings)
    apart = run(hand_made())
    weighed: list[tuple[int, int]] = []

    def attend_and_weigh(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, block: tuple[int, int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        weighed.append(block)
        dense = Plan(tokens=q.shape[2], kinds=("dense",) * q.shape[1])
        return DEFAULT.attend(q, k, v, dense), block_mass(q[0], k[0], block=block)[0]

    monkeypatch.setattr(collect, "takes_weighed", lambda q, block: True)
    monkeypatch.setattr(collect, "attend_and_weigh", attend_and_weigh)
    on_the_way = run(hand_made())
    assert weighed == [(16, 8)] * noted
    for name, table in apart.tables.items():
        torch.testing.assert_close(on_the_way.tables[name], table, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("summed", [True, False])
def test_rehearsing_takes_both_ways_in_which_prompts_are_noted(
    monkeypatch: pytest.MonkeyPatch, hand_made: Made, summed: bool
) -> None:
    ways: list[str] = []

    class Told:
        def note(self, *call: Any) -> Any:
            ways.append(f"prompt {call[-1]}")

        def weighed(self, site: Site, prompt: int) -> tuple[int, int]:
            return (16, 8)

        def note_weighed(self, mass: torch.Tensor, site: Site) -> Any:
            ways.append("a later prompt by mass")

        def merge(self, notes: Any) -> Any: ...

    monkeypatch.setattr(collect, "takes_weighed", lambda q, block: summed)
    monkeypatch.setattr(collect, "attend_and_weigh", lambda q, k, v, *, block: (q, q[0]))
    x = torch.zeros(1, 2, 60, 16)
    site = Site(
        geometry=hand_made().geometry, step=0, steps=2, sigma=1.0, branch="cond", layer=0, layers=3, sample=0
    )  # fmt: skip
    collect.rehearse(Told(), x, x, x, site)
    assert ways == ["prompt 0", "a later prompt by mass" if summed else "prompt 1"]


def test_every_prompt_starts_from_noise_of_its_own(hand_made: Made, run: Made, prompts: tuple[str, ...]) -> None:
    videos = hand_made()
    run(videos)
    assert videos.shown == [(prompt, 7 + number) for number, prompt in enumerate(prompts)]


def test_the_identity_is_taken_before_the_first_video(hand_made: Made, run: Made) -> None:
    videos = hand_made()
    run(videos)
    assert videos.asked[0] == "origin"

    class Nameless(type(videos)):  # type: ignore[misc]
        def origin(self) -> Origin:
            raise ValueError("who knows")

    videos = Nameless()
    with pytest.raises(ValueError, match="who knows"):
        run(videos)
    assert videos.shown == []


def test_any_learner_is_a_client(run: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collect, "learner_of", lambda *_, **__: Means())
    made = run(method="dense", block=None, anchors=None)
    assert made.tables["prompts"].tolist() == [[[0, 1, 2]] * 3] * 2
    assert made.settings == {"scale": 1.0}


def test_prompts_of_any_length_make_one_calibration(hand_made: Made, run: Made, prompts: tuple[str, ...]) -> None:
    geometry = replace(hand_made().geometry, text_tokens=64)
    videos = hand_made(geometry=geometry, texts=dict(zip(prompts, (17, 40, 3), strict=True)))
    made = run(videos)
    assert made.provenance.geometry.text_tokens == 64
    assert made.tables["bits"].shape == (2, 3, 2, 4, 4)
    assert unpacked(made.tables["bits"][0, 0], 8)[:, 3].all()


@pytest.mark.parametrize(
    ("prompts", "says"),
    [
        ("cats", "prompts is a single string: give a list"),
        ([], "give at least one prompt .* no empty ones"),
        (["a circle", " "], "give at least one prompt .* no empty ones"),
    ],
)
def test_what_is_no_list_of_prompts_is_refused_before_any_work(
    hand_made: Made, run: Made, prompts: Any, says: str
) -> None:
    videos = hand_made()
    with pytest.raises(ValueError, match=says):
        run(videos, prompts=prompts)
    assert videos.asked == []


@pytest.mark.parametrize("prompts", [[None], [["a circle"]]])
def test_a_list_of_other_things_than_texts_is_refused(prompts: Any) -> None:
    # as callers without a type checker meet it
    unchecked = inspect.unwrap(calibrate)
    with pytest.raises(ValueError, match="no empty ones; each is a text"):
        unchecked(MODELS["shapes"], None, resolution="quick", prompts=prompts, seed=0)


def test_a_prompt_that_the_model_cannot_read_is_found_before_any_work() -> None:
    prompts = ["a red circle moving left over stripes", "a purple cow"]
    # there is not even a pipeline to work with
    with pytest.raises(ValueError, match="unknown word 'purple'"):
        calibrate(MODELS["shapes"], None, resolution="quick", prompts=prompts, seed=0)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"skipped": [(1, 1), (1, 2)]}, "no conditional attention call at step 1, layer 1, nor at 1 of 6 others"),
        ({"branches": ("uncond",)}, "no conditional attention call at step 0, layer 0, nor at 5 of 6 others"),
        ({"twice": [(0, 2)]}, "called twice at step 0, layer 2 .* scheduler"),
        ({"branches": ("cond", "cond")}, "called twice at step 0, layer 0"),
        ({"not_finite": (1, 0)}, r"step 1, layer 0 is not finite: .* overflow in torch\.float32"),
        ({"runs": 3}, "calibrating 2 steps, but the pipeline runs 3: take a scheduler"),
    ],
    ids=["skipped", "never conditional", "twice", "two videos", "NaN", "steps"],
)
def test_what_would_be_learnt_wrongly_is_refused_by_naming_step_and_layer(
    hand_made: Made, run: Made, wrong: dict[str, Any], says: str
) -> None:
    with pytest.raises(ValueError, match=says) as error:
        run(hand_made(**wrong))
    assert "\n" not in str(error.value)


def test_not_finite_attention_is_refused_at_the_first_call(hand_made: Made, run: Made) -> None:
    videos = hand_made(not_finite=(0, 0))
    with pytest.raises(ValueError, match="step 0, layer 0"):
        run(videos)
    assert len(videos.shown) == 1


def test_a_note_that_is_nan_is_refused(run: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collect, "learner_of", lambda *_, **__: Means(scale=math.nan))
    with pytest.raises(ValueError, match="mean at step 0, layer 0 is NaN"):
        run(method="dense")


@pytest.mark.parametrize("other", [{"layers": 4}, {"geometry": {"grid": (2, 5, 6)}}, {"geometry": {"text_tokens": 3}}])
def test_a_pipeline_of_another_model_is_refused(hand_made: Made, run: Made, other: dict[str, Any]) -> None:
    class Other(type(hand_made())):  # type: ignore[misc]
        """Announces other calls than it makes."""

        def show(self, attention: Any, **how: Any) -> None:
            own = hand_made()
            geometry = replace(own.geometry, **other.get("geometry", {}))
            hand_made(geometry=geometry, layers=other.get("layers", own.layers)).show(attention, **how)

    with pytest.raises(ValueError, match="is it the pipeline of this model"):
        run(Other())


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ({"method": "sparge"}, "sparge/default learns nothing of its own: it can be used as it is"),
        ({"method": "random"}, "random/default learns nothing of its own: it uses what calibatt learns"),
        ({"preset": "defalt"}, "did you mean default"),
        ({"rho": 1.5}, "rho is a share"),
        ({"mass": 0.5}, "calibatt has no setting mass"),
    ],
    ids=lambda x: str(x),
)
def test_what_cannot_be_learnt_is_refused_before_any_work(
    hand_made: Made, run: Made, how: dict[str, Any], says: str
) -> None:
    videos = hand_made()
    given = {"block": None, "anchors": 2} | how
    if "method" in how:
        del given["anchors"]
    with pytest.raises(ValueError, match=says):
        collect.calibrate_on(videos, prompts=["a circle"], seed=0, **given)
    assert videos.asked == []


def test_trials_follow_the_notes_and_put_what_they_learn_in_place(hand_made: Made, prompts: tuple[str, ...]) -> None:
    videos = hand_made(steps=6)
    how = {"method": "budget", "prompts": prompts, "seed": 7, "block": (16, 16), "kernel": KERNELS["sdpa-flash"]}
    made = calibrate_on(videos, **how)
    # of two prompts a dense video, and one for each group of steps: four by themselves, then two together
    assert videos.shown[3:] == [(prompts[0], 7)] * 6 + [(prompts[1], 8)] * 6
    sensitivity = made.tables["sensitivity"]
    assert sensitivity.shape == (6, 3)
    assert sensitivity.log().mean().item() == pytest.approx(0, abs=1e-5)
    assert torch.equal(sensitivity[4], sensitivity[5])
    assert len(set(sensitivity[:, 0].tolist())) == 5
    # nothing of it where there is nothing to see, or nobody asked
    for blind in ({"videos": hand_made(steps=6, visible=False)}, {"videos": hand_made(steps=6), "trials": 0}):
        plain = calibrate_on(blind.pop("videos"), **how, **blind)
        assert plain.tables["sensitivity"].eq(1).all()
        assert torch.equal(plain.tables["levels"], made.tables["levels"])


def test_the_preset_is_the_calibrations(run: Made) -> None:
    assert run(preset="masks-only").preset == "masks-only"


def test_progress_counts_prompts_times_steps_on_stderr(run: Made, capfd: pytest.CaptureFixture[str]) -> None:
    run(progress=True)
    out, err = capfd.readouterr()
    assert out == ""
    assert "6/6" in err
    run()
    assert "calibrating" not in capfd.readouterr().err


def test_a_learner_is_what_the_collector_takes_for_one() -> None:
    assert isinstance(Means(), Learner)


def test_nothing_stays_behind_without_a_folder(run: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    run()
    assert list(tmp_path.iterdir()) == []
