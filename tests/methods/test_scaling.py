"""ScalingAttention's thresholds, curves and levels, worked out by hand."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from calibatt.kernels.geometry import Geometry
from calibatt.methods.energy import block_energy, block_mass
from calibatt.methods.learning import Learnt
from calibatt.methods.scaling import LEVELS, Scaling, ScalingConfig, entry_levels, fidelities, levels, shares
from calibatt.methods.site import Site

# 4 × 4 blocks of 16 tokens
GEOMETRY = Geometry(grid=(4, 4, 4), heads=2, head_dim=8)
SITE = Site(geometry=GEOMETRY, step=1, steps=2, sigma=0.5, branch="cond", layer=0, layers=2)


def config(preset: str = "default", **settings: Any) -> ScalingConfig:
    return replace(Scaling.presets[preset], **{"block": (16, 16), **settings})


def qkv(seed: int, geometry: Geometry = GEOMETRY) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = 2 * torch.randn(3, geometry.heads, geometry.tokens, geometry.head_dim, generator=generator)
    return q, k, v


def merged(settings: ScalingConfig, *seeds: int, site: Site = SITE) -> Mapping[str, Tensor]:
    learner = Scaling.learner(settings)
    notes = [learner.note(*qkv(seed, site.geometry), site, prompt) for prompt, seed in enumerate(seeds)]
    return learner.merge(notes)


Learn = Callable[..., Learnt]


def learnt_from(learn: Learn, settings: ScalingConfig, *seeds: int, site: Site = SITE) -> Learnt:
    return learn("scaling", Scaling.learner(settings), {site: [qkv(seed, site.geometry) for seed in seeds]})


def planned(settings: ScalingConfig, learnt: Learnt, site: Site = SITE) -> Tensor:
    mask = Scaling(settings, learnt).plan(*qkv(99, site.geometry), site).mask
    assert mask is not None
    return mask.keep()


@pytest.mark.parametrize(
    "text", [{}, {"text_tokens": 7, "text_side": "first"}, {"text_tokens": 5, "text_side": "last"}]
)
def test_a_call_is_noted_by_its_mass_as_by_itself(text: dict[str, Any]) -> None:
    learner = Scaling.learner(config(dense_steps=0.5))
    geometry = replace(GEOMETRY, **text)
    site, dense = replace(SITE, geometry=geometry), replace(SITE, geometry=geometry, step=0)
    assert (learner.weighed(site, 0), learner.weighed(dense, 0)) == ((16, 16), None)
    q, k, v = qkv(1, geometry)
    by_mass = learner.note_weighed(block_mass(q, k, block=(16, 16))[0], site)
    for name, note in learner.note(q, k, v, site, 0).items():
        torch.testing.assert_close(by_mass[name], note)


# --- the map ---------------------------------------------------------------------------------------------------------


def test_a_block_enters_with_its_place_in_the_row() -> None:
    energy = torch.tensor([[[0.1, 0.4, 0.2, 0.3]]])
    # places 3, 0, 2, 1: from 4/4, (always), 3/4 and 2/4 on, in 255ths rounded up
    assert entry_levels(energy).tolist() == [[[255, 0, 192, 128]]]


def test_of_equal_blocks_the_first_enters_first() -> None:
    assert entry_levels(torch.full((1, 1, 3), 1 / 3)).tolist() == [[[0, 170, 255]]]


@pytest.mark.parametrize("blocks", [1, 7, 255, 591])
def test_a_level_keeps_as_many_blocks_as_its_share_holds(blocks: int) -> None:
    entered = entry_levels(torch.randn(1, 2, blocks).softmax(-1))
    for level in (0, 1, 100, 254, 255):
        assert ((entered <= level).sum(-1) == max(1, level * blocks // 255)).all()


def test_the_map_has_the_earliest_entry_of_all_prompts() -> None:
    entries = [entry_levels(block_energy(*qkv(seed)[:2], block_q=16, block_k=16)) for seed in (1, 2)]
    assert not torch.equal(*entries)
    assert torch.equal(merged(config(), 1, 2)["map"], torch.minimum(*entries))


@pytest.mark.parametrize("side", ["first", "last"])
def test_text_is_in_every_mask(side: Any, learn: Learn) -> None:
    geometry = replace(GEOMETRY, text_tokens=8, text_side=side)
    site = replace(SITE, geometry=geometry)
    settings = config(density=0.0)
    keep = planned(settings, learnt_from(learn, settings, 1, site=site), site)
    text = 0 if side == "first" else -1
    assert keep[:, text].all()
    assert keep[..., text].all()
    assert not keep.all()


# --- fidelity --------------------------------------------------------------------------------------------------------


def test_fidelity_is_one_less_the_hellinger_distance_of_the_renormalised_row() -> None:
    energy = torch.tensor([[[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]]])
    thresholds = torch.tensor([[[0, 100, 255], [255, 100, 0]]], dtype=torch.uint8)
    fidelity, share = fidelities(energy, thresholds), shares(thresholds)
    for level, kept in ((0, 1), (99, 1), (100, 2), (255, 3)):
        masked = energy * (thresholds <= level)
        masked /= masked.sum(-1, keepdim=True)
        distance = (energy.sqrt() - masked.sqrt()).square().sum(-1).div(2).sqrt()
        assert fidelity[0, level].item() == pytest.approx(1 - distance.mean().item(), abs=1e-6)
        assert share[0, level].item() == pytest.approx(kept / 3)


def test_the_fidelity_is_the_mean_of_the_prompts_and_the_share_that_of_the_common_map() -> None:
    both = merged(config(), 1, 2)
    alone = [merged(config(), seed) for seed in (1, 2)]
    torch.testing.assert_close(both["fidelity"], torch.stack([one["fidelity"] for one in alone]).mean(0))
    # masks that differ hold more blocks together, at every level but the last
    assert (both["share"] >= alone[0]["share"]).all()
    assert torch.equal(both["share"], shares(both["map"]))
    assert not torch.equal(both["share"], alone[0]["share"])


def test_the_common_mask_preserves_at_least_what_the_curve_says() -> None:
    both = merged(config(), 1, 2)
    of_map = [fidelities(block_energy(*qkv(seed)[:2], block_q=16, block_k=16), both["map"]) for seed in (1, 2)]
    assert (torch.stack(of_map).mean(0) >= both["fidelity"] - 1e-6).all()


def test_the_order_of_the_prompts_plays_no_part() -> None:
    one, other = merged(config(), 1, 2, 3), merged(config(), 3, 1, 2)
    for name, table in one.items():
        torch.testing.assert_close(table, other[name])


def test_with_one_prompt_the_curve_is_that_of_its_map() -> None:
    alone = merged(config(), 1)
    energy = block_energy(*qkv(1)[:2], block_q=16, block_k=16)
    assert torch.equal(alone["fidelity"], fidelities(energy, alone["map"]))


# --- densities -------------------------------------------------------------------------------------------------------

SHARE = torch.linspace(0, 1, LEVELS)


def two_heads() -> tuple[Tensor, Tensor]:
    """One site, one head that reaches any fidelity with half the share of the other, and a dense site."""
    fidelity = torch.zeros(1, 2, 2, LEVELS)
    fidelity[0, 0, 0] = (2 * SHARE).clamp(max=1)
    fidelity[0, 0, 1] = SHARE
    return fidelity, SHARE.expand(1, 2, 2, LEVELS)


def test_by_head_all_heads_reach_one_fidelity() -> None:
    found = levels(*two_heads(), config("head-wise", density=0.3))[0, 0].flatten()
    # shares 0.2 and 0.4: fidelity 0.4 for both
    assert found.tolist() == pytest.approx([0.2 * 255, 0.4 * 255], abs=1)


@pytest.mark.parametrize("preset", ["default", "uniform"])
def test_by_site_or_all_the_heads_have_one_density(preset: str) -> None:
    found = levels(*two_heads(), config(preset, density=0.3))[0, 0].flatten()
    assert found.tolist() == pytest.approx([0.3 * 255] * 2, abs=1)


def test_by_site_a_site_that_loses_more_is_denser_and_by_all_it_is_not() -> None:
    # two sites of two equal heads
    fidelity = two_heads()[0][0, 0].view(1, 2, 1, LEVELS).expand(-1, -1, 2, -1)
    share = SHARE.expand(1, 2, 2, LEVELS)
    apart = levels(fidelity, share, config(density=0.3))[0, :, 0].flatten()
    together = levels(fidelity, share, config("uniform", density=0.3))[0, :, 0].flatten()
    assert apart.tolist() == pytest.approx([0.2 * 255, 0.4 * 255], abs=1)
    assert together.tolist() == pytest.approx([0.3 * 255] * 2, abs=1)


@pytest.mark.parametrize("preset", Scaling.presets)
def test_masks_have_the_wanted_density_and_grow_with_it(preset: str, learn: Learn) -> None:
    # 64 × 64 blocks
    settings = config(preset, block=(1, 1))
    learnt = learnt_from(learn, settings, 1, 2)
    masks = [planned(replace(settings, density=share), learnt) for share in (0.1, 0.25, 0.45, 0.7, 1.0)]
    for one, more in pairwise(masks):
        assert (one <= more).all()
    # steps of 1/64 of a row in each of two prompts' share, and of 1/255
    densities = [mask.float().mean().item() for mask in masks]
    assert densities == pytest.approx([0.1, 0.25, 0.45, 0.7, 1.0], abs=0.02)


def test_without_any_density_the_heaviest_block_of_each_prompt_stays(learn: Learn) -> None:
    keep = planned(config(density=0.0), learnt_from(learn, config(), 1, 2))
    expected = torch.zeros_like(keep)
    for seed in (1, 2):
        heaviest = block_energy(*qkv(seed)[:2], block_q=16, block_k=16).argmax(-1, keepdim=True)
        expected.scatter_(-1, heaviest, True)
    assert torch.equal(keep, expected)


# --- where and when --------------------------------------------------------------------------------------------------


def test_both_branches_share_a_mask_that_is_made_once(learn: Learn) -> None:
    made = Scaling(config(), learnt_from(learn, config(), 1))
    q, k, v = qkv(3)
    first = made.plan(q, k, v, SITE)
    made.reset()
    assert made.plan(k, q, v, replace(SITE, branch="uncond")) is first


def test_uniform_is_dense_for_three_tenths_of_the_steps_and_the_default_never(learn: Learn) -> None:
    for preset, dense in (("default", 0), ("uniform", 2)):
        settings = config(preset)
        sites = [replace(SITE, step=step, steps=10) for step in (0, 2, 3, 9)]
        learnt = learn("scaling", Scaling.learner(settings), {site: [qkv(site.step)] for site in sites})
        made = Scaling(settings, learnt)
        kinds = [made.plan(*qkv(0), site).kinds[0] for site in sites]
        assert kinds == ["dense"] * dense + ["masked"] * (4 - dense)
        assert learnt.tables["fidelity"][0, 0].any().item() == (dense == 0)


def test_a_prompt_with_fewer_text_tokens_is_refused_in_one_line(learn: Learn) -> None:
    long, short = (replace(SITE, geometry=replace(GEOMETRY, text_tokens=text)) for text in (16, 8))
    made = Scaling(config(), learnt_from(learn, config(), 1, site=long))
    with pytest.raises(ValueError, match=r"^what scaling learnt is for 16 text tokens, not for 8: run `calibatt"):
        made.plan(*qkv(1, short.geometry), short)


@pytest.mark.parametrize("density", [-0.1, 1.1])
def test_a_density_outside_0_to_1_is_refused(density: float) -> None:
    with pytest.raises(ValueError, match="density is a share"):
        config(density=density)


def test_prompts_of_several_lengths_have_no_common_map() -> None:
    long = replace(SITE, geometry=replace(GEOMETRY, text_tokens=32))
    notes = [Scaling.learner(config()).note(*qkv(1, site.geometry), site, 0) for site in (SITE, long)]
    with pytest.raises(ValueError, match="prompts of one number of text tokens"):
        Scaling.learner(config()).merge(notes)
