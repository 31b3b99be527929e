"""Options, cells and JSON of `pytest bench`: what pytest and pytest-benchmark need to know."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

_OPTIONS = pytest.StashKey[Any]()
_SESSION = pytest.StashKey[Any]()
_JOURNAL = pytest.StashKey[Any]()
_COMMIT = pytest.StashKey[Any]()
# runs to compare with, and then what came of it
_BASELINE = pytest.StashKey[Any]()
_VERDICT = pytest.StashKey[Any]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Say what can be chosen."""
    from calibatt.bench.options import add_options

    add_options(parser.getgroup("calibatt", "what to measure (lists are separated by commas)").addoption)


def pytest_configure(config: pytest.Config) -> None:
    """Read the options; a wrong one is one line and exit code 4, before anything runs."""
    from calibatt.bench import fingerprint
    from calibatt.bench.journal import Journal
    from calibatt.bench.options import (
        Options,
        artifacts_folder,
        check_gate,
        check_output,
        deciding,
        partial_of,
        refuse_pytest_options,
    )
    from calibatt.bench.record import load_run
    from calibatt.bench.session import BenchSession, Settings
    from calibatt.bench.suites.catalogue import SUITES

    given = config.option
    try:
        refuse_pytest_options(given)
        options = Options.read(given)
        for suite in SUITES.values():
            suite.cells(options)
        out, journal = _path(given.benchmark_json), None
        check_output(out)
        if options.gate is not None:
            check_gate(options.gate, out)
            config.stash[_BASELINE] = [load_run(path) for path in options.gate]
        if out is not None:
            captured = [] if options.captures is None else sorted(options.captures.iterdir())
            files = [options.calibration, given.prompts, *captured]
            journal = Journal(partial_of(out), fingerprint.run(deciding(config.invocation_params.args), files))
    except (ValueError, OSError) as error:
        raise pytest.UsageError(str(error)) from None
    settings = Settings(
        rounds=options.rounds, calibration_prompts=options.calibration_prompts, calibration=options.calibration,
        prompts=options.prompts, artifacts=artifacts_folder(out), max_time=options.max_time,
    )  # fmt: skip
    config.stash[_OPTIONS] = options
    # of the code that is measured now: it may be changed meanwhile
    config.stash[_COMMIT] = fingerprint.commit()
    config.stash[_JOURNAL] = journal
    config.stash[_SESSION] = BenchSession(settings, _PytestConsole(config), journal=journal)


def _path(out: Any) -> Path | None:
    """Where the JSON file goes: newer releases of pytest-benchmark give its name, older ones the file, opened."""
    return None if out is None else Path(out.name if hasattr(out, "write") else out)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test a cell."""
    from calibatt.bench.suites.catalogue import SUITES

    if {"suite", "cell"} <= set(metafunc.fixturenames):
        options = metafunc.config.stash[_OPTIONS]
        cells = [(name, cell) for name, suite in SUITES.items() for cell in suite.cells(options)]
        metafunc.parametrize(("suite", "cell"), cells, ids=[f"{name}-{cell}" for name, cell in cells])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All suites of one workload one after the other, so that its model is loaded and calibrated once."""
    # beside tests that are none of ours, which stand under None
    workloads: dict[Any, int] = {None: -1}

    def place(item: pytest.Item) -> int:
        cell = _cell(item)
        return workloads.setdefault(cell and cell[1].workload, len(workloads))

    # sorting keeps the order of suites within a workload
    items.sort(key=place)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Only what -k and the like have left will be measured; what that lacks is one line and exit code 4."""
    bench = session.config.stash[_SESSION]
    try:
        for item in session.items:
            cell = _cell(item)
            if cell is not None:
                bench.choose(*cell)
        bench.check()
    except ValueError as error:
        raise pytest.UsageError(str(error)) from None


def pytest_runtestloop(session: pytest.Session) -> None:
    """Say what is not measured again, or that nothing is kept."""
    if session.items and not session.config.option.collectonly:
        session.config.stash[_SESSION].announce()


def pytest_sessionfinish(session: pytest.Session) -> None:
    """pytest-benchmark has written its file by now: what the journal kept is in there."""
    journal, bench = session.config.stash[_JOURNAL], session.config.stash[_SESSION]
    if journal is not None and bench.finished and session.items and not session.config.option.collectonly:
        journal.remove()
    measured = session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED)
    if measured and _BASELINE in session.config.stash and not session.config.option.collectonly:
        _gate(session)


def _gate(session: pytest.Session) -> None:
    """Compare the file that was written, and let the exit code tell: 1 for a regression, 3 for inconclusive."""
    from calibatt.bench.record import UnusableFile, load_run
    from calibatt.reports.gate import judge

    config, out = session.config, _path(session.config.option.benchmark_json)
    assert out is not None
    if not any(record.outcome == "ok" for record in config.stash[_SESSION].records):
        # then pytest-benchmark has written nothing, and what lies there is of another run
        config.stash[_VERDICT], session.exitstatus = ("no arm has times",), pytest.ExitCode.USAGE_ERROR
        return
    try:
        verdict = judge([load_run(out)], config.stash[_BASELINE])
    except UnusableFile as error:
        config.stash[_VERDICT], session.exitstatus = (str(error),), pytest.ExitCode.USAGE_ERROR
        return
    config.stash[_VERDICT] = verdict.lines
    # what failed has failed, whatever it was before
    session.exitstatus = session.exitstatus or int(verdict.exit_code)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Show the main figures, how to see the others, and what the gate said."""
    from calibatt.reports.tables import for_terminals

    if not config.option.collectonly and (records := config.stash[_SESSION].records):
        out = _path(config.option.benchmark_json)
        terminalreporter.section("results")
        for line in for_terminals(records):
            terminalreporter.write_line(line)
        if out is not None:
            terminalreporter.write_line(f"more in a report: calibatt report {out} -o {out.with_suffix('.report')}")
    if _VERDICT in config.stash:
        terminalreporter.section("gate")
        for line in config.stash[_VERDICT]:
            terminalreporter.write_line(line)


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """Add what decides a figure."""
    from calibatt.bench import fingerprint

    # a host's name and its system's build decide no figure, and result files are published
    for name in ("node", "release"):
        machine_info.pop(name, None)
    machine_info.update(fingerprint.machine())


def pytest_benchmark_update_commit_info(config: pytest.Config, commit_info: dict[str, Any]) -> None:
    """Name the commit of calibatt: pytest-benchmark names that of the folder where it was called, and the folder."""
    commit_info.clear()
    commit_info.update(config.stash[_COMMIT])


def pytest_benchmark_update_json(config: pytest.Config, output_json: dict[str, Any]) -> None:
    """Add the cells without times: pytest-benchmark itself leaves them out."""
    from calibatt.bench.launch import command_line

    output_json["untimed"] = [record.to_extra_info() for record in config.stash[_SESSION].untimed]
    output_json["command"] = command_line(config.invocation_params.args)


@pytest.fixture
def report(request: pytest.FixtureRequest, benchmark: Any) -> Callable[[Any, Any], None]:
    """Measures a cell and hands its samples to pytest-benchmark; skips or fails where there are none."""

    def hand_over(suite: Any, cell: Any) -> None:
        from calibatt.bench.replay import REPLAY

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


def _cell(item: pytest.Item) -> tuple[Any, Any] | None:
    """Suite and cell of a test; None of a test that is none of ours."""
    params = item.callspec.params if hasattr(item, "callspec") else {}
    return (params["suite"], params["cell"]) if {"suite", "cell"} <= params.keys() else None


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
