"""What calibrating CalibAtt takes of memory and disk at a large model's shape: drawn notes are stored and merged.

    python -m calibatt.bench.sizes --model wan2.1-14b --resolution 720p --out FILE

No model runs. All prompts' notes of some steps are stored and merged as a calibration does, and every plan of these
steps is asked for as a video does. Files of all steps follow from that, since every step takes the same.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import torch
from torch import Tensor

from calibatt.bench import fingerprint
from calibatt.calibration.artifact import Calibration
from calibatt.calibration.collect import Run
from calibatt.kernels.geometry import Geometry
from calibatt.kernels.mask import block_count, packed
from calibatt.kernels.names import look_up
from calibatt.methods.catalogue import build
from calibatt.methods.learning import Origin
from calibatt.methods.site import BRANCHES, Site
from calibatt.models.catalogue import MODELS

SCHEMA = "calibatt-sizes-1"
# CalibAtt's at 720p in the paper's table is 0.375
_DENSITY = 0.375
# of those that are drawn, and shared out to prompts and sites: drawing takes longer than storing
_DRAWN = 8
_WATCHED_EVERY_S = 0.01


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and write a JSON file."""
    parser = argparse.ArgumentParser(prog="calibatt.bench.sizes", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--resolution", required=True)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--measured", type=int, default=2, help="steps whose notes are drawn")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--out", type=Path, required=True, help="the JSON file")
    given = sys.argv[1:] if arguments is None else arguments
    own = parser.parse_args(given)
    entry = look_up(MODELS, own.model, "model")
    geometry, block = entry.geometry(own.resolution), entry.block_at(own.resolution)
    # a calibration of the measured steps alone
    videos: Any = SimpleNamespace(
        geometry=geometry, steps=own.measured, layers=entry.layers, guidance=entry.guidance,
        origin=lambda: Origin(model=entry.name, weights="drawn", scheduler="drawn"),
    )  # fmt: skip
    run = Run.of(videos, prompts=[f"drawn {number}" for number in range(own.prompts)], seed=0, block=block)
    with tempfile.TemporaryDirectory(prefix="calibatt-", dir=own.out.parent) as folder:
        found = _measured(run, Path(folder), geometry, block)
    text = json.dumps(
        {
            "schema": SCHEMA,
            "replay": "drawn notes of the model's shapes; no model ran, and no attention was computed",
            "command": " ".join(["python -m calibatt.bench.sizes", *given]),
            "machine_info": fingerprint.machine(),
            "commit_info": fingerprint.commit(),
            "geometry": asdict(geometry), "layers": entry.layers, "block": block, "prompts": own.prompts,
            "measured_steps": own.measured, "steps": own.steps, "measured": found,
            # headers are some kilobytes
            "all_steps": {
                name: round(found[name] * own.steps / own.measured)
                for name in ("notes_bytes", "file_bytes", "disk_bytes", "merging_cpu_s")
            },
        },
        indent=1,
    )  # fmt: skip
    own.out.write_text(text + "\n", encoding="utf-8")
    print(f"wrote {own.out}")


def _measured(run: Run, folder: Path, geometry: Geometry, block: tuple[int, int]) -> dict[str, Any]:
    units, out = run.units(folder / "units"), folder / "calibration"
    steps, layers = units.sites
    with _memory() as noting:
        notes = _drawn(geometry, block)
        for prompt in units.groups:
            with units.writing(prompt) as unit:
                for site in range(steps * layers):
                    unit.put(site, notes[(site + prompt) % _DRAWN])
                unit.finish(total=2.0, watching=1.0)
    notes_bytes = _size(units.folder)
    # of this process: the machine may have been shared
    start = time.process_time()
    with _memory() as merging:
        calibration = run.merge(units, out)
    merging_cpu_s = time.process_time() - start
    with _memory() as planning:
        most = _planned(calibration, steps, layers)
    return {
        "notes_bytes": notes_bytes, "file_bytes": out.stat().st_size, "disk_bytes": notes_bytes + out.stat().st_size,
        "merging_cpu_s": merging_cpu_s, "noting_memory_bytes": noting[0], "merging_memory_bytes": merging[0],
        "planning_memory_bytes": planning[0], "plans_on_device_bytes": most,
    }  # fmt: skip


def _drawn(geometry: Geometry, block: tuple[int, int]) -> Sequence[Mapping[str, Tensor]]:
    """A few notes, which keep a share of the blocks."""
    generator = torch.Generator().manual_seed(0)
    shape = (geometry.heads, *(block_count(geometry.video_tokens, size) for size in block))
    return [
        {
            "bits": packed(torch.rand(shape, generator=generator) < _DENSITY),
            "similarity": torch.rand(geometry.heads, generator=generator),
        }
        for _ in range(_DRAWN)
    ]


def _planned(calibration: Calibration, steps: int, layers: int) -> int:
    """The most bytes that plans take while a video of two branches asks for them."""
    geometry, most = calibration.provenance.geometry, 0
    method: Any = build("calibatt", calibration=calibration)
    # no value of it is read
    q = torch.zeros(1).expand(geometry.heads, geometry.tokens, geometry.head_dim)
    for step in range(steps):
        for branch in BRANCHES:
            for layer in range(layers):
                where = {"step": step, "steps": steps, "layer": layer, "layers": layers}
                method.plan(q, q, q, Site(geometry=geometry, sigma=1.0, branch=branch, **where))
                most = max(most, method.plans.nbytes())
    return most


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


@contextmanager
def _memory() -> Iterator[list[int]]:
    """The most memory beyond that at the start; pages of files that are mapped, which the system may drop, are none."""
    process, found, over = psutil.Process(), [0], threading.Event()

    def own() -> int:
        info = process.memory_info()
        return int(info.rss - info.shared)

    def watch(start: int) -> None:
        while not over.wait(_WATCHED_EVERY_S):
            found[0] = max(found[0], own() - start)

    watcher = threading.Thread(target=watch, args=(own(),))
    watcher.start()
    try:
        yield found
    finally:
        over.set()
        watcher.join()


if __name__ == "__main__":
    main()
