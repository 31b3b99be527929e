"""Notes on their way to the host arrive as they were, and nothing waits for them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from calibatt.calibration import collect
from calibatt.calibration.in_flight import InFlight, joined, parted

Made = Callable[..., Any]


def tensors(device: str = "cpu") -> list[torch.Tensor]:
    """Of odd sizes, so that what lies behind a byte would not be aligned; one has no dimension, one no values."""
    made = [
        torch.arange(7, dtype=torch.uint8), torch.randn(3, 5), torch.tensor([True, False, True]), torch.randn(3).half(),
        torch.tensor(-7), torch.zeros(2, 0), torch.randn(4, 6).double().T,
    ]  # fmt: skip
    return [tensor.to(device) for tensor in made]


def test_tensors_that_were_joined_come_apart_bit_for_bit() -> None:
    given = tensors()
    flat = joined(given)
    assert len(flat) == sum(tensor.nbytes for tensor in given)
    for found, tensor in zip(parted(flat, given), given, strict=True):
        assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(found, tensor)


def test_what_is_on_the_host_is_there_at_once() -> None:
    given = tensors()
    sent = InFlight(given)
    assert sent.arrived
    assert all(found is tensor for found, tensor in zip(sent.received(), given, strict=True))


@pytest.mark.gpu
def test_tensors_of_a_gpu_come_as_they_were_when_they_were_sent() -> None:
    given, here = tensors("cuda"), torch.arange(3)
    kept = [tensor.cpu() for tensor in given]
    sent = InFlight([here, *given])
    for tensor in given:
        tensor.zero_()
    first, *found = sent.received()
    assert sent.arrived
    assert first is here
    for one, tensor in zip(found, kept, strict=True):
        assert one.is_pinned()
        assert torch.equal(one, tensor)


def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Notes never arrive by themselves: they have to be waited for."""
    monkeypatch.setattr(InFlight, "arrived", property(lambda self: False))


@pytest.mark.parametrize("under_way", [0, 2, 100])
def test_notes_that_arrive_late_come_to_the_same_calibration(
    run: Made, same: Made, under_way: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = run(levels=True)
    slow(monkeypatch)
    monkeypatch.setattr(collect, "_UNDER_WAY", under_way)
    assert same(run(levels=True), expected)


def test_no_more_notes_than_allowed_are_under_way(run: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    slow(monkeypatch)
    monkeypatch.setattr(collect, "_UNDER_WAY", 2)
    held: list[int] = []
    write = collect._Watcher._write

    def counting(self: Any, sent: Any) -> None:
        held.append(len(self._sent) + 1)
        write(self, sent)

    monkeypatch.setattr(collect._Watcher, "_write", counting)
    run()
    # of 6 sites a video; the last ones are written when it is over
    assert held == [3, 3, 3, 3, 2, 1] * 3


@pytest.mark.parametrize("site", [(0, 0), (1, 2)])
def test_what_is_not_finite_is_named_however_late_it_is_found(
    hand_made: Made, run: Made, site: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow(monkeypatch)
    with pytest.raises(ValueError, match=f"attention at step {site[0]}, layer {site[1]} is not finite"):
        run(hand_made(not_finite=site), tmp_path / "notes")
    assert not (tmp_path / "notes").exists()
