"""The pipeline runs as WanPipeline does, the shipped weights are small and good, and training trains."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from calibatt.models.generate import generate
from calibatt.models.shapes.entry import SHAPES
from calibatt.models.shapes.evaluate import sample, score
from calibatt.models.shapes.pipeline import WEIGHTS, assemble, load_pipeline, new_transformer
from calibatt.models.shapes.scenes import held_out_captions
from calibatt.models.shapes.text import LENGTH, TEXT_DIM, SceneTextEncoder, SceneTokenizer
from calibatt.models.shapes.train import FlowTraining, Muon, Recipe
from calibatt.models.shapes.training import Stage, run

_TINY = Recipe(
    layers=1,
    heads=1,
    batches={"quick": 1},
    stages=(Stage(until=1.0, shares={"quick": 1.0}),),
    warm_up=5,
    rate=3e-3,
    matrix_rate=1e-2,
)
_CAPTION = "a red circle moving left and a blue square, still, over stripes"


@pytest.mark.parametrize("resolution", list(SHAPES.resolutions))
def test_an_untrained_pipeline_makes_videos_of_the_right_shape(resolution: str) -> None:
    pipe = assemble(new_transformer(layers=1, heads=1))
    video = generate(SHAPES, pipe, prompt=_CAPTION, resolution=resolution, seed=0, steps=1)
    assert video.shape == SHAPES.latent_shape(resolution)[1:]
    assert video.isfinite().all()


def test_a_prompt_outside_the_grammar_is_refused() -> None:
    pipe = assemble(new_transformer(layers=1, heads=1))
    with pytest.raises(ValueError, match="unknown word 'dog'"):
        generate(SHAPES, pipe, prompt="a red dog, still, over dots", resolution="quick", seed=0, steps=1)


def test_text_features_tell_the_clauses_apart() -> None:
    tokens = SceneTokenizer()([_CAPTION, ""], max_length=LENGTH)
    features = SceneTextEncoder()(tokens.input_ids, tokens.attention_mask).last_hidden_state
    assert features.shape == (2, LENGTH, TEXT_DIM)
    clauses = features[0, :13, -3:].argmax(-1).tolist()
    assert clauses == [0] * 5 + [1] * 5 + [2] * 2 + [0]
    longer = SceneTokenizer()([_CAPTION.replace(" over", " and a green cross, still, over")])
    clauses = SceneTextEncoder()(longer.input_ids, longer.attention_mask).last_hidden_state[0, :18, -3:].argmax(-1)
    assert clauses.tolist() == [0] * 5 + [1] * 5 + [2] * 7 + [0]
    assert features[1].abs().max() == 0


def test_weights_that_are_not_there_are_an_error_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"has no config\.json with \.safetensors") as caught:
        load_pipeline(device=torch.device("cpu"), dtype=torch.float32, weights=tmp_path)
    assert "\n" not in str(caught.value)


def test_the_shipped_weights_are_two_small_files_and_have_a_card() -> None:
    files = sorted(WEIGHTS.glob("*.safetensors"))
    assert 1 <= len(files) <= 2
    assert all(file.stat().st_size <= 9_000_000 for file in files)
    card = (WEIGHTS / "MODEL_CARD.md").read_text()
    results = json.loads((WEIGHTS / "results.json").read_text())["results"]
    assert f"{results['standard']['alignment']:.3f}" in card


def test_the_transformer_has_the_sizes_that_the_catalogue_says() -> None:
    config = load_pipeline(device=torch.device("cpu"), dtype=torch.bfloat16).transformer.config
    sizes = (config.num_layers, config.num_attention_heads, config.attention_head_dim, tuple(config.patch_size))
    assert sizes == (SHAPES.layers, SHAPES.heads, SHAPES.head_dim, SHAPES.patch)


@pytest.mark.slow
def test_the_shipped_weights_show_far_more_of_unseen_captions_than_chance() -> None:
    pipe = load_pipeline(device=torch.device("cpu"), dtype=torch.float32)
    captions = held_out_captions(4, seed=0)
    videos = sample(pipe, captions, size=SHAPES.resolution("quick"), steps=8, guidance=SHAPES.guidance, seed=0)
    # renders of other captions reach 0.15
    assert score(videos, captions)["alignment"] > 0.6


@pytest.mark.slow
def test_training_lowers_the_loss(tmp_path: Path) -> None:
    training = FlowTraining(_TINY, seed=0, device=torch.device("cpu"))
    run(training, out=tmp_path, minutes=None, steps=100, resume=False)
    assert training.curve[-1].loss < 0.8 * training.curve[0].loss


@pytest.mark.slow
def test_a_resumed_training_ends_where_an_uninterrupted_one_does(tmp_path: Path) -> None:
    device = torch.device("cpu")
    whole = FlowTraining(_TINY, seed=0, device=device)
    half = FlowTraining(_TINY, seed=0, device=device)
    for training, steps in ((whole, 6), (half, 3)):
        for _ in range(steps):
            training.advance(0.0)
    half.save(tmp_path / "checkpoint.pt")
    resumed = FlowTraining(_TINY, seed=0, device=device)
    resumed.restore(tmp_path / "checkpoint.pt")
    for _ in range(3):
        resumed.advance(0.0)
    assert resumed.step == whole.step
    for a, b in zip(resumed.average, whole.average, strict=True):
        torch.testing.assert_close(a, b)
    assert not all(torch.equal(a, b) for a, b in zip(half.average, whole.average, strict=True))


def test_a_training_can_start_from_the_shipped_weights() -> None:
    training = FlowTraining(Recipe(), seed=0, device=torch.device("cpu"))
    training.begin_with(WEIGHTS)
    shipped = load_pipeline(device=torch.device("cpu"), dtype=torch.float32).transformer
    for a, b in zip(training.averaged().parameters(), shipped.parameters(), strict=True):
        assert torch.equal(a.bfloat16(), b.bfloat16())


def test_matrices_taken_together_are_updated_as_torch_takes_them_one_by_one() -> None:
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=generator) for shape in [(8, 8), (8, 24), (24, 8), (8, 8)]]
    ours, theirs = ([torch.nn.Parameter(matrix.clone()) for matrix in start] for _ in range(2))
    together = Muon(ours, rate=0.01)
    one_by_one = torch.optim.Muon(theirs, lr=0.01, weight_decay=0, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn(a.shape, generator=generator)
            b.grad = a.grad.clone()
        together.step()
        one_by_one.step()
    for a, b, s in zip(ours, theirs, start, strict=True):
        # bf16 products may be summed in another order: one part in 256 of an update
        torch.testing.assert_close(a - s, b - s, atol=1e-4, rtol=2**-7)
        assert not torch.equal(a, s)


def test_a_checkpoint_of_another_recipe_is_refused_in_a_line(tmp_path: Path) -> None:
    device = torch.device("cpu")
    FlowTraining(_TINY, seed=0, device=device).save(tmp_path / "checkpoint.pt")
    other = FlowTraining(replace(_TINY, rate=2 * _TINY.rate), seed=0, device=device)
    with pytest.raises(ValueError, match="another recipe: resume it with"):
        other.restore(tmp_path / "checkpoint.pt")
