"""Blocks that are compiled one by one."""

from __future__ import annotations

from collections.abc import Callable
from functools import partialmethod
from typing import Any

import pytest
import torch

from calibatt.kernels.catalogue import KERNELS
from calibatt.methods.catalogue import build
from calibatt.models.adapter import attached
from calibatt.models.compiled import compile_blocks


@pytest.mark.parametrize(("name", "graphs"), [("wan2.1-1.3b", 1), ("mochi-1", 2), ("cogvideox-5b", 2)])
def test_blocks_of_a_transformer_that_does_not_name_them_are_compiled_too(
    name: str, graphs: int, tiny: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    model, counter = tiny(name), CompileCounterWithBackend("eager")
    kind = type(model.pipe.transformer)
    # as it is traced, without the compiler behind
    monkeypatch.setattr(kind, "compile_repeated_blocks", partialmethod(kind.compile_repeated_blocks, backend=counter))
    with attached(model.pipe, build("dense"), KERNELS["sdpa-math"]):
        expected = model.run()
        compile_blocks(model.pipe.transformer)
        torch.testing.assert_close(model.run(), expected, atol=1e-5, rtol=1e-4)
    # Mochi's last block leaves the text alone; CogVideoX's first is handed parts of one tensor
    assert counter.frame_count == graphs
