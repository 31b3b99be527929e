"""Fused estimates against plain torch, in Triton's interpreter or on a GPU; compiled for GPUs that are elsewhere."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from calibatt.kernels import estimates, tiles
from calibatt.kernels.geometry import Geometry
from calibatt.kernels.plan import RowReuse
from calibatt.methods.blocks import self_similarity, video_queries
from calibatt.methods.budget.importance import LEAST_LEFT, eliminated
from calibatt.methods.calibatt.repetition import energy_and_similarity
from calibatt.methods.clusters import Grouped, assign, by_cluster, kmeans
from calibatt.methods.energy import block_energy, block_mass
from calibatt.methods.xattention import antidiagonal_energy

pytestmark = pytest.mark.skipif(
    not (tiles.interpreted() or torch.cuda.is_available()), reason="needs Triton's interpreter or a CUDA GPU"
)
# the interpreter multiplies bf16 wrongly; what is exact in fp16 is multiplied exactly on both
DEVICE, DTYPE = "cuda" if torch.cuda.is_available() else "cpu", torch.float16
# fp32 logarithms of sums, which are some tens here, and exponentials of their differences; on a GPU, of scores that
# tensor cores add with a few bits less
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, DTYPE)


def as_models_have_it(x: Tensor) -> Tensor:
    """Tokens before heads in memory."""
    return x.transpose(0, 1).contiguous().transpose(0, 1)


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """The device code takes the tests' half precision, wherever it is; how often it was asked."""
    asked: list[bool] = []

    def answer(x: Tensor) -> bool:
        asked.append(x.dtype == DTYPE)
        return asked[-1]

    monkeypatch.setattr(estimates, "_on_device", answer)
    return asked


# whole tiles; tails; a part of a tile; parts of blocks of no power of two; blocks larger than a tile; a single block
SHAPES = [
    (256, 64, (128, 128)),
    (300, 128, (128, 64)),
    (63, 64, (128, 128)),
    (301, 64, (96, 80)),
    (290, 64, (16, 256)),
    (150, 64, (40, 24)),
    (130, 64, (512, 512)),
]


@pytest.mark.parametrize(("tokens", "head_dim", "block"), SHAPES)
def test_the_mass_of_blocks_is_that_of_plain_torch(
    tokens: int, head_dim: int, block: tuple[int, int], fused: list[bool]
) -> None:
    q, k = (as_models_have_it(noise(2, tokens, head_dim, seed=seed)) for seed in (0, 1))
    mass, lse = block_mass(2 * q, k, block=block)
    expected, expected_lse = block_mass(2 * q.float(), k.float(), block=block)
    torch.testing.assert_close(mass, expected, **CLOSE)
    torch.testing.assert_close(lse, expected_lse, **CLOSE)
    energy = block_energy(q, k, block_q=block[0], block_k=block[1])
    torch.testing.assert_close(energy.sum(-1), torch.ones_like(energy[..., 0]), **CLOSE)
    assert fused == [True, False, True]


@pytest.mark.parametrize(("tokens", "block"), [(256, 64), (300, 128), (63, 128), (301, 80)])
def test_means_and_likeness_of_blocks_are_those_of_plain_torch(tokens: int, block: int, fused: list[bool]) -> None:
    x = as_models_have_it(noise(2, tokens, 64)) + 1
    # equal tokens have a similarity of 1, and zeros have no direction
    x[1, :block] = x[1, :1]
    x[0, 0] = 0
    centre = torch.zeros(2, 64, device=DEVICE)
    for middle in (centre, x.float().mean(1)):
        means, similarity = self_similarity(x, block, middle)
        assert fused.pop()
        expected, expected_similarity = self_similarity(x.float(), block, middle)
        torch.testing.assert_close(means, expected, **CLOSE)
        torch.testing.assert_close(similarity, expected_similarity, **CLOSE)
    assert self_similarity(x, block, centre)[1][1, 0].item() == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("tma", [True, False])
