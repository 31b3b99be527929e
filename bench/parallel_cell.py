"""One GPU against several: planted videos, dense and under CalibAtt's masks, whose tokens the processes share.

    torchrun --nproc-per-node 1 -m calibatt.bench.parallel_cell --calibration out/masks.safetensors --out out/one.json
    torchrun --nproc-per-node 2 -m calibatt.bench.parallel_cell --calibration out/masks.safetensors --out out/two.json

The first process learns the masks where the file is not there yet. Weights are planted (`models/planted/`): it is for
time and memory, never for fidelity. A time is that of a whole video without text encoder and autoencoder, of the
process that takes longest.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

from calibatt.bench import fingerprint
from calibatt.bench.timer import timed
from calibatt.calibration.artifact import Calibration
from calibatt.calibration.collect import calibrate
from calibatt.kernels.names import look_up
from calibatt.methods.base import Method
from calibatt.methods.catalogue import build
from calibatt.models.adapter import attached
from calibatt.models.catalogue import MODELS
from calibatt.models.device import pick_device, working_dtype
from calibatt.models.entry import ModelEntry
from calibatt.models.generate import generate
from calibatt.models.parallel import balanced, imbalance, in_order
from calibatt.models.planted.pipeline import load_planted

SCHEMA = "calibatt-parallel-1"
# planted models take any text; what is measured is not what was learnt from
_LEARNT, _MEASURED = "a cat on a sofa", "a boat on a river"
# masks may take longer to learn than processes wait for each other by default
_PATIENCE = timedelta(hours=1)


def main(arguments: Sequence[str] | None = None, models: Mapping[str, ModelEntry] = MODELS) -> None:
    """Measure, in one of several processes; the first one writes a JSON file, and the videos beside it."""
    parser = argparse.ArgumentParser(prog="calibatt.bench.parallel_cell", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="wan2.1-14b", help="default: %(default)s")
    parser.add_argument("--resolution", default="720p", help="default: %(default)s")
    parser.add_argument("--layers", type=int, default=10, help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=4, help="of a video, without guidance; default: %(default)s")
    parser.add_argument("--rounds", type=int, default=3, help="timed videos of each; default: %(default)s")
    parser.add_argument("--compile", action="store_true", help="block by block")
    parser.add_argument("--calibration", type=Path, required=True, help="CalibAtt's masks; learnt where there are none")
    parser.add_argument("--out", type=Path, required=True, help="the JSON file")
    parser.add_argument("--against", type=Path, help="videos of another run, to say how far these are from them")
    given = sys.argv[1:] if arguments is None else arguments
    own = parser.parse_args(given)
    if own.against is not None and not own.against.is_file():
        parser.error(f"--against: there is no file {own.against}")
    own.out.parent.mkdir(parents=True, exist_ok=True)
    device = pick_device(None)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=_PATIENCE)
    try:
        entry = replace(look_up(models, own.model, "model"), layers=own.layers)
        facts, videos = _measured(entry, own, device)
        if dist.get_rank() == 0:
            _write(own, entry, facts, videos, given)
    finally:
        dist.destroy_process_group()


def _measured(
    entry: ModelEntry, own: argparse.Namespace, device: torch.device
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    from diffusers import ContextParallelConfig

    pipe = load_planted(entry, resolution=own.resolution, device=device, dtype=working_dtype(device))
    how: dict[str, Any] = {"resolution": own.resolution, "steps": own.steps, "guidance": 1.0}
    if dist.get_rank() == 0 and not own.calibration.exists():
        calibrate(entry, pipe, prompts=[_LEARNT], seed=1, **how).save(own.calibration)
    dist.barrier()
    masks: Any = build("calibatt", calibration=Calibration.load(own.calibration))
    if dist.get_world_size() > 1:
        pipe.transformer.enable_parallelism(config=ContextParallelConfig(ulysses_degree=dist.get_world_size()))
    if own.compile:
        # no full graphs: what Diffusers puts in front of the first block, to split its tokens, breaks that one's
        pipe.transformer.compile_repeated_blocks()
    arms: dict[str, Method] = {"dense": build("dense"), "calibatt": masks}
    facts: dict[str, Any] = {name: {"samples_s": []} for name in arms}
    works = masks.plans.density()
    facts["calibatt"] |= {"density": works.mean().item(), "imbalance": _imbalance(works.flatten(0, 1))}
    videos = {}
    # after one of each that is not timed, in turns
    for number in range(own.rounds + 1):
        for name, method in arms.items():
            with attached(pipe, method):
                seconds, videos[name], peak = _one(
                    partial(generate, entry, pipe, prompt=_MEASURED, seed=2, **how), device
                )
            if number:
                facts[name]["samples_s"].append(seconds)
                facts[name]["peak_memory_bytes"] = peak
    return facts, videos


def _one(work: Any, device: torch.device) -> tuple[float, Tensor, int | None]:
    """Seconds of a video and its peak of memory, both of the process that has most, and the video."""
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    dist.barrier()
    seconds, video = timed(device, work)
    most = torch.tensor([seconds, torch.cuda.max_memory_allocated(device) if cuda else 0], dtype=torch.float64)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return most[0].item(), video, int(most[1]) if cuda else None


def _imbalance(works: Float[Tensor, "sites heads"]) -> dict[str, float]:
    """The longest process over the mean, as a mean over steps and layers: heads as they come, and by their work."""
    ranks = dist.get_world_size()
    as_they_come = [imbalance(work, in_order(len(work), ranks)) for work in works]
    by_work = [imbalance(work, balanced(work, ranks)) for work in works]
    return {"in_order": statistics.fmean(as_they_come), "balanced": statistics.fmean(by_work)}


def _write(
    own: argparse.Namespace, entry: ModelEntry, facts: dict[str, Any], videos: dict[str, Tensor], given: Sequence[str]
) -> None:
    from safetensors.torch import load_file, save_file

    if own.against is not None:
        for name, other in load_file(own.against).items():
            facts[name]["difference"] = ((videos[name] - other).norm() / other.norm()).item()
    save_file({name: video.contiguous() for name, video in videos.items()}, own.out.with_suffix(".safetensors"))
    size = dist.get_world_size()
    whole = {
        "schema": SCHEMA, "weights": "planted", "processes": size,
        "command": f"torchrun --nproc-per-node {size} -m calibatt.bench.parallel_cell {' '.join(given)}",
        "machine_info": fingerprint.machine(), "commit_info": fingerprint.commit(), "model": own.model,
        "geometry": asdict(entry.geometry(own.resolution)), "layers": own.layers, "steps": own.steps,
        "compiled": own.compile, "arms": facts,
    }  # fmt: skip
    own.out.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {own.out}")


if __name__ == "__main__":
    main()
