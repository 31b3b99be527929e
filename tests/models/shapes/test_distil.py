"""An adapter is merged as Diffusers reads it, bad files are named, and distilling learns what the teacher does."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from calibatt.models.catalogue import MODELS
from calibatt.models.entry import Resolution
from calibatt.models.identity import origin_of
from calibatt.models.shapes import distil
from calibatt.models.shapes.distil import Distillation, Distilling, between, mean_velocity
from calibatt.models.shapes.entry import SHAPES, STUDENT
from calibatt.models.shapes.evaluate import sample, score
from calibatt.models.shapes.lora import FILE, Factors, matrices, merge, save
from calibatt.models.shapes.pipeline import (
    STUDENT_WEIGHTS,
    WEIGHTS,
    assemble,
    load_pipeline,
    load_student,
    new_transformer,
)
from calibatt.models.shapes.scenes import held_out_captions
from calibatt.models.shapes.text import TEXT_DIM
from calibatt.models.shapes.training import Stage, run

CPU = torch.device("cpu")
TINY = Distilling(
    batches={"quick": 1},
    stages=(Stage(until=1.0, shares={"quick": 1.0}),),
    rate=1e-2,
    warm_up=5,
    rank=4,
    substeps=2,
)


@pytest.fixture(autouse=True)
def small_videos(monkeypatch: pytest.MonkeyPatch) -> None:
    """Distil on one frame of 6 tokens."""
    sizes = MappingProxyType({"quick": Resolution(height=8, width=12, frames=1)})
    monkeypatch.setattr(distil, "SHAPES", replace(SHAPES, resolutions=sizes))


def new_base(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    base = new_transformer(layers=1, heads=1).requires_grad_(False)
    # as shipped weights are
    for parameter in base.parameters():
        parameter.copy_(parameter.bfloat16())
    return base


def new_factors(base: Any, rank: int = 3) -> dict[str, Factors]:
    generator = torch.Generator().manual_seed(1)
    return {
        name: Factors(
            down=(0.1 * torch.randn(rank, matrix.shape[1], generator=generator)).bfloat16().float(),
            up=(0.1 * torch.randn(matrix.shape[0], rank, generator=generator)).bfloat16().float(),
        )
        for name, matrix in matrices(base).items()
    }


def inputs(seed: int = 0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, 3, 1, 8, 12, generator=generator)
    text = torch.randn(1, 4, TEXT_DIM, generator=generator)
    return {"hidden_states": x, "timestep": torch.tensor([500.0]), "encoder_hidden_states": text, "return_dict": False}


def test_a_merged_layer_is_the_layer_plus_the_adapters_product_of_its_input(tmp_path: Path) -> None:
    base = new_base()
    factors, merged = new_factors(base), copy.deepcopy(base)
    save(factors, tmp_path / FILE, base=base)
    merge(merged, tmp_path / FILE)
    for name, own in factors.items():
        layer, changed = base.get_submodule(name), merged.get_submodule(name)
        x = torch.randn(5, layer.in_features)
        expected = layer(x) + (x @ own.down.T) @ own.up.T
        # weights are rounded to bf16: half of a 128th each, of terms that add up in root mean square
        bound = 2**-8 * (x.square() @ changed.weight.square().T).sqrt() * 4
        assert ((changed(x) - expected).abs() <= bound).all()
        assert not torch.allclose(changed(x), layer(x), atol=1e-2)
    untouched = [name for name, _ in base.named_parameters() if name.removesuffix(".weight") not in factors]
    assert untouched
    assert all(torch.equal(base.get_parameter(name), merged.get_parameter(name)) for name in untouched)


def test_diffusers_reads_the_file_as_the_same_adapter(tmp_path: Path) -> None:
    base = new_base()
    save(new_factors(base), tmp_path / FILE, base=base)
    pipe, merged = assemble(copy.deepcopy(base)), copy.deepcopy(base)
    merge(merged, tmp_path / FILE)
    pipe.load_lora_weights(tmp_path)
    with torch.no_grad():
        theirs, ours, without = (model(**inputs())[0] for model in (pipe.transformer, merged, base))
    assert (theirs - ours).norm() < 0.02 * (theirs - without).norm()


def broken(tensors: dict[str, torch.Tensor], metadata: dict[str, str], how: str) -> dict[str, torch.Tensor]:
    up = "transformer.proj_out.lora_B.weight"
    if how == "base":
        metadata["base_weights"] = "f" * 16
    changes: dict[str, torch.Tensor | None] = {
        "lacks": None, "shape": tensors[up][:-1].clone(), "nan": torch.full_like(tensors[up], torch.nan),
    }  # fmt: skip
    if how == "more":
        tensors["transformer.blocks.0.norm2.lora_A.weight"] = torch.zeros(1)
    if how in changes:
        changed = changes[how]
        del tensors[up]
        if changed is not None:
            tensors[up] = changed
    return tensors


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("base", r"is an adapter of the weights ffffffffffffffff, not of [0-9a-f]{16}: train it again"),
        ("lacks", r"has no lora_A\.weight and lora_B\.weight for proj_out"),
        ("shape", r"has factors of \(47, 3\) and \(3, 64\) for proj_out, which is 48 × 64"),
        ("nan", r"has factors for proj_out that are not finite"),
        ("more", r"has transformer\.blocks\.0\.norm2\.lora_A\.weight, which is no part"),
    ],
)
def test_an_adapter_that_does_not_fit_is_named_in_a_line_and_changes_nothing(
    tmp_path: Path, how: str, message: str
) -> None:
    base, path = new_base(), tmp_path / FILE
    save(new_factors(base), path, base=base)
    with safe_open(path, framework="pt") as file:
        metadata = dict(file.metadata())
    tensors = broken(load_file(path), metadata, how)
    save_file(tensors, path, metadata=metadata)
    with pytest.raises(OSError, match=message) as caught:
        merge(base, path)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(a, b) for a, b in zip(base.parameters(), new_base().parameters(), strict=True))


def test_a_missing_and_a_cut_file_are_named_in_a_line(tmp_path: Path) -> None:
    base, path = new_base(), tmp_path / FILE
    with pytest.raises(OSError, match=r"there is no .*: train an adapter by python -m"):
        merge(base, path)
    save(new_factors(base), path, base=base)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(OSError, match="is cut off or damaged"):
        merge(base, path)


class Drift:
    """A transformer whose velocity is 2 x + σ + the mean of the text."""

    dtype = torch.float32

    def __call__(
        self, x: torch.Tensor, timestep: torch.Tensor, encoder_hidden_states: torch.Tensor, return_dict: bool
    ) -> tuple[torch.Tensor]:
        text = encoder_hidden_states.mean((1, 2))
        return (2 * x + (timestep / 1000 + text)[:, None, None, None, None],)


def test_the_goal_of_a_step_is_the_guided_teachers_mean_velocity() -> None:
    x = torch.full((1, 3, 1, 2, 2), 0.5)
    text = torch.full((1, 4, 5), 0.25)
    goal = mean_velocity(Drift(), x, text, sigmas=[0.8, 0.6, 0.5], guidance=2.0)
    # guidance counts the text twice: velocity 2·0.5 + 0.8 + 2·0.25 = 2.3, so x = 0.5 − 0.2·2.3 = 0.04; there
    # 2·0.04 + 0.6 + 0.5 = 1.18, so x = 0.04 − 0.1·1.18 = −0.078; from 0.5 over −0.3
    torch.testing.assert_close(goal, torch.full_like(x, (-0.078 - 0.5) / -0.3))


def test_the_teachers_noise_levels_are_those_of_its_own_schedule_where_they_meet() -> None:
    levels = between(1.0, 0.0, count=20)
    assert (levels[0], levels[-1]) == (1.0, 0.0)
    # t = ¾, ½, ¼, shifted by 5
    torch.testing.assert_close([levels[5], levels[10], levels[15]], [15 / 16, 5 / 6, 5 / 8])
    torch.testing.assert_close(between(levels[5], levels[10], count=5), levels[5:11])


def test_a_new_student_is_its_teacher() -> None:
    training = Distillation(TINY, seed=0, base=new_base())
    training.advance(0.0)
    fresh = Distillation(TINY, seed=0, base=new_base())
    fresh._merge()
    ours, teachers = (model(**inputs())[0] for model in (fresh.student, fresh.teacher))
    assert torch.equal(ours, teachers)
    training._merge()
    assert not torch.equal(training.student(**inputs())[0], teachers)
    assert torch.equal(training.teacher(**inputs())[0], teachers)


def test_an_adapters_gradients_are_those_through_its_product() -> None:
    training = Distillation(TINY, seed=0, base=new_base())
    with torch.no_grad():
        for tensor in training.parameters:
            tensor.copy_(0.1 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(tensor.numel())))
    merged = training._merge()
    training.student(**inputs())[0].square().sum().backward()
    training._hand_on(merged)
    names = list(training._base)
    weights = dict(zip((f"{name}.weight" for name in names), training._merge(), strict=True))
    out = torch.func.functional_call(new_base(), weights, kwargs=inputs())[0]
    expected = torch.autograd.grad(out.square().sum(), training.parameters)
    for own, theirs in zip(training.parameters, expected, strict=True):
        assert own.grad is not None
        torch.testing.assert_close(own.grad, theirs, atol=1e-4, rtol=1e-3)


@pytest.mark.slow
def test_distilling_lowers_the_loss(tmp_path: Path) -> None:
    training = Distillation(replace(TINY, guidance=4.0), seed=0, base=new_base())
    run(training, out=tmp_path, minutes=None, steps=150, resume=False)
    assert training.curve[-1].loss < 0.5 * training.curve[0].loss


def test_a_resumed_distillation_ends_bit_for_bit_where_an_uninterrupted_one_does(tmp_path: Path) -> None:
    whole, half, resumed = (Distillation(TINY, seed=0, base=new_base()) for _ in range(3))
    for training, steps in ((whole, 6), (half, 3)):
        for _ in range(steps):
            training.advance(0.0)
    half.save(tmp_path / "checkpoint.pt")
    resumed.restore(tmp_path / "checkpoint.pt")
    for _ in range(3):
        resumed.advance(0.0)
    assert all(torch.equal(a, b) for a, b in zip(resumed.average, whole.average, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(half.average, whole.average, strict=True))


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., list[Path]]:
    """Runs the command on a small transformer, into tmp_path; returns the folders whose adapter was measured."""
    measured: list[Path] = []
    monkeypatch.setattr(distil, "load_pipeline", lambda **_: SimpleNamespace(transformer=new_base()))
    monkeypatch.setattr(distil, "Distilling", lambda: TINY)
    monkeypatch.setattr(distil, "evaluate_student", lambda weights, **_: measured.append(weights))

    def run_with(*options: str) -> list[Path]:
        monkeypatch.setattr("sys.argv", ["distil", "--out", str(tmp_path), *options])
        distil.main()
        return measured

    return run_with


def test_the_command_leaves_an_adapter_that_fits_and_goes_on_with_resume(
    command: Callable[..., list[Path]], tmp_path: Path
) -> None:
    folder = tmp_path / "student"
    assert command("--steps", "3") == [folder]
    first = load_file(folder / FILE)
    merge(new_base(), folder / FILE)
    command("--steps", "5", "--resume")
    assert json.loads((folder / "loss.json").read_text())["steps"] == 5
    assert any(not torch.equal(tensor, first[name]) for name, tensor in load_file(folder / FILE).items())


def test_the_command_says_in_a_line_that_there_is_nothing_to_resume(
    command: Callable[..., list[Path]], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        command("--steps", "3", "--resume")
    assert "there is no checkpoint" in capsys.readouterr().err.splitlines()[-1]


def shipped_with(folder: Path, scale: float) -> Path:
    """A small change of the shipped weights."""
    base = load_pipeline(device=CPU, dtype=torch.float32).transformer
    factors = {name: Factors(down=scale * own.down, up=own.up) for name, own in new_factors(base).items()}
    folder.mkdir()
    save(factors, folder / FILE, base=base)
    return folder


def test_a_students_weights_are_told_from_its_teachers_and_are_the_same_in_any_dtype(tmp_path: Path) -> None:
    one, other = shipped_with(tmp_path / "one", 0.1), shipped_with(tmp_path / "other", 0.2)
    origins = {
        origin_of(load_student(device=CPU, dtype=dtype, weights=folder), "student")
        for dtype in (torch.float32, torch.bfloat16)
        for folder in (one, other)
    }
    teacher = origin_of(load_pipeline(device=CPU, dtype=torch.float32), "student")
    assert len(origins) == 2
    assert teacher.weights not in {origin.weights for origin in origins}
    assert teacher.scheduler not in {origin.scheduler for origin in origins}


def test_the_catalogues_student_makes_four_steps_of_which_the_last_is_a_large_one(tmp_path: Path) -> None:
    entry = MODELS["shapes-4step"]
    assert entry is STUDENT
    assert {name: entry.steps_at(name) for name in entry.resolutions} == {"quick": 4, "standard": 4}
    folder = shipped_with(tmp_path / "one", 0.1)
    pipe = entry.load(resolution="quick", device=CPU, dtype=torch.float32, weights=folder)
    pipe.scheduler.set_timesteps(entry.steps)
    torch.testing.assert_close(pipe.scheduler.sigmas, torch.tensor(distil._sigmas(pipe.transformer)))
    assert pipe.scheduler.sigmas[-2:].tolist() == pytest.approx([0.625, 0])


def test_an_adapter_of_the_recipes_rank_is_a_file_of_less_than_1_75_mb(tmp_path: Path) -> None:
    base = load_pipeline(device=CPU, dtype=torch.float32).transformer
    training = Distillation(Distilling(), seed=0, base=base)
    save(training.averaged(), tmp_path / FILE, base=training.teacher)
    assert (tmp_path / FILE).stat().st_size < 1_750_000


def test_the_card_has_what_the_shipped_student_reaches() -> None:
    measured = json.loads((STUDENT_WEIGHTS / "results.json").read_text())["measured"]
    card = (WEIGHTS / "MODEL_CARD.md").read_text()
    assert measured[0]["weights"] == "student"
    for arm in measured:
        shown = " | ".join(f"{arm['results'][size]['alignment']:.3f}" for size in SHAPES.resolutions)
        assert f"| {shown} |" in card


@pytest.mark.slow
def test_the_shipped_student_shows_what_unseen_captions_say() -> None:
    pipe = load_student(device=CPU, dtype=torch.float32)
    captions = held_out_captions(8, seed=0)
    videos = sample(
        pipe, captions, size=STUDENT.resolution("quick"), steps=STUDENT.steps, guidance=STUDENT.guidance, seed=0
    )
    assert score(videos, captions)["alignment"] >= 0.85
