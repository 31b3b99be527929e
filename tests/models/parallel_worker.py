"""What each of two processes does for `test_parallel.py`: videos whole, and with shared tokens; torchrun and gloo.

    torchrun --nproc-per-node 2 parallel_worker.py FOLDER

Every process writes what it has made into a file of its own.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from calibatt.kernels import oracle
from calibatt.kernels.geometry import Geometry
from calibatt.kernels.mask import packed
from calibatt.kernels.plan import Plan
from calibatt.methods.base import Method
from calibatt.methods.calibatt.method import CalibAttConfig
from calibatt.methods.catalogue import build
from calibatt.methods.learning import Learnt, Origin, Provenance, settings_of
from calibatt.models.adapter import attached, restore, sparsify
from calibatt.models.shapes.pipeline import assemble, new_transformer

HEADS, LAYERS, STEPS = 4, 2, 3
GEOMETRY = Geometry(grid=(2, 4, 8), heads=HEADS, head_dim=64)


class Exact:
    """Computes what a plan says in fp64, and remembers the plans."""

    def __init__(self) -> None:
        self.plans: list[Plan] = []

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: Plan) -> torch.Tensor:
        self.plans.append(plan)
        return oracle.attend(q, k, v, plan).to(q.dtype)


def masks(shifted: int = 0) -> Learnt:
    """Of CalibAtt: the first heads keep more than the last ones, and another one of each layer reuses rows.

    However far blocks are shifted, as many are kept of each head.
    """
    learner = CalibAttConfig(block=(8, 8), anchors=2).learner()
    shares = torch.tensor([0.9, 0.7, 0.4, 0.2])[:, None, None]
    keep = torch.rand(STEPS, LAYERS, HEADS, 8, 8, generator=torch.Generator().manual_seed(0)) < shares
    keep = (keep | torch.eye(8, dtype=torch.bool)).roll(shifted, -1)
    similarity = torch.zeros(STEPS, LAYERS, HEADS)
    similarity[:, 0, 1] = similarity[:, 1, 3] = 1
    return Learnt(
        method="calibatt", preset="default", settings=settings_of(learner),
        tables={
            "bits": packed(keep.flatten(0, 2)).unflatten(0, keep.shape[:3]),
            "agreement": torch.ones(STEPS, LAYERS, HEADS),
            "similarity": similarity,
        },
        provenance=Provenance(
            origin=Origin(model="none", weights="0", scheduler="none"), geometry=GEOMETRY, steps=STEPS, layers=LAYERS,
            guidance=3.0, prompts=("one",), seed=0, cost_ratio=1.0,
        ),
    )  # fmt: skip


def methods() -> dict[str, Method]:
    """One that knows its plans from the start and one that learnt them; one that looks at queries and keys."""
    return {
        "dense": build("dense"),
        "calibatt": build("calibatt", calibration=masks()),
        "draft": build("draft", preset="no-warmup", block=(8, 8), patch=(2, 4)),
    }


@torch.no_grad()
def run(pipe: Any) -> torch.Tensor:
    """A video of two guided branches."""
    frames: torch.Tensor = pipe(
        prompt=["a red circle moving left, over stripes"], negative_prompt=[""], height=16, width=32, num_frames=2,
        num_inference_steps=STEPS, guidance_scale=3.0, max_sequence_length=24, output_type="pt",
        latents=torch.randn(1, 3, 2, 16, 32, generator=torch.Generator().manual_seed(0)),
    ).frames  # fmt: skip
    return frames


def new_pipe() -> Any:
    torch.manual_seed(0)
    pipe = assemble(new_transformer(layers=LAYERS, heads=HEADS))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def videos(pipe: Any) -> dict[str, Any]:
    """By method, and under `NAME plans` how much each computes."""
    made: dict[str, Any] = {"stock": run(pipe)}
    for name, method in methods().items():
        kernel = Exact()
        with attached(pipe, method, kernel, trusted=True):
            made[name] = run(pipe)
        made[f"{name} plans"] = [plan.density() for plan in kernel.plans]
    return made


def late(pipe: Any, config: Any) -> str:
    """What is said where parallelism is switched on too late."""
    sparsify(pipe, build("dense"), kernel=Exact())
    pipe.transformer.enable_parallelism(config=config)
    try:
        run(pipe)
    except ValueError as error:
        return str(error)
    finally:
        restore(pipe)
    return "nothing"


def unlike(pipe: Any) -> str:
    """What is said where processes have masks of their own."""
    try:
        with attached(pipe, build("calibatt", calibration=masks(shifted=dist.get_rank())), Exact(), trusted=True):
            run(pipe)
    except ValueError as error:
        return str(error)
    return "nothing"


def compiled(pipe: Any) -> torch.Tensor:
    """The masks in a model that is compiled block by block."""
    pipe.transformer.compile_repeated_blocks(backend="eager")
    with attached(pipe, methods()["calibatt"], Exact(), trusted=True):
        return run(pipe)


def main(folder: Path) -> None:
    from diffusers import ContextParallelConfig

    dist.init_process_group("gloo")
    # Diffusers divides by it, and would share out GPUs
    torch.accelerator.device_count = lambda: 1  # type: ignore[method-assign]
    pipe = new_pipe()
    made: dict[str, Any] = {"whole": videos(pipe), "late": late(pipe, ContextParallelConfig(ulysses_degree=2))}
    made["unlike"] = unlike(pipe)
    made["shared"] = videos(pipe)
    made["compiled"] = compiled(pipe)
    torch.save(made, folder / f"{dist.get_rank()}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
