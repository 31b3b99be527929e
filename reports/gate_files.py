"""A verdict as a file: JUnit XML for continuous integration, JSON for programs, Markdown for a pull request."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import Any
from xml.etree import ElementTree

from calibatt.bench.record import Run, plain
from calibatt.reports.gate import ExitCode, Judgement, Verdict
from calibatt.reports.tables import markdown, markdown_table

# of JUnit's, of which there is none for what is not known
_ELEMENTS: Mapping[ExitCode, str] = MappingProxyType({ExitCode.REGRESSION: "failure", ExitCode.INCONCLUSIVE: "skipped"})


def check_outputs(outputs: Sequence[Path], inputs: Sequence[Path]) -> None:
    """Refuse, before anything is judged, files that have no folder, are none, or would take the place of a run.

    Raises:
        ValueError: one line that names the file and says what to do.
    """
    taken = {path.resolve() for path in inputs}
    for path in outputs:
        if path.resolve() in taken:
            raise ValueError(f"{path}: is another file of this command; name another one")
        taken.add(path.resolve())
        if path.exists() and not path.is_file():
            raise ValueError(f"{path}: is not a regular file and will not be replaced; name a file")
        if not path.parent.is_dir():
            raise ValueError(f"{path}: there is no folder {path.parent}; make it, or name another file")


def write_whole(path: Path, text: str) -> None:
    """Write a file, whole or not at all.

    Raises:
        OSError: it cannot be written.
    """
    aside = path.with_name(f".{path.name}.partial")
    try:
        aside.write_text(text, encoding="utf-8")
        os.replace(aside, path)
    except OSError:
        with suppress(OSError):
            aside.unlink()
        raise


def as_junit(verdict: Verdict, current: Sequence[Run], baseline: Sequence[Run]) -> str:
    """JUnit XML: a test case an arm; a regression is a failure, what is inconclusive is skipped, with the reason."""
    judgements = verdict.judgements
    counts = {name: sum(one.code == code for one in judgements) for code, name in _ELEMENTS.items()}
    suite = ElementTree.Element(
        "testsuite", name="calibatt gate", tests=str(len(judgements)), failures=str(counts["failure"]),
        skipped=str(counts["skipped"]), errors="0",
    )  # fmt: skip
    properties = ElementTree.SubElement(suite, "properties")
    for name, value in (("verdict", _word(verdict.exit_code)), *_origin(current, baseline)):
        ElementTree.SubElement(properties, "property", name=name, value=plain(value))
    for one in judgements:
        case = ElementTree.SubElement(suite, "testcase", classname=plain(one.workload), name=plain(one.arm))
        if one.code in _ELEMENTS:
            ElementTree.SubElement(case, _ELEMENTS[one.code], message=plain(one.reason))
        else:
            ElementTree.SubElement(case, "system-out").text = plain(one.reason)
    ElementTree.SubElement(suite, "system-out").text = "\n".join(map(plain, verdict.notes))
    ElementTree.indent(suite)
    return ElementTree.tostring(suite, encoding="unicode", xml_declaration=True) + "\n"


def as_json(verdict: Verdict, current: Sequence[Run], baseline: Sequence[Run]) -> str:
    """JSON: the verdict, the exit code, the arms with what was found of each; losses are shares of the speed."""
    content = {
        "verdict": _word(verdict.exit_code), "exit_code": int(verdict.exit_code), **dict(_origin(current, baseline)),
        "notes": verdict.notes, "arms": [_arm(one) for one in verdict.judgements],
    }  # fmt: skip
    return json.dumps(content, indent=2, allow_nan=False) + "\n"


def as_markdown(verdict: Verdict, current: Sequence[Run], baseline: Sequence[Run]) -> str:
    """Markdown: the verdict, a table of what did not pass, and the rest folded away."""
    doubtful = [one for one in verdict.judgements if one.code != ExitCode.PASS]
    passed = [one for one in verdict.judgements if one.code == ExitCode.PASS]
    parts = [f"### calibatt gate: {_word(verdict.exit_code)}", ""]
    parts += [f"- {markdown(f'{name}: {value}')}" for name, value in _origin(current, baseline)]
    parts += [f"- {markdown(note)}" for note in verdict.notes] + [""]
    if doubtful:
        parts += [*_table(doubtful), ""]
    if passed:
        parts += [f"<details><summary>{len(passed)} passed</summary>", "", *_table(passed), "", "</details>", ""]
    return "\n".join(parts)


# by what stands behind `--` on the command line
WRITERS: Mapping[str, Callable[[Verdict, Sequence[Run], Sequence[Run]], str]] = MappingProxyType(
    {"junit": as_junit, "json": as_json, "markdown": as_markdown}
)


def _word(code: ExitCode) -> str:
    return code.name.lower()


def _origin(current: Sequence[Run], baseline: Sequence[Run]) -> list[tuple[str, str]]:
    """Which files were compared, and of which commits."""
    found = []
    for name, runs in (("file", current), ("baseline", baseline)):
        commits = dict.fromkeys(str(run.commit["id"]) for run in runs if run.commit.get("id"))
        found += [(name, ", ".join(str(run.path) for run in runs))]
        found += [(f"{name}_commit", ", ".join(commits))] if commits else []
    return found


def _arm(one: Judgement) -> dict[str, Any]:
    findings = [
        {name: value for name, value in asdict(finding).items() if value is not None and name != "code"}
        | {"verdict": _word(finding.code)}
        for finding in one.findings
    ]
    return {
        "workload": one.workload, "arm": one.arm, "verdict": _word(one.code), "reason": one.reason,
        "findings": findings,
    }  # fmt: skip


def _table(judgements: Sequence[Judgement]) -> list[str]:
    rows = [(_word(one.code), one.workload, one.arm, one.reason) for one in judgements]
    return markdown_table([("verdict", "workload", "arm", "what was found"), *rows])
