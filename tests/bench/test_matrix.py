"""A matrix: what is planned, what becomes of a run, and that nothing is lost or made twice, whatever stops it."""

from __future__ import annotations

import fcntl
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import pytest

from calibatt.bench import matrix
from calibatt.bench.matrix import Planned, Runs, read
from calibatt.bench.options import partial_of
from calibatt.bench.record import load_run
from calibatt.cli import main

# Stands in for the benchmarks: makes sure that it is alone, and writes a result in two parts, as pytest-benchmark may.
STAND_IN = """
import fcntl, json, os, sys, time
from pathlib import Path
out, made, seconds = Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3])
with (made / "busy").open("a") as busy:
    fcntl.flock(busy, fcntl.LOCK_EX | fcntl.LOCK_NB)
    busy.truncate(0)
    print(os.getpid(), file=busy, flush=True)
    partial = out.with_name(out.name + ".partial.jsonl")
    partial.write_text("")
    time.sleep(seconds)
    info = {"schema": 1, "suite": "denoise", "model": "shapes", "method": out.stem, "kernel": "flex",
            "outcome": "ok", "samples_s": [1.0] * 6, "baseline_samples_s": [2.0] * 6}
    text = json.dumps({"benchmarks": [{"stats": {}, "extra_info": info}]})
    with out.open("w") as file:
        file.write(text[:50])
        file.flush()
        time.sleep(seconds)
        file.write(text[50:])
    partial.unlink()
    with (made / "made").open("a") as file:
        print(out.stem, file=file)
    busy.truncate(0)
"""


@pytest.fixture(autouse=True)
def _own_devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Locks of devices that no other test holds."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str], Path]:
    def file(text: str) -> Path:
        path = tmp_path / "matrix.toml"
        path.write_text(text)
        return path

    return file


Write = Callable[[str], Path]


def _python(script: str, *arguments: str) -> list[str]:
    return [sys.executable, "-c", script, *arguments]


def _good(folder: Path, seconds: float = 0) -> matrix.Command:
    return lambda run, out: _python(STAND_IN, str(out), str(folder), str(seconds))


def test_every_combination_is_a_run_with_dense_in_it(write: Write) -> None:
    runs = read(
        write(
            'resolutions = ["quick", "standard"]\nsteps = [2, 4]\nseeds = [0, 7]\n'
            'methods = ["radial", "sparge=0.35,random/draw-2"]\noptions = "--rounds 8 --compile=no -q"'
        )
    )
    assert len(runs) == 2 * 2 * 2 * 2
    assert len({run.name for run in runs}) == len(runs)
    assert runs[3].title == "quick, 2 steps, seed 7, sparge=0.35,random/draw-2"
    assert runs[3].arguments == (
        "-k", "denoise", "--resolutions=quick", "--steps=2", "--seeds=7",
        "--methods=dense,sparge=0.35,random/draw-2", "--rounds", "8", "--compile=no", "-q",
    )  # fmt: skip
    assert [str(cell) for cell in runs[3].cells] == [
        "shapes-quick-2-seed7-dense-fastest", "shapes-quick-2-seed7-sparge=0.35-default",
        "shapes-quick-2-seed7-random/draw-2-default",
    ]  # fmt: skip


