"""The report's page: what is on it, what it needs, and what it leaves alone."""

from __future__ import annotations

import base64
import contextlib
import gzip
import hashlib
import html
import itertools
import json
import os
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from calibatt.bench.record import UnusableFile, load_run
from calibatt.cli import _parser
from calibatt.reports import page as page_module
from calibatt.reports.figures.catalogue import Picture
from calibatt.reports.figures.style import SHEETS
from calibatt.reports.page import write_report
from calibatt.reports.rows import GLYPHS, labels, look

# files of every report
BESIDE = ("data.csv", "records.json", "tables.md", "tables.tex")
# what makes a browser fetch something by itself
LOADS = re.compile(
    r"""(?:src|srcset|data|action)\s*=\s*["']?(?!data:(?:image/webp|video/webm);base64,)[^"'\s>]+|url\(|@import|<link"""
)


class Outline(HTMLParser):
    """What a page is made of: links and what is around them, anchors, landmarks, headings, rows, what is hidden."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.links: list[str] = []
        self.around: list[list[str]] = []
        self.names: list[str] = []
        self.headings: list[int] = []
        self.landmarks: list[str] = []
        self.rows: dict[str, int] = Counter()
        self.hidden: set[str] = set()
        self.open: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        if tag == "a" and found.get("href"):
            self.links.append(found["href"] or "")
            self.around.append(list(self.open))
        if found.get("id"):
            self.names.append(found["id"] or "")
        if re.fullmatch(r"h\d", tag):
            self.headings.append(int(tag[1]))
        if self.open[-1:] == ["body"] and tag not in ("a", "script"):
            self.landmarks.append(tag)
        if tag == "th" and found.get("scope") == "row":
            self.rows["table"] += 1
        if tag == "section" and "hidden" in found:
            self.hidden.add(found["aria-labelledby"] or "")
        if tag not in ("meta", "img", "input", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def _text(page: Path) -> str:
    """What a reader sees."""
    without_style = re.sub(r"<(style|script)\b.*?</\1>", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    return html.unescape(re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", without_style)))


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves the figures out, which take most of the time."""
    monkeypatch.setattr("calibatt.reports.page.pictures", lambda *_, **how: [])
    monkeypatch.setattr("calibatt.reports.page.clips", lambda *_: [])


@pytest.mark.usefixtures("undrawn")
def test_the_page_shows_every_arm_and_every_reason(full_run: Path, tmp_path: Path) -> None:
    shown = _text(write_report([full_run], tmp_path / "report"))
    records = load_run(full_run).records
    for suite in ("denoise", "attention", "calibration"):
        for label in labels([record for record in records if record.suite == suite]):
            assert label in shown
    for record in records:
        assert record.reason is None or record.reason in shown
    for fact in ("Test data CPU", "0123456789ab", "not committed", "2.9.0", "threads", "throttled", "float32", "1536"):
        assert fact in shown


def test_the_page_needs_nothing_but_itself(full_run: Path, tmp_path: Path) -> None:
    page = write_report([full_run], tmp_path / "report").read_text(encoding="utf-8")
    assert page.count("data:image/webp;base64,") >= 9
    assert page.count("data:video/webm;base64,") == 3
    # what a script might ask for, the page's own policy forbids
    assert "default-src 'none'; img-src data:; media-src data:;" in page
    without_script = re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL)
    stripped = re.sub(r'base64,[^"]*', "base64,", without_script)
    assert LOADS.search(stripped) is None
    assert "http://" not in stripped
    assert "https://" not in stripped


