"""Where a model runs, and in what precision."""

from __future__ import annotations

import torch


def pick_device(name: str | None) -> torch.device:
    """The device of that name; without one, the GPU where there is one.

    Raises:
        ValueError: there is no such device here.
    """
    cuda = torch.cuda.is_available()
    if name is None:
        name = "cuda" if cuda else "cpu"
    if name not in ("cpu", "cuda") or (name == "cuda" and not cuda):
        raise ValueError(f"device {name!r}: this machine has {'cpu and cuda' if cuda else 'only cpu'}")
    return torch.device(name)


def working_dtype(device: torch.device) -> torch.dtype:
    """bf16 on a GPU, as all these models are run; fp32 on a CPU, where half precision gains nothing."""
    return torch.float32 if device.type == "cpu" else torch.bfloat16
