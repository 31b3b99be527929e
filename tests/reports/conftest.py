"""A run made up for these tests: none of its figures was measured."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from calibatt.bench.record import Record

WORKLOAD: dict[str, Any] = {
    "model": "shapes", "weights": "test data, not measured", "resolution": "quick", "frames": 29, "steps": 8,
    "tokens": 1536, "heads": 4, "head_dim": 32, "dtype": "float32", "compiled": False,
}  # fmt: skip
MACHINE = {
    "system": "Linux", "machine": "x86_64", "release": "6.1", "python_version": "3.11.7", "threads": 2,
    "cpu": {"brand_raw": "Test data CPU", "count": 2}, "versions": {"calibatt": "0.1.0", "torch": "2.9.0"},
}  # fmt: skip
# labels as their methods have them; the other methods have none
LABELS = {"dense": "Dense", "calibatt": "CalibAtt", "sparge": "SpargeAttn", "radial": "Radial", "random": "Random mask"}
PROMPTS = tuple(f"test data {i}: a red circle moving left over $stripes$ & a blue square, still" for i in range(6))
SHOWN_VIDEOS, FRAMES, STEPS, LAYERS, HEADS, BLOCKS = 2, 12, 8, 6, 4, 24


def arm(method: str, speed: float = 1.3, *, rounds: int = 6, psnr: float = 30.0, seed: int = 0, **more: Any) -> Record:
    """A timed arm of the denoise suite, so many times faster than dense."""
    rng = np.random.default_rng(seed)
    dense = 4 + 0.05 * rng.standard_normal(rounds)
    samples = dense / speed * (1 + 0.02 * rng.standard_normal(rounds))
    facts: dict[str, Any] = {
        **WORKLOAD, "suite": "denoise", "method": method, "method_label": LABELS.get(method), "preset": "default",
        "mode": "native", "kernel": "flex",
        "block": (64, 64), "baseline": "sdpa-flash", "prompts": PROMPTS[:rounds], "outcome": "ok",
        "samples_s": tuple(samples.tolist()), "baseline_samples_s": tuple(dense.tolist()),
        "phases_s": {"plan": tuple((samples * 0.05).tolist()), "attend": tuple((samples * 0.5).tolist())},
        "density": 0.42, "recall": 0.93, "kernel_error": 1.2e-6, "kernel_error_budget": 2.5e-6,
        "method_error": 0.2 - psnr / 200,
        "psnr_db": tuple((psnr + rng.standard_normal(rounds)).tolist()),
        "ssim": tuple((0.9 + 0.01 * rng.standard_normal(rounds)).tolist()),
        "alignment": tuple((0.85 + 0.03 * rng.standard_normal(rounds)).tolist()), "alignment_dense": (0.95,) * rounds,
    }  # fmt: skip
    return Record(**{**facts, **more})


def dense_arm(**more: Any) -> Record:
    """The baseline itself."""
    facts = {"kernel": "sdpa-flash", "baseline": None, "block": None, "baseline_samples_s": None, "psnr_db": None,
             "ssim": None, "alignment_dense": None, "density": 1.0, "recall": 1.0, "method_error": 0.0}  # fmt: skip
    return arm("dense", 1.0, **{**facts, **more})


def broken(method: str, outcome: Any = "unsupported", reason: str = "test data: no reason", **more: Any) -> Record:
    """An arm without times, which knows no blocks."""
    return Record(
        **{**WORKLOAD, "suite": "denoise", "preset": "default", "mode": "native", "kernel": "flex", **more},
        method=method, outcome=outcome, reason=reason,
    )  # fmt: skip


def save_artifact(path: Path, density: float, seed: int) -> None:
    """Pictures of a disc on a gradient, with more noise where density is lower."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[0:64, 0:96]
    videos = []
    for video in range(SHOWN_VIDEOS):
        frames = []
        for frame in range(FRAMES):
            image = np.stack([columns * 2, rows * 3, np.full_like(rows, 90 + 60 * video)], axis=-1).astype(float)
            image[(rows - 32) ** 2 + (columns - 80 + 5 * frame) ** 2 < 200] = (220, 40, 40)
            frames.append(np.clip(image + rng.normal(0, 30 * (1 - density), image.shape), 0, 255).astype(np.uint8))
        videos.append(frames)
    distance = np.abs(np.subtract.outer(np.arange(BLOCKS), np.arange(BLOCKS)))
    path.parent.mkdir(parents=True, exist_ok=True)
    plans = {
        "density": np.clip(rng.normal(density, 0.15, (STEPS, LAYERS, HEADS)), 0.05, 1).astype(np.float32),
        "masks": np.stack([(distance < 3 * i) | (rng.random((BLOCKS, BLOCKS)) < density / 3) for i in range(1, 5)]),
        "mask_sites": np.array([(1, 0, 0), (3, 2, 1), (5, 3, 2), (7, 5, 3)]),
        "frame_starts": np.arange(8) * 192,
    }
    dense = {"density": np.ones((STEPS, LAYERS, HEADS), np.float32)}
    np.savez_compressed(
        path, **(dense if density == 1 else plans), frames=np.array(videos), captions=np.array(PROMPTS[:SHOWN_VIDEOS])
    )


