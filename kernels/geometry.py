"""Geometry: how the tokens of one attention call are laid out."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

TextSide = Literal["first", "last"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Geometry:
    """A grid of video tokens, frame by frame and row by row, with text tokens before or after it.

    Args:
        grid: video tokens as (frames, rows, columns), after the autoencoder and the patching.
        heads: attention heads.
        head_dim: channels of one head.
        text_tokens: text tokens in the same sequence (0 where text enters by cross-attention, as in Wan).
        text_side: whether the text tokens stand first or last.

    Raises:
        ValueError: an extent is not positive.
    """

    grid: tuple[int, int, int]
    heads: int
    head_dim: int
    text_tokens: int = 0
    text_side: TextSide = "last"

    def __post_init__(self) -> None:
        if len(self.grid) != 3 or min(*self.grid, self.heads, self.head_dim) < 1 or self.text_tokens < 0:
            raise ValueError(f"a geometry needs three positive grid extents, heads and head_dim: got {self}")

    @property
    def frame_tokens(self) -> int:
        """Tokens of one frame."""
        return self.grid[1] * self.grid[2]

    @property
    def video_tokens(self) -> int:
        """Tokens of the whole grid."""
        return math.prod(self.grid)

    @property
    def tokens(self) -> int:
        """Length of the sequence: video and text."""
        return self.video_tokens + self.text_tokens

    @property
    def video_start(self) -> int:
        """Index of the first video token."""
        return self.text_tokens if self.text_side == "first" else 0

    @property
    def operations(self) -> int:
        """Floating-point operations of one dense call: two matrix products of tokens × tokens × head_dim a head."""
        return 4 * self.tokens**2 * self.head_dim * self.heads

    def __str__(self) -> str:
        text = f"+{self.text_tokens}" if self.text_tokens else ""
        return f"{'×'.join(map(str, self.grid))}{text} tokens, {self.heads} heads × {self.head_dim}"
