"""Reads back from pixels what a video shows, and compares it with a caption."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from calibatt.models.shapes.scenes import (
    BACKGROUNDS,
    COLOURS,
    MOTIONS,
    SHAPES,
    Canvas,
    canvas_of,
    parse_caption,
    patterns,
    templates,
)

# A pixel belongs to an object where its channels lie this far apart: half of what a fully covered pixel has, so the
# line runs through the middle of a soft edge; where a texture is darkest, a third of a pixel further in.
_CHROMA = 1.0
# pixels this colourless are background; those between are edges and count as neither
_COLOURLESS = 0.3
# An object has, in the mean over frames, at least so much of the smallest shape, of which others hide a part, and
# less than twice the largest.
_LEAST_AREA, _MOST_AREA = 0.5, 1.9
# Overlap (intersection over union) of all that has the colour with a shape that goes one way, over all frames, less
# what other objects cover. A circle and a square share 0.87; an object that comes twice has half.
_OVERLAP = 0.7
# root mean square distance from the background's greys, which differ by 0.3
_BACKGROUND_ERROR = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """One object as the reader saw it.

    Args:
        shape, motion: names, or None where the pixels show no shape of this world in one of its motions.
    """

    shape: str | None
    motion: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What a video shows.

    Args:
        things: the objects by colour.
        background: its name, or None where it is none of this world.
    """

    things: Mapping[str, Seen]
    background: str | None


def alignment(video: Float[Tensor, "3 frames height width"], caption: str) -> float:
    """The fraction of the caption's attributes that the video shows, 0 to 1.

    Each object of the caption has three: that its colour is there, the shape and the motion of what has that colour.
    The background is one more. An object that the caption does not name counts as three that are wrong.

    Args:
        video: values in [-1, 1], on the CPU.
        caption: in the model's grammar.

    Raises:
        ValueError: the caption is not in the grammar, or the world is not drawn at the video's height and width.
    """
    right = [ok for attribute in attributes(video, caption).values() for ok in attribute]
    return sum(right) / len(right)


def attributes(video: Float[Tensor, "3 frames height width"], caption: str) -> dict[str, list[bool]]:
    """For colour, shape, motion and background, whether each that the caption names or the video adds is right.

    Args, Raises: as `alignment`.
    """
    scene, shown = parse_caption(caption), read(video)
    seen = [shown.things.get(thing.colour) for thing in scene.things]
    extra = [False] * (len(shown.things) - len(scene.things))
    pairs = list(zip(scene.things, seen, strict=True))
    return {
        "colour": [one is not None for one in seen] + extra,
        "shape": [one is not None and one.shape == thing.shape for thing, one in pairs] + extra,
        "motion": [one is not None and one.motion == thing.motion for thing, one in pairs] + extra,
        "background": [shown.background == scene.background],
    }


def read(video: Float[Tensor, "3 frames height width"]) -> Reading:
    """What the video shows.

    Args:
        video: values in [-1, 1], on the CPU.

    Raises:
        ValueError: the world is not drawn at the video's height and width.
    """
    canvas = canvas_of(*video.shape[-2:])
    video = video.float().clamp(-1, 1)
    high, low = video.amax(0), video.amin(0)
    bright, coloured = video > (high + low) / 2, high - low >= _CHROMA
    things: dict[str, Seen] = {}
    for name, rgb in COLOURS.items():
        lit = torch.tensor(rgb)[:, None, None, None] > 0
        mask = (bright == lit).all(0) & coloured
        thing = _thing(mask, _widened(coloured & ~mask), canvas)
        if thing is not None:
            things[name] = thing
    return Reading(things=things, background=_background(video.mean(0), high - low < _COLOURLESS, canvas))


def _widened(mask: Bool[Tensor, "frames height width"]) -> Bool[Tensor, "frames height width"]:
    """With the pixels around, which are edges."""
    return torch.nn.functional.max_pool2d(mask[:, None].float(), 3, stride=1, padding=1)[:, 0] > 0