def test_another_option_is_another_run_and_the_same_one_is_not(write: Write) -> None:
    texts = ['methods = ["radial"]', 'methods = ["radial"]\noptions = "--rounds 8"', 'methods = ["radial", "sparge"]']
    first, other, more = (read(write(text)) for text in texts)
    assert first[0].name != other[0].name
    assert first[0] == more[0]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('method = ["radial"]', "unknown key 'method': did you mean methods"),
        ('steps = ["six"]', "steps.0: Input should be a valid integer"),
        ("steps = 6", "steps: Input should be a valid array"),
        ("steps = []", "steps: give at least one"),
        ('suite = "kernels"', "suite: Input should be"),
        ("steps = [", "Invalid value"),
        ('methods = ["radil"]', "radil: unknown method 'radil': did you mean radial"),
        ('resolutions = ["quick", "vast"]', "vast: unknown resolution of shapes 'vast': there are quick"),
        ('models = ["nobody"]', "nobody: --models nobody: unknown model"),
        ("seeds = [-1]", "seed -1: --seeds -1: give a whole number from 0 up"),
        ('methods = ["radial", "sparge,radial"]', "shapes-quick-6-radial-default is in two runs"),
        ('suite = "kernel"\nsteps = [2, 4]', "is in two runs"),
        ('suite = "forward"', "the forward suite measures nothing there"),
        ('options = "--rounds 0"', "--rounds 0: give a whole number"),
        ('options = "--rounds"', "--rounds: expected one argument"),
        ('options = "\'"', "options: no closing quotation"),
        ('options = "-k kernel"', "options: leave out -k"),
        ('options = "--methods=radial"', "options: leave out --methods=radial"),
        ('options = "--max-time 60"', "options: leave out --max-time"),
    ],
)
def test_what_makes_no_sense_is_one_line_that_names_the_file_and_the_key(
    text: str, said: str, write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(text)
    assert main(["matrix", str(path), "-o", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"calibatt matrix: {path}: ")
    assert said in line
    assert not (tmp_path / "out").exists()


def test_a_finished_run_is_not_made_again(write: Write, tmp_path: Path) -> None:
    runs, said = read(write('methods = ["radial", "sparge", "svg"]')), list[str]()
    for chosen in (runs[:2], runs):
        Runs(tmp_path / "out", chosen, log=said.append, command=_good(tmp_path)).make([None])
    assert (tmp_path / "made").read_text().splitlines() == [run.name for run in runs]
    told = [line.partition(",")[0] for line in said]
    assert told == ["1 of 2: radial: done", "2 of 2: sparge: done", "3 of 3: svg: done"]
    assert said[0].startswith("1 of 2: radial: done, about 0:00:0")


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("import sys; print('some\\n\\nlast words \\n', file=sys.stderr); sys.exit(3)", "exit code 3: last words"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "killed by SIGKILL"),
        ("import sys; print('a | 10%\\ra | 20%', end='', file=sys.stderr); sys.exit(5)", "exit code 5: a | 20%"),
        (
            "import sys; print('FAILED test[a] - failed: why\\n1 failed'); print('bar', file=sys.stderr); sys.exit(1)",
            "exit code 1: FAILED test[a] - failed: why",
        ),
        ("print('nothing')", "exit code 0: nothing"),
    ],
)
def test_a_run_that_ends_without_a_result_is_a_record_with_its_reason_and_the_rest_goes_on(
    script: str, reason: str, write: Write, tmp_path: Path
) -> None:
    runs, said = read(write('methods = ["radial", "sparge"]')), list[str]()
    good = _good(tmp_path)

    def command(run: Planned, out: Path) -> Sequence[str]:
        return _python(script) if run is runs[0] else good(run, out)

    made = Runs(tmp_path / "out", runs, log=said.append, command=command)
    made.make([None])
    assert [line.partition(",")[0] for line in said] == ["1 of 2: radial: failed", "2 of 2: sparge: done"]
    assert made.failures() == [f"radial: {reason}"]
    # finished ones first: a merged file has the machine of the first
    good_file, bad_file = made.results()
    assert load_run(good_file).records[0].outcome == "ok"
    dense, radial = load_run(bad_file).records
    assert (dense.method, radial.method) == ("dense", "radial")
    for record in (dense, radial):
        assert (record.suite, record.model, record.steps) == ("denoise", "shapes", 6)
        assert (record.outcome, record.reason) == ("failed", reason)


def test_a_failed_run_is_made_again_only_where_that_is_asked_for(write: Write, tmp_path: Path) -> None:
    runs = read(write('methods = ["radial"]'))
    bad = Runs(tmp_path / "out", runs, log=print, command=lambda run, out: _python("raise SystemExit(9)"))
    good = Runs(tmp_path / "out", runs, log=print, command=_good(tmp_path))
    bad.make([None])
    good.make([None])
    assert good.failures() == ["radial: exit code 9"]
    good.forget_failures()
    good.make([None])
    assert good.failures() == []