def test_only_our_own_script_runs(full_run: Path, undrawn: None, tmp_path: Path) -> None:
    page = write_report([full_run], tmp_path / "report").read_text(encoding="utf-8")
    (script,) = re.findall(r"<script>(.*?)</script>", page, flags=re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in page
    # an HTML comment would change how a browser reads a script
    assert "<!--" not in script


def test_the_table_library_is_the_release_that_its_readme_names() -> None:
    vendor = Path(page_module.__file__).parent / "vendor"
    content = (vendor / "datatables.min.js").read_bytes()
    readme = (vendor / "README.md").read_text(encoding="utf-8")
    assert hashlib.sha256(content).hexdigest() in readme
    (release,) = re.findall(rb"^/\*! DataTables ([\d.]+)", content)
    assert f"DataTables](https://datatables.net) {release.decode()}, MIT" in readme
    assert "Permission is hereby granted" in (vendor / "datatables.license.txt").read_text(encoding="utf-8")


@pytest.fixture
def outline(full_run: Path, undrawn: None, tmp_path: Path) -> Outline:
    return Outline(write_report([full_run], tmp_path / "report"))


def test_every_link_of_the_page_leads_somewhere(outline: Outline) -> None:
    assert {link for link in outline.links if link.startswith("#")} <= {f"#{name}" for name in outline.names}
    assert len(outline.names) == len(set(outline.names))
    for link in outline.links:
        assert link.startswith("#") or (outline.path.parent / link).is_file()


def test_the_contents_name_every_workload_and_come_before_it(outline: Outline) -> None:
    listed = [link for tags, link in zip(outline.around, outline.links, strict=True) if "nav" in tags]
    assert [f"#workload-1.{i}" for i in (1, 2, 3)] == [link for link in listed if link.startswith("#workload")]
    assert {"#headlines", "#all", "#data", "#run-1", "#words"} <= set(listed)
    # whoever reads by keyboard can pass them by
    assert outline.links[0] == "#top"


def test_all_content_is_in_landmarks_and_no_heading_level_is_skipped(outline: Outline) -> None:
    assert outline.landmarks == ["header", "nav", "main"]
    assert outline.headings[0] == 1
    assert outline.headings.count(1) == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(outline.headings))


def test_without_scripts_every_arm_is_in_a_plain_table_and_what_needs_one_is_hidden(
    outline: Outline, full_run: Path
) -> None:
    records = load_run(full_run).records
    assert outline.rows["table"] == len(records)
    assert outline.hidden == {"all"}
    page = outline.path.read_text(encoding="utf-8")
    assert page.count('<details class="arms" open>') == 3


def test_the_table_over_all_arms_has_every_column_that_a_workload_has(outline: Outline) -> None:
    page = outline.path.read_text(encoding="utf-8")
    whole, *tables = re.findall(r"<thead><tr><th scope=\"col\" data-column=\"arm\".*?</thead>", page, flags=re.DOTALL)
    columns = {column for table in tables for column in re.findall(r'data-column="(\d+)"', table)}
    assert columns == set(re.findall(r'data-column="(\d+)"', whole))
    assert re.findall(r'data-place="\d">(\w+)', whole)[:5] == ["file", "suite", "model", "resolution", "steps"]
    places = [json.loads(html.unescape(place)) for place in re.findall(r"data-place='(.*?)'", page)]
    assert [place[:5] for place in places] == [
        ["run.json", suite, "shapes", "quick", "8"] for suite in ("denoise", "attention", "calibration")
    ]


def test_the_page_holds_the_files_of_its_data(outline: Outline) -> None:
    page = outline.path.read_text(encoding="utf-8")
    for name in ("data.csv", "records.json"):
        (held,) = re.findall(rf'download="{re.escape(name)}" data-held="([^"]+)"', page)
        (packed,) = re.findall(rf'<script type="text/plain" id="{held}">([^<]+)</script>', page)
        assert gzip.decompress(base64.b64decode(packed)) == (outline.path.parent / name).read_bytes()


def test_every_picture_on_the_page_is_a_file_beside_it(full_run: Path, tmp_path: Path) -> None:
    page = write_report([full_run], tmp_path / "report")
    named = set(re.findall(r'data-file="([^"]+)"', page.read_text(encoding="utf-8")))
    assert {path.name for path in page.parent.iterdir()} == named | {"index.html"}
    assert named > {"tables.md", "tables.tex", "data.csv", "records.json"}
    for kind in ("speedup", "fidelity", "phases", "density", "masks", "frames"):
        for suffix in ("png", "svg", "pdf"):
            assert any(name.endswith(f"-{kind}.{suffix}") for name in named)


