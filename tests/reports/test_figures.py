"""Figures draw what there is, and nothing where there is nothing."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from calibatt.bench.record import Record, Run, UnusableFile
from calibatt.reports import figures
from calibatt.reports.entries import Entry, entries, palette

BARE: dict[str, Any] = {"suite": "denoise", "model": "shapes", "kernel": "flex", "outcome": "ok"}


def _entries(*records: Record, folder: Path = Path("nowhere")) -> tuple[Entry, ...]:
    run = Run(path=folder / "run.json", machine={}, commit={}, datetime="", command="", records=records)
    return entries(run, records, palette(record.method for record in records))


def _texts(figure: Any) -> list[str]:
    return [text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, "get_text"))]


def test_one_round_is_drawn_and_said_to_have_no_interval(make: SimpleNamespace) -> None:
    arms = _entries(make.dense_arm(rounds=1), make.arm("calibatt", rounds=1))
    speedup, fidelity, phases = figures.speedup(arms), figures.fidelity(arms), figures.phases(arms)
    assert speedup is not None
    assert any("no interval" in text for text in _texts(speedup))
    for figure in (speedup, fidelity, phases):
        assert figure is not None
        figure.draw_without_rendering()


def test_records_with_hardly_any_field_draw_only_their_speedup() -> None:
    dense = Record(**BARE, method="dense", samples_s=(2.0,) * 6)
    sparse = Record(**BARE, method="new", samples_s=(1.0,) * 6, baseline_samples_s=(2.0,) * 6)
    failed = Record(**{**BARE, "outcome": "failed"}, method="radial", reason="test data")
    arms = _entries(dense, sparse, failed)
    speedup = figures.speedup(arms)
    assert speedup is not None
    assert "2.00×  (2.00–2.00)" in _texts(speedup)
    assert figures.fidelity(arms) is figures.phases(arms) is figures.density(arms) is figures.masks(arms) is None
    assert figures.videos(arms) == []
    assert figures.speedup(_entries(dense, failed)) is None


def test_every_arm_is_named_in_the_fidelity_figure_even_where_all_coincide(make: SimpleNamespace) -> None:
    arms = _entries(*(make.arm("radial", preset=f"preset-{i}", kernel="flex") for i in range(12)))
    figure = figures.fidelity(arms)
    assert figure is not None
    figure.draw_without_rendering()
    for axes in figure.axes:
        assert {entry.label for entry in arms} <= {text.get_text() for text in axes.texts}


def test_an_artifact_with_some_arrays_draws_what_it_has(make: SimpleNamespace, tmp_path: Path) -> None:
    np.savez(tmp_path / "frames.npz", frames=np.zeros((1, 3, 8, 8, 3), np.uint8))
    np.savez(tmp_path / "density.npz", density=np.ones((2, 1, 1), np.float32))
    arms = _entries(
        make.arm("radial", artifact="frames.npz"), make.arm("sparge", artifact="density.npz"), folder=tmp_path
    )
    density, (video,) = figures.density(arms), figures.videos(arms)
    assert density is not None
    assert "SpargeAttn\nmean 1.00" in _texts(density)
    assert video[0] == ""
    assert not any("SpargeAttn" in text for text in _texts(video[1]))


def test_frames_of_dense_stand_first_under_their_caption(make: SimpleNamespace, tmp_path: Path) -> None:
    for name, density in (("dense", 1.0), ("radial", 0.4)):
        make.artifact(tmp_path / f"{name}.npz", density, 0)
    arms = _entries(make.arm("radial", artifact="radial.npz"), make.dense_arm(artifact="dense.npz"), folder=tmp_path)
    drawn = figures.videos(arms)
    assert [caption for caption, _ in drawn] == list(make.prompts[:2])
    rows = [part.get_suptitle().split(":")[0] for part in drawn[0][1].subfigs]
    assert rows == ["Dense", "Radial"]
    # a caption's dollar signs are no formula
    drawn[0][1].draw_without_rendering()


@pytest.mark.parametrize("starts", [True, False])
def test_frame_boundaries_are_drawn_only_where_they_are_known(
    starts: bool, make: SimpleNamespace, tmp_path: Path
) -> None:
    known = {"frame_starts": np.array([0, 128, 256])} if starts else {}
    np.savez(tmp_path / "a.npz", masks=np.eye(6, dtype=bool)[None], mask_sites=np.array([[0, 0, 0]]), **known)
    figure = figures.masks(_entries(make.arm("radial", artifact="a.npz"), folder=tmp_path))
    assert figure is not None
    lines = figure.subfigs[0].axes[0].lines
    # two inner boundaries, across and down, at whole blocks of 64 tokens
    assert sorted({float(line.get_xdata()[0]) for line in lines} - {0.0}) == ([2.0, 4.0] if starts else [])


@pytest.mark.parametrize(
    "arrays",
    [
        {"frames": np.zeros((3, 8, 8, 3), np.uint8)},
        {"masks": np.ones((2, 4, 4), bool)},
        {"captions": np.array(["a", None], dtype=object)},
    ],
)
def test_an_artifact_of_another_form_is_refused(arrays: dict[str, Any], make: SimpleNamespace, tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(UnusableFile, match=r"a\.npz"):
        _entries(make.arm("radial", artifact="a.npz"), folder=tmp_path)


def _blocks(density: float, speed: float, **more: Any) -> Record:
    facts = {**BARE, "suite": "kernel", "method": "blocks", "block": (64, 64), "mask": "random", **more}
    return Record(
        **facts, preset=f"{density:g}", density=density, samples_s=(1 / speed,) * 6, baseline_samples_s=(1.0,) * 6
    )


def test_kernels_are_compared_with_what_leaving_blocks_out_could_give() -> None:
    whole = Record(**{**BARE, "suite": "kernel"}, method="blocks", preset="1", density=1.0, samples_s=(1.0,) * 6)
    arms = _entries(whole, _blocks(0.5, 1.6), _blocks(0.25, 3.2), _blocks(0.25, 2.0, kernel="triton"))
    figure = figures.ideal(arms)
    assert figure is not None
    drawn = {line.get_label(): line.get_ydata() for line in figure.axes[0].lines}
    assert list(drawn["flex, 64×64, random"]) == pytest.approx([0.8, 0.8])
    assert list(drawn["triton, 64×64, random"]) == pytest.approx([0.5])
    # one density has nothing to be compared over
    assert figures.ideal(_entries(_blocks(0.5, 1.6))) is None


def test_a_method_keeps_its_colour(make: SimpleNamespace) -> None:
    few, many = palette(["calibatt"]), palette(["calibatt", "dense", "radial", "one", "other"])
    assert few["calibatt"] == many["calibatt"]
    assert len(set(many.values())) == len(many)