def many(count: int) -> list[Record]:
    """So many arms of a matrix, twenty a workload: simulated, as its weights say."""
    found: list[Record] = []
    for model, resolution, steps in itertools.product(range(5), range(5), range(-(-count // 500))):
        facts = {"model": f"model-{model}", "resolution": f"{240 * (resolution + 1)}p", "steps": 10 * (steps + 1)}
        facts |= {"weights": "simulated"}
        found.append(dense_arm(**facts))
        found += [
            arm(f"method-{i}", 1 + i / 20 + model / 10 - resolution / 50, psnr=35 - i, seed=i, **facts)
            for i in range(19)
        ]
    return found[:count]


@pytest.fixture
def make() -> SimpleNamespace:
    """Makers of records: `arm`, `dense_arm`, `broken`, `many`, and `artifact` for the file of an arm's pictures."""
    return SimpleNamespace(
        arm=arm, dense_arm=dense_arm, broken=broken, many=many, artifact=save_artifact, prompts=PROMPTS
    )


@pytest.fixture
def write_run(tmp_path: Path) -> Callable[..., Path]:
    """Writes records as pytest-benchmark would, and gives the file."""

    def write(records: Sequence[Record], name: str = "run.json", machine: dict[str, Any] = MACHINE) -> Path:
        timed = [record for record in records if record.samples_s is not None]
        data = {
            "machine_info": machine,
            "commit_info": {"id": "0123456789abcdef", "dirty": True, "branch": "main"},
            "datetime": "2000-01-01T00:00:00+00:00",
            "benchmarks": [{"stats": {"data": r.samples_s}, "extra_info": r.to_extra_info()} for r in timed],
            "untimed": [record.to_extra_info() for record in records if record.samples_s is None],
        }
        path = tmp_path / name
        path.write_text(json.dumps(data), encoding="utf-8")
        return path

    return write


@pytest.fixture
def small_run(write_run: Callable[..., Path]) -> Path:
    """A run of two arms."""
    return write_run([dense_arm(), arm("calibatt")], "small.json")


@pytest.fixture
def full_run(tmp_path: Path, write_run: Callable[..., Path]) -> Path:
    """A run with every kind of arm, picture and outcome."""
    arms = [
        dense_arm(),
        arm("calibatt", 1.32, psnr=31, seed=1),
        arm("calibatt", 1.2, psnr=33, seed=9, preset="no-reuse", density=0.5),
        arm("radial", 1.25, psnr=29, seed=2, density=0.5),
        arm("radial", 1.31, psnr=26, seed=3, mode="equal_density"),
        arm("sparge", 0.9, psnr=31.2, seed=4, throttled=True),
        arm("sparge", 1.01, psnr=29.2, seed=5, mode="equal_density"),
        arm("random", 1.33, psnr=27, seed=6, recall=0.6),
    ]
    with_pictures = arms[4:]
    for i, record in enumerate(arms[:4]):
        save_artifact(tmp_path / f"run.artifacts/{i}.npz", record.density or 1.0, i)
        with_pictures.append(Record(**{**_fields(record), "artifact": f"run.artifacts/{i}.npz"}))
    attention = [
        Record(
            **{
                **_fields(record), "suite": "attention", "samples_s": tuple(s * 1e-3 for s in record.samples_s or ()),
                "baseline_samples_s": record.baseline_samples_s and tuple(s * 1e-3 for s in record.baseline_samples_s),
                "phases_s": {
                    "plan": tuple(s * 1e-4 for s in record.samples_s or ()),
                    "attend": tuple(s * 9e-4 for s in record.samples_s or ()),
                },
                "psnr_db": None, "ssim": None, "alignment": None, "alignment_dense": None, "prompts": None,
            }
        )
        for record in arms
    ]  # fmt: skip
    calibration = arm(
        "calibatt", suite="calibration", samples_s=(12.0,), baseline_samples_s=None, phases_s=None, prompts=None,
        psnr_db=None, ssim=None, alignment=None, alignment_dense=None, calibration_cost_ratio=1.4, mask_agreement=0.71,
        recall=None, kernel_error=None, kernel_error_budget=None, method_error=None, plan_memory_bytes=123_456,
        baseline=None,
    )  # fmt: skip
    untimed = [
        broken("sta", reason="test data: 1536 tokens are not a multiple of tile=384"),
        broken("draft", "wrong", "test data: its largest error against fp64 is 0.2, allowed 0.001 <&>"),
        broken("jenga", "out_of_memory", "test data: tried to allocate 20 GiB"),
    ]
    return write_run([*with_pictures, *attention, calibration, *untimed])


def _fields(record: Record) -> dict[str, Any]:
    return {name: getattr(record, name) for name in record.__dataclass_fields__}
