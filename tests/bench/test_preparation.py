"""What was learnt for a run that was stopped: taken over by the one that goes on, or refused, and never mixed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch

from calibatt.bench.cells import Arm, Cell, Workload
from calibatt.bench.journal import Journal, UnusableJournal
from calibatt.bench.offline import CALIBRATION_SEED, Lesson, Offline, Prepared, learn, lesson_of
from calibatt.bench.preparation import Preparation
from calibatt.bench.record import Record
from calibatt.bench.session import BenchSession, Settings
from calibatt.bench.video import Rounds, Video
from calibatt.calibration.artifact import Calibration
from calibatt.kernels.catalogue import KERNELS
from calibatt.kernels.geometry import Geometry
from calibatt.methods.call import Attention
from calibatt.methods.learning import Origin
from calibatt.methods.site import Site

BLOCK = (32, 32)
CPU = torch.device("cpu")
ARM = Arm.parse("calibatt", "flex")
WORKLOAD = Workload(model="shapes", resolution="quick", steps=2, device=CPU)
PROMPTS = ("a", "b", "c")
GEOMETRY = Geometry(grid=(2, 8, 8), heads=2, head_dim=16)


class Killed(BaseException):
    """As abrupt as a test can be in its own process."""


@dataclass
class Toy:
    """Videos of one call each, of random inputs that are the seed's; the run is killed at one of them."""

    killed_at: str | None = None
    shown: list[str] = field(default_factory=list)
    resolution: str = "small"
    geometry: Geometry = GEOMETRY
    steps: int = 1
    layers: int = 1
    guidance: float = 1.0

    def origin(self) -> Origin:
        return Origin(model="toy", weights="ab", scheduler="Euler")

    def sigmas(self, prompt: str) -> tuple[float, ...]:
        return (1.0,)

    def show(
        self,
        attention: Attention,
        *,
        prompts: Sequence[str],
        seed: int,
        after_step: Callable[[], object] = lambda: None,
    ) -> None:
        (prompt,) = prompts
        if prompt == self.killed_at:
            raise Killed
        self.shown.append(prompt)
        attention.start_video()
        q, k, v = torch.randn(3, 1, 2, 128, 16, generator=torch.Generator().manual_seed(seed))
        attention(q, k, v, Site(geometry=self.geometry, step=0, steps=1, sigma=1.0, branch="cond", layer=0, layers=1))


class Learning:
    """Learns from such videos in ten seconds."""

    def __init__(self, *, fails: Sequence[Exception] = ()) -> None:
        self.folders: list[Path | None] = []
        self._fails = list(fails)

    def __call__(self, lesson: Lesson, folder: Path | None) -> tuple[float, Calibration]:
        self.folders.append(folder)
        if self._fails:
            raise self._fails.pop()
        made = learn(lesson, Toy(), prompts=PROMPTS, kernel=KERNELS["sdpa-math"], device=CPU, folder=folder)
        return 10.0, made[1]


def prepared(path: Path, learning: Learning, said: list[str] | None = None, arm: Arm = ARM) -> Prepared:
    """What a run whose journal is there plans by."""
    log = [].append if said is None else said.append
    preparation = Preparation(Journal(path, {}), str(WORKLOAD), log)
    offline = Offline(learning, preparation=preparation, stored=None, log=log, block=BLOCK)
    made = offline.prepared(arm)
    assert made is not None
    return made


def keep_a_round(path: Path) -> None:
    rounds = Rounds(first=0, rounds=[{"calibatt": Video(seconds=1.0, phases={})}])
    Journal(path, {}).keep_rounds("denoise", str(WORKLOAD), rounds)


def same(one: Prepared, other: Prepared) -> bool:
    a, b = one.calibration, other.calibration
    return a.provenance == b.provenance and all(torch.equal(a.tables[name], b.tables[name]) for name in a.tables)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run.json.partial.jsonl"


def test_what_was_learnt_is_not_learnt_again_and_took_as_long(path: Path) -> None:
    first = prepared(path, Learning())
    (file,) = (path.parent / "run.json.partial.learnt").iterdir()
    assert file.name.startswith("shapes-quick-2-calibatt-")
    again, said = Learning(), list[str]()
    second = prepared(path, again, said)
    assert again.folders == []
    assert said == ["what calibatt/default needs was learnt before"]
    assert second.seconds == first.seconds == 10
    assert same(first, second)
    # what is learnt under other settings is another lesson
    prepared(path, again, arm=replace(ARM, block=(64, 64)))
    assert len(again.folders) == 1
    assert len(Journal(path, {}).learnt) == 2


def test_a_lesson_has_one_name_in_every_run_and_another_of_other_settings() -> None:
    names = [lesson.name for turned in ((), (), ("calibatt",)) if (lesson := lesson_of(ARM, BLOCK, turned=turned))]
    assert names[0] == names[1] != names[2]
    assert all(name.startswith("calibatt-") for name in names)


def missing(file: Path) -> None:
    file.unlink()


def damaged(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1] + b"?")


def of_another_run(file: Path) -> None:
    # whole, and right in itself
    own = Calibration.load(file)
    replace(own, provenance=replace(own.provenance, created="yesterday")).save(file)


DAMAGES = pytest.mark.parametrize("damage", [missing, damaged, of_another_run])


@DAMAGES
def test_without_rounds_a_file_that_is_gone_is_learnt_anew(path: Path, damage: Callable[[Path], None]) -> None:
    prepared(path, Learning())
    (file,) = Journal(path, {}).folder.iterdir()
    damage(file)
    learning, said = Learning(), list[str]()
    anew = prepared(path, learning, said)
    assert len(learning.folders) == 1
    assert said[0] == f"{file} is missing or damaged: it is learnt anew"
    # and from then on it is that of every later run
    assert same(prepared(path, learning), anew)
    assert len(learning.folders) == 1


