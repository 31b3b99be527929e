"""What captions say and what renders show are the same, and the held-out ones stay out."""

import itertools
import random

import pytest
import torch

from calibatt.models.shapes.reader import alignment, read
from calibatt.models.shapes.scenes import (
    BACKGROUNDS,
    CANVASES,
    COLOURS,
    Canvas,
    Scene,
    Thing,
    canvas_of,
    caption,
    encode,
    held_out,
    held_out_captions,
    parse_caption,
    random_scene,
    render,
)
from calibatt.models.shapes.train import trained_scene

SMALL, LARGE = CANVASES


def _rendered(count: int, *, canvas: Canvas, frames: int, seed: int = 0) -> tuple[torch.Tensor, list[str]]:
    rng = random.Random(seed)
    scenes = [random_scene(rng) for _ in range(count)]
    videos = render(encode(scenes), canvas=canvas, frames=frames, generator=torch.Generator().manual_seed(seed))
    return videos, [caption(scene) for scene in scenes]


def test_every_caption_parses_back_to_its_scene() -> None:
    scenes = [random_scene(random.Random(seed)) for seed in range(2000)]
    assert {len(scene.things) for scene in scenes} == {1, 2, 3}
    assert all(parse_caption(caption(scene)) == scene for scene in scenes)


def test_a_caption_says_its_scene_in_english() -> None:
    red = Thing(colour="red", shape="circle", motion="still")
    blue = Thing(colour="blue", shape="square", motion="left")
    assert caption(Scene(things=(red, blue), background="dots")) == (
        "a red circle, still, and a blue square moving left over dots"
    )


@pytest.mark.parametrize(
    ("text", "blame"),
    [
        ("an orange cat", "unknown word 'an'"),
        ("a red circle moving left", "cannot read"),
        ("a red circle, still, and a red square, still, over dots", "differ in colour"),
    ],
)
def test_what_is_not_in_the_grammar_is_refused_in_one_line(text: str, blame: str) -> None:
    with pytest.raises(ValueError, match=blame) as caught:
        parse_caption(text)
    assert "\n" not in str(caught.value)


def test_held_out_captions_are_never_trained_on() -> None:
    captions = held_out_captions(200, seed=3)
    assert len(set(captions)) == 200
    assert all(held_out(text) for text in captions)
    # the same scene told in another order is held out too
    for scene in map(parse_caption, captions):
        for things in itertools.permutations(scene.things):
            assert held_out(caption(Scene(things=things, background=scene.background)))
    assert not any(held_out(caption(trained_scene(random.Random(seed)))) for seed in range(500))


def test_one_scene_in_eight_is_held_out() -> None:
    out = [held_out(caption(random_scene(random.Random(seed)))) for seed in range(4000)]
    assert 0.10 < sum(out) / len(out) < 0.15


SIZES = [(SMALL, 8), (SMALL, 16), (LARGE, 21)]


@pytest.mark.parametrize(("canvas", "frames"), SIZES)
def test_the_reader_reads_real_renders_and_only_under_their_own_caption(canvas: Canvas, frames: int) -> None:
    videos, captions = _rendered(60, canvas=canvas, frames=frames)
    own = [alignment(video, text) for video, text in zip(videos, captions, strict=True)]
    other = [alignment(video, text) for video, text in zip(videos, captions[1:] + captions[:1], strict=True)]
    assert sum(own) / len(own) >= 0.98
    # a colour is there by chance in a third of the pairs, then shape and motion in a quarter and a fifth of those
    assert sum(other) / len(other) < 0.25


def test_the_reader_bears_softness_but_is_not_gullible() -> None:
    videos, captions = _rendered(30, canvas=SMALL, frames=8)
    soft = torch.nn.functional.avg_pool2d(videos.flatten(0, 1), 3, 1, 1).view_as(videos)
    frozen = videos[:, :, :1].expand_as(videos)
    noise = torch.randn(videos.shape, generator=torch.Generator().manual_seed(1)).clamp(-1, 1)
    blank = torch.full_like(videos, -0.3)

    def mean(shown: torch.Tensor) -> float:
        return sum(alignment(v, t) for v, t in zip(shown, captions, strict=True)) / len(captions)

    assert mean(soft) > 0.95
    assert mean(frozen) < 0.9
    assert mean(noise) == 0
    assert mean(blank) < 0.1


def test_an_object_that_the_caption_does_not_name_costs_its_attributes() -> None:
    text = "a red circle moving left and a blue square, still, over stripes"
    codes, generator = encode([parse_caption(text)]), torch.Generator().manual_seed(0)
    video = render(codes, canvas=SMALL, frames=8, generator=generator)[0]
    assert alignment(video, text) == 1
    assert alignment(video, "a red circle moving left over stripes") == pytest.approx(4 / 7)


@pytest.mark.parametrize(("canvas", "frames"), SIZES[1:])
def test_objects_stay_inside_and_pass_before_each_other(canvas: Canvas, frames: int) -> None:
    rng = random.Random(5)
    scenes = [random_scene(rng) for _ in range(100)]
    videos = render(encode(scenes), canvas=canvas, frames=frames, generator=torch.Generator().manual_seed(5))
    passed = 0
    for scene, video in zip(scenes, videos, strict=True):
        chroma = video.amax(0) - video.amin(0)
        for number, thing in enumerate(scene.things):
            lit = torch.tensor(COLOURS[thing.colour])[:, None, None, None] > 0
            # texture leaves at least 1.2 of a full 2; less is an edge
            full = ((video > (video.amax(0) + video.amin(0)) / 2) == lit).all(0) & (chroma >= 1.2)
            area = full.sum((1, 2)).float()
            # none is cut off or hidden long, and the one named last is never hidden
            assert area.mean() > 0.6 * area.max() > 60
            if number + 1 == len(scene.things):
                assert area.min() > 0.9 * area.max()
            passed += bool(area.min() < 0.8 * area.max())
    assert passed > 15


def test_the_camera_pans_and_textures_go_along() -> None:
    codes = encode([parse_caption("a red circle, still, over dots")] * 40)
    videos = render(codes, canvas=SMALL, frames=8, generator=torch.Generator().manual_seed(0)).mean(1)
    ways = set()
    for video in videos:
        found = [
            (right, down)
            for right in range(-2, 3)
            for down in range(-1, 2)
            # two frames later the same ground, twice as far: right of the middle, where by chance no object is, or left
            if any(
                torch.equal(
                    video[0, 8:56, left : left + 20], video[2, 8 - 2 * down : 56 - 2 * down, left - 2 * right :][:, :20]
                )
                for left in (8, 68)
            )
        ]
        assert len(found) <= 1
        ways.update(found)
    assert len(ways) > 8


def test_patterns_are_read_wherever_the_camera_stands_and_a_texture_alone_is_grey() -> None:
    for canvas in CANVASES:
        codes = encode([parse_caption(f"a red circle, still, over {name}") for name in BACKGROUNDS] * 5)
        videos = render(codes, canvas=canvas, frames=8, generator=torch.Generator().manual_seed(2))
        assert [read(video).background for video in videos] == list(BACKGROUNDS) * 5


def test_a_video_too_long_for_the_picture_is_refused() -> None:
    codes = encode([parse_caption("a red circle, still, over grey")])
    with pytest.raises(ValueError, match="30 frames are too many"):
        render(codes, canvas=SMALL, frames=30, generator=torch.Generator())


def test_a_picture_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match=r"drawn on 64 × 96 or 120 × 208 pixels: got 64 × 64$"):
        canvas_of(64, 64)
