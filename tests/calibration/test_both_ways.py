"""What is learnt from the embedded model's attention: by torch or by the device code, of all queries or of some."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from calibatt.calibration.videos import DenseVideos
from calibatt.kernels import estimates, tiles
from calibatt.kernels.catalogue import KERNELS
from calibatt.kernels.geometry import Geometry
from calibatt.kernels.mask import unpacked
from calibatt.kernels.plan import anchor_rows
from calibatt.methods.calibatt.method import CalibAttConfig
from calibatt.methods.calibatt.repetition import energy_and_similarity
from calibatt.methods.calibatt.schedule import Schedule
from calibatt.methods.call import Call, SparseAttention
from calibatt.methods.catalogue import build
from calibatt.methods.selection import top_p
from calibatt.methods.site import Site
from calibatt.models.shapes.entry import SHAPES

Seen = tuple[Tensor, Tensor, Tensor, Site]


@pytest.fixture(scope="module")
def calls() -> list[Seen]:
    """Conditional calls of a middle and the last layer at the only step of a video at the quick size."""
    seen: list[Seen] = []

    class Keep:
        def saw(self, call: Call) -> None:
            if call.site.branch == "cond" and call.site.layer in (4, SHAPES.layers - 1):
                seen.append((call.q[0].clone(), call.k[0].clone(), call.v[0].clone(), call.site))

    pipe = SHAPES.load(resolution="quick", device=torch.device("cpu"), dtype=torch.float32)
    videos = DenseVideos(SHAPES, pipe, resolution="quick", steps=1)
    attention = SparseAttention(build("dense"), KERNELS["sdpa-flash"], observers=(Keep(),))
    with torch.no_grad():
        videos.show(attention, prompts=SHAPES.captions(1, 0), seed=0)
    return seen


def overlap(one: Tensor, other: Tensor) -> float:
    return ((one & other).sum() / (one | other).sum()).item()


@pytest.mark.skipif(
    not (tiles.interpreted() or torch.cuda.is_available()), reason="needs Triton's interpreter or a CUDA GPU"
)
@pytest.mark.parametrize("stride", [1, 4])
def test_the_device_code_and_torch_choose_the_same_masks(
    calls: list[Seen], stride: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    q, k, _, site = calls[-2]
    # one head, of the last rows of whose frames are left out: the interpreter takes a minute for a whole call
    frames, rows, columns = site.geometry.grid
    geometry = Geometry(grid=(frames, 6, columns), heads=1, head_dim=SHAPES.head_dim)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    q, k = (
        x[:1].unflatten(1, (frames, rows, columns))[:, :, :6].flatten(1, 3).to(device, torch.float16) for x in (q, k)
    )
    anchors = anchor_rows(6, 2)
    monkeypatch.setattr(estimates, "_on_device", lambda x: x.dtype == torch.float16)
    energy, similarity = energy_and_similarity(q, k, geometry, anchors, block=(64, 64), query_stride=stride)
    expected, plain = energy_and_similarity(
        q.float(), k.float(), geometry, anchors, block=(64, 64), query_stride=stride
    )
    for mass in (0.6, 0.8, 0.95):
        # blocks as heavy as each other but for their last bits may change places
        assert overlap(top_p(energy, mass), top_p(expected, mass)) > 0.999
    torch.testing.assert_close(similarity, plain, rtol=1e-4, atol=1e-5)


# seen: 0.990, 0.983 and 0.948; what is missing to 1, twice. Of one prompt, in blocks of 64 × 64: a vote of several
# prompts, and larger blocks, agree more
@pytest.mark.parametrize(("stride", "least"), [(1, 1.0), (2, 0.98), (4, 0.965), (8, 0.9)])
def test_masks_of_some_queries_overlap_with_those_of_all(calls: list[Seen], stride: int, least: float) -> None:
    # likeness of rows, which takes longer, is measured on prompt 0 alone
    settings = {"block": (64, 64), "schedule": Schedule.many_step(3072), "similarity_prompts": 1}
    exact, some = (CalibAttConfig(query_stride=number, **settings).learner() for number in (1, stride))
    masks = [torch.stack([unpacked(one.note(*call, 1)["bits"], 48) for call in calls]) for one in (exact, some)]
    found = overlap(*masks)
    assert found >= least
    assert (found == 1) == (stride == 1)


def test_likeness_of_rows_in_some_columns_is_near_that_in_all(calls: list[Seen]) -> None:
    q, k, _, site = calls[-1]
    anchors = anchor_rows(site.geometry.grid[1], 5)
    whole, some = (
        energy_and_similarity(q, k, site.geometry, anchors, block=(64, 64), query_stride=stride)[1] for stride in (1, 4)
    )
    assert not torch.equal(whole, some)
    # a mean over 6 columns in place of 24
    torch.testing.assert_close(some, whole, rtol=0, atol=0.05)
