"""The verdict as JUnit XML, JSON and Markdown."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calibatt.bench.record import Run
from calibatt.reports.gate import ExitCode, Judgement, Verdict, judge
from calibatt.reports.gate_files import WRITERS, as_json, as_junit, as_markdown

RUN = Run(path=Path("now.json"), machine={}, commit={"id": "abc"}, datetime="", command="", records=())


def _verdict(*codes: ExitCode, reason: str = "speedup 1.2, was 1.3") -> Verdict:
    return Verdict(
        judgements=tuple(
            Judgement(workload="denoise", arm=f"arm {i}", code=code, reason=reason) for i, code in enumerate(codes)
        ),
        notes=("forced",),
    )


def test_junit_has_a_case_an_arm_and_counts_them() -> None:
    text = as_junit(_verdict(ExitCode.PASS, ExitCode.REGRESSION, ExitCode.INCONCLUSIVE), [RUN], [RUN, RUN])
    suite = ElementTree.fromstring(text)
    assert [suite.get(name) for name in ("tests", "failures", "skipped", "errors")] == ["3", "1", "1", "0"]
    cases = suite.findall("testcase")
    assert [case.get("name") for case in cases] == ["arm 0", "arm 1", "arm 2"]
    failure = cases[1].find("failure")
    assert failure is not None
    assert failure.get("message") == "speedup 1.2, was 1.3"
    assert cases[2].find("skipped") is not None
    properties = {one.get("name"): one.get("value") for one in suite.iter("property")}
    assert properties["verdict"] == "regression"
    assert properties["baseline"] == "now.json, now.json"
    assert properties["file_commit"] == "abc"


def test_json_has_every_figure_of_every_finding(make: SimpleNamespace) -> None:
    run = Run(path=Path("x.json"), machine={}, commit={}, datetime="", command="", records=(make.arm("calibatt"),))
    written = json.loads(as_json(judge([run] * 3, [run] * 3), [run] * 3, [run] * 3))
    (arm,) = written["arms"]
    findings = {one["metric"]: one for one in arm["findings"]}
    assert {"loss", "low", "high", "p", "detectable", "said", "verdict"} <= findings["speedup"].keys()
    assert findings["psnr"]["verdict"] == "pass"
    assert {"psnr", "alignment", "density", "recall", "error"} <= findings.keys()


def test_markdown_shows_what_did_not_pass_and_folds_the_rest() -> None:
    text = as_markdown(_verdict(ExitCode.PASS, ExitCode.REGRESSION), [RUN], [RUN])
    assert text.startswith("### calibatt gate: regression\n")
    before, folded = text.split("<details>")
    assert "| regression | denoise | arm 1 |" in before
    assert "1 passed" in folded
    assert "| pass | denoise | arm 0 |" in folded


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.text(), st.sampled_from(list(ExitCode)))
def test_whatever_a_file_holds_is_text_in_all_of_them(reason: str, code: ExitCode) -> None:
    verdict = _verdict(code, reason=reason)
    written = {name: write(verdict, [RUN], [RUN]) for name, write in WRITERS.items()}
    assert len(ElementTree.fromstring(written["junit"]).findall("testcase")) == 1
    assert json.loads(written["json"])["arms"][0]["reason"] == reason
    assert "<script" not in as_markdown(_verdict(code, reason="<script>|\n|"), [RUN], [RUN])
    rows = [line for line in written["markdown"].split("\n") if line.startswith("| ")]
    assert len(rows) == 3
    for text in written.values():
        text.encode("utf-8")


@pytest.mark.parametrize("name", sorted(WRITERS))
def test_a_verdict_without_arms_that_are_compared_is_written_too(name: str) -> None:
    assert WRITERS[name](Verdict(judgements=()), [RUN], [RUN])
