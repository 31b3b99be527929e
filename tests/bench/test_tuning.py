"""Methods whose knob is turned for what is wanted of them."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from calibatt.bench.cells import Arm, Workload
from calibatt.bench.journal import Journal
from calibatt.bench.observers import Probe
from calibatt.bench.offline import CALIBRATION_SEED, Lesson, Offline
from calibatt.bench.preparation import Preparation
from calibatt.bench.tuning import DENSITY_TOLERANCE, TUNING_SEED, Film, Tuner, density_of, solve
from calibatt.bench.video import Rounds
from calibatt.calibration.artifact import Calibration
from calibatt.kernels.base import Unsupported
from calibatt.kernels.catalogue import KERNELS
from calibatt.kernels.geometry import Geometry
from calibatt.kernels.mask import BlockMask
from calibatt.kernels.plan import Plan
from calibatt.methods.base import Knob
from calibatt.methods.call import Attention, SparseAttention
from calibatt.methods.learning import CalibrationMismatch, Learnt
from calibatt.methods.remainder import WithRemainder
from calibatt.methods.scheduled import Scheduled
from calibatt.methods.site import Site

GEOMETRY = Geometry(grid=(4, 16, 16), heads=2, head_dim=16)
SITE = Site(geometry=GEOMETRY, step=0, steps=1, sigma=1.0, branch="cond", layer=0, layers=1)


class Share:
    """Keeps the first blocks of every row, as many as its share says."""

    def __init__(self, share: float) -> None:
        self.share = share

    def reset(self) -> None: ...

    def plan(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, site: Site) -> Plan:
        keep = torch.zeros(2, 64, 64, dtype=torch.bool)
        keep[:, :, : round(self.share * 64)] = True
        return Plan.masked(BlockMask.from_keep(keep, tokens=1024, block_q=16, block_k=16), 2)


@pytest.fixture
def probes() -> list[Probe]:
    q, k, v = torch.randn(3, 1, 2, 1024, 16, generator=torch.Generator().manual_seed(0))
    return [Probe(site=SITE, q=q, k=k, v=v)]


@pytest.mark.parametrize("target", [0.25, 0.5, 0.77])
@pytest.mark.parametrize("rising", [True, False])
def test_the_density_is_reached_whichever_way_the_knob_turns(probes: list[Probe], target: float, rising: bool) -> None:
    def build(x: float) -> Share:
        return Share(x if rising else 1 - x)

    def density(x: float) -> float:
        return density_of(build(x), probes, KERNELS["flex"])

    knob = Knob(field="share", low=0.1, high=0.9)
    value = solve(density, knob, target, tolerance=DENSITY_TOLERANCE, quantity="densities")
    assert isinstance(value, float)
    # 64 blocks a row: the nearest density there is lies at most half a block away
    assert abs(density(value) - target) <= max(DENSITY_TOLERANCE, 0.5 / 64)


def test_any_quantity_is_solved_for_by_the_same_search() -> None:
    # a PSNR that falls along the knob: 40 dB at 0, 20 dB at 1
    knob = Knob(field="share", low=0.0, high=1.0)
    value = solve(lambda x: 40 - 20 * x, knob, 32.5, tolerance=0.25, quantity="PSNRs in dB")
    # halving meets 0.375 exactly
    assert value == 0.375
    answer = solve(lambda x: 40 - 20 * x, knob, 45, tolerance=0.25, quantity="PSNRs in dB")
    assert answer == Unsupported("its share reaches PSNRs in dB from 20.000 to 40.000, not 45.000")


def test_a_target_in_the_middle_of_a_large_step_is_said_to_be_out_of_reach() -> None:
    knob = Knob(field="reach", low=0.0, high=11.0)

    def density(reach: float) -> float:
        return 0.104 if reach < 4 else 1.0

    answer = solve(density, knob, 0.35, tolerance=DENSITY_TOLERANCE, quantity="densities")
    assert answer == Unsupported("its reach gives densities of 0.104 and 1.000, none near 0.350")


def test_a_density_out_of_reach_is_said_so(probes: list[Probe]) -> None:
    answer = solve(
        lambda x: density_of(Share(x), probes, KERNELS["flex"]), Knob(field="share", low=0.25, high=0.5), 0.75,
        tolerance=DENSITY_TOLERANCE, quantity="densities",
    )  # fmt: skip
    assert answer == Unsupported("its share reaches densities from 0.250 to 0.500, not 0.750")


def tuner(
    probes: list[Probe],
    film: Film,
    *,
    resampled: bool = False,
    filmed: bool = True,
    stored: Callable[[], Learnt] | None = None,
    take: Callable[[], list[Probe]] | None = None,
    journal: Journal | None = None,
) -> Tuner:
    """Of the embedded model, where nothing is learnt."""
    workload = Workload(model="shapes", resolution="quick", steps=6, device=torch.device("cpu"), resampled=resampled)

    def learn(lesson: Lesson, folder: Path | None) -> tuple[float, Calibration]:
        raise AssertionError("nothing has to be learnt")

    preparation = Preparation(journal, str(workload), print)
    offline = Offline(
        learn, preparation=preparation, stored=stored, log=lambda line: None,
        block=workload.block,
    )  # fmt: skip
    return Tuner(
        workload, offline=offline, preparation=preparation, probe=probes[-1],
        tuning_probes=take or (lambda: probes), film=film, dense=KERNELS["sdpa-math"],
        prompts=("a", "b"), filmed=filmed, log=lambda line: None,
    )  # fmt: skip


def unseen(attention: Attention, prompt: str, seed: int) -> torch.Tensor:
    raise AssertionError("no video is needed")


def of_calls(probes: list[Probe]) -> Film:
    """Videos whose calls are the probes."""

    def film(attention: Attention, prompt: str, seed: int) -> torch.Tensor:
        attention.start_video()
        for one in probes:
            attention(one.q, one.k, one.v, one.site)
        return torch.zeros(3, 1, 8, 8)

    return film


def test_a_density_is_solved_on_calls_alone_where_no_videos_are_measured(probes: list[Probe]) -> None:
    method = tuner(probes, unseen, filmed=False).method(Arm.parse("sparge=0.5", "flex"))
    assert not isinstance(method, Unsupported)
    assert density_of(method, probes, KERNELS["flex"]) == pytest.approx(0.5, abs=0.05)


def half_dense(probes: list[Probe], shown: list[int] | None = None) -> Film:
    """Videos of two steps with three calls each, the first of which is dense in `HALF`."""

    def film(attention: Attention, prompt: str, seed: int) -> torch.Tensor:
        attention.start_video()
        for step in (0, 0, 0, 1, 1, 1):
            attention(probes[0].q, probes[0].k, probes[0].v, replace(SITE, step=step, steps=2))
        if shown is not None:
            shown.append(seed)
        return torch.zeros(3, 1, 8, 8)

    return film


# of the steps, and of the layers
HALF = (0.5, 0.0)


def test_a_density_that_some_calls_have_is_corrected_on_whole_videos(probes: list[Probe]) -> None:
    late = [replace(probes[0], site=replace(SITE, step=1, steps=2))]
    shown: list[int] = []
    made = tuner(late, half_dense(probes, shown)).method(Arm.parse("sparge=0.7", "flex", HALF))
    assert not isinstance(made, Unsupported)
    # with the dense step: the mean of 1 and 0.4, in sixteenths of a row
    assert density_of(made, late, KERNELS["flex"]) == pytest.approx(0.4, abs=1 / 32)
    # on the videos of both prompts, each with noise of its own
    assert set(shown) == {TUNING_SEED, TUNING_SEED + 1}


def test_a_density_that_no_video_comes_near_is_said_so(probes: list[Probe]) -> None:
    late = [replace(probes[0], site=replace(SITE, step=1, steps=2))]
    answer = tuner(late, half_dense(probes)).method(Arm.parse("sparge=0.3", "flex", HALF))
    assert isinstance(answer, Unsupported)
    assert re.fullmatch(r"its topk gives whole videos a density of 0\.\d{3} at the nearest, not 0\.300", answer.reason)


def test_a_density_known_before_is_that_of_a_prompt_as_long_as_a_video_has(probes: list[Probe]) -> None:
    class Known(Share):
        def mean_density(self, text_tokens: int | None = None) -> float:
            assert text_tokens is not None
            return text_tokens / 100

    site = replace(probes[-1].site, geometry=replace(probes[-1].site.geometry, text_tokens=17))
    made = tuner([*probes, replace(probes[-1], site=site)], unseen)
    assert made._density(Known(0.5), KERNELS["flex"]) == 0.17


def test_calls_to_solve_on_are_taken_once_and_only_where_a_density_is_wanted(probes: list[Probe]) -> None:
    taken: list[int] = []

    def take() -> list[Probe]:
        taken.append(1)
        return probes

    one = tuner(probes, of_calls(probes), take=take)
    one.method(Arm.parse("sparge", "flex"))
    assert taken == []
    for text in ("sparge=0.5", "sparge=0.25"):
        assert not isinstance(one.method(Arm.parse(text, "flex")), Unsupported)
    assert taken == [1]


def test_a_fidelity_is_solved_on_videos_of_its_own(probes: list[Probe], tmp_path: Path) -> None:
    shown: list[tuple[str, int]] = []

    def film(attention: Attention, prompt: str, seed: int) -> torch.Tensor:
        # as far from dense as the share of blocks that is left out
        assert isinstance(attention, SparseAttention)
        share = getattr(getattr(attention.method, "config", None), "topk", 1.0)
        shown.append((prompt, seed))
        return torch.full((3, 1, 8, 8), -share)

    path = tmp_path / "kept"
    own = tuner(probes, film, journal=Journal(path, {}))
    method = own.method(Arm.parse("sparge=20dB", "flex"))
    assert not isinstance(method, Unsupported)
    # a tenth of 255 levels is half a tenth of the range from -1 to 1
    assert method.config.topk == pytest.approx(0.8, abs=0.01)  # type: ignore[attr-defined]
    assert {prompt for prompt, _ in shown} == {"a", "b"}
    # noise that no calibration has, with ten thousand prompts at the most
    assert min(seed for _, seed in shown) == TUNING_SEED >= CALIBRATION_SEED + 10_000
    # another suite that asks gets the same answer, without videos; so does a run that goes on after this one
    videos = len(shown)
    for tuner_ in (own, tuner(probes, film, journal=Journal(path, {}))):
        again = tuner_.method(Arm.parse("sparge=20dB", "flex"))
        assert again.config == method.config  # type: ignore[union-attr]
    assert len(shown) == videos
    # on another kernel it is another arm
    tuner(probes, film, journal=Journal(path, {})).method(Arm.parse("sparge=20dB", "default"))
    assert len(shown) > videos


def test_a_run_that_goes_on_knows_why_a_knob_cannot_be_turned(probes: list[Probe], tmp_path: Path) -> None:
    path = tmp_path / "kept"

    def film(attention: Attention, prompt: str, seed: int) -> torch.Tensor:
        return torch.zeros(3, 1, 8, 8)

    reasons = [
        tuner(probes, shows, journal=Journal(path, {})).method(Arm.parse("sparge=20dB", "flex"))
        for shows in (film, unseen)
    ]
    assert reasons[0] == reasons[1] == Unsupported("its topk reaches PSNRs in dB from 120.000 to 120.000, not 20.000")


def test_a_knob_is_found_anew_where_it_could_not_be_kept(
    probes: list[Probe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, arm = tmp_path / "kept", Arm.parse("sparge=0.5", "flex")
    journal = Journal(path, {})

    def full(number: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("os.fsync", full)
        assert not isinstance(tuner(probes, of_calls(probes), journal=journal).method(arm), Unsupported)
    # no run could go on from rounds that were made with it
    with pytest.raises(OSError, match="what it was made with is not either"):
        journal.keep_rounds("denoise", "shapes-quick-6", Rounds(first=0, rounds=[]))
    journal.keep_rounds("denoise", "shapes-standard-6", Rounds(first=0, rounds=[]))
    assert Journal(path, {}).knobs == {}
    assert list(Journal(path, {}).rounds) == [("denoise", "shapes-standard-6")]


def test_what_is_measured_on_whole_videos_is_refused_without_them(probes: list[Probe]) -> None:
    answer = tuner(probes, unseen, resampled=True).method(Arm.parse("sparge=20dB", "flex"))
    assert answer == Unsupported("this target is measured on whole videos; calls by themselves have none")


def test_a_preset_that_another_field_sets_has_no_knob_to_turn(probes: list[Probe]) -> None:
    answer = tuner(probes, unseen).method(Arm.parse("sparge/cdf=0.5", "flex"))
    assert isinstance(answer, Unsupported)
    assert "its topk cannot be turned" in answer.reason


def test_a_kernel_that_the_method_cannot_use_is_refused_before_anything_is_solved(probes: list[Probe]) -> None:
    answer = tuner(probes, unseen).method(Arm.parse("sparge=0.5", "sdpa-math"))
    assert isinstance(answer, Unsupported)
    assert "choose a sparse one" in answer.reason


def test_one_dense_schedule_for_all_stands_around_the_method(probes: list[Probe]) -> None:
    method = tuner(probes, unseen).method(Arm.parse("sparge", "flex", (1.0, 0.0)))
    assert isinstance(method, Scheduled)
    assert density_of(method, probes, KERNELS["flex"]) == 1


def test_means_of_what_is_left_out_change_no_mask_of_a_density(probes: list[Probe]) -> None:
    film = of_calls(probes)
    made = [tuner(probes, film).method(Arm.parse(text, "flex")) for text in ("sparge+tail=0.5", "sparge=0.5")]
    (one,) = probes
    plans = [method.plan(one.q[0], one.k[0], one.v[0], SITE) for method in made if not isinstance(method, Unsupported)]
    assert [plan.remainder for plan in plans] == ["zeroth", "none"]
    assert all(map(torch.equal, plans[0].tensors(), plans[1].tensors()))
    scheduled = tuner(probes, unseen).method(Arm.parse("sparge+tail", "flex", (1.0, 0.0)))
    assert isinstance(scheduled, WithRemainder)
    assert density_of(scheduled, probes, KERNELS["flex"]) == 1


def test_a_fidelity_is_solved_with_the_remainder(probes: list[Probe]) -> None:
    seen: set[str] = set()

    def film(attention: Attention, prompt: str, seed: int) -> torch.Tensor:
        (one,) = probes
        assert isinstance(attention, SparseAttention)
        plan = attention.method.plan(one.q[0], one.k[0], one.v[0], SITE)
        seen.update({plan.remainder} if plan.mask is not None else ())
        # the nearer to dense the more it keeps
        return torch.full((3, 1, 2, 2), 0.5 + 0.1 * (1 - plan.density().mean().item()))

    method = tuner(probes, film).method(Arm.parse("sparge+tail=30dB", "flex"))
    assert isinstance(method, WithRemainder)
    assert seen == {"zeroth"}


def test_a_stored_calibration_that_fits_nothing_here_is_a_failure_and_no_refusal(probes: list[Probe]) -> None:
    made = tuner(probes, unseen, stored=mismatched)
    for text in ("calibatt", "calibatt=0.5"):
        with pytest.raises(CalibrationMismatch, match="other weights"):
            made.method(Arm.parse(text, "flex"))


def mismatched() -> Learnt:
    raise CalibrationMismatch("other weights")
