"""Captions for Wan's pipeline: a tokenizer and a text encoder without parameters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from calibatt.models.shapes.scenes import WORDS, parse_caption, words_of

# words a prompt is padded to; the longest caption has 19
LENGTH = 24
# first object, second object, what follows: a third object, whose words are its own, and the background
_CLAUSES = 3
# id 0 is padding
_IDS = {word: number for number, word in enumerate(WORDS, start=1)}
TEXT_DIM = len(WORDS) + LENGTH + _CLAUSES


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """Captions as numbers.

    Args:
        input_ids: of the words, 0 after the last.
        attention_mask: 1 at words, 0 at padding.
    """

    input_ids: Int[Tensor, "batch length"]
    attention_mask: Int[Tensor, "batch length"]


class SceneTokenizer:
    """Words to ids."""

    def __call__(self, texts: Sequence[str], *, max_length: int = LENGTH, **_: Any) -> Tokens:
        """Ids of captions, padded; the empty caption is all padding.

        Args:
            texts: captions; further arguments of Hugging Face tokenizers are accepted and mean nothing here.
            max_length: what to pad to, at most 24.

        Raises:
            ValueError: a caption is not in the grammar, or does not fit.
        """
        ids = torch.zeros(len(texts), max_length, dtype=torch.long)
        for row, text in zip(ids, texts, strict=True):
            words = words_of(text)
            if words:
                parse_caption(text)
            if not len(words) <= max_length <= LENGTH:
                raise ValueError(
                    f"prompts of this model are padded to {len(words)} to {LENGTH} words: got {max_length}"
                )
            row[: len(words)] = torch.tensor([_IDS[word] for word in words], dtype=torch.long)
        return Tokens(input_ids=ids, attention_mask=ids.gt(0).long())


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoded:
    """What the text encoder returns, under the name that Wan's pipeline reads."""

    last_hidden_state: Float[Tensor, "batch length text_dim"]


class SceneTextEncoder(nn.Module):
    """Each word as three ones among zeros: which word, at which position, in which clause. Padding is zeros."""

    words: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("words", torch.eye(len(WORDS) + 1)[:, 1:])

    @property
    def device(self) -> torch.device:
        """Where its tables are."""
        return self.words.device

    @property
    def dtype(self) -> torch.dtype:
        """Of what it returns."""
        return self.words.dtype

    def forward(self, input_ids: Int[Tensor, "batch length"], attention_mask: Int[Tensor, "batch length"]) -> Encoded:
        """Features of the words."""
        # "and" opens the next object, "over" the background
        opened = (input_ids == _IDS["over"]).cumsum(1)
        clause = ((input_ids == _IDS["and"]).cumsum(1) + (_CLAUSES - 1) * opened).clamp(max=_CLAUSES - 1)
        position = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
        features = torch.cat(
            (
                self.words[input_ids],
                nn.functional.one_hot(position, LENGTH).to(self.words),
                nn.functional.one_hot(clause, _CLAUSES).to(self.words),
            ),
            dim=-1,
        )
        return Encoded(last_hidden_state=features * attention_mask[..., None].to(self.words))
