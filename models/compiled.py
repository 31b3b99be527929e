"""Transformers whose blocks are compiled one by one."""

from __future__ import annotations

from typing import Any


def compile_blocks(transformer: Any) -> None:
    """Compile every block of a transformer of Diffusers, as it is used, in full graphs.

    Self-attention is one operator in the graph (`processor.self_attention`), so one graph serves all methods. A class
    that does not say which blocks it repeats (Mochi's) repeats those that it says cannot be split.
    """
    if not transformer._repeated_blocks:
        transformer._repeated_blocks = list(transformer._no_split_modules)
    transformer.compile_repeated_blocks(fullgraph=True)