@DAMAGES
def test_with_rounds_a_run_is_refused_whose_file_is_gone(path: Path, damage: Callable[[Path], None]) -> None:
    prepared(path, Learning())
    keep_a_round(path)
    (file,) = Journal(path, {}).folder.iterdir()
    checked = Preparation(Journal(path, {}), str(WORKLOAD), print)
    checked.check()
    damage(file)
    learning = Learning()
    for refused in (checked.check, lambda: prepared(path, learning)):
        with pytest.raises(UnusableJournal, match="missing or damaged, and rounds of shapes-quick-2 were") as error:
            refused()
        assert f"delete {path} to measure anew" in str(error.value)
        assert "\n" not in str(error.value)
    assert learning.folders == []
    # of another workload there are no rounds
    Preparation(Journal(path, {}), "shapes-standard-2", print).check()


def test_a_run_is_refused_only_where_something_is_left_to_measure(path: Path) -> None:
    prepared(path, Learning())
    keep_a_round(path)
    (file,) = Journal(path, {}).folder.iterdir()
    missing(file)

    def session() -> BenchSession:
        settings = Settings(rounds=1, calibration_prompts=1, calibration=None, prompts=None, artifacts=None)
        made = BenchSession(settings, Quiet(), journal=Journal(path, {}))
        made.choose("denoise", Cell(workload=WORKLOAD, arm=ARM))
        return made

    with pytest.raises(UnusableJournal, match="missing or damaged"):
        session().check()
    record = Record(suite="denoise", model="shapes", method="calibatt", kernel="flex", outcome="failed", reason="no")
    Journal(path, {}).keep("denoise", str(Cell(workload=WORKLOAD, arm=ARM)), record)
    session().check()


class Quiet:
    """Shows nothing."""

    def line(self, text: str) -> None: ...

    def open(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


def test_the_folder_goes_with_the_file(path: Path) -> None:
    prepared(path, Learning())
    Journal(path, {}).remove()
    assert list(path.parent.iterdir()) == []


def test_what_a_run_has_left_whose_file_was_deleted_is_not_used(path: Path) -> None:
    prepared(path, Learning())
    path.unlink()
    learning = Learning()
    prepared(path, learning)
    assert len(learning.folders) == 1
    path.unlink()
    # whoever begins with something else clears it away too
    keep_a_round(path)
    assert list(path.parent.iterdir()) == [path]


def test_learning_goes_on_after_the_last_prompt_and_its_seconds_are_those_of_both_runs(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lesson = lesson_of(ARM, BLOCK)
    assert lesson is not None

    def run(videos: Toy) -> tuple[float, Calibration]:
        folder = Preparation(Journal(path, {}), str(WORKLOAD), print).notes(lesson.name)
        return learn(lesson, videos, prompts=PROMPTS, kernel=KERNELS["sdpa-math"], device=CPU, folder=folder)

    # each video takes a second by the clock that videos are timed by, and this run's work a tenth by the other
    monkeypatch.setattr("calibatt.calibration.collect._Clock._mark", lambda self: 0.0)
    monkeypatch.setattr("calibatt.calibration.collect.time.perf_counter", iter(range(100)).__next__)
    with pytest.raises(Killed):
        run(Toy(killed_at="c"))
    monkeypatch.setattr("calibatt.bench.timer.perf_counter", iter((0.0, 0.1)).__next__)
    videos = Toy()
    seconds, learnt = run(videos)
    assert videos.shown == ["c"]
    assert seconds == pytest.approx(2.1)
    assert learnt.provenance.seed == CALIBRATION_SEED
    # in one go it comes to the same
    monkeypatch.undo()
    whole = learn(lesson, Toy(), prompts=PROMPTS, kernel=KERNELS["sdpa-math"], device=CPU, folder=None)[1]
    assert all(torch.equal(learnt.tables[name], whole.tables[name]) for name in whole.tables)
    # and is kept in place of the notes
    journal = Journal(path, {})
    assert [one.suffix for one in journal.folder.iterdir()] == [".units"]
    Preparation(journal, str(WORKLOAD), print).keep_learnt(lesson.name, seconds, learnt)
    assert [one.suffix for one in journal.folder.iterdir()] == [".safetensors"]


def test_where_notes_cannot_be_kept_learning_goes_on_without(path: Path) -> None:
    learning, said = Learning(fails=[OSError("no room")]), list[str]()
    prepared(path, learning, said)
    assert [folder is None for folder in learning.folders] == [False, True]
    assert said == ["learning what calibatt/default needs", "no room: learning without keeping notes"]
    # without a folder it is a failure as any other
    with pytest.raises(OSError, match="no room"):
        Offline(
            Learning(fails=[OSError("no room")]), preparation=Preparation(None, str(WORKLOAD), print), stored=None,
            log=print, block=BLOCK,
        ).prepared(ARM)  # fmt: skip


def test_what_cannot_be_kept_is_no_reason_to_stop(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []

    def full(self: Calibration, file: Path) -> None:
        raise OSError(f"{file} cannot be written: No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Calibration, "save", full)
        assert prepared(path, Learning(), said).seconds == 10
    assert said[-1].startswith(f"{path}: calibatt-")
    assert "of shapes-quick-2 is not kept there" in said[-1]
    assert "No space left on device" in said[-1]
    # its notes are gone too, and the next run learns
    assert list(Journal(path, {}).folder.glob("*")) == []
    learning = Learning()
    prepared(path, learning)
    assert len(learning.folders) == 1
