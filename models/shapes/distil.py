"""Distils a student of 4 steps without guidance: python -m calibatt.models.shapes.distil --out DIR --minutes 7.

From noise, the student goes its own way. From where each of its steps begins, the teacher goes on to where it ends, in
smaller steps and with guidance, and the student learns to get there at once: progressive distillation (Salimans and
Ho, 2022) of a guided model (Meng and others, 2023), in one round, on the student's own states, so that it learns to put
right what its earlier steps did (DAgger; Ross and others, 2011). What is trained is an adapter (`lora.py`).
"""

from __future__ import annotations

import copy
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from calibatt.models.shapes.entry import SHAPES, STUDENT
from calibatt.models.shapes.evaluate import evaluate_student
from calibatt.models.shapes.lora import FILE, Factors, matrices, save
from calibatt.models.shapes.pipeline import SHIFT, STUDENT_TERMINAL, assemble, cast, load_pipeline
from calibatt.models.shapes.scenes import caption
from calibatt.models.shapes.training import Pace, Stage, Training, adamw, parser_of, run_command, trained_scene

Video = Float[Tensor, "batch 3 frames height width"]
Text = Float[Tensor, "batch length text_dim"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Distilling(Pace):
    """How to distil.

    Args:
        stages, batches: 24,576 tokens in each pass of the student, since smaller batches leave a GPU waiting for its
            host; of the largest size, which is rare since it takes the longest by far, 32,760.
        rate: on a CPU, on two videos of two frames a step, it brought the four steps' errors to 0.5 to 0.9 of what they
            are without an adapter within 23 steps; three times as much made that of the last one larger within 10.
        ema: shorter than that of a training, which makes more steps.
        rank: of the adapter; 16 makes a file of 1.7 MB.
        substeps: of the teacher, to one step of the student; 20 in all, as many as it is used with.
        guidance: of the teacher.
    """

    stages: tuple[Stage, ...] = (Stage(until=1.0, shares={"quick": 0.5, "standard": 0.4, "large": 0.1}),)
    batches: Mapping[str, int] = field(default_factory=lambda: {"quick": 8, "standard": 4, "large": 1})
    rate: float = 1e-3
    warm_up: int = 50
    ema: float = 0.99
    rank: int = 16
    substeps: int = 5
    guidance: float = SHAPES.guidance


class Distillation(Training):
    """Of a student, which is its teacher with an adapter.

    Args:
        recipe: how.
        seed: of adapter, scenes and noise.
        base: a transformer in fp32, which becomes the student; the teacher is a copy.
    """

    recipe: Distilling

    def __init__(self, recipe: Distilling, *, seed: int, base: Any) -> None:
        torch.manual_seed(seed)
        device = base.device
        self.student = base.requires_grad_(False)
        self.teacher = cast(copy.deepcopy(base), torch.bfloat16 if device.type == "cuda" else torch.float32)
        self.sigmas = _sigmas(self.teacher)
        self._merged_into = {name: matrix.requires_grad_() for name, matrix in matrices(self.student).items()}
        self._base = {name: matrix.detach().clone() for name, matrix in self._merged_into.items()}
        factors = [tensor for matrix in self._base.values() for tensor in Factors.new(matrix, rank=recipe.rank)]
        factors = [tensor.requires_grad_() for tensor in factors]
        super().__init__(
            recipe,
            seed=seed,
            device=device,
            models=[self.student, self.teacher],
            parameters=factors,
            optimisers=[adamw(factors, rate=recipe.rate)],
        )

    def gradients(self, size: str, rng: random.Random) -> Float[Tensor, ""]:
        """As Training's; the loss is the mean over the student's steps."""
        texts = [caption(trained_scene(rng)) for _ in range(self.recipe.batches[size])]
        text = self.captions.features(texts)
        shape = (len(texts), *SHAPES.latent_shape(size)[1:])
        x = torch.randn(shape, generator=self.generator, device=self.device)
        merged = self._merge()
        losses = []
        for start, end in pairwise(self.sigmas):
            goal = mean_velocity(
                self.teacher, x, text, sigmas=between(start, end, count=self.recipe.substeps),
                guidance=self.recipe.guidance,
            )  # fmt: skip
            # an input with a gradient, so that the first layer is compiled as the others are
            with self.half():
                step = velocity(self.student, x.detach().requires_grad_(), text, sigma=start)
            loss = torch.nn.functional.mse_loss(step, goal)
            loss.backward()
            losses.append(loss.detach())
            x = x + (end - start) * step.detach()
        self._hand_on(merged)
        return torch.stack(losses).mean()

    def averaged(self) -> dict[str, Factors]:
        """The averaged adapter, by the names of the matrices."""
        return self._factors(self.average)

    def _factors(self, tensors: Sequence[Tensor]) -> dict[str, Factors]:
        pairs = zip(tensors[::2], tensors[1::2], strict=True)
        return {name: Factors(down=down, up=up) for name, (down, up) in zip(self._base, pairs, strict=True)}

    def _merge(self) -> list[Tensor]:
        """Put base and adapter into the student; what was put there, still tied to the adapter."""
        factors = self._factors(self.parameters)
        merged = [factors[name].added_to(matrix) for name, matrix in self._base.items()]
        with torch.no_grad():
            torch._foreach_copy_(list(self._merged_into.values()), merged)
        return merged

    def _hand_on(self, merged: Sequence[Tensor]) -> None:
        """The gradients of the student's matrices, to the adapter."""
        own = list(self._merged_into.values())
        torch.autograd.backward(merged, [matrix.grad for matrix in own])
        for matrix in own:
            matrix.grad = None


def velocity(model: Any, x: Video, text: Text, *, sigma: float) -> Video:
    """What a transformer says at one noise level, which Wan counts in thousandths, in fp32."""
    steps = torch.full((len(x),), 1000 * sigma, device=x.device)
    (found,) = model(x.to(model.dtype), timestep=steps, encoder_hidden_states=text.to(model.dtype), return_dict=False)
    return found.float()  # type: ignore[no-any-return]


@torch.no_grad()
def mean_velocity(model: Any, x: Video, text: Text, *, sigmas: Sequence[float], guidance: float) -> Video:
    """The mean velocity at which a guided model goes from the first of these noise levels to the last, step by step.

    Args:
        model: the teacher.
        x: videos at the first noise level.
        text: features of their captions; those of the empty one are zeros.
        sigmas: noise levels, the first and the last among them.
        guidance: scale of classifier-free guidance.
    """
    both, at = torch.cat((torch.zeros_like(text), text)), x
    for sigma, following in pairwise(sigmas):
        without, with_text = velocity(model, torch.cat((at, at)), both, sigma=sigma).chunk(2)
        at = at + (following - sigma) * torch.lerp(without, with_text, guidance)
    return (at - x) / (sigmas[-1] - sigmas[0])


def between(start: float, end: float, *, count: int) -> list[float]:
    """Noise levels from one to another in so many steps, which are even before the schedule's shift."""
    first, last = (sigma / (SHIFT - (SHIFT - 1) * sigma) for sigma in (start, end))
    even = [first + (last - first) * number / count for number in range(count + 1)]
    return [SHIFT * t / (1 + (SHIFT - 1) * t) for t in even]


def _sigmas(transformer: Any) -> list[float]:
    """The student's noise levels, of which the last is 0."""
    scheduler = assemble(transformer, terminal=STUDENT_TERMINAL).scheduler
    scheduler.set_timesteps(STUDENT.steps)
    levels: list[float] = scheduler.sigmas.tolist()
    return levels


def main() -> None:
    """Distil, keep the averaged adapter, and measure it."""
    parser = parser_of(__doc__)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def begun() -> Distillation:
        base = load_pipeline(device=device, dtype=torch.float32).transformer
        return Distillation(Distilling(), seed=args.seed, base=base)

    training = run_command(parser, args, begun)
    folder = args.out / "student"
    folder.mkdir(exist_ok=True)
    save(training.averaged(), folder / FILE, base=training.teacher)
    training.write_curve(folder)
    evaluate_student(folder, out=folder, device=device)


if __name__ == "__main__":
    main()