def test_both_ways_to_load_give_the_mass(tma: bool, fused: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    if tma and tiles.compute_capability(torch.device(DEVICE)) < (9, 0):
        pytest.skip("tensor memory accelerators came with sm90")
    monkeypatch.setattr(estimates, "has_tma", lambda *tensors: tma)
    q, k = noise(2, 3, 200, 64)
    torch.testing.assert_close(
        block_mass(q, k, block=(64, 64))[0], block_mass(q.float(), k.float(), block=(64, 64))[0], **CLOSE
    )


def test_heads_that_do_not_fit_together_give_the_same_mass(fused: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    q, k = noise(2, 3, 200, 64)
    whole = block_mass(q, k, block=(64, 64))
    # groups of 64 keys: 4 of them
    monkeypatch.setattr(estimates, "_HELD", 2 * 4 * 200)
    for part, expected in zip(block_mass(q, k, block=(64, 64)), whole, strict=True):
        assert torch.equal(part, expected)


def test_given_sums_take_the_place_of_the_own_ones(fused: list[bool]) -> None:
    q, k = noise(2, 2, 200, 64)
    lse = block_mass(k.float(), q.float(), block=(64, 64))[1]
    mass, same = block_mass(q, k, block=(64, 64), lse=lse)
    assert same is lse
    torch.testing.assert_close(mass, block_mass(q.float(), k.float(), block=(64, 64), lse=lse)[0], **CLOSE)


def test_scores_of_thousands_do_not_overflow(fused: list[bool]) -> None:
    q, k = 30 * noise(2, 2, 300, 64)
    mass, lse = block_mass(q, k, block=(64, 64))
    expected, expected_lse = block_mass(q.float(), k.float(), block=(64, 64))
    assert lse.max() > 2000
    # steps of fp32 at 4096, of the scores as of their logarithms, are factors of the weights
    torch.testing.assert_close(mass, expected, rtol=4e-3, atol=1e-6)
    torch.testing.assert_close(lse, expected_lse)


# the last of many tiles of keys, two of them whole where a tile has 256 groups
@pytest.mark.parametrize(("stride", "tokens"), [(8, 512), (8, 333), (16, 512), (16, 333), (8, 5003)])
def test_tokens_put_together_are_products_of_many_channels(stride: int, tokens: int, fused: list[bool]) -> None:
    q, k = (2 * noise(2, 2, tokens, 64)).transpose(1, 2).contiguous().transpose(1, 2)
    sizes = {"stride": stride, "block_q": 128, "block_k": 128}
    torch.testing.assert_close(
        antidiagonal_energy(q, k, **sizes), antidiagonal_energy(q.float(), k.float(), **sizes), **CLOSE
    )
    assert fused == [True, False]


@pytest.mark.parametrize("places", [slice(None, None, 3), slice(5, 290, 2), slice(200, 301)])
def test_the_mass_of_some_queries_is_that_of_these_alone(places: slice, fused: list[bool]) -> None:
    q, k = (as_models_have_it(noise(2, 301, 64, seed=seed)) for seed in (0, 1))
    some = torch.arange(301, device=DEVICE)[places].contiguous()
    mass, lse = block_mass(q[:, some], k, block=(96, 80), places=some)
    expected, expected_lse = exactly(q[:, some], k, (96, 80), some)
    torch.testing.assert_close(mass.double(), expected, **CLOSE)
    torch.testing.assert_close(lse.double(), expected_lse, **CLOSE)
    energy = block_energy(q[:, some], k, block_q=96, block_k=80, places=some)
    torch.testing.assert_close(energy.sum(-1), torch.ones_like(energy[..., 0]), **CLOSE)
    # blocks without any of them count as attending everywhere
    assert (energy[(mass == 0).all(-1)] == 0.25).all()
    assert fused == [True, True]


def exactly(q: Tensor, k: Tensor, block: tuple[int, int], places: Tensor) -> tuple[Tensor, Tensor]:
    """Mass of blocks and log-sum-exps of all weights at once, in fp64."""
    scores = q.double() @ k.double().mT / q.shape[-1] ** 0.5
    weights, tokens = scores.softmax(-1), k.shape[1]
    rows, columns = (
        torch.nn.functional.one_hot(place // size, -(-tokens // size)).double()
        for place, size in zip((places, torch.arange(tokens, device=q.device)), block, strict=True)
    )
    return rows.T @ weights @ columns, scores.logsumexp(-1)


# a part of a tile; tails of places and keys; text before and behind the video; one in two, four and eight columns;
# an anchor without other rows, with one, and with an odd number of them
GRIDS = [
    ((1, 5, 7), 64, {}, (1, 3), (16, 16), 1),
    ((3, 7, 9), 128, {"text_tokens": 11, "text_side": "first"}, (1, 5), (96, 80), 1),
    ((2, 8, 16), 64, {"text_tokens": 40}, (1, 6), (64, 64), 1),
    ((2, 8, 16), 64, {"text_tokens": 40}, (1, 6), (64, 64), 2),
    ((3, 7, 9), 64, {"text_tokens": 11, "text_side": "first"}, (0, 2, 3), (40, 24), 4),
    ((2, 6, 21), 128, {}, (0, 1, 4), (128, 128), 8),
]


def video(
    grid: tuple[int, int, int], head_dim: int, text: dict[str, Any], factor: int = 3
) -> tuple[Geometry, Tensor, Tensor]:
    """A geometry, queries and keys; scores of some tens make weights that differ by many orders of magnitude."""
    geometry = Geometry(grid=grid, heads=2, head_dim=head_dim, **text)
    q, k = (as_models_have_it(factor * noise(2, geometry.tokens, head_dim, seed=seed)) for seed in (0, 1))
    return geometry, q, k


@pytest.mark.parametrize(("grid", "head_dim", "text", "anchors", "block", "stride"), GRIDS)
def test_energy_and_likeness_of_rows_are_those_of_all_weights_in_fp64(
    grid: tuple[int, int, int],
    head_dim: int,
    text: dict[str, Any],
    anchors: tuple[int, ...],
    block: tuple[int, int],
    stride: int,
    fused: list[bool],
) -> None:
    geometry, q, k = video(grid, head_dim, text)
    energy, similarity = energy_and_similarity(q, k, geometry, anchors, block=block, query_stride=stride)
    assert fused == [True, True]
    places = video_queries(geometry, stride, DEVICE)
    mass, _ = exactly(q[:, places], k, block, places)
    seen = mass.sum((0, 2)) > 0
    torch.testing.assert_close(energy[:, seen].double(), (mass / mass.sum(-1, keepdim=True))[:, seen], **CLOSE)
    weights = (q.double() @ k.double().mT / head_dim**0.5).softmax(-1)
    reuse = RowReuse.of_anchor_rows(geometry, anchors)
    cosine = torch.cosine_similarity(weights, weights[:, reuse.computed[reuse.source].to(DEVICE)], dim=-1)
    rows = cosine[:, places].view(2, *grid[:2], -1).mean(-1)
    others = rows[:, :, [row for row in range(grid[1]) if row not in anchors]]
    torch.testing.assert_close(similarity.double(), others.flatten(1).quantile(0.5, dim=-1), **CLOSE)
    assert (similarity < 0.9).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_device_code_leaves_other_types_to_torch_whose_energy_and_likeness_are_the_same(
    dtype: torch.dtype, fused: list[bool]
) -> None:
    geometry, q, k = video((2, 8, 16), 64, {"text_tokens": 40}, factor=1)
    sizes: dict[str, Any] = {"block": (64, 64), "query_stride": 2}
    own = energy_and_similarity(q, k, geometry, (1, 6), **sizes)
    q, k = (x.to(dtype) for x in (q, k))
    other = energy_and_similarity(q, k, geometry, (1, 6), **sizes)
    assert not fused[-1]
    # bf16 rounds inputs by 2⁻⁹, and scores of a few units by as much
    close = CLOSE if dtype == torch.float32 else {"rtol": 5e-2, "atol": 1e-3}
    for one, another in zip(own, other, strict=True):
        torch.testing.assert_close(one, another, **close)


def test_rows_that_are_copies_are_alike_where_scores_would_overflow(fused: list[bool]) -> None:
    geometry, q, k = video((2, 8, 16), 64, {"text_tokens": 40})
    row = (30 * noise(2, 1, 1, 16, 64)).expand(-1, *geometry.grid, -1).flatten(1, 3)
    q[:, geometry.video_start : geometry.video_start + geometry.video_tokens] = row
    _, similarity = energy_and_similarity(q, k, geometry, (1, 6), block=(64, 64))
    torch.testing.assert_close(similarity, torch.ones_like(similarity), **CLOSE)
    assert all(fused)


def test_heads_that_do_not_fit_together_are_as_alike(fused: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    geometry, q, k = video((2, 8, 16), 64, {})
    whole = energy_and_similarity(q, k, geometry, (1, 6), block=(64, 64))
    # groups of 64 keys: 4 of them
    monkeypatch.setattr(estimates, "_HELD", 4 * 256)
    for part, expected in zip(energy_and_similarity(q, k, geometry, (1, 6), block=(64, 64)), whole, strict=True):
        assert torch.equal(part, expected)


def whole(*shape: int, seed: int = 0) -> Tensor:
    """Small whole numbers, whose products and sums are exact in any order."""
    return torch.randint(-4, 5, shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, DTYPE)


def same(found: Grouped, expected: Grouped) -> None:
    assert torch.equal(found.labels, expected.labels)
    assert torch.equal(found.sizes, expected.sizes)
    torch.testing.assert_close(found.centroids, expected.centroids)


# a part of a tile of either; tails of both; more clusters than tokens, most of them empty; one cluster
@pytest.mark.parametrize(
    ("tokens", "clusters", "head_dim"), [(100, 7, 64), (300, 130, 128), (50, 90, 64), (300, 1, 64), (1, 1, 64)]
)
def test_clusters_are_those_of_plain_torch(tokens: int, clusters: int, head_dim: int, fused: list[bool]) -> None:
    x = as_models_have_it(whole(2, tokens, head_dim))
    directions = whole(2, clusters, head_dim, seed=1)
    # ties: every cluster has a twin
    directions[:, clusters - clusters // 2 :] = directions[:, : clusters // 2]
    centroids, offsets = directions.float() + 1, directions.float().square().sum(-1) / -2
    found = assign(x, centroids, directions, offsets)
    same(found, assign(x.float(), centroids, directions.float(), offsets))
    assert (found.labels < clusters - clusters // 2).all()
    assert fused == [True, False]


def test_a_cluster_of_nearly_all_tokens_and_clusters_without_any(fused: list[bool]) -> None:
    x = whole(2, 400, 64)
    directions, centroids = whole(2, 3, 64, seed=1), torch.randn(2, 3, 64, device=DEVICE)
    offsets = torch.tensor([[0.0, 10_000.0, -10_000.0], [-torch.inf, -torch.inf, -torch.inf]], device=DEVICE)
    found = assign(x, centroids, directions, offsets)
    assert found.sizes.tolist() == [[0, 400, 0], [400, 0, 0]]
    same(found, assign(x.float(), centroids, directions.float(), offsets))
    assert torch.equal(found.centroids[0, 0], centroids[0, 0])


def test_the_same_tokens_are_clustered_the_same_twice(fused: list[bool]) -> None:
    x = noise(2, 300, 64)
    found, again = (kmeans(x, x[:, :20].float(), iterations=3, tolerance=0.0) for _ in range(2))
    assert torch.equal(found.labels, again.labels)
    assert torch.equal(found.centroids, again.centroids)


@pytest.mark.gpu
def test_tokens_in_order_of_their_clusters_keep_their_own_on_a_gpu() -> None:
    labels = torch.randint(0, 9, (3, 1000), generator=torch.Generator().manual_seed(0))
    assert torch.equal(by_cluster(labels.cuda()).cpu(), by_cluster(labels))


def test_what_the_device_code_has_not_is_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.empty(1, 1, 64, dtype=DTYPE, device="cpu")
    assert not estimates.takes(x)
    monkeypatch.setattr(estimates, "_on_device", lambda x: True)
    assert estimates.takes(x)
    assert not estimates.takes(x[..., :48])
    assert [estimates.takes_mass(x, block) for block in (128, 80, 8, 12)] == [True, True, True, False]
    assert not estimates.takes_mass(x[..., :48], 128)


# what is compiled: channels and keys of a group, or channels alone
PRODUCTS = {"128": (128, 128), "128-blocks-of-64": (128, 64), "64": (64, 64), "antidiagonals": (2048, 8)}
TARGETS = {"sm80": (8, 0), "sm89": (8, 9), "sm90": (9, 0)}
# bytes of shared memory that a block of threads may have: CUDA's programming guide, table of compute capabilities
SHARED = {(8, 0): 163 * 1024, (8, 9): 99 * 1024, (9, 0): 227 * 1024}


@pytest.fixture(scope="module")
def compiled() -> dict[str, dict[str, Any]]:
    """What the compiler says of every kernel; in a process of its own, since the interpreter changes Triton's."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    told: dict[str, dict[str, Any]] = json.loads(done.stdout)
    return told


@pytest.mark.parametrize("what", [*PRODUCTS, "nearest", "cosines-64", "cosines-128"])
@pytest.mark.parametrize("target", TARGETS)
def test_products_compile_for_every_gpu_and_stay_in_registers(
    compiled: dict[str, dict[str, Any]], target: str, what: str
) -> None:
    told = compiled[f"{target}-{what}"]
    assert told["shared"] <= SHARED[TARGETS[target]]
    stack = re.search(r" STACK:(\d+) ", told["usage"])
    assert stack is not None
    assert int(stack[1]) == 0
    assert told["wgmma"] == (target == "sm90")


def _compile_mass(capability: tuple[int, int], channels: int, group: int, **change: int) -> dict[str, Any]:
    from compiling import compiled_for

    from calibatt.kernels import estimate_code

    shape = replace(estimates.mass_shape(capability, channels), **change)
    step = channels if channels <= 128 else estimates._STEP
    tma = capability >= (9, 0)
    types = dict.fromkeys(("q", "k"), "*bf16") | {"logsums": "*fp32", "lse": "*fp32", "scale": "fp32"}
    if tma:
        types |= {"q": f"tensordesc<bf16[1,{shape.rows},{step}]>", "k": f"tensordesc<bf16[1,{shape.columns},{step}]>"}
    constants = {
        "TILE_Q": shape.rows, "TILE_K": shape.columns, "GROUP": group, "CHANNELS": channels, "STEP": step, "TMA": tma,
    }  # fmt: skip
    aligned = ("q", "k", "logsums", "lse", "tokens", "q_head", "q_token", "k_head", "k_token")
    return compiled_for(capability, estimate_code.group_logsums, types, constants, aligned, shape.warps, shape.stages)


def _compile_nearest(capability: tuple[int, int], head_dim: int = 128, **change: int) -> dict[str, Any]:
    from compiling import compiled_for

    from calibatt.kernels import estimate_code

    shape = replace(estimates.nearest_shape(capability), **change)
    types = {"x": "*bf16", "directions": "*bf16", "offsets": "*fp32", "labels": "*i64"}
    constants = {"TILE": shape.rows, "CLUSTERS": shape.columns, "HEAD_DIM": head_dim}
    aligned = (*types, "x_head", "x_token")
    return compiled_for(capability, estimate_code.nearest, types, constants, aligned, shape.warps, shape.stages)


def _compile_cosines(capability: tuple[int, int], head_dim: int, **change: int) -> dict[str, Any]:
    from compiling import compiled_for

    from calibatt.kernels import estimate_code

    shape = replace(estimates.cosine_shape(capability), **change)
    types = dict.fromkeys(("q", "k"), "*bf16") | {"bands": "*i32", "scale": "fp32"}
    types |= dict.fromkeys(("logsums", "lse", "cosine"), "*fp32")
    constants = {
        "TILE_Q": shape.rows, "TILE_K": shape.columns, "GROUP": shape.columns, "MEMBERS": estimates._MEMBERS,
        "HEAD_DIM": head_dim,
    }  # fmt: skip
    strides = [f"{name}_{axis}" for name in ("q", "k") for axis in ("head", "token")]
    aligned = ("q", "k", "bands", "logsums", "lse", "cosine", *strides)
    code = estimate_code.logsums_and_cosines
    return compiled_for(capability, code, types, constants, aligned, shape.warps, shape.stages)


if __name__ == "__main__":
    told = {f"{target}-nearest": _compile_nearest(capability) for target, capability in TARGETS.items()}
    for target, capability in TARGETS.items():
        told |= {f"{target}-cosines-{size}": _compile_cosines(capability, size) for size in (64, 128)}
    for target, capability in TARGETS.items():
        told |= {f"{target}-{name}": _compile_mass(capability, *sizes) for name, sizes in PRODUCTS.items()}
    print(json.dumps(told))


@pytest.mark.parametrize(("rows", "blocks", "channels"), [(7, 40, 64), (3, 5, 9), (4, 1, 3), (2, 33, 200)])
def test_blocks_are_left_out_in_the_order_of_plain_torch(rows: int, blocks: int, channels: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    mass = torch.rand(rows, blocks, generator=generator).pow(4)
    mass /= mass.sum(-1, keepdim=True)
    values = torch.randn(rows, blocks, channels, generator=generator)
    out = (mass[..., None] * values).sum(1, keepdim=True)
    moved = mass[..., None] * (values - out)
    given = moved @ moved.mT, mass, out.square().sum((1, 2))
    expected = eliminated(*given)
    found = estimates.eliminate(*(x.to(DEVICE) for x in given), least=LEAST_LEFT).cpu()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)
    assert expected.isfinite().all()