def test_the_command_ends_with_1_where_a_run_failed_and_merges_what_there_is(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = write('methods = ["radial", "sparge"]'), tmp_path / "out"
    good, (bad, _) = _good(tmp_path), read(path)

    def command(run: Planned, result: Path) -> Sequence[str]:
        return _python("raise SystemExit('no luck')") if run == bad else good(run, result)

    monkeypatch.setattr(matrix, "bench_command", command)
    assert main(["matrix", str(path), "-o", str(out)]) == 1
    said = capsys.readouterr().out.splitlines()
    assert said[-2:] == ["failed: radial: exit code 1: no luck", f"wrote {out / 'results.json'}"]
    outcomes = [record.outcome for record in load_run(out / "results.json").records]
    assert outcomes == ["ok", "failed", "failed"]
    monkeypatch.setattr(matrix, "bench_command", good)
    assert main(["matrix", str(path), "-o", str(out)]) == 1
    assert main(["matrix", str(path), "-o", str(out), "--retry"]) == 0
    assert [record.outcome for record in load_run(out / "results.json").records] == ["ok", "ok"]


def test_runs_of_another_process_are_left_to_it(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = write('methods = ["radial", "sparge"]'), tmp_path / "out"
    first, _ = read(path)
    monkeypatch.setattr(matrix, "bench_command", _good(tmp_path))
    (out / "runs").mkdir(parents=True)
    # as on another machine, which has its own devices
    with (out / "runs" / f"{first.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert main(["matrix", str(path), "-o", str(out)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("1 of 2: sparge: done, about ")
    results = out / "results.json"
    assert said[1] == f"1 of 2 runs are done, other processes make the rest: the last to end writes {results}"
    assert not results.exists()


def test_nothing_is_measured_beside_another_run_on_the_device(write: Write, tmp_path: Path) -> None:
    runs, said = read(write('methods = ["radial"]')), list[str]()
    waits = threading.Event()

    def log(line: str) -> None:
        said.append(line)
        waits.set()

    made = Runs(tmp_path / "out", runs, log=log, command=_good(tmp_path))
    with (tmp_path / "temporary" / f"calibatt-matrix-{os.getuid()}-3.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        work = threading.Thread(target=made.make, args=(["3"],))
        work.start()
        assert waits.wait(30)
        assert not (tmp_path / "made").exists()
    work.join(30)
    assert said == ["waiting for another run on GPU 3 to end", "1 of 1: radial: done"]


def test_a_file_that_was_cut_is_measured_again(write: Write, tmp_path: Path) -> None:
    runs = read(write('methods = ["radial"]'))
    made = Runs(tmp_path / "out", runs, log=print, command=_good(tmp_path))
    result = tmp_path / "out" / f"{runs[0].name}.json"
    made.make([None])
    whole = result.read_text()
    result.write_text(whole[:50])
    assert Runs(tmp_path / "out", runs, command=_good(tmp_path), log=print).results() == []
    # whole, and not yet known to be
    result.write_text(whole)
    partial_of(result).write_text("")
    again = Runs(tmp_path / "out", runs, log=print, command=_good(tmp_path))
    assert again.results() == []
    again.make([None])
    assert again.results() == [result]
    assert len((tmp_path / "made").read_text().splitlines()) == 2


def test_each_gpu_has_one_process_at_a_time_and_is_all_that_it_sees(write: Write, tmp_path: Path) -> None:
    runs = read(write('methods = ["radial", "sparge", "svg", "sta"]'))
    script = """
import os, sys, time
from pathlib import Path
mine = Path(sys.argv[1]) / os.environ["CUDA_VISIBLE_DEVICES"]
os.close(os.open(mine, os.O_CREAT | os.O_EXCL))
with (mine.parent / "seen").open("a") as file:
    file.write(mine.name + "\\\\n")
while len(set((mine.parent / "seen").read_text().split())) < 2:
    time.sleep(0.01)
mine.unlink()
sys.exit(4)
""".replace("\\\\n", "\\n")
    made = Runs(tmp_path / "out", runs, log=print, command=lambda run, out: _python(script, str(tmp_path)))
    made.make(["2", "GPU-abc"])
    seen = (tmp_path / "seen").read_text().split()
    assert len(seen) == 4
    assert set(seen) == {"2", "GPU-abc"}
    assert {line.partition(": ")[2] for line in made.failures()} == {"exit code 4"}


def test_visible_gpus_are_used_and_no_others(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    (run,) = read(write('methods = ["radial"]\noptions = "--device cpu"'))
    assert matrix.devices([run]) == [None]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    (run,) = read(write('methods = ["radial"]\noptions = "--device cuda"'))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert matrix.devices([run]) == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,MIG-7,-1")
    assert matrix.devices([run]) == ["5", "MIG-7"]


# Imports once, and then runs the command line in a process of its own for each line that it reads: its arguments. Says
# which process that is, and then with what it ended: an exit code, or minus a signal.
DRIVER = """
import json, os, sys
from calibatt.bench import matrix
from calibatt.cli import main
stand_in, made, seconds = sys.argv[1:]

def command(run, out):
    return [sys.executable, "-c", stand_in, str(out), made, seconds]

matrix.bench_command = command
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        os.dup2(2, 1)
        os._exit(main(json.loads(line)))
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class _Driver:
    """The command line, over and over, with what stands in for the benchmarks."""

    def __init__(self, folder: Path, seconds: float) -> None:
        self._said = folder / "said"
        with self._said.open("w") as said:
            self._process = subprocess.Popen(
                _python(DRIVER, STAND_IN, str(folder), str(seconds)), stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=said, text=True, env={**os.environ, "TMPDIR": str(folder / "temporary")},
            )  # fmt: skip

    def begin(self, *arguments: str) -> int:
        """Start it; the number of its process."""
        self._said.write_text("")
        assert self._process.stdin is not None
        print(json.dumps(arguments), file=self._process.stdin, flush=True)
        return self._number()

    def end(self) -> tuple[int, list[str]]:
        """Wait for its end: with what, and the lines that it said."""
        return self._number(), self._said.read_text().replace("\0", "").splitlines()

    def _number(self) -> int:
        assert self._process.stdout is not None
        return int(self._process.stdout.readline())

    def close(self) -> None:
        self._process.communicate()


@pytest.fixture
def driver(tmp_path: Path) -> Iterator[_Driver]:
    made = _Driver(tmp_path, 0.05)
    yield made
    made.close()


def _busy(folder: Path) -> int | None:
    """Who is at work."""
    path = folder / "busy"
    return int(text) if path.exists() and (text := path.read_text()) else None


@pytest.mark.slow
def test_ctrl_c_says_how_to_go_on_and_leaves_nothing_at_work(write: Write, tmp_path: Path) -> None:
    path, out = write('methods = ["radial", "sparge"]'), tmp_path / "out"
    for seconds, code in ((60, 130), (0, 0)):
        driver = _Driver(tmp_path, seconds)
        process = driver.begin("matrix", str(path), "-o", str(out))
        while code and _busy(tmp_path) is None:
            time.sleep(0.01)
        if code:
            os.kill(process, signal.SIGINT)
        ended, lines = driver.end()
        driver.close()
        assert ended == code
        if code:
            (line,) = lines
            assert line == (
                f"calibatt matrix: stopped with 0 of 2 runs done, kept in {out}: run the same command again to go on"
            )
    *told, last = lines
    assert [line.partition(",")[0] for line in told] == ["1 of 2: radial: done", "2 of 2: sparge: done"]
    assert last == f"wrote {out / 'results.json'}"
    merged = json.loads((out / "results.json").read_text())["merged"]
    assert [one["file"] for one in merged] == [f"{run.name}.json" for run in read(path)]


@pytest.mark.slow
def test_killed_at_20_random_moments_nothing_finished_is_lost_or_made_twice(
    driver: _Driver, write: Write, tmp_path: Path
) -> None:
    path, out = write(f"methods = ['radial', 'sparge']\nseeds = {list(range(60))}"), tmp_path / "out"
    names, drawn, found = sorted(run.name for run in read(path)), random.Random(17), dict[str, int]()
    arguments = ("matrix", str(path), "-o", str(out))
    for kill in range(20):
        process = driver.begin(*arguments)
        time.sleep(drawn.uniform(0, 1))
        os.kill(process, signal.SIGKILL)
        # every other time what measures is killed too; elsewhere it goes on, and the next matrix waits for it
        if kill % 2 and (busy := _busy(tmp_path)) is not None:
            # unless it has just ended
            with suppress(ProcessLookupError):
                os.kill(busy, signal.SIGKILL)
        assert driver.end()[0] == -signal.SIGKILL, "it ended before it was killed"
        # what was written again has another time
        results = Runs(out / "runs", read(path), command=matrix.bench_command, log=print).results()
        whole = {file.stem: file.stat().st_mtime_ns for file in results}
        assert found.items() <= whole.items()
        found = whole
    assert 0 < len(found) < len(names), "no run ended, or all did: nothing is shown"
    driver.begin(*arguments)
    code, lines = driver.end()
    assert (code, lines[-1]) == (0, f"wrote {out / 'results.json'}")
    assert all((out / "runs" / f"{name}.json").stat().st_mtime_ns == time for name, time in found.items())
    assert sorted(record.method for record in load_run(out / "results.json").records) == names
