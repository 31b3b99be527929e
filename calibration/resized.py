"""Transfer: what was learnt at one size and number of steps, made to fit another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from calibatt.calibration.sections import Index
from calibatt.calibration.videos import Videos
from calibatt.kernels.names import look_up
from calibatt.methods.catalogue import METHODS
from calibatt.methods.learning import ROWS, Learnt, Stage, Tables, sections
from calibatt.methods.transfer import Blocks

_L = TypeVar("_L", bound=Learnt)


def transfer(learnt: _L, videos: Videos, *, block: tuple[int, int] | None = None) -> _L:
    """As `Calibration.transferred`."""
    own = learnt.provenance
    if not own.sigmas:
        raise ValueError(
            "this calibration does not say how noisy its steps were, since it was made before calibrations did: run "
            "`calibatt calibrate` again"
        )
    origin = videos.origin()
    learnt.check_model(origin, videos.geometry, videos.layers)
    source = Blocks(geometry=own.geometry, block=_block(learnt))
    to = Blocks(geometry=videos.geometry, block=block or source.block)
    sigmas = videos.sigmas(own.prompts[0])
    stage = Stage(geometry=own.geometry, steps=own.steps, scheduler=own.origin.scheduler)
    made = replace(
        learnt,
        settings={**learnt.settings, "block": list(to.block)},
        tables=TransferredTables(learnt, source, to, nearest(sigmas, own.sigmas)),
        provenance=replace(
            own, origin=origin, geometry=to.geometry, steps=videos.steps,
            sigmas=sigmas, transferred=(*own.transferred, stage),
        ),
    )  # fmt: skip
    look_up(METHODS, made.method, "method").check_tables(made)
    return made


def nearest(sigmas: Sequence[float], known: Sequence[float]) -> list[int]:
    """For each noise level the index of the nearest of those that are known, of two as near the first."""
    between = torch.tensor(sigmas, dtype=torch.float64)[:, None] - torch.tensor(known, dtype=torch.float64)
    steps: list[int] = between.abs().argmin(1).tolist()
    return steps


class TransferredTables(Tables):
    """Tables for other videos: each part is made of the source's when it is asked for; none is held.

    Args:
        learnt: the source.
        source, to: its blocks, and those to make.
        steps: of each step to make, the source's.

    Raises:
        ValueError: what the method learns cannot be transferred.
    """

    def __init__(self, learnt: Learnt, source: Blocks, to: Blocks, steps: Sequence[int]) -> None:
        self._learnt = learnt
        self._blocks = source, to
        self._steps = steps
        self._whole = learnt.parts.layout
        super().__init__({name: self._empty(name) for name in self._whole})

    def __getitem__(self, name: str) -> Tensor:
        table = super().__getitem__(name)
        return torch.stack([self.part(name, index) for index in sections(self.layout, name)]).view(table.shape)

    def part(self, name: str, index: Index) -> Tensor:
        """What lies at a step and layer; of a table that has rows, at a row."""
        if name + ROWS not in self._whole:
            index = (self._steps[index[0]], *index[1:])
        if name.removesuffix(ROWS) != name:
            return self._learnt.parts.part(name, index)
        return METHODS[self._learnt.method].transferred_part(self._learnt, name, index, *self._blocks)

    def _empty(self, name: str) -> Tensor:
        """As large as the table, and nothing in it."""
        dtype, shape = self._whole[name]
        shared = name + ROWS in self._whole
        leading = shape[:1] if shared else (len(self._steps), shape[1])
        first = self.part(name, (0,) if shared else (0, 0))
        return torch.empty(*leading, *first.shape, dtype=dtype, device="meta")


def _block(learnt: Learnt) -> tuple[int, int]:
    """Tokens of a query and of a key block that it was learnt by.

    Raises:
        ValueError: it was not learnt by blocks.
    """
    if "block" not in learnt.settings:
        raise ValueError(f"what {learnt.method} learnt is not of blocks of tokens, and cannot be transferred")
    block_q, block_k = learnt.settings["block"]
    return block_q, block_k
