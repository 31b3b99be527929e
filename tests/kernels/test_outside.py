"""A kernel in a package of one's own: the one of the docs, and ones that get something wrong."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from calibatt.kernel_cases import CASES
from calibatt.kernels.catalogue import KERNELS
from calibatt.kernels.names import UnknownName, UnusableEntry
from calibatt.testing import ContractBroken, check_case, check_kernel

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "own-kernel.md").read_text(encoding="utf-8")
(SOURCE, _) = re.findall(r"```python\n(.*?)```", PAGE, re.S)


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Puts the page's kernel where it can be imported, changed; the catalogue forgets it afterwards."""
    monkeypatch.setattr(KERNELS, "_loaded", dict(KERNELS._loaded))
    monkeypatch.syspath_prepend(tmp_path)

    def file(module: str, *changes: tuple[str, str]) -> str:
        source = SOURCE
        for old, new in changes:
            assert old in source
            source = source.replace(old, new)
        (tmp_path / f"{module}.py").write_text(source)
        monkeypatch.delitem(sys.modules, module, raising=False)
        return f"{module}:plain"

    return file


Write = Callable[..., str]


@pytest.mark.slow
def test_the_kernel_of_the_docs_passes_and_says_what_it_left_out(write: Write) -> None:
    said = check_kernel(write("right"))
    assert len(said) == len(CASES)
    assert "right:plain computes the blocks that it is given and no others: 20 of 20 plans" in said
    (variable,) = (line for line in said if "approximates variable blocks" in line)
    assert re.search(r": 0 of \d+ plans \(else: plain has blocks of one size, and dense heads: the Triton", variable)
    # some of its heads reuse rows in some of these plans
    assert any(re.search(r"mixes the kinds of heads: 4 of 12 plans \(else", line) for line in said)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (
            "part if seen is None else part.masked_fill(~seen.any(-1, keepdim=True), 0)", "part + 1e-3",
            r"computes the blocks that it is given and no others: all-blocks-63: the output is 0\.001 off that of fp64",
        ),
        ("seen = plan.mask.seen(head, places)", "seen = plan.mask.seen(0, places)", "no others: one-head-empty-63"),
        ("return out", "return out.clone().mul_(q.mul_(1.5).isfinite())", "all-blocks-63: the inputs were changed"),
        ("return out", "return out.double()", "all-blocks-63: the output is not like the queries"),
        pytest.param(
            "plan.order is not None", "False",
            "takes blocks of tokens that lie apart: masked-masked-masked-one-order",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "queries, keys = (one", "keys, queries = (one",
            "masked-masked-masked-queries-apart: the output is",
            marks=pytest.mark.slow,
        ),
        ("return None", 'return Unsupported("not today")', r"0 of 20 plans .*not today.*: there is nothing to check"),
    ],
)  # fmt: skip
def test_a_kernel_that_is_wrong_is_one_line_that_names_the_plan(old: str, new: str, said: str, write: Write) -> None:
    name = write("wrong", (old, new))
    with pytest.raises(ContractBroken, match=said) as caught:
        check_kernel(name)
    assert str(caught.value).startswith(name)
    assert "\n" not in str(caught.value)


def test_another_output_from_the_same_inputs_is_found(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    name = write("drifting")
    plain: Any = KERNELS[name]
    attend, calls = type(plain).attend, []

    def drifting(self: object, q: torch.Tensor, *rest: Any) -> torch.Tensor:
        calls.append(q)
        # by a bit, within the rounding that is allowed
        return attend(self, q, *rest) * (1 + len(calls) % 2 * 1e-7)

    monkeypatch.setattr(type(plain), "attend", drifting)
    case = CASES["gives the same output twice"]["dense-dense-dense"]
    with pytest.raises(ContractBroken, match=r"^the same inputs have another output$"):
        check_case(plain, case, device="cpu", dtype=torch.float32)


def test_what_is_no_kernel_is_refused_in_one_line(write: Write) -> None:
    with pytest.raises(UnknownName, match="did you mean flex"):
        check_kernel("flx")
    with pytest.raises(UnusableEntry, match="is no kernel: it has no name, no refusal or no attend"):
        check_kernel(write("none", ("def attend", "def attended")))