def test_files_of_figures_are_as_wide_as_a_column_where_that_is_asked_for(small_run: Path, tmp_path: Path) -> None:
    pages = [write_report([small_run], tmp_path / name, sheet=sheet).parent for name, sheet in SHEETS.items()]
    names = [sorted(file.name for file in page.iterdir()) for page in pages]
    assert names[0] == names[1]
    for page, sheet in zip(pages, SHEETS.values(), strict=True):
        widths = [
            float(re.findall(r'<svg .*?width="([\d.]+)pt"', path.read_text(encoding="utf-8"), flags=re.DOTALL)[0])
            for path in page.glob("*.svg")
        ]
        assert widths
        # points, 72 an inch
        assert all(width == pytest.approx(72 * sheet.width, abs=1) for width in widths)


def test_each_figure_links_its_files_and_nothing_else(full_run: Path, tmp_path: Path) -> None:
    page = write_report([full_run], tmp_path / "report")
    text = page.read_text(encoding="utf-8")
    figures = re.findall(r"<figure\b.*?</figure>", text, flags=re.DOTALL)
    linked = [re.findall(r'<a href="([^"]+)"', figure) for figure in figures]
    everything = list(itertools.chain(*linked))
    assert len(everything) == len(set(everything))
    starts = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF", "webm": b"\x1a\x45\xdf\xa3"}
    for names in linked:
        assert [name.rpartition(".")[2] for name in names] in (["png", "svg", "pdf"], ["webm"])
        for name in names:
            assert (page.parent / name).read_bytes().startswith(starts[name.rpartition(".")[2]])


def test_videos_play_only_when_asked_or_seen_and_say_what_they_show(full_run: Path, tmp_path: Path) -> None:
    page = write_report([full_run], tmp_path / "report").read_text(encoding="utf-8")
    videos = re.findall(r"<video [^>]*>", page)
    assert len(videos) == 3
    for video in videos:
        assert re.search(
            r" controls muted loop playsinline aria-label=\"Dense, and [^\"]+: [\d.]+×, [\d.]+ dB\">", video
        )
        assert "autoplay" not in video
    # the fastest first
    assert [re.findall(r"and ([\w/-]+):", video)[0] for video in videos] == ["CalibAtt", "Radial", "CalibAtt/no-reuse"]
    assert page.index("<video") < page.index("-frames.png")


def test_the_command_line_has_the_default_of_figures() -> None:
    assert _parser().parse_args(["report", "run.json", "-o", "report"]).figures == page_module.FIGURES


def test_once_there_are_enough_figures_further_workloads_have_none_and_say_so(full_run: Path, tmp_path: Path) -> None:
    page = write_report([full_run], tmp_path / "report", figures=1)
    assert list(page.parent.glob("1.1-*-frames.png"))
    assert not list(page.parent.glob("1.2-*.png"))
    assert _text(page).count("No figures: there are enough above.") == 2


def test_a_page_of_two_thousand_arms_is_small(
    write_run: Callable[..., Path], undrawn: None, tmp_path: Path, make: SimpleNamespace
) -> None:
    page = write_report([write_run(make.many(2000), "many.json")], tmp_path / "report")
    # 24 figures of 60 kB take 2 MB in base64
    assert page.stat().st_size < 3.2e6
    assert page.read_text(encoding="utf-8").count('<th scope="row">') == 2000


@pytest.mark.slow
def test_a_report_of_two_thousand_arms_takes_a_minute_and_five_megabytes(
    write_run: Callable[..., Path], tmp_path: Path, make: SimpleNamespace
) -> None:
    run = write_run(make.many(2000), "many.json")
    # of this process, whatever else the machine does
    start = time.process_time()
    page = write_report([run], tmp_path / "report")
    assert time.process_time() - start < 60
    assert page.stat().st_size < 5e6


