"""What FlashAttention-3 and -4 refuse, and why; the contract tests compute with them where there is a GPU."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import pytest
import torch

from calibatt.kernels import flash
from calibatt.kernels.base import Task
from calibatt.kernels.catalogue import KERNELS
from calibatt.kernels.geometry import Geometry
from calibatt.kernels.mask import BlockMask
from calibatt.kernels.plan import Plan


def _task(block: tuple[int, int] | None = None, **change: object) -> Task:
    given = {"device": torch.device("cuda"), "dtype": torch.bfloat16, "head_dim": 128, "block": block, **change}
    return Task(**given)  # type: ignore[arg-type]


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with all that is needed."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())


def _reason(name: str, task: Task) -> str | None:
    refusal = KERNELS[name].refusal(task)
    return None if refusal is None else refusal.reason


@pytest.mark.parametrize("name", ["fa3", "fa4"])
@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"device": torch.device("cpu")}, "runs on cuda, not on cpu"),
        ({"dtype": torch.float32}, "here, not float32"),
        ({"head_dim": 96}, "head dims 64 and 128 here, not 96"),
        ({}, None),
    ],
)
@pytest.mark.usefixtures("hopper")
def test_a_dense_task_is_taken_or_refused_with_both_sides(
    name: str, change: dict[str, object], said: str | None
) -> None:
    reason = _reason(name, _task(**change))
    assert reason is None if said is None else said in str(reason)


@pytest.mark.usefixtures("hopper")
def test_fa3_as_it_is_packaged_has_no_fp16() -> None:
    assert "computes bfloat16 here, not float16" in str(_reason("fa3", _task(dtype=torch.float16)))
    assert _reason("fa4", _task(dtype=torch.float16)) is None


@pytest.mark.parametrize("name", ["fa3", "fa4"])
def test_where_it_is_not_installed_it_says_what_to_install(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: None)
    assert f"pip install 'calibatt[{name}]'" in str(_reason(name, _task()))


def test_a_package_without_its_parent_is_not_installed() -> None:
    assert not flash._installed("no_such_parent.child")


@pytest.mark.parametrize(
    ("capability", "block", "taken"),
    [
        ((9, 0), (128, 128), True),
        ((9, 0), (64, 64), True),
        ((9, 0), (256, 128), True),
        ((9, 0), (128, 80), True),
        ((9, 0), (32, 64), False),
        ((9, 0), (128, 256), False),
        ((9, 0), (128, 72), False),
        ((10, 0), (256, 128), True),
        ((10, 0), (128, 128), False),
        # there the lists would be ignored, and everything computed
        ((8, 0), (128, 128), False),
        ((12, 0), (128, 128), False),
    ],
)
@pytest.mark.usefixtures("hopper")
def test_fa4_takes_the_blocks_that_the_gpu_walks(
    capability: tuple[int, int], block: tuple[int, int], taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert (_reason("fa4", _task(block)) is None) == taken


@pytest.mark.parametrize("capability", [(8, 0), (10, 0)])
@pytest.mark.usefixtures("hopper")
def test_fa3_is_for_hopper_only(capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert "sm90" in str(_reason("fa3", _task()))


def test_fa4_raises_what_it_refuses() -> None:
    q = torch.zeros(1, 2, 64, 64)
    with pytest.raises(ValueError, match="FlashAttention-4 runs on cuda, not on cpu"):
        KERNELS["fa4"].attend(q, q, q, Plan.dense(Geometry(grid=(1, 8, 8), heads=2, head_dim=64)))


def test_its_operators_tell_the_compiler_their_shapes() -> None:
    # made of nothing, as torch.compile does it: no GPU is needed
    q = torch.empty((1, 2, 128, 64), dtype=torch.bfloat16, device="meta")
    indices, counts = (torch.empty(shape, dtype=torch.int32, device="meta") for shape in ((2, 1, 1), (2, 1)))
    dense, blocks = flash._operators()
    for out in (dense(q, q, q), blocks(q, q, q, indices, counts, 128, 128)):
        assert (out.shape, out.dtype) == (q.shape, q.dtype)
        # tokens before heads in memory
        assert out.transpose(1, 2).is_contiguous()


def _environment_at_import(monkeypatch: pytest.MonkeyPatch, folder: Path, given: dict[str, str]) -> dict[str, str]:
    """The environment in which FlashAttention-4 would be imported."""
    package = folder / "flash_attn" / "cute"
    package.mkdir(parents=True)
    (package.parent / "__init__.py").touch()
    (package / "__init__.py").write_text("import os\nfound = dict(os.environ)\n")
    names = ("flash_attn", "flash_attn.cute")
    before = {name: sys.modules.pop(name) for name in names if name in sys.modules}
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setattr(os, "environ", given)
    try:
        found: dict[str, str] = flash._interface().found
    finally:
        for name in names:
            sys.modules.pop(name, None)
        sys.modules.update(before)
    return found


def test_what_is_compiled_stays_on_disk_in_the_users_own_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found = _environment_at_import(monkeypatch, tmp_path / "site", {"XDG_CACHE_HOME": str(tmp_path)})
    assert found["FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED"] == "1"
    folder = Path(found["FLASH_ATTENTION_CUTE_DSL_CACHE_DIR"])
    assert folder == tmp_path / "calibatt" / "flash-attention-4"
    assert folder.is_dir()


@pytest.mark.parametrize("enabled", ["0", None])
def test_nothing_is_kept_where_it_is_not_wanted_or_there_is_no_room(
    enabled: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    taken = tmp_path / "file"
    taken.touch()
    given = {"XDG_CACHE_HOME": str(taken)}
    if enabled is not None:
        given["FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED"] = enabled
    found = _environment_at_import(monkeypatch, tmp_path / "site", given)
    assert found.get("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED") == enabled


def _mixed(block: tuple[int, int], tokens: int) -> BlockMask:
    rows, columns = -(-tokens // block[0]), -(-tokens // block[1])
    keep = torch.rand((2, rows, columns), generator=torch.Generator().manual_seed(0)) < 0.5
    return BlockMask.from_keep(keep, tokens=tokens, block_q=block[0], block_k=block[1]).to("cuda")


@pytest.mark.gpu
def test_the_operators_pass_torchs_own_check() -> None:
    if (reason := _reason("fa4", _task((128, 128)))) is not None:
        pytest.skip(reason)
    from calibatt.kernels.expand import block_lists

    q, k, v = torch.randn((3, 1, 2, 300, 128), device="cuda").bfloat16()
    indices, counts = block_lists(Plan.masked(_mixed((128, 128), 300), 2), every_head=True)
    dense, blocks = flash._operators()
    torch.library.opcheck(dense, (q, k, v))
    torch.library.opcheck(blocks, (q, k, v, indices, counts, 128, 128))


@pytest.mark.gpu
def test_its_operators_are_left_whole_by_torch_compile() -> None:
    if (reason := _reason("fa4", _task((128, 128)))) is not None:
        pytest.skip(reason)
    from calibatt.kernels.expand import block_lists

    indices, counts = block_lists(Plan.masked(_mixed((128, 128), 300), 2), every_head=True)
    q, k, v = torch.randn((3, 1, 2, 300, 128), device="cuda").bfloat16()
    _, blocks = flash._operators()

    # the operators, not `attend`: the check of shapes around that one, in tests alone, cannot be traced
    def layer(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return blocks(q * 2, k, v, indices, counts, 128, 128) + 1

    torch.testing.assert_close(torch.compile(layer, fullgraph=True)(q, k, v), layer(q, k, v))
