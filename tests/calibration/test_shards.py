"""Units of a run: resumed, shared out, refused where they are another run's, and never there by half."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from calibatt.calibration import shards
from calibatt.calibration.collect import Run, calibrate_on
from calibatt.calibration.files import UnusableCalibration
from calibatt.calibration.shards import Units
from calibatt.kernels.catalogue import KERNELS

Made = Callable[..., Any]
SDPA = KERNELS["sdpa-flash"]
UNITS = ["prompt-0000.safetensors", "prompt-0001.safetensors", "prompt-0002.safetensors"]


def held(folder: Path) -> list[str]:
    """The units in a folder."""
    return sorted(path.name for path in folder.glob("*.safetensors"))


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("out of memory")], ids=lambda e: type(e).__name__)
def test_a_run_that_was_stopped_goes_on_and_comes_to_the_same_bits(
    hand_made: Made, run: Made, same: Made, tmp_path: Path, prompts: tuple[str, ...], error: BaseException
) -> None:
    folder = tmp_path / "units"
    with pytest.raises(type(error)):
        run(hand_made(stop=(prompts[1], error)), folder=folder, levels=True)
    assert held(folder) == UNITS[:1]
    videos = hand_made()
    resumed = run(videos, folder=folder, levels=True)
    assert [prompt for prompt, _ in videos.shown] == list(prompts[1:])
    assert same(resumed, run(levels=True))
    # what is complete costs nothing
    videos = hand_made()
    assert same(run(videos, folder=folder, levels=True), resumed)
    assert videos.shown == []


def test_two_ranks_come_to_the_bits_of_one(hand_made: Made, run: Made, same: Made, tmp_path: Path) -> None:
    videos = hand_made()
    shared = Run.of(videos, prompts=["one", "two", "three", "four"], seed=7, block=(16, 8), anchors=2)
    units = shared.units(tmp_path)
    shared.note(units, kernel=SDPA, rank=1, world=2)
    assert videos.shown == [("two", 8), ("four", 10)]
    with pytest.raises(UnusableCalibration, match="prompt 0 of 4 has no notes yet"):
        shared.merge(units)
    shared.note(shared.units(tmp_path), kernel=SDPA, rank=0, world=2)
    assert same(shared.merge(units), run(prompts=["one", "two", "three", "four"]))


def test_prompts_that_are_noted_as_one_are_a_unit_and_their_videos_are_made_side_by_side(
    hand_made: Made, same: Made, tmp_path: Path
) -> None:
    how: dict[str, Any] = {"method": "budget", "block": (16, 8), "beside": 2, "trials": 0, "seed": 7}
    prompts = ["one", "two", "three", "four", "five"]
    videos = hand_made()
    whole = Run.of(videos, prompts=prompts, **how)
    # as even as it goes
    assert whole.groups == [range(1), range(1, 3), range(3, 5)]
    units = whole.units(tmp_path / "whole")
    whole.note(units, kernel=SDPA)
    assert videos.asked.count("show") == 3
    assert videos.shown == [(prompt, 7 + number) for number, prompt in enumerate(prompts)]
    assert (units.finished(), units.videos()) == ([0, 1, 3], (5, 5))
    made = whole.merge(units)
    assert made.provenance.prompts == tuple(prompts)
    # stopped in the last unit, and gone on with by two processes
    stopped = Run.of(hand_made(stop=("five", KeyboardInterrupt())), prompts=prompts, **how)
    parts = stopped.units(tmp_path / "parts")
    with pytest.raises(KeyboardInterrupt):
        stopped.note(parts, kernel=SDPA)
    assert parts.videos() == (3, 5)
    for rank in range(2):
        Run.of(hand_made(), prompts=prompts, **how).note(parts, kernel=SDPA, rank=rank, world=2)
    assert same(whole.merge(parts), made)
    # what is noted as one is not the mean of what is noted by itself
    how["beside"] = 1
    assert not torch.equal(calibrate_on(hand_made(), prompts=prompts, **how).tables["levels"], made.tables["levels"])


def test_videos_side_by_side_that_do_not_fit_say_what_to_do(hand_made: Made, tmp_path: Path) -> None:
    how: dict[str, Any] = {"method": "budget", "block": (16, 8), "trials": 0, "seed": 7}
    videos = hand_made(stop=("two", torch.OutOfMemoryError("no room")))
    with pytest.raises(
        ValueError, match=r"^2 videos side by side take more memory than there is.*smaller `beside` \(--set"
    ):
        calibrate_on(videos, prompts=["one", "two"], **how)
    with pytest.raises(torch.OutOfMemoryError):
        calibrate_on(videos, prompts=["two"], **how)


def test_a_run_that_finished_no_video_leaves_nothing(
    hand_made: Made, run: Made, tmp_path: Path, prompts: tuple[str, ...]
) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(hand_made(stop=(prompts[0], KeyboardInterrupt())), folder=tmp_path / "units")
    assert list(tmp_path.iterdir()) == []


def test_the_folder_goes_when_its_units_are_removed_and_stays_where_something_else_lies_in_it(
    run: Made, hand_made: Made, tmp_path: Path
) -> None:
    one = Run.of(hand_made(), prompts=["a"], seed=7, block=(16, 8), anchors=2)
    for other in ((), ("notes.txt",)):
        folder = tmp_path / "units"
        units = one.units(folder)
        one.note(units, kernel=SDPA)
        for name in other:
            (folder / name).touch()
        units.remove()
        assert [path.name for path in folder.glob("*")] == list(other)


def test_who_comes_after_the_units_were_merged_and_removed_leaves_nothing(hand_made: Made, tmp_path: Path) -> None:
    folder = tmp_path / "units"
    one = Run.of(hand_made(), prompts=["a"], seed=7, block=(16, 8), anchors=2)
    first, other = one.units(folder), one.units(folder)
    one.note(first, kernel=SDPA)
    # a third process has no prompt
    one.note(other, kernel=SDPA, rank=2, world=3)
    with first.alone():
        first.remove()
    with other.alone():
        assert other.finished() == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("other", "field"),
    [
        ({"prompts": ["a circle, “red”", "a square", "a ring"]}, "prompts"),
        ({"seed": 8}, "seed"),
        ({"rho": 0.9}, "settings"),
        ({"videos": {"weights": "fedcba9876543210"}}, "origin"),
        ({"videos": {"guidance": 1.0}}, "guidance"),
        ({"videos": {"steps": 3}}, "steps"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_units_of_another_run_are_refused_in_one_line_that_names_what_differs(
    hand_made: Made, run: Made, tmp_path: Path, other: dict[str, Any], field: str
) -> None:
    run(folder=tmp_path)
    videos = hand_made(**other.pop("videos", {}))
    with pytest.raises(UnusableCalibration, match=f"notes of a run with another {field}: delete it") as error:
        run(videos, folder=tmp_path, **other)
    assert "\n" not in str(error.value)
    assert videos.shown == []


def test_a_unit_of_another_run_beside_the_right_manifest_is_refused(run: Made, tmp_path: Path) -> None:
    run(folder=tmp_path / "one")
    run(folder=tmp_path / "other", seed=8)
    (tmp_path / "other" / UNITS[1]).replace(tmp_path / "one" / UNITS[1])
    with pytest.raises(UnusableCalibration, match="notes of another run or prompt: delete it"):
        run(folder=tmp_path / "one")
    (tmp_path / "one" / UNITS[0]).replace(tmp_path / "one" / UNITS[1])
    (tmp_path / "one" / UNITS[0]).write_bytes((tmp_path / "one" / UNITS[1]).read_bytes())
    with pytest.raises(UnusableCalibration, match="notes of another run or prompt: delete it"):
        run(folder=tmp_path / "one")


@pytest.mark.parametrize("place", [-1, -100, -300])
def test_a_damaged_unit_is_refused_by_name(run: Made, tmp_path: Path, place: int) -> None:
    run(folder=tmp_path)
    path = tmp_path / UNITS[2]
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)
    with pytest.raises(UnusableCalibration, match=f"{UNITS[2]} was changed or damaged .* delete it and run again"):
        run(folder=tmp_path)


def test_two_processes_cannot_work_on_one_folder_and_a_dead_one_holds_nothing(
    hand_made: Made, run: Made, tmp_path: Path
) -> None:
    code = (
        "import sys, time; from filelock import FileLock\n"
        f"lock = FileLock({str(tmp_path / 'prompt-0001.lock')!r}); lock.acquire(); print('held', flush=True); "
        "time.sleep(60)"
    )
    videos = hand_made()
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(UnusableCalibration, match=r"another process is at work on prompt 1 in .*: wait"):
            run(videos, folder=tmp_path)
        assert videos.shown == []
        os.kill(other.pid, signal.SIGKILL)
    assert run(videos, folder=tmp_path).provenance.steps == 2


def test_what_a_killed_process_left_is_replaced(run: Made, same: Made, tmp_path: Path) -> None:
    tmp_path.joinpath(f".{UNITS[0]}.partial").write_bytes(b"half a unit")
    assert same(run(folder=tmp_path), run())
    assert [path.name for path in tmp_path.iterdir() if "partial" in path.name] == []


def test_units_have_the_mode_that_the_umask_gives(run: Made, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        run(folder=tmp_path)
    finally:
        os.umask(before)
    assert {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in UNITS} == {0o640}


def test_a_full_disk_is_one_line_and_finished_units_stay(run: Made, tmp_path: Path) -> None:
    # as good as a full disk: what is written aside goes there
    (tmp_path / f".{UNITS[1]}.partial").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"prompt-0001\.safetensors cannot be written: No space left on device") as error:
        run(folder=tmp_path)
    assert "\n" not in str(error.value)
    assert held(tmp_path) == UNITS[:1]
    assert run(folder=tmp_path).provenance.steps == 2


def test_memory_holds_one_site_of_the_notes(hand_made: Made, run: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[int] = []
    notes = shards._Unit.notes

    def counted(self: shards._Unit, site: int) -> dict[str, torch.Tensor]:
        made = notes(self, site)
        held.append(sum(note.nbytes for note in made.values()))
        return made

    monkeypatch.setattr(shards._Unit, "notes", counted)
    made = run(hand_made(steps=4))
    # a site at a time, of all prompts
    assert len(held) == 4 * 3 * 3
    assert set(held) == {2 * 4 * 4 + 2 * 4}
    assert made.tables["bits"].nbytes == 12 * 2 * 4 * 4


def test_a_manifest_that_cannot_be_read_is_refused(run: Made, tmp_path: Path) -> None:
    for content in ("{", "[]", "[" * 100_000, '"x"'):
        (tmp_path / "run.json").write_text(content)
        with pytest.raises(UnusableCalibration, match=r"run\.json cannot be read"):
            run(folder=tmp_path)


def test_the_manifest_says_what_the_units_depend_on(run: Made, tmp_path: Path) -> None:
    run(folder=tmp_path)
    known = json.loads((tmp_path / "run.json").read_text())
    assert {"method", "settings", "prompts", "seed", "origin", "geometry", "steps", "layers", "guidance"} < set(known)


def test_notes_that_differ_in_shape_between_sites_are_refused(tmp_path: Path) -> None:
    units = Units(tmp_path, {"steps": 1, "layers": 2}, [range(1)])
    with units.writing(0) as unit:
        unit.put(0, {"x": torch.zeros(3)})
        with pytest.raises(ValueError, match="the same at every site"):
            unit.put(1, {"x": torch.zeros(4)})


def test_a_process_that_fails_leaves_the_claims_of_others(tmp_path: Path) -> None:
    def units() -> Units:
        return Units(tmp_path / "units", {"steps": 1, "layers": 2}, [range(1), range(1, 2)])

    first, second = units(), units()
    with first.claimed([0]):
        with pytest.raises(RuntimeError, match="it broke"), second.claimed([1]):
            raise RuntimeError("it broke")
        with pytest.raises(UnusableCalibration, match="another process is at work on prompt 0"), units().claimed([0]):
            pass
    # the last that ends without a video leaves nothing
    assert not (tmp_path / "units").exists()