def test_the_same_run_makes_the_same_files(small_run: Path, tmp_path: Path) -> None:
    one, other = (write_report([small_run], tmp_path / name).parent for name in ("one", "other"))
    assert [path.read_bytes() for path in sorted(one.iterdir())] == [
        path.read_bytes() for path in sorted(other.iterdir())
    ]


@pytest.mark.usefixtures("undrawn")
def test_the_tables_quote_the_figures_of_every_arm_that_has_a_speedup_beside_it(
    small_run: Path, tmp_path: Path
) -> None:
    brief = (write_report([small_run], tmp_path / "report").parent / "tables.md").read_text(encoding="utf-8")
    (table,) = [part for part in brief.split("\n\n") if part.startswith("|")]
    head, line, dense, sparse = ([cell.strip() for cell in row.split("|")[1:-1]] for row in table.splitlines())
    assert head == [
        "arm", "speedup (95 %)", "time", "PSNR dB", "SSIM", "alignment", "sparsity", "recall", "method error",
        "estimate",
    ]  # fmt: skip
    assert set(line) == {"---"}
    assert dense[:2] == ["Dense", "1 (baseline)"]
    record = load_run(small_run).records[1]
    assert record.speedup is not None
    assert sparse[0] == "CalibAtt"
    assert sparse[1].startswith(f"{record.speedup.median:.2f}× ({record.speedup.low:.2f}–")
    assert sparse[6] == "58.0%"


def test_many_arms_have_their_masks_in_several_pictures_and_dense_frames_in_each(
    write_run: Callable[..., Path], make: SimpleNamespace, tmp_path: Path
) -> None:
    make.artifact(tmp_path / "a.npz", 0.4, 0)
    make.artifact(tmp_path / "dense.npz", 1, 0)
    arms = [
        make.arm("sparge", 1.1, mode="equal_density", target_density=0.1 + i / 100, artifact="a.npz") for i in range(9)
    ]
    run = write_run([make.dense_arm(artifact="dense.npz"), *arms], "many.json")
    page = write_report([run], tmp_path / "report")
    kinds = [path.stem.rpartition("-")[2] for path in page.parent.glob("*.png")]
    assert (kinds.count("speedup"), kinds.count("density"), kinds.count("masks")) == (1, 2, 2)
    # two videos, of each batch of arms
    assert kinds.count("frames") == 4


def test_several_runs_share_a_page_and_no_picture(
    write_run: Callable[..., Path], make: SimpleNamespace, tmp_path: Path
) -> None:
    first = write_run([make.dense_arm(), make.arm("calibatt", 1.3)], "first.json")
    second = write_run([make.dense_arm(), make.arm("radial", 1.1)], "second.json")
    page = write_report([first, second], tmp_path / "report")
    assert {"first.json", "second.json"} <= set(_text(page).split())
    pictures = re.findall(r'data-file="([^"]+)"', page.read_text(encoding="utf-8"))
    assert len(pictures) == len(set(pictures)) > 2


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(
    ("records", "said"),
    [
        ({"speed": 1.3}, "CalibAtt is faster than dense: 1.3"),
        ({"speed": 1.0}, "CalibAtt is not measurably faster than dense: 1.0"),
        ({"speed": 0.8}, "CalibAtt is slower than dense: 0.8"),
        ({"speed": 1.3, "rounds": 3}, "in 3 rounds, too few for an interval or a claim"),
    ],
)
def test_a_finding_claims_no_more_than_the_interval(
    records: dict[str, float], said: str, write_run: Callable[..., Path], make: SimpleNamespace, tmp_path: Path
) -> None:
    path = write_run([make.dense_arm(), make.arm("calibatt", **records)])
    shown = _text(write_report([path], tmp_path / "report"))
    assert said in shown
    assert "The random control was not asked for" in shown


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(
    ("psnr", "density", "speed", "beats"),
    [(35, 0.42, 1.2, True), (35, 0.9, 1.6, True), (35, 0.9, 1.1, False), (20, 0.42, 1.6, False)],
)
def test_a_random_mask_that_beats_a_method_is_said_to(
    psnr: float, density: float, speed: float, beats: bool,
    write_run: Callable[..., Path], make: SimpleNamespace, tmp_path: Path,
) -> None:  # fmt: skip
    control = make.arm("random", speed, psnr=psnr, density=density)
    path = write_run([make.dense_arm(), make.arm("calibatt", 1.3, psnr=30, seed=1), control])
    shown = _text(write_report([path], tmp_path / "report"))
    assert ("Random mask beats CalibAtt" in shown) is beats
    assert ("beats no method" in shown) is not beats


