"""The share of keys is what it says, published tables are read or refused in a line, and the card quotes the files."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from calibatt.kernels.geometry import Geometry
from calibatt.kernels.plan import Plan
from calibatt.methods.call import Call
from calibatt.methods.site import Branch, Site
from calibatt.models.shapes import concentration
from calibatt.models.shapes.concentration import (
    LEVELS,
    OURS,
    PICTURE,
    PROFILES,
    PUBLISHED,
    NeededShares,
    Summary,
    evenly_spaced,
    measure,
    measure_weights,
    read_profile,
    read_summaries,
    summarise_profiles,
    table,
)
from calibatt.models.shapes.pipeline import WEIGHTS, assemble, new_transformer

HEADER = "Step,Layer,Head,Sparsity\n"
# one step, two layers of two heads
SMALL = HEADER + "1,0,0,0.1\n1,0,1,0.2\n1,1,0,0.3\n1,1,1,0.8\n"


def call(q: Tensor, k: Tensor, *, step: int = 0, layer: int = 0, branch: Branch = "cond") -> Call:
    geometry = Geometry(grid=(1, 1, k.shape[1]), heads=k.shape[0], head_dim=k.shape[2])
    site = Site(geometry=geometry, step=step, steps=2, sigma=1.0, branch=branch, layer=layer, layers=2)
    return Call(site=site, q=q[None], k=k[None], v=k[None], plan=Plan.dense(geometry), out=k[None])


def tables(folder: Path, content: str = SMALL) -> Path:
    for name in PROFILES:
        (folder / name).write_text(content)
    return folder


def test_heads_that_look_everywhere_and_heads_that_look_at_one_key_are_told_apart() -> None:
    keys = 100
    one_hot, nothing = torch.eye(keys), torch.zeros(keys, keys)
    q, k = torch.stack((nothing, 1e4 * one_hot)), torch.stack((one_hot, one_hot))
    seen = NeededShares(queries=10)
    for step in range(2):
        for layer in range(2):
            seen.saw(call(q, k, step=step, layer=layer))
            # the other branch would be told apart
            seen.saw(call(q.flip(0), k, step=step, layer=layer, branch="uncond"))
    shares = seen.shares()
    assert shares.shape == (2, 2, 2)
    # sums in fp32 may reach 0.95 one key later
    torch.testing.assert_close(shares[..., 0], torch.full((2, 2), 0.95), atol=0.011, rtol=0)
    torch.testing.assert_close(shares[..., 1], torch.full((2, 2), 1 / keys))


def test_queries_are_spread_from_the_first_to_the_last() -> None:
    device = torch.device("cpu")
    rows = evenly_spaced(32_760, 512, device)
    assert (rows[0], rows[-1], len(rows.unique())) == (0, 32_759, 512)
    assert set(rows.diff().tolist()) == {64, 65}
    assert evenly_spaced(7, 512, device).tolist() == list(range(7))


def test_every_step_layer_and_head_of_a_video_is_measured() -> None:
    pipe = assemble(new_transformer(layers=2, heads=1))
    shares = measure(pipe, "quick", ["a red circle, still, over grey"], queries=16, steps=2)
    assert shares.shape == (1, 2, 2, 1)
    assert ((shares > 0) & (shares <= 1)).all()


def test_a_summary_has_means_by_step_and_layer_and_quantiles_of_all() -> None:
    # steps 2, layers 3, heads 7: 0, 1/41, … 1
    summary = Summary.of(torch.linspace(0, 1, 42, dtype=torch.float64).view(2, 3, 7))
    assert summary.mean == 0.5
    assert summary.quantiles == pytest.approx(LEVELS, abs=1e-5)
    assert summary.by_step == pytest.approx((10 / 41, 31 / 41), abs=1e-5)
    assert summary.by_layer == pytest.approx([(13.5 + 7 * layer) / 41 for layer in range(3)], abs=1e-5)


def test_heads_that_keep_their_share_have_all_of_the_variance_and_heads_that_swap_none() -> None:
    kept = torch.tensor([[0.1, 0.9], [0.1, 0.9]])[:, None]
    swapped = torch.tensor([[0.1, 0.9], [0.9, 0.1]])[:, None]
    assert Summary.of(kept).between_heads == 1
    assert Summary.of(swapped).between_heads == 0
    # variances: 0.01 of the heads' means 0.2 and 0.4, 0.035 of all
    assert Summary.of(torch.tensor([[[0.1, 0.2]], [[0.3, 0.6]]])).between_heads == pytest.approx(0.01 / 0.035, abs=1e-5)
    assert Summary.of(torch.full((2, 1, 2), 0.5)).between_heads == 1


def test_a_size_is_added_to_a_file_of_the_same_weights_and_to_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measured(share: float) -> Callable[..., Tensor]:
        return lambda pipe, size, captions, *, queries: torch.full((len(captions), 3, 2, 1), share)

    def add(size: str, share: float) -> dict[str, Summary]:
        monkeypatch.setattr(concentration, "measure", measured(share))
        measure_weights(tmp_path, out=tmp_path, sizes=[size], captions=2, queries=8, device=torch.device("cpu"))
        return read_summaries(tmp_path / OURS)

    new_transformer(layers=1, heads=1).save_pretrained(tmp_path)
    add("large", 0.25)
    both = add("quick", 0.5)
    assert {size: one.mean for size, one in both.items()} == {"quick": 0.5, "large": 0.25}
    assert add("large", 0.75)["large"].mean == 0.75
    new_transformer(layers=1, heads=1).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is of other weights"):
        add("quick", 0.5)


def test_a_table_is_read_as_steps_layers_and_heads_in_any_order(tmp_path: Path) -> None:
    path = tmp_path / "small.csv"
    path.write_text(HEADER + "\n".join(reversed(SMALL.splitlines()[1:])) + "\n\n")
    assert read_profile(path).tolist() == [[[0.1, 0.2], [0.3, 0.8]]]


def test_tables_are_summarised_by_model(tmp_path: Path) -> None:
    facts = summarise_profiles(tables(tmp_path))
    assert list(facts["models"]) == list(PROFILES.values())
    one = facts["models"]["HunyuanVideo"]
    assert (one["steps"], one["layers"], one["heads"]) == (1, 2, 2)
    assert (one["mean"], one["by_step"], one["by_layer"]) == (0.35, (0.35,), (0.15, 0.55))
    assert one["quantiles"][LEVELS.index(0.5)] == 0.25


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "no table in CSV"),
        ("\xff\xfe", "no table in CSV"),
        ("Step,Layer,Head\n1,0,0\n", "columns should be Step,Layer,Head,Sparsity: got 'Step,Layer,Head'"),
        ('"Step\nLayer"\n', "columns should be"),
        (HEADER, "should each be there once"),
        (HEADER + "1,0,0\n", "not three whole numbers and a share"),
        (HEADER + "1,0,x,0.5\n", "not three whole numbers and a share"),
        (HEADER + "1,0,0,1.5\n", "not 0 to 1"),
        (HEADER + "1,0,0,nan\n", "not 0 to 1"),
        (SMALL.replace("1,0,1,0.2\n", ""), "should each be there once"),
        (SMALL + "1,0,0,0.1\n", "should each be there once"),
        (SMALL.replace("1,0,", "0,0,").replace("1,1,", "0,1,"), "should each be there once"),
    ],
)
def test_what_is_no_such_table_is_refused_in_a_line(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "small.csv"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match=message) as caught:
        read_profile(path)
    assert "\n" not in str(caught.value)


@settings(
    max_examples=500, derandomize=True, database=None, deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
@given(
    share=st.floats(0, 1),
    places=st.lists(st.tuples(st.floats(0, 0.999), st.sampled_from(b'0129,.-\n\r"e \x00\xff')), max_size=4),
)
def test_a_table_that_was_changed_in_any_way_is_read_or_refused_in_a_line(
    tmp_path: Path, share: float, places: list[tuple[float, int]]
) -> None:
    changed = bytearray(SMALL.encode()[: math.ceil(share * len(SMALL))])
    for place, value in places:
        changed[int(place * len(changed)) : int(place * len(changed)) + 1] = bytes([value])
    path = tmp_path / "small.csv"
    path.write_bytes(changed)
    try:
        shares = read_profile(path)
    except ValueError as error:
        said = str(error)
    else:
        assert ((shares >= 0) & (shares <= 1)).all()
        return
    assert "\n" not in said
    assert said.startswith(f"{path}: ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--profiles", "missing"], "missing has no sparsity_wan_1.3B_t2v.csv: unpack what `pip download sparsevideo"),
        (["--captions", "0"], "ask for 1 to"),
        (["--queries", "0"], "at least one query: got 0"),
        (["--weights", "missing"], "missing has no config.json"),
    ],
)
def test_the_command_refuses_in_a_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.setattr("sys.argv", ["concentration", "--out", str(tmp_path), *arguments])
    with pytest.raises(SystemExit, match="2"):
        concentration.main()
    assert message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"weights": "", "sizes": {"quick": {}}}', '{"models": {"a": 1}}'])
def test_a_file_of_something_else_is_refused_in_a_line(tmp_path: Path, content: str) -> None:
    (tmp_path / OURS).write_text(content)
    with pytest.raises(ValueError, match="into another folder"):
        read_summaries(tmp_path / OURS)


def test_the_command_summarises_tables_and_draws(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--out", str(tmp_path / "out"), "--profiles", str(tables(tmp_path))]
    monkeypatch.setattr("sys.argv", ["concentration", *arguments])
    concentration.main()
    assert "| Wan 2.1 1.3B | 35.0 | 11.5 | 25.0 | 72.5 | 15.0 | 35.0 | 55.0 | 35.0 | 35.0 |" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / PUBLISHED).read_text())["mass"] == 0.95
    assert (tmp_path / "out" / PICTURE).stat().st_size > 10_000


def test_the_card_quotes_the_shipped_statistics_and_these_are_of_the_samples_beside_them() -> None:
    sizes = json.loads((WEIGHTS / OURS).read_text())["sizes"]
    ours = read_summaries(WEIGHTS / OURS)
    for size, facts in sizes.items():
        shares = torch.tensor(facts["shares"], dtype=torch.float64)
        again = Summary.of(shares.mean(0))
        assert ours[size].mean == pytest.approx(again.mean, abs=2e-5)
        assert ours[size].by_layer == pytest.approx(again.by_layer, abs=2e-5)
        assert ours[size].between_heads == pytest.approx(again.between_heads, abs=1e-4)
    card = (WEIGHTS / "MODEL_CARD.md").read_text()
    for row in table({**ours, **read_summaries(WEIGHTS / PUBLISHED)}).splitlines():
        assert row in card