def _thing(
    mask: Bool[Tensor, "frames height width"], covered: Bool[Tensor, "frames height width"], canvas: Canvas
) -> Seen | None:
    """The object that the pixels of one colour make, or None where they make none.

    Args:
        mask: its pixels.
        covered: those where it may be behind others.
        canvas: of the video.
    """
    shapes = templates(canvas)
    areas = shapes.sum((1, 2))
    area = mask.sum() / len(mask)
    if not _LEAST_AREA * areas.min() <= area <= _MOST_AREA * areas.max():
        return None
    overlaps = torch.stack([_overlaps(mask, covered, speed, shapes) for speed in canvas.speeds().tolist()])
    motion, shape = divmod(int(overlaps.argmax()), len(SHAPES))
    if overlaps.max() < _OVERLAP:
        return Seen(shape=None, motion=None)
    return Seen(shape=SHAPES[shape], motion=list(MOTIONS)[motion])


def _overlaps(
    mask: Bool[Tensor, "frames height width"],
    covered: Bool[Tensor, "frames height width"],
    speed: Sequence[int],
    shapes: Float[Tensor, "shapes side side"],
) -> Float[Tensor, " shapes"]:
    """The largest overlap of each shape that goes at one speed (right, down), over all places where it may begin."""
    frames, height, width = mask.shape
    margin = shapes.shape[-1] // 2
    room = (height + 2 * margin, width + 2 * margin)
    # frame by frame as one sees it who goes with the object: what has the colour, and what could show it
    seen, open_ = torch.zeros(2, *room)
    for frame in range(frames):
        right, down = (step * frame for step in speed)
        for sums, picture in ((seen, mask[frame]), (open_, ~covered[frame])):
            top, left = max(0, down), max(0, right)
            bottom, end = min(height, height + down), min(width, width + right)
            sums[margin + top - down : margin + bottom - down, margin + left - right : margin + end - right] += picture[
                top:bottom, left:end
            ]
    within, possible = _correlated(torch.stack((seen, open_)), shapes)
    # what has the colour and cannot be the object's, since it is out of the picture then, counts too
    overlap: Tensor = within / (possible + mask.sum() - within)
    return overlap.flatten(1).amax(1)


def _correlated(
    sums: Float[Tensor, "two rows columns"], shapes: Float[Tensor, "shapes side side"]
) -> Float[Tensor, "two shapes rows columns"]:
    """Sums below each shape at each place, which is its corner's; places wrap around, where only the margin is."""
    size = sums.shape[-2:]
    spectra = torch.fft.rfft2(sums)[:, None] * torch.fft.rfft2(shapes, s=size).conj()
    found: Tensor = torch.fft.irfft2(spectra, s=size)
    return found


def _background(
    grey: Float[Tensor, "frames height width"], free: Bool[Tensor, "frames height width"], canvas: Canvas
) -> str | None:
    """The background whose greys are nearest, wherever it begins, judged where no object is, over all frames."""
    # three objects and their edges cover less than a third of the picture
    if free.float().mean() < 0.5:
        return None
    period, known = canvas.period, patterns(canvas)
    # frames as one period: means over all its places in the picture
    pad = (0, -grey.shape[2] % period, 0, -grey.shape[1] % period)
    folded = [
        torch.nn.functional.pad(part, pad).unflatten(2, (-1, period)).unflatten(1, (-1, period)).sum((1, 3))
        for part in (grey * free, free.float())
    ]
    mean = folded[0] / folded[1].clamp(min=1)
    # the squared distance at every shift: of a constant pattern, and of those with one, by their correlation
    spectra = torch.fft.rfft2(mean)[:, None] * torch.fft.rfft2(known).conj()
    both = torch.fft.irfft2(spectra, s=(period, period)).amax((-1, -2))
    squares = mean.square().sum((1, 2))[:, None] + known.square().sum((1, 2)) - 2 * both
    errors = (squares.clamp(min=0) / period**2).sqrt().mean(0)
    return BACKGROUNDS[int(errors.argmin())] if errors.min() <= _BACKGROUND_ERROR else None
