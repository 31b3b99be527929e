"""The model's world: what a caption can say, and videos that show it."""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from jaxtyping import Bool, Float, Int
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

# of the pixels of an object, how many others may hide, at most, in the mean over the frames
_MOST_HIDDEN = 0.3
# Three objects hide no more of each other in a third of all draws; where all go one way at the large size, in one of
# forty, and then one video in twenty has no such draw among these.
_DRAWS = 128
# greys of the patterns and their mean, dark enough that every colour stands out
_DARK, _MEAN, _LIGHT = -0.45, -0.3, -0.15
# how much lighter or darker than that a place can be, and how much of its colour a place of an object
# can lack
_TEXTURE, _SHADE = 0.2, 0.4
# pixels, at scale 1, from one independent value of a texture to the next: each token of the smaller sizes has its own
_GRAIN = 4
# pixels a frame that the camera goes at most, at scale 1, sideways and upright: slower than objects do
_PAN = (2, 1)
# one scene in eight is never trained on
_HELD_OUT_ONE_IN = 8
# of some 486,000; far below that, drawing until enough differ is quick
_MOST_HELD_OUT = 2000
# of scenes with one, two and three objects: drawn by the number of scenes there are, nearly all would have three
_SHARES = (0.3, 0.4, 0.3)
MOST_OBJECTS = len(_SHARES)

