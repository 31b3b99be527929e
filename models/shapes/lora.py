"""A low-rank adapter (LoRA) of the model: its file, as Diffusers and PEFT name things, and merging it.

W + B A takes the place of a matrix W (Hu and others, arXiv 2106.09685); the scale α / r is 1, which is what
`pipe.load_lora_weights` takes where a file names no α.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from calibatt.models.identity import weights_digest

# what Diffusers looks for in a folder
FILE = "pytorch_lora_weights.safetensors"
# A, of what comes in, and B, of what goes out, as PEFT names them
_ENDS = ("lora_A.weight", "lora_B.weight")
# of the file's header: the digest of the weights that it was trained on
_BASE = "base_weights"


@dataclass(frozen=True, slots=True, kw_only=True)
class Factors:
    """What is added to one matrix, as a product.

    Args:
        down, up: A and B.
    """

    down: Float[Tensor, "rank columns"]
    up: Float[Tensor, "rows rank"]

    @staticmethod
    def new(matrix: Float[Tensor, "rows columns"], *, rank: int) -> tuple[Tensor, Tensor]:
        """A and B at the beginning of a training, when they add nothing: A as PEFT draws it, B zeros."""
        rows, columns = matrix.shape
        bound = columns**-0.5
        return matrix.new_empty(rank, columns).uniform_(-bound, bound), matrix.new_zeros(rows, rank)

    def added_to(self, matrix: Float[Tensor, "rows columns"]) -> Float[Tensor, "rows columns"]:
        """The matrix that takes its place."""
        return torch.addmm(matrix, self.up, self.down)


def matrices(transformer: Any) -> dict[str, Tensor]:
    """The matrices that an adapter may change, by the names of their layers: those of the transformer's blocks.

    And the one that makes the blocks' modulation of the noise level, and the last one.
    """
    found = {
        f"blocks.{name}": layer.weight
        for name, layer in transformer.blocks.named_modules()
        if isinstance(layer, torch.nn.Linear)
    }
    return {
        **found,
        "condition_embedder.time_proj": transformer.condition_embedder.time_proj.weight,
        "proj_out": transformer.proj_out.weight,
    }


def save(factors: Mapping[str, Factors], path: Path, *, base: Any) -> None:
    """Write an adapter's file, in bf16.

    Args:
        factors: by the names of `matrices`.
        path: of the file.
        base: the transformer that it was trained on.
    """
    from safetensors.torch import save_file

    tensors = {
        f"transformer.{name}.{end}": tensor.detach().to(torch.bfloat16).contiguous().cpu()
        for name, own in factors.items()
        for end, tensor in zip(_ENDS, (own.down, own.up), strict=True)
    }
    save_file(tensors, path, metadata={"format": "pt", _BASE: weights_digest([base])})


@torch.no_grad()
def merge(transformer: Any, path: Path) -> None:
    """Add an adapter to the weights that it was trained on, and round the sums to bf16, as weights are shipped.

    So that they are the same weights in any dtype.

    Args:
        transformer: in fp32, changed in place.
        path: of the adapter's file.

    Raises:
        OSError: there is no such file, or it holds no adapter of these weights.
    """
    factors = _read(transformer, path)
    for name, matrix in matrices(transformer).items():
        matrix.copy_(factors[name].added_to(matrix).bfloat16())


def _read(transformer: Any, path: Path) -> dict[str, Factors]:
    """The factors of an adapter's file, in fp32.

    Raises:
        OSError: as `merge`.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise OSError(f"there is no {path}: train an adapter by python -m calibatt.models.shapes.distil")
    try:
        with safe_open(path, framework="pt") as file:
            base = (file.metadata() or {}).get(_BASE)
            tensors = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise OSError(f"{path} is cut off or damaged ({error}): copy it again") from None
    own = weights_digest([transformer])
    if base != own:
        raise OSError(f"{path} is an adapter of the weights {base}, not of {own}: train it again on these")
    factors = {name: _factors(tensors, name, matrix, path) for name, matrix in matrices(transformer).items()}
    if more := sorted(tensors.keys() - {f"transformer.{name}.{end}" for name in factors for end in _ENDS}):
        raise OSError(f"{path} has {more[0]}, which is no part of an adapter of this model")
    return factors


def _factors(tensors: Mapping[str, Tensor], name: str, matrix: Tensor, path: Path) -> Factors:
    down, up = (tensors.get(f"transformer.{name}.{end}") for end in _ENDS)
    rows, columns = matrix.shape
    if down is None or up is None:
        raise OSError(f"{path} has no {' and '.join(_ENDS)} for {name}")
    if down.ndim != 2 or up.ndim != 2 or up.shape != (rows, len(down)) or down.shape[1] != columns:
        raise OSError(
            f"{path} has factors of {tuple(up.shape)} and {tuple(down.shape)} for {name}, which is {rows} × {columns}"
        )
    if not (down.isfinite().all() and up.isfinite().all()):
        raise OSError(f"{path} has factors for {name} that are not finite")
    return Factors(down=down, up=up)
