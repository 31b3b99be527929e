"""Videos without a model, and something learnt from them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from calibatt.calibration.artifact import Calibration
from calibatt.calibration.collect import calibrate_on
from calibatt.kernels.catalogue import KERNELS
from calibatt.kernels.geometry import Geometry
from calibatt.methods.call import Attention
from calibatt.methods.learning import Origin
from calibatt.methods.site import BRANCHES, Branch, Site

GEOMETRY = Geometry(grid=(2, 6, 5), heads=2, head_dim=16)
PROMPTS = ("a circle, “red”", "a square", "a cross")
# the settings of most tests: 2 × 6 × 5 tokens make 4 × 8 blocks
SETTINGS: Mapping[str, Any] = {"block": (16, 8), "anchors": 2}


@dataclass
class HandMade:
    """Videos of random queries, keys and values, which may go wrong.

    Args:
        geometry: of every call.
        texts: text tokens of each prompt, where their number varies.
        branches: of the passes of a step.
        skipped, twice: sites (step, layer) that are not called, or called a second time.
        not_finite: the site whose queries hold a NaN.
        runs: steps that the pipeline says it runs, where that is not `steps`.
        stop: a prompt whose video is broken off by this error after the first step.
        contrast: by how much the video is stretched, so that eight bits tell the means of other attention apart.
        visible: whether there is a video, a mean of all that attention computes, or only calls to watch.
    """

    geometry: Geometry = GEOMETRY
    steps: int = 2
    layers: int = 3
    guidance: float = 3.0
    resolution: str = "small"
    weights: str = "0123456789abcdef"
    texts: Mapping[str, int] = field(default_factory=dict)
    branches: tuple[Branch, ...] = BRANCHES
    skipped: Collection[tuple[int, int]] = ()
    twice: Collection[tuple[int, int]] = ()
    not_finite: tuple[int, int] | None = None
    runs: int | None = None
    stop: tuple[str, BaseException] | None = None
    contrast: float = 1.0
    visible: bool = True
    shown: list[tuple[str, int]] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)

    def origin(self) -> Origin:
        self.asked.append("origin")
        return Origin(model="toy", weights=self.weights, scheduler="Euler")

    def sigmas(self, prompt: str) -> tuple[float, ...]:
        return tuple(1 - step / self.steps for step in range(self.steps))

    def show(
        self,
        attention: Attention,
        *,
        prompts: Sequence[str],
        seed: int,
        after_step: Callable[[], object] = lambda: None,
    ) -> torch.Tensor | None:
        self.shown += [(prompt, seed + number) for number, prompt in enumerate(prompts)]
        self.asked.append("show")
        attention.start_video()
        generators = [torch.Generator().manual_seed(seed + number) for number in range(len(prompts))]
        videos = torch.zeros(len(prompts), 3, 1, 2, 2)
        for step in range(self.steps):
            for branch in self.branches:
                for layer in range(self.layers):
                    for number, prompt in enumerate(prompts):
                        text = self.texts.get(prompt, self.geometry.text_tokens)
                        geometry = replace(self.geometry, text_tokens=text)
                        shape = (3, 1, geometry.heads, geometry.tokens, geometry.head_dim)
                        q, k, v = torch.randn(shape, generator=generators[number]).mul(2)
                        if (step, layer) == self.not_finite:
                            q[0, 0, 0, 0] = float("nan")
                        site = Site(
                            geometry=geometry, step=step, steps=self.runs or self.steps, sigma=1.0, branch=branch,
                            layer=layer, layers=self.layers, sample=number,
                        )  # fmt: skip
                        calls = 0 if (step, layer) in self.skipped else 2 if (step, layer) in self.twice else 1
                        for _ in range(calls):
                            videos[number] += attention(q, k, v, site).mean()
            after_step()
            if self.stop is not None and self.stop[0] in prompts:
                raise self.stop[1]
        return videos * self.contrast if self.visible else None


@pytest.fixture
def hand_made() -> Callable[..., HandMade]:
    """Makes such videos."""
    return HandMade


@pytest.fixture
def prompts() -> tuple[str, ...]:
    """Of a run."""
    return PROMPTS


@pytest.fixture
def run() -> Callable[..., Calibration]:
    """Calibrates on videos by the settings of most tests."""

    def made(videos: HandMade | None = None, folder: Path | None = None, **other: Any) -> Calibration:
        given = {"prompts": PROMPTS, "seed": 7, "kernel": KERNELS["sdpa-flash"], **SETTINGS, **other}
        return calibrate_on(videos or HandMade(), folder=folder, **given)

    return made


@pytest.fixture(scope="session")
def calibration() -> Calibration:
    """What CalibAtt learns from three videos, levels included."""
    return calibrate_on(HandMade(), prompts=PROMPTS, seed=7, kernel=KERNELS["sdpa-flash"], levels=True, **SETTINGS)


@pytest.fixture
def same() -> Callable[[Calibration, Calibration], bool]:
    """Whether two calibrations are alike bit for bit, but for when they were made and how long it took."""

    def asked(one: Calibration, other: Calibration) -> bool:
        alike = [replace(made.provenance, cost_ratio=1.0, created="") for made in (one, other)]
        tables = one.tables.keys() == other.tables.keys() and all(
            torch.equal(one.tables[name], other.tables[name]) for name in one.tables
        )
        return tables and alike[0] == alike[1] and (one.method, one.settings) == (other.method, other.settings)

    return asked
