"""Letting a method's own learner watch dense videos, and the file of what it learnt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

from calibatt.calibration.file import UnusableCalibration, read, write
from calibatt.calibration.videos import DenseVideos, Stopwatch, Videos
from calibatt.kernels.base import Attender
from calibatt.kernels.geometry import Geometry
from calibatt.kernels.plan import Plan
from calibatt.methods.catalogue import learner as new_learner
from calibatt.methods.learning import Learner, Learnt
from calibatt.methods.site import Site
from calibatt.models.catalogue import ModelEntry

SCHEMA = "calibatt-learnt-1"


class Watcher:
    """Dense attention, of whose conditional calls a learner sees queries, keys and values.

    Args:
        learner: sees them.
        kernel: computes.
    """

    def __init__(self, learner: Learner, kernel: Attender) -> None:
        self.watch = Stopwatch()
        self.site: Site | None = None
        self._learner = learner
        self._kernel = kernel

    def reset(self) -> None:
        """Videos follow each other; learners sum up."""

    def plan(
        self,
        q: Float[Tensor, "heads tokens head_dim"],
        k: Float[Tensor, "heads tokens head_dim"],
        site: Site,
    ) -> Plan:
        """Dense."""
        self.site = site
        return Plan.dense(site.geometry)

    def attend(
        self,
        q: Float[Tensor, "batch heads tokens head_dim"],
        k: Float[Tensor, "batch heads tokens head_dim"],
        v: Float[Tensor, "batch heads tokens head_dim"],
        plan: Plan,
    ) -> Float[Tensor, "batch heads tokens head_dim"]:
        """The kernel's output, after the learner has watched."""
        if self.site is not None and self.site.branch == "cond":
            with self.watch.counting(q.device):
                self._learner.watch(q[0], k[0], v[0], self.site)
        return self._kernel.attend(q, k, v, plan)


def learn(
    entry: ModelEntry,
    pipe: Any,
    *,
    method: str,
    preset: str = "default",
    resolution: str,
    prompts: Sequence[str],
    seed: int,
    kernel: Attender,
    block: tuple[int, int] | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    progress: bool = False,
) -> Learnt:
    """What a method's preset learns offline, by generating one video a prompt with dense attention.

    Args:
        entry, pipe: the model and its loaded pipeline.
        method, preset: as `calibatt methods` lists them.
        block: tokens of a query and of a key block, in place of the preset's.
        resolution, prompts, seed, kernel, steps, guidance, progress: as for `calibrate`.

    Raises:
        UnknownName: there is no such method or preset.
        ValueError: the preset learns nothing; there is no prompt, or one is empty or not in the model's language.
    """
    videos = DenseVideos(entry, pipe, resolution=resolution, steps=steps, guidance=guidance)
    return learn_from(
        videos, method=method, preset=preset, prompts=prompts, seed=seed, kernel=kernel, block=block, progress=progress
    )


def learn_from(
    videos: Videos,
    *,
    method: str,
    preset: str,
    prompts: Sequence[str],
    seed: int,
    kernel: Attender,
    block: tuple[int, int] | None,
    progress: bool = False,
    **settings: Any,
) -> Learnt:
    """The same, from dense videos wherever they come from.

    Args:
        settings: fields of the method's config, in place of the preset's.

    Raises:
        UnknownName, ValueError: as `learn`, or a setting does not exist.
    """
    learner = new_learner(method, preset=preset, block=block, **settings)
    if learner is None:
        raise ValueError(f"{method}/{preset} learns nothing: it can be used as it is")
    watcher = Watcher(learner, kernel)
    seconds = videos.show(watcher, watcher, prompts=prompts, seed=seed, progress=progress)
    return Learnt(
        method=method, preset=preset, geometry=videos.geometry, steps=videos.steps, layers=videos.layers,
        tables=learner.tables(), model=videos.model, weights=videos.weights(), prompts=tuple(prompts), seed=seed,
        guidance=videos.guidance, cost_ratio=seconds / (seconds - watcher.watch.seconds),
    )  # fmt: skip


def save_learnt(learnt: Learnt, path: Path) -> None:
    """Write the file, whole or not at all.

    Raises:
        OSError: it cannot be written.
    """
    facts = {field.name: getattr(learnt, field.name) for field in fields(learnt) if field.name != "tables"}
    write(path, SCHEMA, learnt.tables, facts | {"geometry": asdict(learnt.geometry)})


def load_learnt(path: Path) -> Learnt:
    """Read a file that `save_learnt` wrote.

    Raises:
        UnusableCalibration: the file is missing, damaged, changed, of another version, or something else.
    """
    tables, facts = read(path, SCHEMA)
    try:
        geometry = Geometry(**{**facts["geometry"], "grid": tuple(facts["geometry"]["grid"])})
        return Learnt(**{**facts, "geometry": geometry, "prompts": tuple(facts["prompts"])}, tables=tables)
    except (KeyError, TypeError, ValueError) as error:
        raise UnusableCalibration(f"{path} contradicts itself: {error}") from None
