"""Figures draw what there is, and nothing where there is nothing."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from matplotlib.text import Text

from calibatt.bench.record import Record, Run, load_run
from calibatt.reports.facts import imprint, samples, workloads
from calibatt.reports.figures import catalogue, density, fidelity, frames, heatmap, ideal, masks, phases, speedup
from calibatt.reports.figures.style import SHEETS, drawn_on, new_figure, sign
from calibatt.reports.rows import Row, illustrated, look, rows, shared_words, short

RESULTS = Path(__file__).resolve().parents[2] / "bench" / "results"

BARE: dict[str, Any] = {"suite": "denoise", "model": "shapes", "kernel": "flex", "outcome": "ok"}


def _rows(*records: Record, folder: Path = Path("nowhere")) -> tuple[Row, ...]:
    run = Run(path=folder / "run.json", machine={}, commit={}, datetime="", command="", records=records)
    return illustrated(run, rows(records))


def _texts(figure: Any) -> list[str]:
    return [text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, "get_text"))]


def _one(drawn: Iterable[tuple[str, Any]]) -> Any:
    ((_, figure),) = drawn
    return figure


def test_every_module_of_the_folder_is_in_the_catalogue_and_says_how_to_read_it() -> None:
    folder = Path(catalogue.__file__).parent
    names = {path.stem for path in folder.glob("*.py")} - {"__init__", "catalogue", "style"}
    assert [module.__name__.rpartition(".")[2] for module in catalogue.FIGURES] == [
        "speedup", "fidelity", "ideal", "phases", "density", "masks", "frames",
    ]  # fmt: skip
    assert [module.__name__.rpartition(".")[2] for module in catalogue.OVERVIEWS] == ["heatmap"]
    everything = (*catalogue.FIGURES, *catalogue.OVERVIEWS)
    assert len(names) == len(everything)
    for module in everything:
        assert module.__name__.rpartition(".")[2] in names
        assert module.TITLE
        assert module.CAPTION.endswith(".")
        assert module.KEY.endswith(".")


@pytest.mark.parametrize("name", SHEETS)
def test_figures_are_as_wide_as_their_sheet_and_so_is_all_that_stands_in_them(
    name: str, full_run: Path, make: SimpleNamespace
) -> None:
    run, sheet = load_run(full_run), SHEETS[name]
    arms = _rows(*run.records, folder=full_run.parent)
    with drawn_on(sheet):
        drawn = {
            module: figure for module in (*catalogue.FIGURES, *catalogue.OVERVIEWS) for _, figure in module.draw(arms)
        }
        # there are no kernel benchmarks here
        assert set(drawn) == {*catalogue.FIGURES, heatmap} - {ideal}
        for module, figure in drawn.items():
            box = sign(figure, f"{imprint(run, arms)}\n{module.KEY}")
            assert (box.width, figure.get_size_inches()[0]) == (sheet.width, sheet.width)
            # the finest type that Nature prints has 5 points
            assert min(text.get_fontsize() for text in figure.findobj(Text) if text.get_text()) >= 5.6
            drawn_in = figure.get_tightbbox()
            # inches: a hundredth is less than a line
            assert drawn_in.x0 > -0.01, module
            assert drawn_in.x1 < sheet.width + 0.01, module


def test_one_round_is_drawn_and_said_to_have_no_interval(make: SimpleNamespace) -> None:
    arms = _rows(make.dense_arm(rounds=1), make.arm("calibatt", rounds=1))
    assert any("no interval" in text for text in _texts(_one(speedup.draw(arms))))
    for module in (speedup, fidelity, phases):
        _one(module.draw(arms)).draw_without_rendering()


def test_records_with_hardly_any_field_draw_only_their_speedup() -> None:
    dense = Record(**BARE, method="dense", samples_s=(2.0,) * 6)
    sparse = Record(**BARE, method="new", samples_s=(1.0,) * 6, baseline_samples_s=(2.0,) * 6)
    failed = Record(**{**BARE, "outcome": "failed"}, method="radial", reason="test data")
    arms = _rows(dense, sparse, failed)
    assert "2.00×  (2.00–2.00)" in _texts(_one(speedup.draw(arms)))
    for module in (fidelity, ideal, phases, density, masks, frames):
        assert list(module.draw(arms)) == []
    assert list(speedup.draw(_rows(dense, failed))) == []


def test_a_hundred_arms_share_a_figure_and_more_have_another(make: SimpleNamespace) -> None:
    arms = _rows(*(make.arm("radial", preset=f"preset-{i}") for i in range(101)))
    assert [len(figure.axes[0].get_yticks()) for _, figure in speedup.draw(arms)] == [100, 1]
    assert [len(figure.axes[0].get_yticks()) for _, figure in phases.draw(arms)] == [100, 1]


def test_a_dozen_arms_are_named_in_the_fidelity_figure_even_where_all_coincide(make: SimpleNamespace) -> None:
    arms = _rows(*(make.arm("radial", preset=f"preset-{i}", kernel="flex") for i in range(12)))
    figure = _one(fidelity.draw(arms))
    figure.draw_without_rendering()
    for axes in figure.axes:
        assert {row.label for row in arms} <= {text.get_text() for text in axes.texts}
    assert not figure.legends


def test_of_many_arms_those_are_named_that_none_beats_and_the_outermost(make: SimpleNamespace) -> None:
    best = {"fast": (1.6, 20.0), "fair": (1.4, 30.0), "close": (1.2, 40.0), "slowest": (0.5, 25.0), "worst": (1.0, 5.0)}
    facts = {"alignment": None, "alignment_dense": None, "method_error": None, "rounds": 6}
    arms = [
        make.arm(method, ratio, psnr_db=(psnr,) * 6, samples_s=(1.0,) * 6, baseline_samples_s=(ratio,) * 6, **facts)
        for method, (ratio, psnr) in best.items()
    ]
    arms += [
        make.arm(
            "radial", preset=f"p{i}", psnr_db=(15.0,) * 6, samples_s=(1.0,) * 6, baseline_samples_s=(1.1,) * 6, **facts
        )
        for i in range(60)
    ]
    shown = _rows(*arms)
    start = time.perf_counter()
    figure = _one(fidelity.draw(shown))
    # it took 25 seconds when every arm was named
    assert time.perf_counter() - start < 5
    named = {text.get_text() for text in figure.axes[0].texts} & {row.label for row in shown}
    assert set(best) < named
    assert len(named) <= 12
    # the others are told by their marker, which a legend of the methods explains
    assert {text.get_text() for text in figure.legends[0].get_texts()} == {*best, "Radial"}


def _medley(make: SimpleNamespace, count: int, seed: int) -> list[Record]:
    """Arms all over the panel, some of them slower than dense, some with equal places, every tenth a control."""
    rng = np.random.default_rng(seed)
    facts = {"alignment": None, "alignment_dense": None, "method_error": None, "samples_s": (1.0,) * 6}
    return [
        make.arm(
            "random" if i % 10 == 0 else "radial", preset=f"p{i}", psnr_db=(float(psnr),) * 6,
            baseline_samples_s=(float(ratio),) * 6, **facts,
        )
        for i, (ratio, psnr) in enumerate(rng.uniform((0.5, 10), (2, 80), (count, 2)).round(1))
    ]  # fmt: skip


def _places(records: Iterable[Record]) -> list[tuple[float, float]]:
    return [(record.speedup.median, record.psnr_db[0]) for record in records]


@pytest.mark.parametrize("count", [1, 5, 40, 200])
def test_the_front_is_what_neither_another_arm_nor_dense_beats(count: int, make: SimpleNamespace) -> None:
    records = _medley(make, count, seed=count)
    places = _places(records)
    rivals = [*places, (1.0, np.inf)]
    true = {(x, y) for x, y in places if not any((a >= x and b >= y) and (a > x or b > y) for a, b in rivals)}
    axes = _one(fidelity.draw(_rows(*records))).axes[0]
    lines = [line for line in axes.lines if line.get_label() == "front"]
    assert len(lines) == bool(true)
    for line in lines:
        # from dense's speed at the left to the lower edge at the right
        x, y = line.get_xdata(), line.get_ydata()
        top = 10 * np.log10(255**2 * 12)
        assert set(zip(x[1:-1], y[1:-1], strict=True)) == {(a, min(b, top)) for a, b in true}
        assert (x[0], y[0], x[-1]) == (1.0, y[1], x[-2])
        assert list(x) == sorted(x)
        assert list(y) == sorted(y, reverse=True)


def test_without_an_arm_faster_than_dense_there_is_no_front(make: SimpleNamespace) -> None:
    axes = _one(fidelity.draw(_rows(make.arm("radial", 0.8, alignment=None), make.arm("sparge", 0.7, alignment=None))))
    assert not [line for line in axes.axes[0].lines if line.get_label() == "front"]


def _named(figure: Any, shown: Iterable[Row]) -> list[list[Any]]:
    """In each panel the names of arms, as texts."""
    names = {short(row, shared_words(tuple(shown))) for row in shown}
    found = []
    for axes in figure.axes:
        texts = [text for text in axes.texts if text.get_text().replace("\n", " ").partition(": ")[0] in names]
        others = {text.get_text() for text in axes.texts if text not in texts}
        assert others <= {"", "dense videos"}
        found.append(texts)
    return found


@pytest.mark.parametrize(
    "name", ["cpu/methods.json", "cpu/methods-equal.json", "h100/attention.json", "h100/videos.json"]
)
def test_of_the_committed_results_a_dozen_at_most_are_named_and_no_name_covers_another(name: str) -> None:
    for records in workloads(load_run(RESULTS / name).records):
        shown = rows(records)
        for _, figure in fidelity.draw(shown):
            for axes, texts in zip(figure.axes, _named(figure, shown), strict=True):
                assert 8 <= len(texts) <= 12
                boxes = [text.get_window_extent() for text in axes.texts if text.get_text()]
                assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))
                inside = axes.get_window_extent()
                for box in boxes:
                    assert inside.x0 <= box.x0
                    assert box.x1 <= inside.x1
                    assert inside.y0 <= box.y0
                    assert box.y1 <= inside.y1


def test_of_many_arms_the_front_the_outermost_and_controls_are_named(make: SimpleNamespace) -> None:
    records = _medley(make, 200, seed=3)
    shown = _rows(*records)
    ((*texts,),) = _named(_one(fidelity.draw(shown)), shown)
    named = {text.get_text().partition(": ")[0] for text in texts}
    by_label = {row.label: row.record for row in shown}
    places = dict(zip(by_label, _places(by_label.values()), strict=True))
    assert len(named) <= 12
    for axis in (0, 1):
        ends = [choose(place[axis] for place in places.values()) for choose in (min, max)]
        assert all(any(places[label][axis] == end for label in named) for end in ends)
    # both ends of the front
    faster = {label: place for label, place in places.items() if place[0] > 1}
    assert max(faster, key=lambda label: (faster[label][0], faster[label][1])) in named
    assert max(faster, key=lambda label: (faster[label][1], faster[label][0])) in named
    assert any(by_label[label].method == "random" for label in named)


def test_an_unnamed_arm_is_a_small_mark_without_bars(make: SimpleNamespace) -> None:
    shown = _rows(*_medley(make, 60, seed=1))
    figure = _one(fidelity.draw(shown))
    ((*texts,),) = _named(figure, shown)
    marks = [
        line
        for line in figure.axes[0].lines
        if line.get_marker() in {row.marker for row in shown} and len(line.get_xdata())
    ]
    assert len(marks) == 60
    large = [mark for mark in marks if mark.get_markersize() == 9]
    assert len(texts) <= len(large) < 30
    assert len(figure.axes[0].collections) == 2 * len(large)


def test_less_method_error_is_the_better() -> None:
    facts = {**BARE, "suite": "attention", "samples_s": (1.0,) * 6}
    records = [
        Record(**facts, method=f"m{i}", method_error=0.1 + 0.01 * i, baseline_samples_s=(1 + 0.1 * i,) * 6)
        for i in range(14)
    ]
    # slower and less close than another, and outermost in nothing
    beaten = Record(**facts, method="beaten", method_error=0.2, baseline_samples_s=(1.05,) * 6)
    names = {text.get_text() for text in _one(fidelity.draw(_rows(*records, beaten))).axes[0].texts}
    assert {"m0", "m13"} < names & {record.method for record in records}
    assert "beaten" not in names


@pytest.mark.parametrize(
    ("calls", "said"), [((None, 8), "of some calls"), ((1920, 1920), "of 1,920 calls"), ((4, 8), "of 4 to 8 calls")]
)
def test_the_method_error_says_of_which_calls(calls: tuple[int | None, ...], said: str, make: SimpleNamespace) -> None:
    arms = [make.arm(f"m{i}", suite="attention", psnr_db=None, alignment=None, error_calls=count)
            for i, count in enumerate(calls)]  # fmt: skip
    (axes,) = _one(fidelity.draw(_rows(*arms))).axes
    assert axes.get_ylabel() == f"method error {said}\n(up is better)"


def test_alignment_is_the_mean_and_psnr_the_median_as_the_caption_says(make: SimpleNamespace) -> None:
    values = (1.0, 1.0, 1.0, 1.0, 1.0, 0.4)
    row = _rows(make.arm("calibatt", alignment=values, psnr_db=(20.0, 20.0, 20.0, 20.0, 20.0, 80.0)))
    psnr, alignment = (axes.lines[0].get_ydata()[0] for axes in _one(fidelity.draw(row)).axes)
    assert alignment == pytest.approx(0.9)
    assert psnr == 20.0
    assert "for alignment the mean" in fidelity.CAPTION


def test_the_phases_and_the_rest_add_up_to_the_time_and_launching_is_no_part_of_it(make: SimpleNamespace) -> None:
    parts = {"plan": (0.2,) * 3, "attend": (0.5,) * 3, "lists": (0.1,) * 3, "launch": (7.0,) * 3}
    arms = _rows(make.arm("calibatt", rounds=3, samples_s=(2.0,) * 3, baseline_samples_s=(3.0,) * 3, phases_s=parts))
    axes = _one(phases.draw(arms)).axes[0]
    widths = {bar.get_label(): bar[0].get_width() for bar in axes.containers}
    assert widths == pytest.approx({"plan": 0.2, "attend": 0.5, "lists": 0.1, "other": 1.2})
    assert "2 s" in _texts(axes)
    only = _rows(make.arm("calibatt", rounds=3, phases_s={"launch": (7.0,) * 3}))
    assert list(phases.draw(only)) == []


def _marks(figure: Any) -> dict[tuple[float, float], tuple[str, str]]:
    """Colour and marker of what is drawn at each place."""
    return {
        (float(line.get_xdata()[0]), float(line.get_ydata()[0])): (line.get_color(), line.get_marker())
        for axes in figure.axes
        for line in axes.lines
        if line.get_marker() not in ("None", None, "") and len(line.get_xdata())
    }


@pytest.mark.parametrize("company", [[], ["dense", "radial", "sta"], ["one", "other", "random", "sparge"]])
def test_a_method_looks_the_same_in_every_figure_and_in_any_company(
    company: list[str], make: SimpleNamespace, tmp_path: Path
) -> None:
    make.artifact(tmp_path / "a.npz", 0.4, 0)
    own = make.arm("mine", 1.3, artifact="a.npz")
    arms = _rows(own, *(make.arm(name, 1.1, psnr=20) for name in company), folder=tmp_path)
    colour, marker = look(own)
    row = next(row for row in arms if row.record is own)
    assert (row.colour, row.marker) == (colour, marker)
    for module in (speedup, fidelity):
        assert (colour, marker) in _marks(_one(module.draw(arms))).values()
    (map_title,) = [axes._left_title for axes in _one(density.draw(arms)).axes if axes._left_title.get_text()]
    titles = [map_title, *(_one(masks.draw(arms)).subfigs[0].texts), *(next(frames.draw(arms))[1].subfigs[0].texts)]
    for title in titles:
        assert title.get_text().startswith(f"{row.glyph} mine")
        assert title.get_color() == colour


def test_an_artifact_with_some_arrays_draws_what_it_has(make: SimpleNamespace, tmp_path: Path) -> None:
    np.savez(tmp_path / "frames.npz", frames=np.zeros((1, 3, 8, 8, 3), np.uint8))
    np.savez(tmp_path / "density.npz", density=np.ones((2, 1, 1), np.float32))
    arms = _rows(make.arm("radial", artifact="frames.npz"), make.arm("sparge", artifact="density.npz"), folder=tmp_path)
    ((title, video),) = frames.draw(arms)
    assert any(text.endswith("SpargeAttn\nmean 1.00") for text in _texts(_one(density.draw(arms))))
    assert title == "Frames"
    assert not any("SpargeAttn" in text for text in _texts(video))


def test_frames_of_dense_stand_first_under_their_caption(make: SimpleNamespace, tmp_path: Path) -> None:
    for name, kept in (("dense", 1.0), ("radial", 0.4)):
        make.artifact(tmp_path / f"{name}.npz", kept, 0)
    arms = _rows(make.arm("radial", artifact="radial.npz"), make.dense_arm(artifact="dense.npz"), folder=tmp_path)
    drawn = list(frames.draw(arms))
    assert [title for title, _ in drawn] == [f"“{prompt}”" for prompt in make.prompts[:2]]
    parts = [part.get_suptitle().split(":")[0] for part in drawn[0][1].subfigs]
    assert parts == [row.heading for row in arms]
    assert [row.label for row in arms] == ["Dense", "Radial"]


def test_arms_without_frames_make_no_figure_of_dense_alone(make: SimpleNamespace, tmp_path: Path) -> None:
    make.artifact(tmp_path / "a.npz", 0.4, 0)
    make.artifact(tmp_path / "dense.npz", 1.0, 0)
    without = [make.arm("radial", preset=f"p{i}") for i in range(9)]
    dense, arm = make.dense_arm(artifact="dense.npz"), make.arm("sparge", artifact="a.npz")
    for records, names in (((dense, *without, arm), ["Dense", "SpargeAttn"]), ((dense, *without), ["Dense"])):
        arms = _rows(*records, folder=tmp_path)
        drawn = [[part.get_suptitle().split(":")[0][2:] for part in figure.subfigs] for _, figure in frames.draw(arms)]
        # two videos
        assert drawn == [names, names]


@pytest.mark.parametrize("starts", [True, False])
def test_frame_boundaries_are_drawn_only_where_they_are_known(
    starts: bool, make: SimpleNamespace, tmp_path: Path
) -> None:
    known = {"frame_starts": np.array([0, 128, 256])} if starts else {}
    np.savez(tmp_path / "a.npz", masks=np.eye(6, dtype=bool)[None], mask_sites=np.array([[0, 0, 0]]), **known)
    figure = _one(masks.draw(_rows(make.arm("radial", artifact="a.npz"), folder=tmp_path)))
    lines = figure.subfigs[0].axes[0].lines
    # two inner boundaries, across and down, at whole blocks of 64 tokens
    assert sorted({float(line.get_xdata()[0]) for line in lines} - {0.0}) == ([2.0, 4.0] if starts else [])


def _blocks(kept: float, speed: float, **more: Any) -> Record:
    facts = {**BARE, "suite": "kernel", "method": "blocks", "block": (64, 64), "mask": "random", **more}
    return Record(**facts, preset=f"{kept:g}", density=kept, samples_s=(1 / speed,) * 6, baseline_samples_s=(1.0,) * 6)


def test_kernels_are_compared_with_what_leaving_blocks_out_could_give() -> None:
    whole = Record(**{**BARE, "suite": "kernel"}, method="blocks", preset="1", density=1.0, samples_s=(1.0,) * 6)
    figure = _one(ideal.draw(_rows(whole, _blocks(0.5, 1.6), _blocks(0.25, 3.2), _blocks(0.25, 2.0, kernel="triton"))))
    drawn = {line.get_label(): line.get_ydata() for line in figure.axes[0].lines}
    assert list(drawn["flex, 64×64, random"]) == pytest.approx([0.8, 0.8])
    assert list(drawn["triton, 64×64, random"]) == pytest.approx([0.5])
    # one density has nothing to be compared over, and no density no logarithm
    assert list(ideal.draw(_rows(_blocks(0.5, 1.6)))) == []
    assert list(ideal.draw(_rows(_blocks(0.0, 1.6), _blocks(0.5, 1.6)))) == []


def test_labels_of_densities_that_nearly_agree_do_not_touch() -> None:
    figure = _one(ideal.draw(_rows(*(_blocks(kept, 1.6) for kept in (0.1, 0.15, 0.25, 0.37, 0.38, 0.5)))))
    figure.draw_without_rendering()
    boxes = [label.get_window_extent() for label in figure.axes[0].get_xticklabels()]
    assert len(boxes) == 5
    assert not any(one.overlaps(other) for one, other in itertools.pairwise(boxes))


def test_a_dollar_sign_is_no_formula_in_any_figure(make: SimpleNamespace, tmp_path: Path) -> None:
    make.artifact(tmp_path / "a.npz", 0.4, 0)
    bad = r"$\badcommand$"
    arms = _rows(
        make.dense_arm(artifact="a.npz", kernel=bad),
        make.arm("calibatt", preset=bad, artifact="a.npz", phases_s={bad: (0.1,) * 6}, baseline=bad),
        *(_blocks(kept, 1.6, kernel=bad) for kept in (0.25, 0.5)),
        folder=tmp_path,
    )
    run = Run(path=tmp_path / bad, machine={"gpu": bad}, commit={}, datetime=bad, command="", records=())
    drawn = catalogue.pictures(run, arms, "stem")
    assert {name.rpartition("-")[2] for picture in drawn for name in picture.files} == {
        f"{module.__name__.rpartition('.')[2]}.{suffix}"
        for module in catalogue.FIGURES
        for suffix in ("png", "svg", "pdf")
    }


def test_medians_of_bars_are_those_of_the_rounds(make: SimpleNamespace) -> None:
    record = make.arm("calibatt")
    (axes,) = _one(phases.draw(_rows(record))).axes
    plan = next(bar for bar in axes.containers if bar.get_label() == "plan")[0].get_width()
    assert plan == pytest.approx(statistics.median(record.phases_s["plan"]))


# --- what stands below every figure ----------------------------------------------------------------------------------


def test_a_figure_of_planted_weights_says_so() -> None:
    facts = {"suite": "denoise", "model": "wan2.1-14b", "method": "sparge", "kernel": "flex"}
    planted = [Record(**facts, outcome="failed", reason="test data", weights="planted 0123")]
    run = Run(path=Path("run.json"), machine={}, commit={}, datetime="", command="", records=tuple(planted))
    assert "planted weights" in imprint(run, rows(planted))


def _imprint(name: str, place: int = 0) -> tuple[str, str]:
    run = load_run(RESULTS / name)
    arms = rows(workloads(run.records)[place])
    return imprint(run, arms).replace("\N{NO-BREAK SPACE}", " "), samples(arms)


def test_a_figure_says_what_was_run_on_what_when_and_how_often() -> None:
    assert _imprint("cpu/methods.json") == (
        "denoise · shapes · quick · 6 steps · float32 · dense: sdpa-flash · AMD EPYC · 2026-11-25 · methods.json",
        "6 videos an arm",
    )
    facts, videos = _imprint("h100/videos.json")
    assert facts.startswith(
        "denoise · shapes · large · 20 steps · bfloat16 · compiled · dense: fa3, fa4 · NVIDIA H100 80GB HBM3 · 2026-"
    )
    assert videos == "30 to 32 videos an arm"


def test_a_figure_marks_what_is_resampled_drawn_or_disturbed(make: SimpleNamespace) -> None:
    resampled, rounds = _imprint("h100/attention.json")
    assert "inputs resampled from shapes, 16×16×24 tokens, 4 heads × 64" in resampled
    assert "every arm: 0% of the steps dense" in resampled
    assert rounds == "10 rounds an arm"
    assert "queries, keys and values drawn at random · masks captured, random" in _imprint("h200/kernel.json")[0]
    assert (
        "10 layers with random weights · every arm: default, 128×128 · masks even, " in _imprint("h100/forward.json")[0]
    )
    assert "compiled" in _imprint("h100/forward.json", 1)[0]
    run = Run(path=Path("run.json"), machine={}, commit={}, datetime="", command="", records=())
    hot = _rows(*(make.arm(name, throttled=True, rounds=i + 1) for i, name in enumerate("abcde")), make.arm("radial"))
    assert "clock held down during a, b, c and 2 more" in imprint(run, hot)
    assert samples(hot) == "1 to 6 videos an arm"


def test_a_figure_says_nothing_that_the_file_does_not() -> None:
    run = Run(path=Path("run.json"), machine={}, commit={}, datetime="", command="", records=())
    arms = _rows(Record(**BARE, method="new", samples_s=(1.0,), baseline_samples_s=(2.0,)))
    assert imprint(run, arms).replace("\N{NO-BREAK SPACE}", " ") == "denoise · shapes · run.json"
    assert samples(arms) == "1 video an arm"


def test_every_figure_has_its_imprint_and_key_in_every_file(
    make: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make.artifact(tmp_path / "a.npz", 0.4, 0)
    arms = _rows(
        make.dense_arm(artifact="a.npz"), make.arm("radial", artifact="a.npz"),
        *(_blocks(kept, 1.6) for kept in (0.25, 0.5)), folder=tmp_path,
    )  # fmt: skip
    said: list[str] = []
    monkeypatch.setattr(catalogue, "sign", lambda figure, text: said.append(text) or sign(figure, text))
    run = Run(path=Path("run.json"), machine={"gpu": "Test data GPU"}, commit={}, datetime="2000-01-01T00:00",
              command="", records=())  # fmt: skip
    drawn = catalogue.pictures(run, arms, "stem")
    assert len(said) == len(drawn) > len(catalogue.FIGURES)
    for text in said:
        facts, key = text.split("\n")
        assert facts.replace("\N{NO-BREAK SPACE}", " ").endswith("Test data GPU · 2000-01-01 · run.json")
        assert key
        assert "{" not in key
    assert [("95 %" in text) for text in said[:4]] == [True, True, False, False]


def test_the_text_below_a_figure_is_inside_what_is_saved_and_moves_nothing() -> None:
    figure = new_figure(2)
    axes = figure.add_subplot()
    figure.draw_without_rendering()
    before = axes.get_position().bounds
    box = sign(figure, "W" * 300 + "\n" + "a fact · " * 40)
    figure.draw_without_rendering()
    assert axes.get_position().bounds == before
    (text,) = figure.texts
    extent = text.get_window_extent()
    saved = box.transformed(figure.dpi_scale_trans)
    assert saved.y0 <= extent.y0
    assert extent.y1 <= 0
    # all but the widest letters fit the width
    (text,) = (sign(other := new_figure(2), "a fact · " * 40), other.texts)[1]
    assert text.get_window_extent().x1 <= other.bbox.width


def test_a_heat_map_has_a_line_a_workload_and_a_column_an_arm(make: SimpleNamespace) -> None:
    records = [record for record in make.many(60) if record.method != "method-3" or record.resolution != "240p"]
    run = Run(path=Path("run.json"), machine={}, commit={}, datetime="", command="", records=tuple(records))
    arms = [row for some in workloads(run.records) for row in rows(some)]
    drawn = dict(heatmap.draw(arms))
    assert list(drawn) == ["Speedup over all workloads", "PSNR (dB) over all workloads"]
    axes = drawn["Speedup over all workloads"].axes[0]
    # what all share is not repeated
    assert [text.get_text() for text in axes.get_yticklabels()] == ["240p", "480p", "720p"]
    values = axes.images[0].get_array().filled(np.nan)
    assert values.shape == (3, 19)
    for line, some in enumerate(workloads(run.records)):
        by_name = {row.label: row.record.speedup for row in rows(some)}
        for column, text in enumerate(axes.get_xticklabels()):
            interval = by_name.get(text.get_text())
            assert np.isnan(values[line, column]) if interval is None else values[line, column] == interval.median


def test_one_workload_of_a_suite_has_no_heat_map(make: SimpleNamespace) -> None:
    assert list(heatmap.draw(_rows(make.dense_arm(), make.arm("calibatt")))) == []


def test_parts_of_a_large_heat_map_have_one_scale_white_where_an_arm_is_as_fast_as_dense(make: SimpleNamespace) -> None:
    run = Run(path=Path("run.json"), machine={}, commit={}, datetime="", command="", records=tuple(make.many(2000)))
    arms = [row for some in workloads(run.records) for row in rows(some)]
    figures = [figure for title, figure in heatmap.draw(arms) if title.startswith("Speedup")]
    assert [len(figure.axes[0].get_yticklabels()) for figure in figures] == [40, 40, 20]
    images = [figure.axes[0].images[0] for figure in figures]
    assert len({(image.norm.vmin, image.norm.vmax) for image in images}) == 1
    assert images[0].norm(1.0) == pytest.approx(0.5)
