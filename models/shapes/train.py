"""Trains the model, from nothing or further: python -m calibatt.models.shapes.train --out DIR --minutes 15."""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import signal
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from calibatt.models.entry import Resolution
from calibatt.models.shapes.entry import SHAPES
from calibatt.models.shapes.evaluate import Point, draw_curve, evaluate_weights
from calibatt.models.shapes.pipeline import cast, load_pipeline, new_transformer
from calibatt.models.shapes.scenes import Scene, canvas_of, caption, encode, held_out, random_scene, render
from calibatt.models.shapes.text import SceneTextEncoder, SceneTokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """A part of the training.

    Args:
        until: where it ends, as a fraction of the whole.
        shares: of the steps, by the size of their videos, a resolution's name.
    """

    until: float
    shares: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How to train; MODEL_CARD.md beside the weights says what they were trained with.

    Args:
        layers, heads: of the transformer.
        stages: the shorter video first, which teaches colours, shapes and backgrounds at two fifths of the price.
        batches: videos a step, by size; 147,456 tokens each, of the largest 131,040.
        rate, matrix_rate: peak learning rates, of AdamW and of Muon (which has the matrices of the layers).
        warm_up: steps until the peak.
        flat_until: fraction of the training after which the rates fall, linearly, to `last_rate` of the peak.
        logit_mean, logit_std: of the noise level's logit, a normal distribution, drawn stratified over the batch; the
            mean at the standard size. Layout, colour and motion are decided at high noise, since sixteen frames say
            the same thing many times: a quarter of the draws are above 0.95.
            With n times the tokens, noise hides less of what all of them say, as if it were √n times less: so the mean
            grows by ½ ln n with the size (Esser and others, 2024).
        anchored: share of the videos whose first frame has less noise than the others, as in diffusion forcing (Chen
            and others, 2024). Without it directions are not learnt: that a thing moves to the right shows in no single
            frame, only in two at once, and a model that knows neither "later" nor "to the right" gains nothing by
            learning one of them. After a clear first frame everything is later.
        blank: share of captions replaced by the empty one, for guidance.
        ema: decay of the averaged weights, which are those that are kept.
        clip: largest norm of the gradient.
    """

    layers: int = 8
    heads: int = 4
    stages: tuple[Stage, ...] = (
        Stage(until=0.2, shares={"quick": 1.0}),
        Stage(until=1.0, shares={"standard": 0.7, "quick": 0.3}),
    )
    batches: Mapping[str, int] = field(default_factory=lambda: {"quick": 48, "standard": 24, "large": 4})
    rate: float = 8e-4
    matrix_rate: float = 2e-3
    warm_up: int = 100
    flat_until: float = 0.4
    last_rate: float = 0.03
    logit_mean: float = 2.0
    logit_std: float = 1.4
    anchored: float = 0.5
    blank: float = 0.1
    ema: float = 0.999
    clip: float = 1.0

    @property
    def sizes(self) -> list[str]:
        """All sizes of its videos."""
        return sorted({size for stage in self.stages for size in stage.shares})

    def size(self, progress: float, rng: random.Random) -> str:
        """Size of the next step's videos, at a progress from 0 to 1."""
        stage = next((stage for stage in self.stages if progress < stage.until), self.stages[-1])
        return rng.choices(list(stage.shares), list(stage.shares.values()))[0]

    def logit_mean_of(self, tokens: int) -> float:
        """Mean of the noise level's logit for videos of so many tokens."""
        standard = SHAPES.geometry("standard").tokens
        return self.logit_mean + 0.5 * math.log(tokens / standard)

    def rate_factor(self, step: int, progress: float) -> float:
        """What the peak learning rates are multiplied by."""
        fall = max(0.0, (progress - self.flat_until) / (1 - self.flat_until))
        return min(1.0, (step + 1) / self.warm_up) * (1 - (1 - self.last_rate) * min(1.0, fall))


# how to go on from weights that know much already, at lower rates: small videos first, which are cheap, then large ones
FURTHER = Recipe(
    stages=(
        Stage(until=0.3, shares={"standard": 0.6, "quick": 0.3, "large": 0.1}),
        Stage(until=1.0, shares={"large": 0.7, "standard": 0.2, "quick": 0.1}),
    ),
    rate=4e-4,
    matrix_rate=1e-3,
)