_EXAMPLE = "a red circle moving left and a blue square, still, over stripes"
_THING = (
    rf"a ({'|'.join(COLOURS)}) ({'|'.join(SHAPES)}) (still|moving (?:{'|'.join(m for m in MOTIONS if m != 'still')}))"
)
_CAPTION = re.compile(rf"{_THING}{rf'(?: and {_THING})?' * (MOST_OBJECTS - 1)} over ({'|'.join(BACKGROUNDS)})")
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
    def period(self) -> int:
        """Pixels after which the patterns of backgrounds repeat, in both directions."""
        return 16 * self.scale

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
        things: one to three objects of different colours; those named later pass before those named earlier.
        background: a name in BACKGROUNDS.

    Raises:
        ValueError: no or too many objects, two of one colour, or an unknown background.
    """

    things: tuple[Thing, ...]
    background: str

    def __post_init__(self) -> None:
        if not 1 <= len(self.things) <= MOST_OBJECTS:
            raise ValueError(f"a scene has 1 to {MOST_OBJECTS} objects: got {len(self.things)}")
        colours = [thing.colour for thing in self.things]
        for colour in colours:
            if colours.count(colour) > 1:
                raise ValueError(f"objects of one scene differ in colour: two are {colour}")
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
        for colour, shape, motion in zip(parts[::3], parts[1::3], parts[2::3], strict=True)
        if colour is not None
    )
    return Scene(things=things, background=background)


def random_scene(rng: random.Random) -> Scene:
    """A scene drawn at random: first the number of objects, then each of their attributes."""
    (count,) = rng.choices(range(1, MOST_OBJECTS + 1), _SHARES)
    colours = rng.sample(list(COLOURS), count)
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


def encode(scenes: Sequence[Scene]) -> Int[Tensor, "batch 10"]:
    """Scenes as numbers: colour, shape and motion of three objects, then the background; -1 where there is none."""
    colours, motions = list(COLOURS), list(MOTIONS)
    rows = []
    for scene in scenes:
        row = [
            n for t in scene.things for n in (colours.index(t.colour), SHAPES.index(t.shape), motions.index(t.motion))
        ]
        rows.append([*row, *[-1] * (3 * MOST_OBJECTS - len(row)), BACKGROUNDS.index(scene.background)])
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


def patterns(canvas: Canvas, device: torch.device | str = "cpu") -> Float[Tensor, "backgrounds period period"]:
    """The greys behind the objects, without texture: what repeats in both directions."""
    period, cell = canvas.period, canvas.period // 2
    y, x = torch.arange(period, device=device)[:, None], torch.arange(period, device=device)[None, :]
    rows, columns = (y // cell).expand(period, period), (x // cell).expand(period, period)
    middle, radius = cell - 0.5, 4.5 * canvas.scale
    dots = ((y - middle) ** 2 + (x - middle) ** 2 < radius**2).long()
    drawn = torch.stack((rows, rows ^ columns, dots)).float() * (_LIGHT - _DARK) + _DARK
    return torch.cat((torch.full_like(drawn[:1], _MEAN), drawn))


def render(
    codes: Int[Tensor, "batch 10"], *, canvas: Canvas, frames: int, generator: torch.Generator
) -> Float[Tensor, "batch 3 frames height width"]:
    """Videos of scenes, values in [-1, 1]: objects at random places where they fit, before a ground that a camera pans.

    Args:
        codes: what `encode` returns, on the device to draw on.
        canvas: to draw on.
        frames: of each video.
        generator: of places, textures and the camera, on the same device.

    Raises:
        ValueError: an object would leave the picture in that many frames.
    """
    device, batch = codes.device, torch.arange(len(codes), device=codes.device)
    present = codes[:, :-1:3] >= 0
    colour, shape, motion = (codes[:, n:-1:3].clamp(min=0) for n in range(3))
    centre = _places(present, motion, canvas=canvas, frames=frames, generator=generator)
    table = templates(canvas, device)
    side = table.shape[-1]
    rgb = torch.tensor(list(COLOURS.values()), device=device, dtype=torch.float32)
    shade = _texture(len(codes) * MOST_OBJECTS, side, side, canvas.scale * _GRAIN, generator)
    shade = 1 - _SHADE * (1 + shade.view(len(codes), MOST_OBJECTS, side, side)) / 2
    video = _grounds(codes[:, -1], canvas=canvas, frames=frames, generator=generator)
    video = video[:, None].expand(-1, 3, -1, -1, -1)
    for thing in range(MOST_OBJECTS):
        x, y = centre[:, thing, :, 0, None], centre[:, thing, :, 1, None]
        column = (torch.arange(canvas.width, device=device) - x + side // 2).clamp(0, side - 1)[..., None, :]
        row = (torch.arange(canvas.height, device=device) - y + side // 2).clamp(0, side - 1)[..., None]
        cover = table[shape[:, thing, None, None, None], row, column] * present[:, thing, None, None, None]
        shown = shade[batch[:, None, None, None], thing, row, column]
        video = torch.lerp(video, rgb[colour[:, thing]][:, :, None, None, None] * shown[:, None], cover[:, None])
    return video


def _places(
    present: Bool[Tensor, "batch objects"],
    motion: Int[Tensor, "batch objects"],
    *,
    canvas: Canvas,
    frames: int,
    generator: torch.Generator,
) -> Int[Tensor, "batch objects frames 2"]:
    """Where the centres of objects are, right and down: inside the picture, and no object hidden too long."""
    device, reach = present.device, canvas.reach
    room = torch.tensor([canvas.width - 1 - 2 * reach, canvas.height - 1 - 2 * reach], device=device)
    speeds = canvas.speeds(device)
    if ((frames - 1) * speeds.abs() > room).any():
        raise ValueError(f"{frames} frames are too many: objects would leave the picture")
    # batch × draws × objects × frames × (x, y)
    path = speeds[motion][:, None, :, None] * torch.arange(frames, device=device)[:, None]
    travel = path[..., -1:, :]
    draw = torch.rand((len(present), _DRAWS, MOST_OBJECTS, 1, 2), generator=generator, device=device)
    centres = reach - travel.clamp(max=0) + (draw * (room - travel.abs() + 1)).long() + path
    # by the boxes around them, which are larger than what they hold
    most = torch.zeros(centres.shape[:2], device=device)
    for behind in range(MOST_OBJECTS):
        hidden = torch.zeros_like(most)
        for before in range(behind + 1, MOST_OBJECTS):
            apart = (centres[:, :, behind] - centres[:, :, before]).abs() / (2 * reach + 1)
            shared = (1 - apart).clamp(min=0).prod(-1).mean(-1)
            hidden += shared * (present[:, before] & present[:, behind])[:, None]
        most = most.maximum(hidden)
    # the first draw that will do; should none, the best
    chosen = torch.where((most <= _MOST_HIDDEN).any(1), (most <= _MOST_HIDDEN).float().argmax(1), most.argmin(1))
    return centres[torch.arange(len(present), device=device), chosen]


def _grounds(
    background: Int[Tensor, " batch"], *, canvas: Canvas, frames: int, generator: torch.Generator
) -> Float[Tensor, "batch frames height width"]:
    """Patterns and their texture, as a camera sees them that goes at one speed, which is each video's own."""
    device, batch = background.device, torch.arange(len(background), device=background.device)
    most = torch.tensor(_PAN, device=device) * canvas.scale
    draw = torch.rand((len(background), 2, 2), generator=generator, device=device)
    speed = (draw[:, 0] * (2 * most + 1)).long() - most
    path = speed[:, None] * torch.arange(frames, device=device)[:, None]
    # so that no place is below 0
    path = path - path.amin(1, keepdim=True)
    reach = most * (frames - 1)
    width, height = canvas.width + int(reach[0]), canvas.height + int(reach[1])
    texture = _TEXTURE * _texture(len(background), height, width, canvas.scale * _GRAIN, generator)
    phase = (draw[:, 1] * canvas.period).long()[:, None]
    columns = torch.arange(canvas.width, device=device) + path[..., 0, None]
    rows = torch.arange(canvas.height, device=device) + path[..., 1, None]
    drawn = patterns(canvas, device)[
        background[:, None, None, None],
        ((rows + phase[..., 1, None]) % canvas.period)[..., None],
        ((columns + phase[..., 0, None]) % canvas.period)[..., None, :],
    ]
    return drawn + texture[batch[:, None, None, None], rows[..., None], columns[..., None, :]]


def _texture(
    count: int, height: int, width: int, grain: int, generator: torch.Generator
) -> Float[Tensor, "count height width"]:
    """Value noise in [-1, 1]: independent values so many pixels apart, and straight lines between them."""
    size = (-(-height // grain) + 1, -(-width // grain) + 1)
    values = torch.rand((count, 1, *size), generator=generator, device=generator.device) * 2 - 1
    smooth = torch.nn.functional.interpolate(
        values, size=((size[0] - 1) * grain + 1, (size[1] - 1) * grain + 1), mode="bilinear", align_corners=True
    )
    return smooth[:, 0, :height, :width]
