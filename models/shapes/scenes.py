"""The model's world: what a caption can say, and videos that show it."""

from __future__ import annotations

import hashlib
import itertools
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from jaxtyping import Float, Int
from torch import Tensor

# the corners of the RGB cube that are not grey: as far apart as six colours can be
COLOURS: Mapping[str, tuple[float, float, float]] = MappingProxyType(
    {
        "red": (1, -1, -1),
        "green": (-1, 1, -1),
        "blue": (-1, -1, 1),
        "yellow": (1, 1, -1),
        "cyan": (-1, 1, 1),
        "magenta": (1, -1, 1),
    }
)
SHAPES = ("circle", "square", "triangle", "cross")
# the way they go: right and down
MOTIONS: Mapping[str, tuple[int, int]] = MappingProxyType(
    {"still": (0, 0), "left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
)
BACKGROUNDS = ("grey", "stripes", "checks", "dots")

# two crossing objects find room in one draw of eighteen or better, so 512 draws fail once in 10^12 videos
_DRAWS = 512
# greys of the patterns and their mean, dark enough that every colour stands out
_DARK, _MEAN, _LIGHT = -0.45, -0.3, -0.15
# one scene in eight is never trained on
_HELD_OUT_ONE_IN = 8
# about 6,000 scenes are held out; far below that, drawing until enough differ is quick
_MOST_HELD_OUT = 2000
# single objects are 1 % of all scenes: drawn by count alone they would never be learnt
ONE_OBJECT_SHARE = 0.3

_EXAMPLE = "a red circle moving left and a blue square, still, over stripes"
_THING = (
    rf"a ({'|'.join(COLOURS)}) ({'|'.join(SHAPES)}) (still|moving (?:{'|'.join(m for m in MOTIONS if m != 'still')}))"
)
_CAPTION = re.compile(rf"{_THING}(?: and {_THING})? over ({'|'.join(BACKGROUNDS)})")
# every word a caption can have
WORDS = ("a", "and", "over", "moving", *COLOURS, *SHAPES, *MOTIONS, *BACKGROUNDS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Canvas:
    """A size of picture; all that is drawn grows with it.

    Args:
        height, width: pixels.
        scale: how large everything is; 1 on the smallest.
        sideways, upright: pixels a frame of what moves: as fast as the longest videos leave room for where an object
            starts. What tells a model left from right is that the two cover other parts of the picture, and that grows
            with the way they go.
    """

    height: int
    width: int
    scale: int
    sideways: int
    upright: int

    @property
    def reach(self) -> int:
        """Pixels from an object's centre to the farthest point of any shape, which is the triangle's top."""
        return 12 * self.scale

    def speeds(self, device: torch.device | str = "cpu") -> Int[Tensor, "motions 2"]:
        """Pixels a frame of every motion, right and down."""
        return torch.tensor(list(MOTIONS.values()), device=device) * torch.tensor(
            [self.sideways, self.upright], device=device
        )


CANVASES = (
    Canvas(height=64, width=96, scale=1, sideways=3, upright=2),
    # with patches of 4 × 4, Wan's own grid at 480p: 30 × 52 tokens a frame
    Canvas(height=120, width=208, scale=2, sideways=6, upright=3),
)


def canvas_of(height: int, width: int) -> Canvas:
    """The canvas of so many pixels.

    Raises:
        ValueError: the world is not drawn at that size.
    """
    for canvas in CANVASES:
        if (canvas.height, canvas.width) == (height, width):
            return canvas
    known = " or ".join(f"{canvas.height} × {canvas.width}" for canvas in CANVASES)
    raise ValueError(f"this world is drawn on {known} pixels: got {height} × {width}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Thing:
    """One object.

    Args:
        colour, shape, motion: names in COLOURS, SHAPES and MOTIONS.

    Raises:
        ValueError: a name is not one of these.
    """

    colour: str
    shape: str
    motion: str

    def __post_init__(self) -> None:
        for value, known in ((self.colour, COLOURS), (self.shape, SHAPES), (self.motion, MOTIONS)):
            if value not in known:
                raise ValueError(f"{value!r} is none of {', '.join(known)}")

    @property
    def phrase(self) -> str:
        """How a caption says it."""
        motion = ", still" if self.motion == "still" else f" moving {self.motion}"
        return f"a {self.colour} {self.shape}{motion}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """What a caption says.

    Args:
        things: one or two objects of different colours.
        background: a name in BACKGROUNDS.

    Raises:
        ValueError: no or too many objects, two of one colour, or an unknown background.
    """

    things: tuple[Thing, ...]
    background: str

    def __post_init__(self) -> None:
        if not 1 <= len(self.things) <= 2:
            raise ValueError(f"a scene has one or two objects: got {len(self.things)}")
        if len({thing.colour for thing in self.things}) < len(self.things):
            raise ValueError(f"two objects of one scene differ in colour: both are {self.things[0].colour}")
        if self.background not in BACKGROUNDS:
            raise ValueError(f"{self.background!r} is none of {', '.join(BACKGROUNDS)}")


def caption(scene: Scene) -> str:
    """The scene in words."""
    said = ""
    for thing in scene.things:
        # the comma that opens ", still" is closed before the next clause
        said += f"{_closing(said)} and {thing.phrase}" if said else thing.phrase
    return f"{said}{_closing(said)} over {scene.background}"


def _closing(said: str) -> str:
    return "," if said.endswith("still") else ""


def words_of(text: str) -> list[str]:
    """The words of a caption, without case and commas."""
    return text.lower().replace(",", " ").split()


def parse_caption(text: str) -> Scene:
    """The scene that a caption describes.

    Raises:
        ValueError: the caption is not in the grammar; says what is.
    """
    words = words_of(text)
    match = _CAPTION.fullmatch(" ".join(words))
    if match is None:
        unknown = [word for word in words if word not in WORDS]
        blame = f"unknown word {unknown[0]!r} in {text!r}" if unknown else f"cannot read {text!r}"
        raise ValueError(
            f"{blame}: write like {_EXAMPLE!r}, with colours {', '.join(COLOURS)}; shapes {', '.join(SHAPES)}; "
            f"{', '.join(MOTIONS)}; backgrounds {', '.join(BACKGROUNDS)}"
        )
    *parts, background = match.groups()
    things = tuple(
        Thing(colour=colour, shape=shape, motion=motion.removeprefix("moving "))
        for colour, shape, motion in (parts[:3], parts[3:])
        if colour is not None
    )
    return Scene(things=things, background=background)


def every_scene() -> Iterator[Scene]:
    """All scenes, those with one object first; two objects come in both orders."""
    things = [Thing(colour=c, shape=s, motion=m) for c, s, m in itertools.product(COLOURS, SHAPES, MOTIONS)]
    for thing, background in itertools.product(things, BACKGROUNDS):
        yield Scene(things=(thing,), background=background)
    for first, second, background in itertools.product(things, things, BACKGROUNDS):
        if first.colour != second.colour:
            yield Scene(things=(first, second), background=background)


def random_scene(rng: random.Random) -> Scene:
    """A scene drawn at random: first the number of objects, then each of their attributes."""
    colours = rng.sample(list(COLOURS), 1 if rng.random() < ONE_OBJECT_SHARE else 2)
    things = tuple(Thing(colour=c, shape=rng.choice(SHAPES), motion=rng.choice(list(MOTIONS))) for c in colours)
    return Scene(things=things, background=rng.choice(BACKGROUNDS))


def held_out(text: str) -> bool:
    """Whether a caption's scene is one of those never trained on, in whichever order it names its objects.

    Raises:
        ValueError: the caption is not in the grammar.
    """
    scene = parse_caption(text)
    key = " ".join([*sorted(thing.phrase for thing in scene.things), scene.background])
    return hashlib.sha256(key.encode()).digest()[0] % _HELD_OUT_ONE_IN == 0


def held_out_captions(count: int, *, seed: int) -> list[str]:
    """Different captions that were never trained on.

    Args:
        count: how many, at most 2,000.
        seed: of the choice.

    Raises:
        ValueError: count is out of range.
    """
    if not 1 <= count <= _MOST_HELD_OUT:
        raise ValueError(f"ask for 1 to {_MOST_HELD_OUT} held-out captions: got {count}")
    rng = random.Random(seed)
    found: dict[str, None] = {}
    while len(found) < count:
        text = caption(random_scene(rng))
        if held_out(text):
            found[text] = None
    return list(found)


def encode(scenes: Sequence[Scene]) -> Int[Tensor, "batch 7"]:
    """Scenes as numbers: colour, shape and motion of two objects, then the background; -1 where there is no object."""
    colours, motions = list(COLOURS), list(MOTIONS)
    rows = []
    for scene in scenes:
        row = [
            n for t in scene.things for n in (colours.index(t.colour), SHAPES.index(t.shape), motions.index(t.motion))
        ]
        rows.append([*row, *[-1] * (6 - len(row)), BACKGROUNDS.index(scene.background)])
    return torch.tensor(rows)


def templates(canvas: Canvas, device: torch.device | str = "cpu") -> Float[Tensor, "shapes side side"]:
    """How much of each pixel a shape covers, 0 to 1, with its centre on the middle pixel and an empty border."""
    scale, reach = canvas.scale, canvas.reach
    line = torch.arange(-reach - 1, reach + 2, dtype=torch.float32, device=device)
    y, x = line[:, None], line[None, :]
    across, along = x.abs().expand(len(line), -1), y.abs().expand(-1, len(line))
    # signed distances in pixels; sizes make shapes as large as the reach allows and their areas alike
    circle = (x**2 + y**2).sqrt() - 10 * scale
    square = torch.maximum(across, along) - 9 * scale
    triangle = torch.maximum(across * 0.75**0.5 - y / 2, y.expand_as(across)) - reach / 2
    long, wide = 10 * scale, 3.5 * scale
    cross = torch.minimum(torch.maximum(across - long, along - wide), torch.maximum(across - wide, along - long))
    return (0.5 - torch.stack((circle, square, triangle, cross))).clamp(0, 1)


def backgrounds(canvas: Canvas, device: torch.device | str = "cpu") -> Float[Tensor, "backgrounds height width"]:
    """The greys behind the objects; patterns always stand at the same place."""
    height, width, cell = canvas.height, canvas.width, 8 * canvas.scale
    y, x = torch.arange(height, device=device)[:, None], torch.arange(width, device=device)[None, :]
    rows, columns = (y // cell % 2).expand(height, width), (x // cell % 2).expand(height, width)
    middle, radius = cell - 0.5, 4.5 * canvas.scale
    dots = ((y % (2 * cell) - middle) ** 2 + (x % (2 * cell) - middle) ** 2 < radius**2).long()
    patterns = torch.stack((rows, rows ^ columns, dots)).float() * (_LIGHT - _DARK) + _DARK
    return torch.cat((torch.full_like(patterns[:1], _MEAN), patterns))


def render(
    codes: Int[Tensor, "batch 7"], *, canvas: Canvas, frames: int, generator: torch.Generator
) -> Float[Tensor, "batch 3 frames height width"]:
    """Videos of scenes, values in [-1, 1], with the objects at random places where they fit and never touch.

    Args:
        codes: what `encode` returns, on the device to draw on.
        canvas: to draw on.
        frames: of each video.
        generator: of the places, on the same device.

    Raises:
        ValueError: an object would leave the picture in that many frames.
    """
    device, reach = codes.device, canvas.reach
    room = torch.tensor([canvas.width - 1 - 2 * reach, canvas.height - 1 - 2 * reach], device=device)
    speeds = canvas.speeds(device)
    if ((frames - 1) * speeds.abs() > room).any():
        raise ValueError(f"{frames} frames are too many: objects would leave the picture")
    present = codes[:, [0, 3]] >= 0
    colour, shape, motion = (codes[:, [n, n + 3]].clamp(min=0) for n in range(3))

    # batch × draws × objects × frames × (x, y)
    path = speeds[motion][:, None, :, None] * torch.arange(frames, device=device)[:, None]
    travel = path[..., -1:, :]
    draw = torch.rand((len(codes), _DRAWS, 2, 1, 2), generator=generator, device=device)
    start = reach - travel.clamp(max=0) + (draw * (room - travel.abs() + 1)).long()
    centres = start + path
    gap = (centres[:, :, 0] - centres[:, :, 1]).abs().amax(-1).amin(-1)
    # the first draw with centres so far apart along one axis that a pixel lies between any two shapes
    chosen = (gap >= 2 * reach - 1).float().argmax(1)
    centre = centres[torch.arange(len(codes), device=device), chosen]

    table = templates(canvas, device)
    rgb = torch.tensor(list(COLOURS.values()), device=device, dtype=torch.float32)
    video = backgrounds(canvas, device)[codes[:, 6]][:, None, None].expand(-1, 3, frames, -1, -1)
    edge = reach + 1
    for thing in range(2):
        x, y = centre[:, thing, :, 0, None], centre[:, thing, :, 1, None]
        column = (torch.arange(canvas.width, device=device) - x + edge).clamp(0, 2 * edge)
        row = (torch.arange(canvas.height, device=device) - y + edge).clamp(0, 2 * edge)
        cover = table[shape[:, thing, None, None, None], row[..., None], column[..., None, :]]
        cover = (cover * present[:, thing, None, None, None])[:, None]
        video = torch.lerp(video, rgb[colour[:, thing]][:, :, None, None, None], cover)
    return video
