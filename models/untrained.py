"""How families make transformers with random weights, and pipelines around them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def drawn_on(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """While this context is open, tensors are made where and as they are used, and random ones drawn from one seed.

    14 billion parameters are not made twice.
    """
    own = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            torch.manual_seed(0)
            yield
    finally:
        torch.set_default_dtype(own)


def bare(pipeline: Any, transformer: Any, scheduler: Any) -> Any:
    """A pipeline of Diffusers, by its class, around a transformer that learns no more, and nothing else."""
    transformer.eval().requires_grad_(False)
    return pipeline(tokenizer=None, text_encoder=None, vae=None, transformer=transformer, scheduler=scheduler)
