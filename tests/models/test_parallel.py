"""Pipelines whose tokens several processes share: the same videos, heads by their work, and what is refused."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from calibatt.kernels.catalogue import KERNELS
from calibatt.methods.catalogue import build
from calibatt.methods.remainder import WithRemainder
from calibatt.models.adapter import attached, installed
from calibatt.models.families.wan import FAMILY
from calibatt.models.parallel import balanced, imbalance, in_order, ranks_of
from calibatt.models.shapes.pipeline import assemble, new_transformer

SDPA = KERNELS["sdpa-flash"]
WORKER = Path(__file__).with_name("parallel_worker.py")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes has made."""
    folder = tmp_path_factory.mktemp("ranks")
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", WORKER, folder],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("name", ["stock", "dense", "calibatt", "draft"])
def test_two_processes_make_the_video_of_one(made: list[dict[str, Any]], name: str) -> None:
    whole = made[0]["whole"][name]
    for rank in made:
        # a head is computed as ever; what surrounds it is, of half the tokens, a smaller product in fp32
        torch.testing.assert_close(rank["shared"][name], whole, atol=1e-6, rtol=1e-5)
    if name not in ("stock", "dense"):
        assert (whole - made[0]["whole"]["dense"]).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["dense", "calibatt", "draft"])
def test_each_head_of_a_plan_is_computed_once(made: list[dict[str, Any]], name: str) -> None:
    whole, parts = made[0]["whole"][f"{name} plans"], [rank["shared"][f"{name} plans"] for rank in made]
    # steps, branches and layers
    assert len(whole) == len(parts[0]) == 3 * 2 * 2
    for plan, *of_ranks in zip(whole, *parts, strict=True):
        assert {len(part) for part in of_ranks} == {2}
        assert torch.equal(torch.cat(of_ranks).sort().values, plan.sort().values)


def test_heads_are_shared_by_their_work_where_it_is_known(made: list[dict[str, Any]]) -> None:
    as_they_come, by_work = [], []
    parts = (rank["shared"]["calibatt plans"] for rank in made)
    for plan, *of_ranks in zip(made[0]["whole"]["calibatt plans"], *parts, strict=True):
        as_they_come.append(imbalance(plan, in_order(4, 2)))
        by_work.append(imbalance(torch.cat(of_ranks), in_order(4, 2)))
    assert all(ours <= theirs for ours, theirs in zip(by_work, as_they_come, strict=True))
    assert sum(by_work) < sum(as_they_come)


def test_a_compiled_model_is_shared_as_any(made: list[dict[str, Any]]) -> None:
    torch.testing.assert_close(made[0]["compiled"], made[0]["shared"]["calibatt"], atol=1e-6, rtol=1e-5)


def test_parallelism_that_comes_too_late_is_refused(made: list[dict[str, Any]]) -> None:
    assert made[0]["late"].endswith("call restore(pipe), then sparsify")


def test_plans_that_differ_between_processes_are_refused_by_all(made: list[dict[str, Any]]) -> None:
    for rank in made:
        assert rank["unlike"].startswith("processes have different plans at step 0, layer 0")


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_shares_are_equal_in_number_and_no_less_even_than_in_order(ranks: int) -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        work = torch.rand(40, generator=generator, dtype=torch.float64) ** 3
        shares = balanced(work, ranks)
        assert shares.shape == (ranks, 40 // ranks)
        assert shares.flatten().sort().values.tolist() == list(range(40))
        assert imbalance(work, shares) <= imbalance(work, in_order(40, ranks))
        assert torch.equal(balanced(work.clone(), ranks), shares)


def test_the_longest_heads_are_kept_apart() -> None:
    work = torch.tensor([4.0, 3.0, 2.0, 1.0], dtype=torch.float64)
    assert balanced(work, 2).tolist() == [[0, 3], [1, 2]]
    assert (imbalance(work, in_order(4, 2)), imbalance(work, balanced(work, 2))) == (1.4, 1.0)
    # where all are alike, there is nothing to gain
    assert torch.equal(balanced(torch.ones(4), 2), in_order(4, 2))


def _parallel(**changes: Any) -> Any:
    mesh = SimpleNamespace(get_group=lambda: "group", get_local_rank=lambda: 0)
    settings = {"ulysses_degree": 2, "ring_degree": 1, "ulysses_anything": False, "_ulysses_mesh": mesh, **changes}
    return SimpleNamespace(context_parallel_config=SimpleNamespace(**settings))


@pytest.fixture
def pipe() -> Any:
    """As if it were parallel; it cannot be run."""
    made = assemble(new_transformer(layers=1, heads=2))
    made.transformer._parallel_config = _parallel()
    return made


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (_parallel(ulysses_degree=4), "2 heads cannot be shared equally by 4 processes: take a ulysses_degree"),
        (_parallel(ring_degree=2), r"by ContextParallelConfig\(ulysses_degree=N\): no ring"),
        (_parallel(ulysses_anything=True), "no ring, no `anything`"),
        (SimpleNamespace(context_parallel_config=None), "where each transformer has the same ContextParallelConfig"),
    ],
    ids=["odd", "ring", "anything", "tensors"],
)
def test_another_way_to_be_parallel_is_refused(pipe: Any, config: Any, said: str) -> None:
    pipe.transformer._parallel_config = config
    with pytest.raises(ValueError, match=said), attached(pipe, build("dense"), SDPA):
        pass


def test_a_pipeline_of_which_one_transformer_is_parallel_is_refused(pipe: Any) -> None:
    with pytest.raises(ValueError, match="each transformer has the same"):
        ranks_of(FAMILY, [pipe.transformer, assemble(new_transformer(layers=1, heads=2)).transformer])


@pytest.mark.parametrize("name", ["mochi-1", "hunyuanvideo", "cogvideox-5b", "ltx-video-2b"])
def test_another_family_is_refused(tiny: Callable[[str], Any], name: str) -> None:
    pipe = tiny(name).load()
    pipe.transformer._parallel_config = _parallel()
    said = f"does not run {type(pipe.transformer).__name__} in parallel, only Wan's"
    with pytest.raises(ValueError, match=said), attached(pipe, build("dense"), SDPA):
        pass


@pytest.mark.parametrize(
    "make",
    [lambda: build("svg2"), lambda: WithRemainder(build("svg2"), "zeroth")],
    ids=["a method", "within another planner"],
)
def test_a_method_that_needs_all_heads_together_is_refused(pipe: Any, make: Callable[[], Any]) -> None:
    with pytest.raises(ValueError, match="does not plan heads by themselves"), attached(pipe, make(), SDPA):
        pass


def test_only_a_methods_attention_is_shared(pipe: Any) -> None:
    class Other:
        def start_video(self) -> None: ...

        def __call__(self, q: Any, k: Any, v: Any, site: Any) -> Any: ...

    with pytest.raises(ValueError, match="only a method's attention is split by head"), installed(pipe, Other()):
        pass


def test_a_refused_pipeline_is_left_as_it_was(pipe: Any) -> None:
    before = [block.attn1.processor for block in pipe.transformer.blocks]
    with pytest.raises(ValueError, match="by themselves"), attached(pipe, build("svg2"), SDPA):
        pass
    assert [block.attn1.processor for block in pipe.transformer.blocks] == before
    assert not pipe.transformer._forward_pre_hooks
