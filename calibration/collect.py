"""Calibrating: generate a few videos densely, watch the attention, keep what most prompts need."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from importlib.metadata import version
from typing import Any

import torch
from jaxtyping import Bool, Float, Integer, UInt8
from torch import Tensor

from calibatt.calibration.levels import common_levels, loss_levels
from calibatt.calibration.repetition import anchor_rows, row_similarity
from calibatt.calibration.schedule import Schedule
from calibatt.calibration.store import Calibration, Provenance
from calibatt.calibration.videos import DenseVideos, Stopwatch, Videos
from calibatt.kernels.base import Attender
from calibatt.kernels.geometry import Geometry
from calibatt.kernels.mask import BlockMask, block_count
from calibatt.kernels.plan import Plan
from calibatt.methods.energy import block_energy
from calibatt.methods.selection import smallest_set
from calibatt.methods.site import Site
from calibatt.models.catalogue import ModelEntry


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationConfig:
    """How to calibrate; the defaults are those of arXiv 2603.05503.

    Args:
        schedule: attention mass kept at each step; None takes the paper's fit for many-step models.
        rho: share of prompts that must keep a block, in (0, 1]: 0.5 is the majority, next to 0 is any prompt.
        anchors: anchor rows of a frame.
        gamma: heads at least this similar over rows are repetitive.
        block: tokens of a query block and of a key block; None takes the model's own.
        similarity_prompts: measure repetition on this many prompts only, which saves time; None is all of them.
        levels: also keep what `CalibAttConfig.loss` needs to be another than 1: a byte a block in the file, and one a
            block and prompt while calibrating.

    Raises:
        ValueError: a value is out of range.
    """

    schedule: Schedule | None = None
    rho: float = 0.5
    anchors: int = 5
    gamma: float = 0.87
    block: tuple[int, int] | None = None
    similarity_prompts: int | None = None
    levels: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.rho <= 1:
            raise ValueError(f"rho is a share of the prompts, above 0 and up to 1: got {self.rho}")
        if self.block is not None and min(self.block) < 1:
            raise ValueError(f"a block has at least one token: got {self.block}")
        if self.similarity_prompts is not None and self.similarity_prompts < 1:
            raise ValueError(f"repetition needs at least one prompt: got similarity_prompts={self.similarity_prompts}")


class Recorder:
    """A planner of dense attention that takes notes: which blocks each video needs, and how its rows repeat.

    Notes are taken on the conditional branch and summed up at once, so that memory does not grow with the videos; but
    for levels, of which each video has its own.

    Args:
        geometry: layout of the tokens.
        steps, layers: of the generations to come.
        videos: how many there will be.
        schedule, block, anchors: as in CalibrationConfig.
        similarity_videos: measure repetition on the first so many.
        with_levels: whether to note the loss that each block withstands.
    """

    votes: Integer[Tensor, "steps layers heads q_blocks k_blocks"]
    levels: UInt8[Tensor, "videos steps layers heads q_blocks k_blocks"] | None
    similarity: Float[Tensor, "steps layers heads"]

    def __init__(
        self,
        geometry: Geometry,
        *,
        steps: int,
        layers: int,
        videos: int,
        schedule: Schedule,
        block: tuple[int, int],
        anchors: int,
        similarity_videos: int,
        with_levels: bool = False,
    ) -> None:
        sites = (steps, layers, geometry.heads)
        # one byte a block where it can count the videos: 28 GB for Wan 14B at 720p and 50 steps
        dtype = next(d for d in (torch.uint8, torch.int16, torch.int32) if videos <= torch.iinfo(d).max)
        self.votes = torch.zeros(*sites, *(block_count(geometry.tokens, size) for size in block), dtype=dtype)
        self.levels = torch.zeros(videos, *self.votes.shape, dtype=torch.uint8) if with_levels else None
        self.similarity = torch.zeros(sites)
        self.watch = Stopwatch()
        self._geometry = geometry
        self._schedule = schedule
        self._block = block
        self._anchors = anchor_rows(geometry.grid[1], anchors)
        self._similarity_videos = similarity_videos
        self._dense = Plan.dense(geometry)
        self._video = -1

    def reset(self) -> None:
        """Start of a video."""
        self._video += 1

    def plan(
        self,
        q: Float[Tensor, "heads tokens head_dim"],
        k: Float[Tensor, "heads tokens head_dim"],
        site: Site,
    ) -> Plan:
        """Dense, after taking notes.

        Raises:
            ValueError: the pipeline runs another geometry, or other numbers of steps or layers, than was announced.
        """
        steps, layers = self.votes.shape[:2]
        if (site.geometry, site.steps, site.layers) != (self._geometry, steps, layers):
            raise ValueError(
                f"calibrating {self._geometry}, {steps} steps, {layers} layers, but the pipeline runs "
                f"{site.geometry}, {site.steps} steps, {site.layers} layers: is it the pipeline of this model?"
            )
        if site.branch == "cond":
            with self.watch.counting(q.device):
                self._note(q, k, site)
        return self._dense

    def _note(self, q: Tensor, k: Tensor, site: Site) -> None:
        block_q, block_k = self._block
        energy = block_energy(q, k, block_q=block_q, block_k=block_k)
        mass = self._schedule.mass(site.step, site.steps)
        self.votes[site.step, site.layer] += smallest_set(energy, mass).cpu()
        if self.levels is not None:
            self.levels[self._video, site.step, site.layer] = loss_levels(energy, mass).cpu()
        if self._video < self._similarity_videos:
            alike = row_similarity(q, k, self._geometry, self._anchors)
            self.similarity[site.step, site.layer] += alike.cpu() / self._similarity_videos


def calibrate(
    entry: ModelEntry,
    pipe: Any,
    *,
    resolution: str,
    prompts: Sequence[str],
    seed: int,
    kernel: Attender,
    config: CalibrationConfig | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    progress: bool = False,
) -> Calibration:
    """Learn which blocks a model needs, by generating one video a prompt with dense attention.

    Its cost is told by `provenance.cost_ratio`: the time of all generations, over what is left of it without the time
    spent on taking notes.

    Args:
        entry, pipe: the model and its loaded pipeline.
        resolution: name of one of the model's resolutions.
        prompts: 16 are nearly as good as the paper's 64.
        seed: prompt i starts from noise of seed + i.
        kernel: computes the dense attention.
        config: how; the paper's settings where None, and the model's own blocks.
        steps, guidance: the model's defaults where None. A calibration fits generations of this many steps only.
        progress: whether to show a progress bar over prompts × steps on stderr.

    Raises:
        ValueError: there is no prompt, or one is empty or not in the model's language; an option is out of range.
    """
    config = CalibrationConfig() if config is None else config
    config = replace(config, block=config.block or entry.block)
    videos = DenseVideos(entry, pipe, resolution=resolution, steps=steps, guidance=guidance)
    return calibrate_on(videos, prompts=prompts, seed=seed, kernel=kernel, config=config, progress=progress)


def calibrate_on(
    videos: Videos,
    *,
    prompts: Sequence[str],
    seed: int,
    kernel: Attender,
    config: CalibrationConfig,
    progress: bool = False,
) -> Calibration:
    """The same, on dense videos wherever they come from.

    Raises:
        ValueError: as `calibrate`, or the config leaves the blocks open.
    """
    geometry, steps, layers, block = videos.geometry, videos.steps, videos.layers, config.block
    if block is None:
        raise ValueError("a calibration needs to know its blocks: give `block`")
    schedule = config.schedule or Schedule.many_step(geometry.tokens)
    similarity_prompts = min(config.similarity_prompts or len(prompts), len(prompts))

    recorder = Recorder(
        geometry,
        steps=steps,
        layers=layers,
        videos=len(prompts),
        schedule=schedule,
        block=block,
        anchors=config.anchors,
        similarity_videos=similarity_prompts,
        with_levels=config.levels,
    )
    seconds = videos.show(recorder, kernel, prompts=prompts, seed=seed, progress=progress)

    threshold = votes_needed(len(prompts), config.rho)
    bits, overlaps = [], []
    # layer by layer: unpacked, all masks of a large model are some ten times their packed size
    for votes in recorder.votes.flatten(0, 1):
        keep = majority(votes, threshold)
        overlaps.append(agreement(votes, keep, len(prompts)))
        bits.append(BlockMask.from_keep(keep, tokens=geometry.tokens, block_q=block[0], block_k=block[1]).bits)
    levels = recorder.levels
    if levels is not None:
        each = [common_levels(levels[:, step, layer], threshold) for step in range(steps) for layer in range(layers)]
        levels = torch.stack(each).view(recorder.votes.shape)
    return Calibration(
        bits=torch.stack(bits).view(steps, layers, *bits[0].shape),
        levels=levels,
        similarity=recorder.similarity,
        gamma=config.gamma,
        provenance=Provenance(
            model=videos.model,
            weights=videos.weights(),
            resolution=videos.resolution,
            geometry=geometry,
            steps=steps,
            guidance=videos.guidance,
            prompts=tuple(prompts),
            seed=seed,
            block=block,
            schedule=schedule,
            rho=config.rho,
            anchors=config.anchors,
            similarity_prompts=similarity_prompts,
            cost_ratio=seconds / (seconds - recorder.watch.seconds),
            mask_agreement=torch.stack(overlaps).mean().item(),
            versions={package: version(package) for package in ("calibatt", "torch", "diffusers")},
            created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        ),
    )


def votes_needed(prompts: int, rho: float) -> int:
    """The least number of prompts that is at least the share rho of them, and one at the fewest."""
    # 0.07 * 100 is a little more than 7 in floating point: that must not ask for an eighth vote
    return max(1, math.ceil(rho * prompts - 1e-9))


def majority(
    votes: Integer[Tensor, "heads q_blocks k_blocks"], threshold: int
) -> Bool[Tensor, "heads q_blocks k_blocks"]:
    """The blocks with enough votes.

    In a row without any, those with the most: a query without keys would give zeros.
    """
    return votes >= votes.amax(-1, keepdim=True).clamp(max=threshold)


def agreement(
    votes: Integer[Tensor, "heads q_blocks k_blocks"],
    keep: Bool[Tensor, "heads q_blocks k_blocks"],
    prompts: int,
) -> Float[Tensor, "heads"]:
    """Intersection over union of the prompts' masks with the aggregated one, 0 to 1.

    Intersections and unions are summed over the prompts before they are divided, which votes alone are enough for.
    """
    intersections = (votes * keep).sum((1, 2), dtype=torch.int64)
    sizes = votes.sum((1, 2), dtype=torch.int64) + prompts * keep.sum((1, 2))
    return intersections / (sizes - intersections)
