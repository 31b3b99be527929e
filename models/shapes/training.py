"""What trainings of the model share: pace, captions, a checkpoint that holds all, and a loop that can be stopped."""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import signal
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from calibatt.models.shapes.evaluate import Point, draw_curve
from calibatt.models.shapes.scenes import Scene, caption, held_out, random_scene
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
class Pace:
    """How fast to train, and on which sizes.

    Args:
        stages: parts of the training, in their order.
        batches: videos a step, by size.
        rate: peak learning rate of AdamW.
        warm_up: steps until the peak.
        flat_until: fraction of the training after which the rates fall, linearly, to `last_rate` of the peak.
        ema: decay of the averaged weights, which are those that are kept.
        clip: largest norm of the gradient.
    """

    stages: tuple[Stage, ...]
    batches: Mapping[str, int]
    rate: float
    warm_up: int = 100
    flat_until: float = 0.4
    last_rate: float = 0.03
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

    def rate_factor(self, step: int, progress: float) -> float:
        """What the peak learning rates are multiplied by."""
        fall = max(0.0, (progress - self.flat_until) / (1 - self.flat_until))
        return min(1.0, (step + 1) / self.warm_up) * (1 - (1 - self.last_rate) * min(1.0, fall))


class Captions:
    """Captions of the model's grammar as the features that its transformer takes, on a device."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._tokenizer = device, SceneTokenizer()
        self._encoder = SceneTextEncoder().to(device)

    def features(self, texts: Sequence[str]) -> Float[Tensor, "batch length text_dim"]:
        """Features of captions, and of the empty one."""
        tokens = self._tokenizer(texts)
        text = self._encoder(tokens.input_ids.to(self._device), tokens.attention_mask.to(self._device))
        features: Tensor = text.last_hidden_state
        return features


def trained_scene(rng: random.Random) -> Scene:
    """A random scene that is not held out."""
    while held_out(caption(scene := random_scene(rng))):
        pass
    return scene


def adamw(parameters: Sequence[Tensor], *, rate: float) -> torch.optim.Optimizer:
    """AdamW without decay, whose second moment forgets within 20 steps or so."""
    fused = parameters[0].is_cuda
    return torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.95), weight_decay=0.0, fused=fused)


class Training(ABC):
    """Parameters, their optimisers and their average, which a checkpoint holds whole.

    Args:
        recipe: how to train.
        seed: of scenes and noise.
        device: of the parameters.
        models: transformers that are run, to be compiled.
        parameters: what is trained.
        optimisers: that have all of them.
    """

    def __init__(
        self,
        recipe: Pace,
        *,
        seed: int,
        device: torch.device,
        models: Sequence[Any],
        parameters: Sequence[Tensor],
        optimisers: Sequence[torch.optim.Optimizer],
    ) -> None:
        self.recipe, self.seed, self.device = recipe, seed, device
        self.models, self.parameters, self.optimisers = models, list(parameters), optimisers
        self.peaks = [optimiser.param_groups[0]["lr"] for optimiser in optimisers]
        self.average = [p.detach().clone() for p in self.parameters]
        self.generator = torch.Generator(device).manual_seed(seed)
        self.captions = Captions(device)
        self.step, self.seconds = 0, 0.0
        self.curve: list[Point] = []

    @abstractmethod
    def gradients(self, size: str, rng: random.Random) -> Float[Tensor, ""]:
        """The loss of one batch, with its gradients left at the parameters.

        Args:
            size: of the videos, a resolution's name.
            rng: draws scenes; everything else is drawn by the training's own generator.
        """

    def advance(self, progress: float) -> tuple[str, Float[Tensor, ""]]:
        """One step; returns the size it was made on, and the loss."""
        rng = random.Random(f"{self.seed} {self.step}")
        size = self.recipe.size(progress, rng)
        for optimiser, peak in zip(self.optimisers, self.peaks, strict=True):
            for group in optimiser.param_groups:
                group["lr"] = peak * self.recipe.rate_factor(self.step, progress)
        loss = self.gradients(size, rng)
        torch.nn.utils.clip_grad_norm_(self.parameters, self.recipe.clip, foreach=True)
        for optimiser in self.optimisers:
            optimiser.step()
            optimiser.zero_grad()
        self.step += 1
        # a young average would otherwise remember the start
        decay = min(self.recipe.ema, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(self.average, [p.detach() for p in self.parameters], 1 - decay)
        return size, loss.detach()

    def half(self) -> AbstractContextManager[None]:
        """What a model in fp32 is run in: bf16 on CUDA."""
        return torch.autocast("cuda", torch.bfloat16) if self.device.type == "cuda" else nullcontext()

    def compile(self) -> None:
        """Compile the layers for every size, so that the clock of the training starts after it."""
        torch._dynamo.config.recompile_limit = 64
        for model in self.models:
            model.compile_repeated_blocks(dynamic=False)
        state = self.generator.get_state()
        for size in self.recipe.sizes:
            self.gradients(size, random.Random(size))
        for optimiser in self.optimisers:
            optimiser.zero_grad()
        self.generator.set_state(state)

    def save(self, path: Path) -> None:
        """Write a checkpoint, whole or not at all."""
        aside = path.with_suffix(".partial")
        torch.save(
            {
                "recipe": asdict(self.recipe),
                "parameters": [p.detach() for p in self.parameters],
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
            raise ValueError(f"{path} is of a training by another recipe: resume it with the options it was begun with")
        with torch.no_grad():
            for parameter, saved in zip(self.parameters, state["parameters"], strict=True):
                parameter.copy_(saved)
        for optimiser, saved in zip(self.optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)
        self.average = state["average"]
        self.generator.set_state(state["generator"].cpu())
        self.step, self.seconds = state["step"], state["seconds"]
        self.curve = [Point(**point) for point in state["curve"]]

    def write_curve(self, folder: Path, **facts: Any) -> None:
        """Write loss.json, with the recipe and further facts, and loss.png."""
        known = {"seed": self.seed, "steps": self.step, "minutes": self.seconds / 60, "recipe": asdict(self.recipe)}
        curve = [asdict(point) for point in self.curve]
        text = json.dumps({**facts, **known, "curve": curve}, indent=1) + "\n"
        (folder / "loss.json").write_text(text, encoding="utf-8")
        draw_curve(self.curve, folder / "loss.png")


_Training = TypeVar("_Training", bound=Training)


def run(training: Training, *, out: Path, minutes: float | None, steps: int | None, resume: bool) -> None:
    """Train until the minutes or the steps are used up; whichever is given is what the recipe's fractions are of.

    Args:
        training: at its beginning; compiled on CUDA, plain elsewhere.
        out: folder of the checkpoint; written every minute and at the end.
        minutes, steps: one of the two. Minutes count from the first step, and earlier tries that were resumed count.
        resume: whether to go on from the folder's checkpoint.

    Raises:
        ValueError: neither or both of minutes and steps are given.
        OSError: there is no checkpoint to resume.
        KeyboardInterrupt: asked to stop (SIGINT); the checkpoint is written first.
    """
    if (minutes is None) == (steps is None):
        raise ValueError("give either minutes or steps")
    out.mkdir(parents=True, exist_ok=True)
    checkpoint = out / "checkpoint.pt"
    if resume:
        training.restore(checkpoint)
    if training.device.type == "cuda":
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
            if time.monotonic() - saved > 60:
                training.save(checkpoint)
                saved = time.monotonic()
    finally:
        signal.signal(signal.SIGINT, handler)
    training.save(checkpoint)
    if interrupts:
        raise KeyboardInterrupt(f"stopped after {training.seconds / 60:.1f} minutes: go on with --resume")


def parser_of(about: str | None) -> argparse.ArgumentParser:
    """The options that every training has."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoint, weights, curve and samples")
    parser.add_argument("--minutes", type=float, help="length of the training, on any device")
    parser.add_argument("--steps", type=int, help="length of the training in steps, in place of minutes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="go on from the folder's checkpoint")
    return parser


def run_command(parser: argparse.ArgumentParser, args: argparse.Namespace, begun: Callable[[], _Training]) -> _Training:
    """Train as the command line says; what went wrong is a line.

    Args:
        parser, args: of the command line.
        begun: makes the training at its beginning; its ValueError and OSError are said too.
    """
    try:
        training = begun()
        run(training, out=args.out, minutes=args.minutes, steps=args.steps, resume=args.resume)
    except (ValueError, OSError) as problem:
        parser.error(str(problem))
    except KeyboardInterrupt as stopped:
        parser.exit(130, f"{stopped}\n")
    return training
