"""Where a generation's time goes beside attention: each kind of a pipeline's components is a phase."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any

import torch

from calibatt.kernels.ordered import Phase
from calibatt.models.identity import transformers_of

# Diffusers' names: of a pipeline's text encoders, and of what its autoencoder and its scheduler are asked for
_TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
_METHODS = (("vae", "encode", "vae"), ("vae", "decode", "vae"), ("scheduler", "step", "scheduler"))
# what runs within an attention call, and so within the transformer
_WITHIN = ("plan", "permute", "attend", "unpermute", "observe")


@contextmanager
def components_timed(pipe: Any, phase: Phase) -> Iterator[None]:
    """While this context is open, the phases `transformer`, `text`, `vae` and `scheduler` surround its work.

    Args:
        pipe: a Diffusers pipeline; what it lacks is no phase.
        phase: entered by name.
    """
    works = [(transformer, "forward", "transformer") for transformer in transformers_of(pipe)]
    works += [(getattr(pipe, name, None), "forward", "text") for name in _TEXT_ENCODERS]
    works += [(getattr(pipe, owner, None), method, name) for owner, method, name in _METHODS]
    with ExitStack() as undo:
        for owner, method, name in works:
            # a callable that is no module is not called by that name
            if hasattr(owner, method) and (method != "forward" or isinstance(owner, torch.nn.Module)):
                _wrap(owner, method, phase, name, undo)
        yield


def without_attention(phases: dict[str, float]) -> dict[str, float]:
    """Phases of which none is within another: `transformer` is what attention leaves of it.

    Args:
        phases: seconds of each.
    """
    if "transformer" not in phases:
        return phases
    within = sum(phases.get(name, 0.0) for name in _WITHIN)
    # the two clocks of a phase and of those within it may differ by what an event takes
    return {**phases, "transformer": max(phases["transformer"] - within, 0.0)}


def _wrap(owner: Any, method: str, phase: Phase, name: str, undo: ExitStack) -> None:
    """Enter the phase around each call of an object's method, until undone."""
    inner: Callable[..., Any] = getattr(owner, method)
    own = vars(owner).get(method)

    @wraps(inner)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with phase(name):
            return inner(*args, **kwargs)

    setattr(owner, method, wrapped)
    undo.callback(lambda: delattr(owner, method) if own is None else setattr(owner, method, own))
