"""Self-attention of one layer, left to somebody else by one operator that torch.compile does not look into."""

from __future__ import annotations

import itertools
from typing import Any, Protocol
from weakref import WeakValueDictionary

import torch
from jaxtyping import Bool, Float
from torch import Tensor

_NUMBERS = itertools.count()
_OWNERS: WeakValueDictionary[int, Owner] = WeakValueDictionary()


class GridSeen:
    """Frames, rows and columns of tokens in the pass that is under way: written before the first layer, read by all."""

    frames = 0
    rows = 0
    columns = 0


class Owner(Protocol):
    """Computes the attention of all layers of a pipeline."""

    def attend(
        self,
        q: Float[Tensor, "batch tokens heads head_dim"],
        k: Float[Tensor, "batch tokens heads head_dim"],
        v: Float[Tensor, "batch tokens heads head_dim"],
        text: Bool[Tensor, "batch text_tokens"] | None,
        layer: int,
        grid: tuple[int, int, int],
    ) -> Float[Tensor, "batch tokens heads head_dim"]:
        """The outputs; those of text tokens that are padding are zeros."""
        ...


def enrol(owner: Owner) -> int:
    """A number by which the operator finds an owner for as long as it lives."""
    number = next(_NUMBERS)
    _OWNERS[number] = owner
    return number


@torch.library.custom_op(
    "calibatt::self_attention",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor? text, Tensor place, SymInt frames, SymInt rows, SymInt columns)"
    " -> Tensor",
)
def self_attention(
    q: Tensor, k: Tensor, v: Tensor, text: Tensor | None, place: Tensor, frames: int, rows: int, columns: int
) -> Tensor:
    """Attention of one layer by the owner of its place.

    What a compiled graph must not depend on, step, branch and layer, is read while it runs: the layer from `place`,
    which is a tensor, so that all layers share a graph.

    Args:
        q, k, v: [batch, tokens, heads, head_dim].
        text: [batch, text_tokens], which text tokens are no padding; None where there are none.
        place: number of the owner, and of the layer; int64 on the CPU.
        frames, rows, columns: grid of the video's tokens.
    """
    owner, layer = place.tolist()
    return _OWNERS[owner].attend(q, k, v, text, layer, (frames, rows, columns))


@self_attention.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, text: Tensor | None, place: Tensor, frames: int, rows: int, columns: int
) -> Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)


class AttentionProcessor:
    """Stands where a self-attention module has its processor; a family's subclass makes queries, keys and values.

    Args:
        owner: what computes attention.
        number: of the owner, by `enrol`.
        layer: index of the layer.
        grid: written before the layers of a pass are called.
        replaced: the processor that stands here otherwise.
    """

    def __init__(self, owner: Owner, number: int, layer: int, grid: GridSeen, replaced: Any) -> None:
        self.owner = owner
        self.replaced = replaced
        self._place = torch.tensor([number, layer])
        self._grid = grid

    # what `set_attention_backend` chooses is for the processor that comes back; here, kernels are chosen by calibatt
    @property
    def _attention_backend(self) -> Any:
        return self.replaced._attention_backend

    @_attention_backend.setter
    def _attention_backend(self, backend: Any) -> None:
        self.replaced._attention_backend = backend

    # so is what `enable_parallelism` says; of this, calibatt asks the transformer
    @property
    def _parallel_config(self) -> Any:
        return self.replaced._parallel_config

    @_parallel_config.setter
    def _parallel_config(self, config: Any) -> None:
        self.replaced._parallel_config = config

    def attend(
        self,
        q: Float[Tensor, "batch tokens heads head_dim"],
        k: Float[Tensor, "batch tokens heads head_dim"],
        v: Float[Tensor, "batch tokens heads head_dim"],
        text: Bool[Tensor, "batch text_tokens"] | None = None,
    ) -> Float[Tensor, "batch tokens heads head_dim"]:
        """The owner's output."""
        grid = self._grid
        out: Tensor = torch.ops.calibatt.self_attention(
            q, k, v, text, self._place, grid.frames, grid.rows, grid.columns
        )
        return out


def rotated(
    x: Float[Tensor, "batch tokens heads head_dim"],
    cosines: Float[Tensor, "*places pairs"],
    sines: Float[Tensor, "*places pairs"],
) -> Float[Tensor, "batch tokens heads head_dim"]:
    """Rotary position embedding of neighbouring pairs of channels.

    Args:
        x: queries or keys.
        cosines, sines: of each pair's angle, to be broadcast over batch, tokens and heads.
    """
    even, odd = x[..., 0::2], x[..., 1::2]
    turned = torch.stack((even * cosines - odd * sines, even * sines + odd * cosines), dim=-1)
    return turned.flatten(-2).type_as(x)
