"""Trains the model, from nothing or further: python -m calibatt.models.shapes.train --out DIR --minutes 15."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from calibatt.models.shapes.entry import SHAPES
from calibatt.models.shapes.evaluate import evaluate_weights
from calibatt.models.shapes.pipeline import cast, load_pipeline, new_transformer
from calibatt.models.shapes.scenes import canvas_of, caption, encode, render
from calibatt.models.shapes.training import Pace, Stage, Training, adamw, parser_of, run_command, trained_scene


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe(Pace):
    """How to train; MODEL_CARD.md beside the weights says what they were trained with.

    Args:
        layers, heads: of the transformer.
        stages: the shorter video first, which teaches colours, shapes and backgrounds at two fifths of the price.
        batches: videos a step, by size; 147,456 tokens each, of the largest 131,040.
        rate, matrix_rate: peak learning rates, of AdamW and of Muon (which has the matrices of the layers).
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
    logit_mean: float = 2.0
    logit_std: float = 1.4
    anchored: float = 0.5
    blank: float = 0.1

    def logit_mean_of(self, tokens: int) -> float:
        """Mean of the noise level's logit for videos of so many tokens."""
        standard = SHAPES.geometry("standard").tokens
        return self.logit_mean + 0.5 * math.log(tokens / standard)


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


class FlowTraining(Training):
    """Of the whole model, on videos that are drawn as it goes."""

    recipe: Recipe

    def __init__(self, recipe: Recipe, *, seed: int, device: torch.device) -> None:
        torch.manual_seed(seed)
        self.model = new_transformer(layers=recipe.layers, heads=recipe.heads).to(device)
        matrices = [p for p in self.model.blocks.parameters() if p.ndim == 2]
        chosen = {id(p) for p in matrices}
        others = [p for p in self.model.parameters() if id(p) not in chosen]
        super().__init__(
            recipe,
            seed=seed,
            device=device,
            models=[self.model],
            parameters=list(self.model.parameters()),
            optimisers=[Muon(matrices, rate=recipe.matrix_rate), adamw(others, rate=recipe.rate)],
        )

    def gradients(self, size: str, rng: random.Random) -> Float[Tensor, ""]:
        """As Training's."""
        video, text = self._batch(size, rng)
        with self.half():
            loss = flow_loss(self.model, video, text, recipe=self.recipe, generator=self.generator)
        loss.backward()
        return loss

    def _batch(
        self, size: str, rng: random.Random
    ) -> tuple[Float[Tensor, "batch 3 frames height width"], Float[Tensor, "batch length text_dim"]]:
        """Videos and the features of their captions, some of them those of the empty caption."""
        of = SHAPES.resolution(size)
        scenes = [trained_scene(rng) for _ in range(self.recipe.batches[size])]
        texts = [caption(scene) if rng.random() >= self.recipe.blank else "" for scene in scenes]
        video = render(
            encode(scenes).to(self.device), canvas=canvas_of(of.height, of.width), frames=of.frames,
            generator=self.generator,
        )  # fmt: skip
        return video, self.captions.features(texts)

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
        self.average = [p.detach().clone() for p in self.parameters]


def main() -> None:
    """Train, keep the averaged weights, and measure them."""
    parser = parser_of(__doc__)
    parser.add_argument("--start", type=Path, help="weights to go on from, by another recipe; again with --resume")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # the training that this one goes on from; read first, so that a missing file is said before the work
    earlier: dict[str, Any] = {"start": None}

    def begun() -> FlowTraining:
        if args.start:
            earlier["start"] = json.loads((args.start / "loss.json").read_text(encoding="utf-8"))
        training = FlowTraining(FURTHER if args.start else Recipe(), seed=args.seed, device=device)
        if args.start and not args.resume:
            training.begin_with(args.start)
        return training

    training = run_command(parser, args, begun)
    weights = args.out / "weights"
    # two files of less than 9 MB
    training.averaged().to(torch.bfloat16).save_pretrained(weights, max_shard_size="9MB")
    training.write_curve(weights, **earlier)
    evaluate_weights(weights, out=weights, device=device)


if __name__ == "__main__":
    main()
