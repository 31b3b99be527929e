"""What the arms of a real workload share."""

from __future__ import annotations

from functools import partialmethod
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel

from calibatt.bench.cells import Workload
from calibatt.bench.opening import _videos
from calibatt.kernels.catalogue import KERNELS
from calibatt.methods.call import SparseAttention
from calibatt.methods.catalogue import build


@pytest.mark.slow
def test_compiled_videos_have_one_graph_for_all_arms_and_look_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    # as it is traced, without the compiler behind
    counter = CompileCounterWithBackend("eager")
    repeated: Any = WanTransformer3DModel.compile_repeated_blocks
    monkeypatch.setattr(WanTransformer3DModel, "compile_repeated_blocks", partialmethod(repeated, backend=counter))
    workload = {"model": "shapes", "resolution": "quick", "steps": 2, "device": torch.device("cpu")}
    compiled, eager = (_videos(Workload(**workload, compiled=how))[0] for how in (True, False))
    for method in ("dense", "radial"):
        attention = SparseAttention(build(method, block=(64, 64)), KERNELS["default"])
        prompt = "a red circle moving left over stripes"
        torch.testing.assert_close(compiled(attention, prompt, 0), eager(attention, prompt, 0), atol=1e-4, rtol=0)
    assert counter.frame_count == 1
