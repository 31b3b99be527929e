"""Options, cells and JSON of `pytest bench`: what pytest and pytest-benchmark need to know."""

from __future__ import annotations

import contextlib
import importlib.metadata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from calibatt.bench.record import Suite

# the order in which suites run on one workload: each can use what the one before has made
_SUITES: tuple[Suite, ...] = ("kernel", "calibration", "attention", "denoise")
# pip names of what decides a figure
_VERSIONS = (
    "calibatt", "torch", "triton", "diffusers", "transformers", "numpy", "flash-attn", "flash-attn-4", "fa3-fwd",
)  # fmt: skip
_SESSION = pytest.StashKey[Any]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Say what can be chosen."""
    group = parser.getgroup("calibatt", "what to measure (lists are separated by commas)")
    add = group.addoption
    add("--models", default="shapes", help="see `calibatt models`; default: %(default)s")
    add(
        "--methods",
        default="dense,calibatt,radial,sparge,random",
        help="METHOD[/PRESET][=density], see `calibatt methods`; =density turns the method's knob to CalibAtt's "
        "density, =0.35 to that one, =30dB to that PSNR against dense videos; default: %(default)s",
    )
    add("--resolutions", default="", help="see `calibatt models`; default: each model's first")
    add("--steps", default="", help="denoising steps; default: the model's at that resolution")
    add("--kernels", default="default", help="see `calibatt kernels`; default: %(default)s")
    add("--densities", default="0.25", help="of the kernel suite, 1 for dense; default: %(default)s")
    add(
        "--blocks",
        default="",
        help="QUERIESxKEYS in tokens, and for methods also `native`, each preset's own; default: the model's",
    )
    add(
        "--dense-steps",
        type=float,
        default=None,
        help="share of the first steps that are dense in every arm, in place of each method's own steps and layers",
    )
    add(
        "--dense-layers",
        type=float,
        default=None,
        help="share of the first layers likewise; if one of both is given, the other is 0; default: each method's own",
    )
    add(
        "--inputs",
        choices=("own", "resampled"),
        default="own",
        help="of attention calls: the model's own, or those of the embedded model resampled to the model's size, which "
        "needs no weights; then there is the attention suite alone, without dense steps; default: %(default)s",
    )
    add(
        "--masks",
        default="random",
        help="of the kernel suite: random, banded, captured from the embedded model, rows (reused in place of a mask), "
        "mixed; default: %(default)s",
    )
    add(
        "--orders",
        default="",
        help="of the kernel suite: permutations to time against a copy: tile, token-major, random; default: none",
    )
    add("--device", default=None, help="cpu or cuda; default: cuda where there is one")
    add("--rounds", type=int, default=6, help="videos an arm; below 6 no interval exists; default: %(default)s")
    add("--calibration-prompts", type=int, default=4, help="prompts to calibrate on; default: %(default)s")
    add("--calibration", type=Path, default=None, help="a file of `calibatt calibrate`, in place of calibrating")
    add("--prompts", type=Path, default=None, help="file of prompts, one a line: first those to calibrate on")


def pytest_configure(config: pytest.Config) -> None:
    """Read the options; a wrong one is one line and exit code 4, before anything runs."""
    from calibatt.bench.options import cells, open_session

    try:
        config.stash[_SESSION] = open_session(config.option, _PytestConsole(config))
        for suite in _SUITES:
            cells(config.option, suite)
        if config.option.benchmark_json is not None:
            # pytest-benchmark opens the file when everything is measured: without its folder all would be lost
            Path(config.option.benchmark_json).parent.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        raise pytest.UsageError(str(error)) from None


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test a cell."""
    from calibatt.bench.options import cells

    if "cell" in metafunc.fixturenames:
        metafunc.parametrize("cell", cells(metafunc.config.option, metafunc.module.SUITE), ids=str)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All suites of one workload one after the other, so that its model is loaded and calibrated once."""
    workloads: dict[Any, int] = {}

    def place(item: pytest.Item) -> tuple[int, int]:
        cell = _cell(item)
        if cell is None:
            return (-1, 0)
        return (workloads.setdefault(cell.workload, len(workloads)), _SUITES.index(item.module.SUITE))  # type: ignore[attr-defined]

    items.sort(key=place)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Only what -k and the like have left will be measured; a lack of prompts is one line and exit code 4."""
    for item in session.items:
        cell = _cell(item)
        if cell is not None:
            try:
                session.config.stash[_SESSION].choose(item.module.SUITE, cell)  # type: ignore[attr-defined]
            except ValueError as error:
                raise pytest.UsageError(str(error)) from None


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """Add what decides a figure."""
    import torch

    # a host's name and its system's build decide no figure, and result files are published
    for name in ("node", "release"):
        machine_info.pop(name, None)
    machine_info["versions"] = _installed_versions()
    machine_info["threads"] = torch.get_num_threads()
    if torch.cuda.is_available():
        machine_info["gpu"] = torch.cuda.get_device_name()
        machine_info["cuda"] = torch.version.cuda
        machine_info["cudnn"] = torch.backends.cudnn.version()
        machine_info["driver"] = _driver()


def pytest_benchmark_update_json(config: pytest.Config, output_json: dict[str, Any]) -> None:
    """Add the cells without times: pytest-benchmark itself leaves them out."""
    output_json["untimed"] = [record.to_extra_info() for record in config.stash[_SESSION].untimed]
    output_json["command"] = " ".join(["pytest", *config.invocation_params.args])


@pytest.fixture
def report(request: pytest.FixtureRequest, benchmark: Any) -> Callable[[Any], None]:
    """Measures a cell and hands its samples to pytest-benchmark; skips or fails where there are none."""

    def hand_over(cell: Any) -> None:
        from calibatt.bench.replay import REPLAY

        suite = request.module.SUITE
        record = request.config.stash[_SESSION].record(suite, cell)
        if record.outcome == "unsupported":
            pytest.skip(record.reason)
        if record.outcome != "ok":
            pytest.fail(f"{record.outcome}: {record.reason}", pytrace=False)
        benchmark.group = f"{suite} {cell.workload}"
        benchmark.extra_info.update(record.to_extra_info())
        REPLAY.load(record.samples_s)
        benchmark.pedantic(lambda: None, rounds=len(record.samples_s))

    return hand_over


def _cell(item: pytest.Item) -> Any:
    from calibatt.bench.cells import Cell

    callspec = getattr(item, "callspec", None)
    # a suite without cells has one test that pytest skips, and no cell of ours
    cell = None if callspec is None else callspec.params.get("cell")
    return cell if isinstance(cell, Cell) else None


class _PytestConsole:
    """Output past pytest's capturing."""

    def __init__(self, config: pytest.Config) -> None:
        self._plugins = config.pluginmanager

    def line(self, text: str) -> None:
        reporter = self._plugins.getplugin("terminalreporter")
        with self.open():
            if reporter:
                reporter.ensure_newline()
                reporter.write_line(text, flush=True)

    def open(self) -> contextlib.AbstractContextManager[None]:
        capture = self._plugins.getplugin("capturemanager")
        return capture.global_and_fixture_disabled() if capture else contextlib.nullcontext()


def _installed_versions() -> dict[str, str]:
    found = {}
    for name in _VERSIONS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _driver() -> str:
    import pynvml

    pynvml.nvmlInit()
    return str(pynvml.nvmlSystemGetDriverVersion())