def test_an_unusable_file_writes_nothing(small_run: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.json"
    bad.write_text("{}")
    before = set(tmp_path.iterdir())
    with pytest.raises(UnusableFile, match=re.escape(str(bad))):
        write_report([small_run, bad], tmp_path / "report")
    assert set(tmp_path.iterdir()) == before


@pytest.mark.usefixtures("undrawn")
def test_unreadable_pictures_are_named_and_leave_the_old_report(full_run: Path, tmp_path: Path) -> None:
    page = write_report([full_run], tmp_path / "report")
    old = page.read_bytes()
    broken = tmp_path / "run.artifacts/1.npz"
    broken.write_bytes(b"no zip file")
    with pytest.raises(UnusableFile, match=re.escape(str(broken))):
        write_report([full_run], tmp_path / "report")
    assert page.read_bytes() == old
    # nothing of the attempt is left behind
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_missing_artifact_is_no_error(full_run: Path, tmp_path: Path) -> None:
    for path in (tmp_path / "run.artifacts").iterdir():
        path.unlink()
    page = write_report([full_run], tmp_path / "report")
    assert not list(page.parent.glob("*-masks.png"))
    assert list(page.parent.glob("*-speedup.png"))


def test_an_earlier_report_is_replaced_whole(
    full_run: Path, write_run: Callable[..., Path], make: SimpleNamespace, tmp_path: Path
) -> None:
    write_report([full_run], tmp_path / "report")
    page = write_report([write_run([make.dense_arm()], "other.json")], tmp_path / "report")
    assert "other.json" in _text(page)
    assert not list(page.parent.glob("*-masks.png"))


@pytest.mark.parametrize("name", ["notes.txt", "photo.png", "index.html"])
def test_a_folder_with_files_of_others_is_refused_and_kept(name: str, small_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "report"
    out.mkdir()
    (out / name).write_text("mine")
    with pytest.raises(ValueError, match=name):
        write_report([small_run], out)
    assert [(path.name, path.read_text()) for path in out.iterdir()] == [(name, "mine")]


def test_a_picture_of_others_in_a_report_is_kept(small_run: Path, tmp_path: Path) -> None:
    page = write_report([small_run], tmp_path / "report")
    photo = page.parent / "photo.png"
    photo.write_text("mine")
    with pytest.raises(ValueError, match=r"photo\.png"):
        write_report([small_run], page.parent)
    assert photo.read_text() == "mine"


@pytest.mark.parametrize("done", range(10))
def test_dying_while_a_report_is_replaced_leaves_a_whole_page_that_the_next_run_takes_over(
    done: int, small_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "report"

    def write(*names: str) -> bytes:
        drawn = [
            Picture(files={name: b""}, title="Test data", caption="Not drawn.", shown=b"", size=(1, 1))
            for name in names
        ]
        monkeypatch.setattr(
            "calibatt.reports.page.pictures", lambda run, rows, stem, *modules, **how: [] if modules else drawn
        )
        return write_report([small_run], out).read_bytes()

    new = write("b.png", "c.png", "d.png")
    old = write("a.png", "b.png")
    steps = iter(range(10))

    def dying(work: Callable[..., None]) -> Callable[..., None]:
        def step(*arguments: Any) -> None:
            if next(steps) == done:
                raise KeyboardInterrupt
            work(*arguments)

        return step

    # a picture less, then the page, four files and three pictures
    remove = Path.unlink
    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", dying(os.replace))
        patched.setattr(Path, "unlink", lambda path: dying(remove)(path) if path.parent == out else remove(path))
        with pytest.raises(KeyboardInterrupt) if done < 9 else contextlib.nullcontext():
            write("b.png", "c.png", "d.png")
    page = (out / "index.html").read_bytes()
    assert page == (old if done < 2 else new)
    named = set(re.findall(r'data-file="([^"]+)"', page.decode())) | {"index.html"}
    left = {path.name for path in out.iterdir()}
    assert left <= named
    assert (left == named) is (done == 0 or done > 4)
    # it is no folder of strange files, but a report
    assert write("b.png", "c.png", "d.png") == new
    assert {path.name for path in out.iterdir()} == {"b.png", "c.png", "d.png", "index.html", *BESIDE}
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.usefixtures("undrawn")
def test_a_page_shows_each_method_by_its_marker(small_run: Path, tmp_path: Path) -> None:
    page = write_report([small_run], tmp_path / "report").read_text(encoding="utf-8")
    for record in load_run(small_run).records:
        colour, marker = look(record)
        assert f'style="color: {colour}" aria-hidden="true">{GLYPHS[marker]}</span>' in page


@pytest.mark.usefixtures("undrawn")
def test_names_of_others_are_text_wherever_they_stand(
    write_run: Callable[..., Path], make: SimpleNamespace, tmp_path: Path
) -> None:
    evil = "</script><script>alert('1')</script>|x|\n# y\x1b[2J \\input{z}"
    arms = [
        make.dense_arm(resolution=evil), make.arm("sparge", preset=evil, resolution=evil),
        make.broken("sta", reason=f"{evil} <b>", resolution=evil),
    ]  # fmt: skip
    page = write_report([write_run(arms)], tmp_path / "report")
    text = page.read_text(encoding="utf-8")
    # ours: the data that the page holds, and what it does
    assert len(re.findall(r"<script[ >]", text)) == text.count("</script>") == 3
    assert "alert('1')" not in text
    (place,) = re.findall(r"data-place='(.*?)'", text)
    assert json.loads(place)[3] == evil
    tex = (page.parent / "tables.tex").read_text(encoding="utf-8")
    read = [line for line in tex.splitlines() if not line.startswith("%")]
    assert "\\input" not in "\n".join(read).replace("\\textbackslash{}input", "")
    assert "\x1b" not in tex
    brief = (page.parent / "tables.md").read_text(encoding="utf-8")
    assert "<" not in brief
    assert "\x1b" not in brief
    lines = brief.splitlines()
    assert [line for line in lines if line.startswith("#")] == ["# run.json"]
    (row,) = [line for line in lines if line.startswith("| SpargeAttn")]
    heading = next(line for line in lines if line.startswith("| arm"))
    assert len(re.findall(r"(?<!\\)\|", row)) == len(re.findall(r"(?<!\\)\|", heading))


def test_a_long_name_of_a_workload_fits_the_name_of_a_file(
    write_run: Callable[..., Path], make: SimpleNamespace, tmp_path: Path
) -> None:
    run = write_run([make.dense_arm(model="m" * 200), make.arm("sparge", model="m" * 200, resolution="r" * 200)])
    assert list(write_report([run], tmp_path / "report").parent.glob("*-speedup.png"))


def test_importing_the_report_loads_no_torch() -> None:
    code = "import sys, calibatt.reports.page, calibatt.reports.gate; print('torch' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/")
    assert shown.stdout.strip() == "False"


def test_making_a_report_needs_no_torch(small_run: Path, tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['torch'] = None; from pathlib import Path\n"
        "from calibatt.reports.page import write_report; write_report([Path(sys.argv[1])], Path(sys.argv[2]))"
    )
    subprocess.run([sys.executable, "-c", code, str(small_run), str(tmp_path / "report")], check=True, cwd="/")
    assert (tmp_path / "report/index.html").is_file()
