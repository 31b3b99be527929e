"""CalibAtt, the random control that it is compared with, and how methods are built."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from calibatt.kernels.geometry import Geometry
from calibatt.kernels.mask import BlockMask
from calibatt.kernels.names import UnknownName
from calibatt.kernels.plan import Plan, RowReuse
from calibatt.methods.base import Foreseen
from calibatt.methods.catalogue import METHODS, build
from calibatt.methods.catalogue import learner as build_learner
from calibatt.methods.learning import Learnt
from calibatt.methods.site import Site

# 1000 tokens in blocks of 32 × 16: 32 × 63 blocks, the last of each axis shorter
GEOMETRY = Geometry(grid=(8, 5, 25), heads=3, head_dim=8)
BLOCK = (32, 16)
Q = torch.zeros(3, 1000, 8)


def site(**where: Any) -> Site:
    given = {"step": 3, "steps": 50, "sigma": 0.5, "branch": "cond", "layer": 2, "layers": 8}
    return Site(**{"geometry": GEOMETRY, **given, **where})


def masked() -> Plan:
    """Another number of blocks in every row, one row empty."""
    keep = torch.arange(63) < torch.arange(32)[:, None]
    return Plan.masked(BlockMask.from_keep(keep.expand(3, -1, -1), tokens=1000, block_q=32, block_k=16), 3)


def half() -> Plan:
    return Plan.masked(
        BlockMask.from_keep(torch.ones(3, 32, 63, dtype=torch.bool), tokens=1000, block_q=32, block_k=16), 3
    )


def mixed() -> Plan:
    reuse = RowReuse.of_anchor_rows(GEOMETRY, (1, 3))
    return Plan(tokens=1000, kinds=("masked", "reused", "dense"), mask=masked().mask, reuse=reuse)


@dataclass
class Source:
    """Answers with one plan, and remembers what it was asked."""

    answer: Plan
    asked: list[tuple[Site, bool]] = field(default_factory=list)

    def at(self, loss: float) -> Source:
        return Source(half()) if loss == 2 else self

    def density(self, *, repetition: bool = True) -> torch.Tensor:
        return torch.tensor([[[0.5]], [[0.1 if repetition else 0.3]]])

    def plan(self, site: Site, *, repetition: bool = True) -> Plan:
        self.asked.append((site, repetition))
        return self.answer


def counts(plan: Plan) -> torch.Tensor:
    assert plan.mask is not None
    return plan.mask.keep().sum(-1)


@pytest.mark.parametrize(("preset", "repetition"), [("default", True), ("masks-only", False)])
def test_calibatt_hands_on_what_was_learnt(preset: str, repetition: bool) -> None:
    source = Source(mixed())
    assert build("calibatt", preset=preset, source=source).plan(Q, Q, site()) is source.answer
    assert source.asked == [(site(), repetition)]


def test_calibatt_takes_the_masks_of_its_loss() -> None:
    source = Source(mixed())
    assert build("calibatt", source=source, loss=2.0).plan(Q, Q, site()).kinds == half().kinds
    assert not source.asked


@pytest.mark.parametrize(("preset", "expected"), [("default", 0.3), ("masks-only", 0.4)])
def test_calibatts_density_is_known_before_any_call(preset: str, expected: float) -> None:
    method = build("calibatt", preset=preset, source=Source(mixed()))
    assert isinstance(method, Foreseen)
    assert method.mean_density() == pytest.approx(expected)


@pytest.mark.parametrize("loss", [-0.5, float("nan")])
def test_calibatt_loses_nothing_negative(loss: float) -> None:
    with pytest.raises(ValueError, match="0 or more"):
        build("calibatt", source=Source(mixed()), loss=loss)


def test_random_keeps_as_many_blocks_of_every_row_as_its_source() -> None:
    plan = build("random", source=Source(masked()), block=BLOCK).plan(Q, Q, site())
    assert torch.equal(counts(plan), counts(masked()))


def test_random_keeps_other_blocks_than_its_source_and_than_its_other_heads() -> None:
    plan = build("random", source=Source(masked()), block=BLOCK).plan(Q, Q, site())
    assert plan.mask is not None
    one, other, _ = plan.mask.keep()
    source = masked().mask
    assert source is not None
    # a draw agrees with anything in half of its blocks or so; the source's own would in all
    assert (one & source.keep()[0]).sum() < 0.6 * one.sum()
    assert (one & other).sum() < 0.6 * one.sum()


def test_random_spreads_over_all_blocks() -> None:
    drawn = torch.zeros(32, 63)
    for step in range(50):
        mask = build("random", source=Source(masked()), block=BLOCK).plan(Q, Q, site(step=step)).mask
        assert mask is not None
        drawn += mask.keep().sum(0)
    # row 20 keeps 20 of 63 blocks in 150 draws: 48 a block, with a standard deviation below 6
    assert 48 - 5 * 6 < drawn[20].min() <= drawn[20].max() < 48 + 5 * 6


def test_random_has_its_sources_density_whatever_the_head_does() -> None:
    plan = build("random", source=Source(mixed()), block=BLOCK).plan(Q, Q, site())
    assert set(plan.kinds) == {"masked"}
    # half a block of 63 from rounding, and as much from the shorter last one
    torch.testing.assert_close(plan.density(), mixed().density(), atol=1 / 63, rtol=0)


def test_random_has_its_sources_density_in_blocks_of_another_size() -> None:
    plan = build("random", source=Source(mixed()), block=(64, 64)).plan(Q, Q, site())
    torch.testing.assert_close(plan.density(), mixed().density(), atol=1 / 16, rtol=0)


def test_random_draws_the_same_again_and_for_the_other_branch() -> None:
    method = build("random", source=Source(masked()), block=BLOCK)
    first = method.plan(Q, Q, site()).mask
    torch.rand(3)
    other = build("random", source=Source(masked()), block=BLOCK).plan(Q, Q, site(branch="uncond")).mask
    assert first is not None
    assert other is not None
    assert torch.equal(first.bits, other.bits)


@pytest.mark.parametrize("elsewhere", [{"step": 4}, {"layer": 3}, {"seed": 1}])
def test_random_draws_anew_at_another_site_and_with_another_seed(elsewhere: dict[str, int]) -> None:
    seed: dict[str, Any] = {key: value for key, value in elsewhere.items() if key == "seed"}
    where = {key: value for key, value in elsewhere.items() if key != "seed"}
    one = build("random", source=Source(masked()), block=BLOCK).plan(Q, Q, site()).mask
    other = build("random", source=Source(masked()), block=BLOCK, **seed).plan(Q, Q, site(**where)).mask
    assert one is not None
    assert other is not None
    assert not torch.equal(one.bits, other.bits)


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.offline])
def test_an_offline_method_without_a_calibration_says_how_to_make_one(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} needs a calibration: make one by `calibatt calibrate`"):
        build(name)


def test_unknown_names_and_settings_are_refused_and_the_known_ones_named() -> None:
    with pytest.raises(UnknownName, match="unknown method 'radail': did you mean radial"):
        build("radail")
    with pytest.raises(UnknownName, match="unknown preset of radial 'defualt': did you mean default"):
        build("radial", preset="defualt")
    with pytest.raises(ValueError, match="radial has no setting decoy: it has decay, "):
        build("radial", decoy=1)
    with pytest.raises(ValueError, match="dense has no setting decay: it has none"):
        build("dense", decay=1)


def test_what_one_preset_learnt_is_not_taken_for_anothers() -> None:
    with pytest.raises(ValueError, match=r"sta/searched learns from videos first: pass what it learnt as `source`$"):
        build("sta", preset="searched")
    # which has other steps dense, and so watches others
    tables = {"distance": torch.zeros(50, 8, 6, 3)}
    source = Learnt(method="sta", preset="searched-no-warmup", geometry=GEOMETRY, steps=50, layers=8, tables=tables)
    build("sta", preset="searched-no-warmup", source=source)
    with pytest.raises(ValueError, match="not that of sta/searched-no-warmup"):
        build("sta", preset="searched", source=source)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_its_name_a_default_and_a_knob_that_exists(name: str) -> None:
    method = METHODS[name]
    assert method.name == name
    assert "default" in method.presets
    if method.knob is not None:
        assert hasattr(method.presets["default"], method.knob.field)


# CalibAtt's plans are its source's: tests/calibration/test_levels.py
@pytest.mark.parametrize(
    "name", [name for name, kind in METHODS.items() if kind.knob is not None and name != "calibatt"]
)
def test_density_is_monotonic_along_the_knob(name: str) -> None:
    knob = METHODS[name].knob
    assert knob is not None
    q, k = torch.randn(2, 3, 1000, 8, generator=torch.Generator().manual_seed(0))
    values = [knob.low + (knob.high - knob.low) * share for share in (0, 0.01, 0.05, 0.2, 0.5, 1)]
    where = site(step=49, layer=7)
    settings: list[dict[str, Any]] = [{knob.field: value} for value in values]
    # where a default leaves low blocks to the kernel, these do not
    preset = next((one for one in ("no-warmup", "oracle") if one in METHODS[name].presets), "default")
    source: Source | Learnt | None = Source(Plan.dense(where.geometry)) if METHODS[name].offline else None
    if (learner := build_learner(name, preset=preset, block=BLOCK)) is not None:
        learner.watch(q, k, k, where)
        source = Learnt(method=name, preset=preset, geometry=GEOMETRY, steps=50, layers=8, tables=learner.tables())
    built = [build(name, preset=preset, source=source, block=BLOCK, **one) for one in settings]
    if knob.over_videos:
        # what was low at a call is left out from the next on
        for method in built:
            method.plan(q, k, site(step=48, layer=7))
    found = [method.plan(q, k, where).density().mean().item() for method in built]
    assert found in (sorted(found), sorted(found, reverse=True))
    assert abs(found[-1] - found[0]) > 0.1