class Muon(torch.optim.Optimizer):
    """Muon (Jordan and others, 2024), with the matrices of one shape orthogonalised together.

    torch.optim.Muon takes them one by one: for this small model its 2,000 launches a step cost a third of the time.

    Args:
        matrices: parameters of two dimensions.
        rate: learning rate, on AdamW's scale: an update's root mean square is 0.2 (Liu and others, 2025).
        momentum: of the gradient, Nesterov's.
    """

    # the quintic's coefficients and number of rounds are those of Jordan's description
    _COEFFICIENTS, _ROUNDS = (3.4445, -4.7750, 2.0315), 5

    def __init__(self, matrices: Sequence[Tensor], *, rate: float, momentum: float = 0.95) -> None:
        shapes = sorted({tuple(p.shape) for p in matrices})
        groups = [{"params": [p for p in matrices if tuple(p.shape) == shape]} for shape in shapes]
        super().__init__(groups, {"lr": rate, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every matrix that has a gradient; all of them must."""
        for group in self.param_groups:
            matrices: list[Tensor] = group["params"]
            gradient = torch.stack([p.grad for p in matrices if p.grad is not None])
            # one buffer for the whole group, kept at its first matrix
            state = self.state[matrices[0]]
            if not state:
                state["momentum"] = torch.zeros_like(gradient)
            state["momentum"].lerp_(gradient, 1 - group["momentum"])
            update = self._orthogonal(gradient.lerp(state["momentum"], group["momentum"]))
            scale = 0.2 * math.sqrt(max(update.shape[1:]))
            torch._foreach_add_(matrices, list(update.float().unbind()), alpha=-group["lr"] * scale)

    def _orthogonal(self, stack: Float[Tensor, "matrices rows columns"]) -> Float[Tensor, "matrices rows columns"]:
        """Roughly the nearest matrices with orthonormal rows or columns, by Newton and Schulz."""
        tall = stack.shape[1] > stack.shape[2]
        x = (stack.mT if tall else stack).bfloat16()
        x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
        a, b, c = self._COEFFICIENTS
        for _ in range(self._ROUNDS):
            gram = x @ x.mT
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
        return x.mT if tall else x


class Corpus:
    """Scenes that are not held out, and their videos and captions on a device."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._tokenizer = device, SceneTokenizer()
        self._encoder = SceneTextEncoder().to(device)

    def batch(
        self, count: int, *, size: Resolution, blank: float, rng: random.Random, generator: torch.Generator
    ) -> tuple[Float[Tensor, "batch 3 frames height width"], Float[Tensor, "batch length text_dim"]]:
        """Videos and the features of their captions, some of them those of the empty caption.

        Args:
            count: how many.
            size: of the videos.
            blank: share of captions replaced by the empty one.
            rng: draws scenes.
            generator: draws everything else, on the device.
        """
        scenes = [trained_scene(rng) for _ in range(count)]
        texts = [caption(scene) if rng.random() >= blank else "" for scene in scenes]
        tokens = self._tokenizer(texts)
        text = self._encoder(tokens.input_ids.to(self._device), tokens.attention_mask.to(self._device))
        video = render(
            encode(scenes).to(self._device), canvas=canvas_of(size.height, size.width), frames=size.frames,
            generator=generator,
        )  # fmt: skip
        return video, text.last_hidden_state


def trained_scene(rng: random.Random) -> Scene:
    """A random scene that is not held out."""
    while held_out(caption(scene := random_scene(rng))):
        pass
    return scene


def flow_loss(
    model: Any,
    video: Float[Tensor, "batch 3 frames height width"],
    text: Float[Tensor, "batch length text_dim"],
    *,
    recipe: Recipe,
    generator: torch.Generator,
) -> Float[Tensor, ""]:
    """Mean squared error of the velocity (noise − video) at random noise levels."""
    # one draw in each of as many equal parts of the distribution as there are videos
    within = torch.rand(len(video), generator=generator, device=video.device)
    strata = torch.arange(len(video), device=video.device) + within
    logits = torch.special.ndtri(strata / len(video))
    tokens = video[0, 0, 0].numel() // math.prod(model.config.patch_size)
    mean = recipe.logit_mean_of(tokens * video.shape[2])
    sigma = torch.sigmoid(logits * recipe.logit_std + mean)[:, None].repeat(1, video.shape[2])
    chosen, less = torch.rand((2, len(video)), generator=generator, device=video.device)
    sigma[:, 0] *= torch.where(chosen < recipe.anchored, less, 1)
    noise = torch.randn(video.shape, generator=generator, device=video.device)
    noisy = torch.lerp(video, noise, sigma[:, None, :, None, None])
    # Wan counts noise levels in thousandths, and has one for each token
    steps = (sigma * 1000).repeat_interleave(tokens, dim=1)
    velocity = model(noisy, timestep=steps, encoder_hidden_states=text, return_dict=False)[0]
    return torch.nn.functional.mse_loss(velocity.float(), noise - video)


class Training:
    """A model, its optimisers and its average, which a checkpoint holds whole."""

    def __init__(self, recipe: Recipe, *, seed: int, device: torch.device) -> None:
        self.recipe, self.seed, self.device = recipe, seed, device
        torch.manual_seed(seed)
        self.model = new_transformer(layers=recipe.layers, heads=recipe.heads).to(device)
        matrices = [p for p in self.model.blocks.parameters() if p.ndim == 2]
        chosen = {id(p) for p in matrices}
        others = [p for p in self.model.parameters() if id(p) not in chosen]
        self.optimisers: list[torch.optim.Optimizer] = [
            Muon(matrices, rate=recipe.matrix_rate),
            torch.optim.AdamW(others, lr=recipe.rate, betas=(0.9, 0.95), weight_decay=0.0, fused=device.type == "cuda"),
        ]
        self.peaks = [optimiser.param_groups[0]["lr"] for optimiser in self.optimisers]
        self.average = [p.detach().clone() for p in self.model.parameters()]
        self.generator = torch.Generator(device).manual_seed(seed)
        self.corpus = Corpus(device)
        self.step, self.seconds = 0, 0.0
        self.curve: list[Point] = []

    def advance(self, progress: float) -> tuple[str, Float[Tensor, ""]]:
        """One step; returns the size it was made on, and the loss."""
        rng = random.Random(f"{self.seed} {self.step}")
        size = self.recipe.size(progress, rng)
        for optimiser, peak in zip(self.optimisers, self.peaks, strict=True):
            for group in optimiser.param_groups:
                group["lr"] = peak * self.recipe.rate_factor(self.step, progress)
        loss = self.gradients(size, rng)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip, foreach=True)
        for optimiser in self.optimisers:
            optimiser.step()
            optimiser.zero_grad()
        self.step += 1
        # a young average would otherwise remember the random start
        decay = min(self.recipe.ema, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(self.average, [p.detach() for p in self.model.parameters()], 1 - decay)
        return size, loss.detach()

    def gradients(self, size: str, rng: random.Random) -> Float[Tensor, ""]:
        """The loss of one batch, with its gradients left at the parameters."""
        video, text = self.corpus.batch(
            self.recipe.batches[size], size=SHAPES.resolution(size), blank=self.recipe.blank, rng=rng,
            generator=self.generator,
        )  # fmt: skip
        half = torch.autocast("cuda", torch.bfloat16) if self.device.type == "cuda" else nullcontext()
        with half:
            loss = flow_loss(self.model, video, text, recipe=self.recipe, generator=self.generator)
        loss.backward()
        return loss

    def compile(self) -> None:
        """Compile the layers for every size, so that the clock of the training starts after it."""
        torch._dynamo.config.recompile_limit = 64
        self.model.compile_repeated_blocks(dynamic=False)
        state = self.generator.get_state()
        for size in self.recipe.sizes:
            self.gradients(size, random.Random(size))
        for optimiser in self.optimisers:
            optimiser.zero_grad()
        self.generator.set_state(state)

    def averaged(self) -> Any:
        """A transformer with the averaged weights, in bf16 but for what Wan keeps in fp32."""
        transformer = new_transformer(layers=self.recipe.layers, heads=self.recipe.heads).to(self.device)
        for parameter, average in zip(transformer.parameters(), self.average, strict=True):
            parameter.data.copy_(average)
        return cast(transformer.requires_grad_(False), torch.bfloat16)

    def begin_with(self, folder: Path) -> None:
        """Take over another training's weights, but not its optimisers or its clock.

        Raises:
            OSError: the folder holds no weights.
        """
        pipe = load_pipeline(device=self.device, dtype=torch.float32, weights=folder)
        self.model.load_state_dict(pipe.transformer.state_dict())
        self.average = [p.detach().clone() for p in self.model.parameters()]

    def save(self, path: Path) -> None:
        """Write a checkpoint, whole or not at all."""
        aside = path.with_suffix(".partial")
        torch.save(
            {
                "recipe": asdict(self.recipe),
                "model": self.model.state_dict(),
                "optimisers": [optimiser.state_dict() for optimiser in self.optimisers],
                "average": self.average,
                "generator": self.generator.get_state(),
                "step": self.step,
                "seconds": self.seconds,
                "curve": [asdict(point) for point in self.curve],
            },
            aside,
        )
        os.replace(aside, path)

    def restore(self, path: Path) -> None:
        """Go on from a checkpoint.

        Raises:
            OSError: there is none.
            ValueError: it is of a training by another recipe.
        """
        if not path.is_file():
            raise OSError(f"there is no checkpoint {path}: start without --resume")
        state = torch.load(path, map_location=self.device)
        if state["recipe"] != asdict(self.recipe):
            raise ValueError(f"{path} is of a training by another recipe: give --start where it was begun with that")
        self.model.load_state_dict(state["model"])
        for optimiser, saved in zip(self.optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)
        self.average = state["average"]
        self.generator.set_state(state["generator"].cpu())
        self.step, self.seconds = state["step"], state["seconds"]
        self.curve = [Point(**point) for point in state["curve"]]


def train(
    recipe: Recipe,
    *,
    out: Path,
    seed: int,
    device: torch.device,
    minutes: float | None = None,
    steps: int | None = None,
    resume: bool = False,
    start: Path | None = None,
) -> Training:
    """Train until the minutes or the steps are used up; whichever is given is what the recipe's fractions are of.

    Args:
        recipe: how.
        out: folder of the checkpoint; written every two minutes and at the end.
        seed: of weights, scenes and noise.
        device: to train on; compiled and in bf16 on CUDA, plain elsewhere.
        minutes, steps: one of the two. Minutes count from the first step, and earlier tries that were resumed count.
        resume: whether to go on from the folder's checkpoint.
        start: folder of weights to begin with, in place of random ones; a checkpoint that is resumed has its own.

    Raises:
        ValueError: neither or both of minutes and steps are given.
        OSError: there is no checkpoint to resume, or there are no weights to start with.
        KeyboardInterrupt: asked to stop (SIGINT); the checkpoint is written first.
    """
    if (minutes is None) == (steps is None):
        raise ValueError("give either minutes or steps")
    out.mkdir(parents=True, exist_ok=True)
    checkpoint = out / "checkpoint.pt"
    training = Training(recipe, seed=seed, device=device)
    if resume:
        training.restore(checkpoint)
    elif start is not None:
        training.begin_with(start)
    if device.type == "cuda":
        training.compile()
    before, began, saved = training.seconds, time.monotonic(), time.monotonic()
    losses: dict[str, list[Tensor]] = {}
    interrupts: list[int] = []
    # heard between steps: one that is cut in half would be in the checkpoint
    handler = signal.signal(signal.SIGINT, lambda number, _: interrupts.append(number))
    try:
        while not interrupts:
            progress = training.seconds / (60 * minutes) if minutes else training.step / (steps or 1)
            if progress >= 1:
                break
            size, loss = training.advance(progress)
            losses.setdefault(size, []).append(loss)
            training.seconds = before + time.monotonic() - began
            if training.step % 50 == 0:
                # reading the losses waits for the device, which also keeps the clock honest
                for size, some in sorted(losses.items()):
                    point = Point(
                        step=training.step, minutes=training.seconds / 60, size=size,
                        loss=float(torch.stack(some).mean()),
                    )  # fmt: skip
                    training.curve.append(point)
                    if training.step % 200 == 0:
                        print(f"step {point.step}, {point.minutes:.2f} min, {size}: {point.loss:.5f}", flush=True)
                    if not math.isfinite(point.loss):
                        raise FloatingPointError(f"the loss is {point.loss} at step {point.step}")
                losses.clear()
            if time.monotonic() - saved > 120:
                training.save(checkpoint)
                saved = time.monotonic()
    finally:
        signal.signal(signal.SIGINT, handler)
    training.save(checkpoint)
    if interrupts:
        raise KeyboardInterrupt(f"stopped after {training.seconds / 60:.1f} minutes: go on with --resume")
    return training


def main() -> None:
    """Train, keep the averaged weights, and measure them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoint, weights, curve and samples")
    parser.add_argument("--minutes", type=float, help="length of the training, on any device")
    parser.add_argument("--steps", type=int, help="length of the training in steps, in place of minutes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="go on from the folder's checkpoint")
    parser.add_argument("--start", type=Path, help="weights to go on from, by another recipe; again with --resume")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    recipe = FURTHER if args.start else Recipe()
    try:
        # the training that this one goes on from; read first, so that a missing file is said before the work
        earlier = json.loads((args.start / "loss.json").read_text(encoding="utf-8")) if args.start else None
        training = train(
            recipe,
            out=args.out,
            seed=args.seed,
            device=device,
            minutes=args.minutes,
            steps=args.steps,
            resume=args.resume,
            start=args.start,
        )
    except (ValueError, OSError) as problem:
        parser.error(str(problem))
    except KeyboardInterrupt as stopped:
        parser.exit(130, f"{stopped}\n")
    weights = args.out / "weights"
    # two files of less than 9 MB
    training.averaged().to(torch.bfloat16).save_pretrained(weights, max_shard_size="9MB")
    facts = {
        "seed": args.seed,
        "start": earlier,
        "steps": training.step,
        "minutes": training.seconds / 60,
        "recipe": asdict(recipe),
    }
    (weights / "loss.json").write_text(
        json.dumps({**facts, "curve": [asdict(point) for point in training.curve]}, indent=1) + "\n"
    )
    draw_curve(training.curve, weights / "loss.png")
    evaluate_weights(weights, out=weights, device=device)


if __name__ == "__main__":
    main()
