"""Pipelines with the weights of the Hugging Face Hub or of a folder; in one line why they cannot be had."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from calibatt.methods.facts import one_line


def load(
    pipeline: str,
    repository: str,
    device: torch.device,
    dtype: torch.dtype,
    weights: Path | None,
    *,
    dtypes: Mapping[str, torch.dtype] = MappingProxyType({}),
) -> Any:
    """A pipeline, on the device.

    Args:
        pipeline: name of its class in Diffusers.
        repository: owner/name.
        device, dtype: of its parts.
        weights: a folder in the repository's layout, to be read in place of it.
        dtypes: of the parts that have their own, by name.

    Raises:
        OSError: the weights cannot be had; one line, which says what to do.
    """
    import diffusers

    source = repository if weights is None else str(weights)
    try:
        pipe = getattr(diffusers, pipeline).from_pretrained(source, dtype={**dtypes, "default": dtype})
    # there is no end to what Diffusers, Transformers and the Hub's client raise
    except Exception as error:
        raise OSError(_reason(source, error)) from error
    return pipe.to(device)


def _reason(source: str, error: Exception) -> str:
    """What is behind an error of `from_pretrained`, which seldom says it itself, and what to do."""
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    from safetensors import SafetensorError

    causes = list(_behind(error))
    answers = [cause for cause in causes if isinstance(cause, HfHubHTTPError)]
    if any(answer.response.status_code in (401, 403) for answer in answers):
        return (
            f"the Hugging Face Hub does not give {source} to just anybody: accept its terms at "
            f"https://huggingface.co/{source}, then log in by `hf auth login`"
        )
    if answers:
        return f"{source} cannot be had from the Hugging Face Hub: {one_line(answers[0])}"
    if any(isinstance(cause, LocalEntryNotFoundError | ConnectionError | TimeoutError) for cause in causes):
        return (
            f"{source} is not on this disk, and the Hugging Face Hub cannot be reached: connect to it, "
            "or name a folder of weights"
        )
    for cause in causes:
        if isinstance(cause, SafetensorError):
            where = ", ".join(_damaged(Path(source))) or source
            return f"{where} is cut off or damaged ({one_line(cause)}): download or copy it again"
    return f"{source} cannot be loaded: {type(error).__name__}: {one_line(error)}"


def _behind(error: BaseException | None) -> Iterator[BaseException]:
    """An error, what it was made from, and what was under way when it came up; some twice."""
    if error is not None:
        yield error
        yield from _behind(error.__cause__)
        yield from _behind(error.__context__)


def _damaged(folder: Path) -> Iterator[str]:
    """The files of weights in a folder whose header does not fit what follows it."""
    from safetensors import SafetensorError, safe_open

    for path in sorted(folder.rglob("*.safetensors")):
        try:
            with safe_open(path, framework="pt"):
                pass
        except SafetensorError:
            yield str(path)
