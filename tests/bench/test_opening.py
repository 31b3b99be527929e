"""What the arms of a real workload share."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial, partialmethod
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel

from calibatt.bench import cells, opening
from calibatt.bench.cells import Workload
from calibatt.bench.journal import Journal
from calibatt.bench.observers import Probe
from calibatt.bench.opening import _baseline, _facts, _videos
from calibatt.bench.preparation import Preparation
from calibatt.kernels.catalogue import KERNELS
from calibatt.kernels.geometry import Geometry
from calibatt.methods.call import SparseAttention
from calibatt.methods.catalogue import build
from calibatt.methods.site import Site
from calibatt.models.entry import ModelEntry, Resolution
from calibatt.models.families import mochi, wan


def test_a_run_that_goes_on_pairs_with_the_dense_kernel_that_it_began_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    geometry = Geometry(grid=(1, 2, 2), heads=1, head_dim=16)
    q = torch.zeros(1, 1, 4, 16)
    probe = Probe(
        site=Site(geometry=geometry, step=0, steps=1, sigma=1.0, branch="cond", layer=0, layers=1), q=q, k=q, v=q
    )
    path, fastest = tmp_path / "run.partial.jsonl", iter(("sdpa-flash", "flex-dense"))
    monkeypatch.setattr(opening, "fastest_dense", lambda *_, **__: KERNELS[next(fastest)])

    def chosen(workload: str) -> str:
        preparation = Preparation(Journal(path, {"command": "pytest bench"}), workload, print)
        return _baseline(probe, preparation, log=print).name

    assert [chosen("one"), chosen("one"), chosen("other"), chosen("other")] == ["sdpa-flash"] * 2 + ["flex-dense"] * 2


@pytest.mark.parametrize(
    ("stock", "untrained", "size"),
    [
        (
            wan.ENTRIES[0], partial(wan.untrained, {"ffn_dim": 32, "text_dim": 8}),
            Resolution(height=32, width=48, frames=5, flow_shift=5.0),
        ),
        (
            mochi.ENTRIES[0], partial(mochi.untrained, {"pooled_projection_dim": 16, "text_embed_dim": 8}),
            Resolution(height=32, width=48, frames=7),
        ),
    ],
    ids=["wan", "mochi"],
)  # fmt: skip
def test_planted_weights_are_made_without_a_download_and_named_in_every_record(
    monkeypatch: pytest.MonkeyPatch, stock: ModelEntry, untrained: Any, size: Resolution
) -> None:
    entry = replace(stock, layers=2, heads=2, steps=2, untrained=untrained, resolutions={"tiny": size})
    monkeypatch.setattr(cells, "MODELS", {entry.name: entry})
    workload = Workload(model=entry.name, resolution="tiny", steps=2, device=torch.device("cpu"), planted=True)
    film, videos = _videos(workload)
    assert re.fullmatch("planted [0-9a-f]{16}", _facts(workload, videos)["weights"])
    attention = SparseAttention(build("dense"), KERNELS["sdpa-math"])
    # three channels of latents: two frames of 4 × 6
    shallow = _videos(replace(workload, layers=1))[1]
    assert (shallow.layers, videos.layers) == (1, 2)
    assert shallow.origin().weights != videos.origin().weights
    first, again, other = film(attention, "a cat", 0), film(attention, "a cat", 0), film(attention, "a dog", 0)
    assert first.shape == (3, 2, 4, 6)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


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
