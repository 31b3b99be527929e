"""Steps that share a mask: where a head's masks of some steps are nearly the same, one takes their place."""

from __future__ import annotations

from functools import reduce

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from calibatt.methods.calibatt.votes import ones
from calibatt.methods.learning import ROWS, Learnt, Tables

_BITS = "bits"


class SharedTables(Tables):
    """CalibAtt's tables with fewer masks: of each group of steps one, which keeps what any of theirs keeps.

    A shared mask is put together when it is asked for; none is held.

    Args:
        learnt: with a mask for each step, layer and head.
        overlap: the least intersection over union of any two masks of a group.
    """

    def __init__(self, learnt: Learnt, overlap: float) -> None:
        own, heads = learnt.provenance, learnt.provenance.geometry.heads
        self._whole = learnt.parts
        rows = torch.empty(own.steps, own.layers, heads, dtype=torch.int32)
        # of each row: the layer, the head, and the steps
        self._members: list[tuple[int, int, list[int]]] = []
        for layer in range(own.layers):
            masks = torch.stack([learnt.part(_BITS, step, layer) for step in range(own.steps)])
            for head in range(heads):
                for steps in cliques(overlaps(masks[:, head]) >= overlap):
                    rows[steps, layer, head] = len(self._members)
                    self._members.append((layer, head, steps))
        dtype, shape = self._whole.layout[_BITS]
        others = {name: learnt.tables[name] for name in learnt.tables if name != _BITS}
        none = torch.empty(len(self._members), *shape[3:], dtype=dtype, device="meta")
        super().__init__({**others, _BITS: none, _BITS + ROWS: rows})

    def __getitem__(self, name: str) -> Tensor:
        if name != _BITS:
            return super().__getitem__(name)
        return torch.stack([self.part(_BITS, (row,)) for row in range(len(self._members))])

    def part(self, name: str, index: tuple[int, ...]) -> Tensor:
        """What lies at a step and layer; of the masks, at a row."""
        if name != _BITS:
            return super().part(name, index)
        layer, head, steps = self._members[index[0]]
        return reduce(torch.bitwise_or, (self._whole.part(_BITS, (step, layer))[head] for step in steps))


def overlaps(masks: UInt8[Tensor, "steps q_blocks row_bytes"]) -> Float[Tensor, "steps steps"]:
    """Intersection over union of any two masks."""
    sizes = ones(masks)
    common = torch.stack([ones(masks & mask) for mask in masks])
    return common / (sizes[:, None] + sizes - common)


def cliques(alike: Bool[Tensor, "steps steps"]) -> list[list[int]]:
    """Groups of steps that are all alike: each step joins the first group of all of whose steps it is one, in turn."""
    groups: list[list[int]] = []
    for step in range(len(alike)):
        for group in groups:
            if bool(alike[step, group].all()):
                group.append(step)
                break
        else:
            groups.append([step])
    return groups
