"""Transformers whose blocks are compiled one by one."""

from __future__ import annotations

from collections import Counter
from typing import Any


def compile_blocks(transformer: Any) -> None:
    """Compile every block of a transformer of Diffusers, as it is used, in full graphs.

    Self-attention is one operator in the graph (`processor.self_attention`), so one graph serves all methods. A class
    that does not name the blocks that it repeats (Mochi's, CogVideoX's) repeats those that it says cannot be split, of
    which it has several.

    Raises:
        ValueError: the class tells of no blocks.
    """
    if not transformer._repeated_blocks:
        counts = Counter(type(module).__name__ for module in transformer.modules())
        repeated = [name for name in transformer._no_split_modules or () if counts[name] > 1]
        if not repeated:
            raise ValueError(f"{type(transformer).__name__} does not say which blocks it repeats: leave out --compile")
        transformer._repeated_blocks = repeated
    transformer.compile_repeated_blocks(fullgraph=True)
