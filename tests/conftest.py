"""What all tests run under: checked shapes, poisoned memory, few threads, and a reason where there is no GPU.

This file installs the check of shapes and types before anything of ours is imported; no test may import `calibatt` in a
plugin that loads earlier.
"""

from __future__ import annotations

import functools
import inspect
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from jaxtyping import install_import_hook

_ROOT = Path(__file__).resolve().parents[1]

# of several processes, each has a core, and so has what they start: two threads that wait for each other on one core
# take three times as long
WORKER = "PYTEST_XDIST_WORKER" in os.environ
if WORKER:
    os.environ["OMP_NUM_THREADS"] = "1"
if not torch.cuda.is_available():
    # Triton's kernels run in its interpreter, which it looks for when they are imported
    os.environ["TRITON_INTERPRET"] = "1"
if already := sorted(name for name in sys.modules if name.split(".")[0] == "calibatt"):
    raise RuntimeError(f"imported before its shapes could be checked: {', '.join(already)}")
# what goes unchecked: a record checks its own fields, since it is also read from files, and its tests give it wrong
# ones; beartype takes numpy's str_ for strings of length 0; what torch.compile traces would be traced with the checks;
# and device code is no Python
_UNCHECKED = {
    "bench.record",
    "reports.artifact",
    "models.adapter",
    *(f"models.families.{name}" for name in ("cogvideox", "hunyuan", "ltx", "mochi", "wan")),
    "models.processor",
    *(f"kernels.{name}_code" for name in ("estimate", "flex", "gluon", "triton")),
}
# one by one: a package's name would stand for all that lies under it
_MODULES = {
    ".".join(path.relative_to(_ROOT).with_suffix("").parts)
    for room in ("bench", "calibration", "kernels", "methods", "models", "reports")
    for path in (_ROOT / room).rglob("*.py")
    if path.stem != "__init__"
}
if strange := sorted(_UNCHECKED - _MODULES):
    raise RuntimeError(f"not a module, so nothing to leave unchecked: {', '.join(strange)}")
# every other annotation of the library is enforced: shapes by jaxtyping, other types by beartype; an int is a float, as
# everywhere in Python's typing
install_import_hook(
    ["calibatt.cli", *(f"calibatt.{name}" for name in sorted(_MODULES - _UNCHECKED))],
    "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))",
)


def pytest_configure() -> None:
    """Poison what is allocated and not written, and keep to a core or two."""
    # an element of torch.empty that nothing wrote is NaN (or the largest integer), not a lucky zero
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    # code that torch.compile generates allocates by functions of its own, which do not fill: it looks them up here
    for device in ("cpu", "cuda"):
        setattr(torch._C._dynamo.guards, f"_empty_strided_{device}", functools.partial(_poisoned, device))
    # other work may go on beside the tests
    torch.set_num_threads(1 if WORKER else 2)
    if "TRITON_INTERPRET" in os.environ:
        _patch_once_a_launch()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU: torch sees none here"))


def _patch_once_a_launch() -> None:
    """Spare Triton's interpreter a quarter of its time.

    It puts its own functions in the place of `triton.language`'s for every launch, and again for every function that
    the kernel calls, each time that it does.
    """
    # only now: it asks for the interpreter when it is imported
    import triton.language
    from triton.runtime import interpreter

    launch, replace = interpreter.GridExecutor.__call__, interpreter._patch_lang
    replaced: set[frozenset[str]] = set()

    @functools.cache
    def seen_by(function: Callable[..., Any]) -> frozenset[str]:
        """The modules that a replacement for this function is made in."""
        modules = {found.__name__ for found in function.__globals__.values() if inspect.ismodule(found)}
        return frozenset(modules & {triton.language.__name__, triton.language.core.__name__})

    def launch_anew(self: Any, *args: Any, **kwargs: Any) -> None:
        replaced.clear()
        launch(self, *args, **kwargs)

    def replace_once(function: Callable[..., Any]) -> Any:
        if seen_by(function) in replaced:
            return interpreter._LangPatchScope()
        replaced.add(seen_by(function))
        return replace(function)

    interpreter.GridExecutor.__call__ = launch_anew
    interpreter._patch_lang = replace_once


def _poisoned(device: str, size: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    return torch.empty_strided(size, stride, dtype=dtype, device=device)
