"""Reads back from pixels what a video shows, and compares it with a caption."""

from __future__ import annotations

from collections.abc import Mapping
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
    backgrounds,
    canvas_of,
    parse_caption,
    templates,
)

# A pixel belongs to an object where its channels lie this far apart: half of what a fully covered pixel has, so the
# line runs through the middle of a soft edge.
_CHROMA = 1.0
# pixels this colourless are background; those between are edges and count as neither
_COLOURLESS = 0.3
# an object has at least half the pixels of the smallest shape and less than twice those of the largest
_LEAST_AREA, _MOST_AREA = 0.5, 1.9
# of the pixels of a colour, the share that lies around the object's centre; noise spreads over the picture
_COMPACT = 0.8
# of the frames, the share in which the object must be there
_LASTING = 0.8
# overlap (intersection over union) of object and template, averaged over time; a circle and a square share 0.87
_OVERLAP = 0.7
# Pixels a frame at scale 1, against 0, 2 or 3: nearest wins, and what fits none is no motion of this world.
_SPEED_TOLERANCE = 0.75
# root mean square distance, in pixels at scale 1, of the centres from a straight line
_WOBBLE = 1.5
# root mean square distance from the background's greys, which differ by 0.3
_BACKGROUND_ERROR = 0.12


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """One object as the reader saw it.

    Args:
        shape, motion: names, or None where the pixels show none of this world.
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
    bright = video > (high + low) / 2
    things: dict[str, Seen] = {}
    for name, rgb in COLOURS.items():
        lit = torch.tensor(rgb)[:, None, None, None] > 0
        thing = _thing((bright == lit).all(0) & (high - low >= _CHROMA), canvas)
        if thing is not None:
            things[name] = thing
    return Reading(things=things, background=_background(video.mean(0), high - low < _COLOURLESS, canvas))


def _thing(mask: Bool[Tensor, "frames height width"], canvas: Canvas) -> Seen | None:
    """The object that the pixels of one colour make, or None where they make none."""
    shapes, reach = templates(canvas), canvas.reach
    areas = shapes.sum((1, 2))
    rows, columns = torch.arange(mask.shape[1]), torch.arange(mask.shape[2])
    # medians, so that stray pixels elsewhere do not move the centre
    tracks, crops = [], []
    for frame, picture in enumerate(mask):
        y, x = picture.nonzero(as_tuple=True)
        if len(y) == 0:
            continue
        near = ((rows - y.median()).abs() <= reach)[:, None] & ((columns - x.median()).abs() <= reach) & picture
        area = int(near.sum())
        if not (_LEAST_AREA * areas.min() <= area <= _MOST_AREA * areas.max() and area >= _COMPACT * len(y)):
            continue
        y, x = (found.float().mean() for found in near.nonzero(as_tuple=True))
        tracks.append(torch.stack((torch.tensor(float(frame)), x, y)))
        crops.append(_crop(near, int(y.round()), int(x.round()), reach=shapes.shape[-1] // 2))
    if len(tracks) < _LASTING * len(mask):
        return None
    return Seen(
        shape=_shape(torch.stack(crops).float().mean(0), shapes, canvas), motion=_motion(torch.stack(tracks), canvas)
    )


def _crop(picture: Bool[Tensor, "height width"], y: int, x: int, *, reach: int) -> Bool[Tensor, "side side"]:
    padded = torch.nn.functional.pad(picture, (reach, reach, reach, reach))
    return padded[y : y + 2 * reach + 1, x : x + 2 * reach + 1]


def _shape(mean: Float[Tensor, "side side"], shapes: Float[Tensor, "shapes side side"], canvas: Canvas) -> str | None:
    """The shape whose template overlaps most, over shifts by one pixel at scale 1."""
    best = torch.zeros(len(shapes))
    shifts = range(-canvas.scale, canvas.scale + 1)
    for down in shifts:
        for right in shifts:
            moved = mean.roll((down, right), (0, 1))
            overlap = torch.minimum(moved, shapes).sum((1, 2)) / torch.maximum(moved, shapes).sum((1, 2))
            best = torch.maximum(best, overlap)
    return SHAPES[int(best.argmax())] if best.max() >= _OVERLAP else None


def _motion(track: Float[Tensor, "frames 3"], canvas: Canvas) -> str | None:
    """The motion whose velocity the centres (frame, x, y) have."""
    time, places = track[:, :1] - track[:, :1].mean(), track[:, 1:] - track[:, 1:].mean(0)
    velocity = (time * places).sum(0) / time.square().sum()
    wobble = (places - time * velocity).square().sum(1).mean().sqrt()
    off = (canvas.speeds() - velocity).norm(dim=1)
    if wobble > _WOBBLE * canvas.scale or off.min() > _SPEED_TOLERANCE * canvas.scale:
        return None
    return list(MOTIONS)[int(off.argmin())]


def _background(
    grey: Float[Tensor, "frames height width"], free: Bool[Tensor, "frames height width"], canvas: Canvas
) -> str | None:
    """The background whose greys are nearest, judged where no object is."""
    # two objects and their edges cover less than a third of the picture
    if free.float().mean() < 0.5:
        return None
    errors = torch.stack([((grey - pattern)[free] ** 2).mean().sqrt() for pattern in backgrounds(canvas)])
    return BACKGROUNDS[int(errors.argmin())] if errors.min() <= _BACKGROUND_ERROR else None
