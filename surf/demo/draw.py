"""Draw the example world: small scenes from shapes, colours and textures, by this file alone.

A `Style` says how large and how crowded they are: SMALL is the embedded example, LARGE the controlled experiment.
Objects are tables of primitives (`surf.demo.shapes`), drawn at four times their final size and downsampled.
Everything random comes from the `random.Random` that the caller passes, so equal seeds give equal pixels.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from surf.demo.backdrop import paint
from surf.demo.shapes import INKS, SHAPES

SIZE = 64  # pixels, width and height of every image of style SMALL
CELL = 32  # pixels, width of an object slot
OVERSAMPLE = 4  # drawing scale before downsampling
JITTER = 1  # pixels; more makes objects straddle patches, which a four-layer transformer learns far more slowly
HIDINGS = ("small", "fog", "cover")

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (216, 52, 52),
    "blue": (48, 98, 220),
    "green": (52, 164, 76),
    "yellow": (246, 206, 48),
    "purple": (146, 72, 196),
    "orange": (244, 134, 40),
}
MORE_COLORS: dict[str, tuple[int, int, int]] = {  # of style LARGE alone
    "pink": (240, 132, 186),
    "brown": (122, 80, 50),
    "black": (46, 46, 54),
    "white": (246, 246, 246),
    "gray": (142, 146, 152),
    "teal": (36, 170, 170),
}
PAINTS = COLORS | MORE_COLORS
KINDS = tuple(SHAPES)
PLACES: dict[str, tuple[str, ...]] = {  # place -> its own objects, most frequent first
    "park": ("dog", "bench", "kite", "bird"),
    "street": ("car", "bus", "bicycle", "cat"),
    "kitchen": ("cup", "chair", "clock", "vase"),
    "beach": ("boat", "umbrella", "ball", "surfboard"),
}


@dataclass(frozen=True)
class Style:
    """How scenes look. The defaults are the embedded example's."""

    grid: int = 2  # object slots a side
    counts: tuple[int, ...] = (1, 2, 3, 4)  # objects of a scene
    weights: tuple[int, ...] = (1, 2, 4, 3)  # how often each count comes
    colors: tuple[str, ...] = tuple(COLORS)
    backdrops: int = 16  # variants per place
    hidings: tuple[str, ...] = HIDINGS
    fog: tuple[int, int] = (205, 240)  # opacity of fog, of 255

    @property
    def size(self) -> int:
        """Width and height of an image in pixels."""
        return CELL * self.grid

    @cached_property
    def cells(self) -> tuple[tuple[int, int], ...]:
        """Centres of the object slots, pixels."""
        spots = range(self.grid)
        return tuple((CELL // 2 + CELL * column, CELL // 2 + (CELL - 1) * row) for row in spots for column in spots)


SMALL = Style()
# Eight objects of twelve colours: few of 100,000 scenes share by chance what a query leaves in plain sight, so that the
# nearest references are the ones that were made for it.
LARGE = Style(3, (8,), (1,), tuple(PAINTS), 64, ("fog", "fog", "fog", "cover"), (205, 255))
STYLES = {"small": SMALL, "large": LARGE}


@dataclass(frozen=True)
class Item:
    """One object of a scene: kind, colour name and cell (0 … grid² − 1)."""

    kind: str
    color: str
    cell: int


@dataclass(frozen=True)
class Scene:
    """What an image shows: a place and objects of different kinds."""

    place: str
    items: tuple[Item, ...]

    @property
    def kinds(self) -> tuple[str, ...]:
        return tuple(item.kind for item in self.items)


def render(
    scene: Scene, rng: random.Random, noise: float, hidden: dict[str, str] | None = None, style: Style = SMALL
) -> Image.Image:
    """Return an RGB image of the scene, style.size pixels wide and high.

    noise: standard deviation (grey levels); hidden: kind -> one of HIDINGS, for objects made small, fogged or covered.
    """
    image = _backdrop(scene.place, rng.randrange(style.backdrops), style.size).copy()
    for item in scene.items:
        _place_object(image, item, rng, (hidden or {}).get(item.kind, ""), style)
    pixels = np.asarray(image, dtype=np.float32)
    # the light differs between photographs of one scene, so that pixels alone do not give a re-render away
    pixels = pixels * rng.uniform(0.9, 1.08) + rng.uniform(-8, 8)
    grain = np.random.default_rng(rng.getrandbits(63)).normal(0.0, noise, pixels.shape)
    return Image.fromarray(np.clip(pixels + grain, 0, 255).astype(np.uint8))


def _place_object(image: Image.Image, item: Item, rng: random.Random, how: str, style: Style) -> None:
    """Paste one object with a soft shadow at its jittered cell, then hide it if asked."""
    size = rng.randint(12, 15) if how == "small" else rng.randint(26, 29)
    x = style.cells[item.cell][0] + rng.randint(-JITTER, JITTER)
    y = style.cells[item.cell][1] + rng.randint(-JITTER, JITTER)
    sprite = _sprite(item.kind, item.color, size)
    corner = (x - size // 2, y - size // 2)
    shadow = Image.new("RGBA", (size, max(3, size // 7)), (0, 0, 0, 0))
    ImageDraw.Draw(shadow).ellipse((size * 0.15, 0, size * 0.85, shadow.height - 1), fill=(20, 20, 40, 60))
    image.paste(shadow, (corner[0], corner[1] + size - shadow.height // 2), shadow)
    image.paste(sprite, corner, sprite)
    if how == "fog":
        fog = _fog(size + 10, rng.randint(*style.fog))
        image.paste((228, 232, 236), (x - fog.width // 2, y - fog.height // 2), fog)
    elif how == "cover":
        cover = _cover(rng.choice(("bush", "crate")), size + 2)
        side = rng.choice((-1, 1))
        shift = round(size * rng.uniform(0.12, 0.3))
        image.paste(cover, (x - cover.width // 2 + side * shift, y - cover.height // 2 + 1), cover)


@cache
def _sprite(kind: str, color: str, size: int) -> Image.Image:
    """Return the object as RGBA of size x size pixels, with a dark outline."""
    side = size * OVERSAMPLE
    margin = OVERSAMPLE * 1.5
    scale = (side - 2 * margin) / 100
    canvas = Image.new("RGBA", (side, side), (0, 0, 0, 0))
    pen = ImageDraw.Draw(canvas)
    for shape, ink, *rest in SHAPES[kind]:
        _primitive(pen, shape, _ink(ink, PAINTS[color]), rest, scale, margin)
    alpha = canvas.getchannel("A")
    outline = Image.new("RGBA", canvas.size, (*_shade(PAINTS[color], 0.3), 0))
    outline.putalpha(alpha.filter(ImageFilter.MaxFilter(2 * (OVERSAMPLE // 2) + 1)))
    outline.alpha_composite(canvas)
    return outline.resize((size, size), Image.Resampling.BOX)


def _primitive(
    pen: ImageDraw.ImageDraw, shape: str, fill: tuple[int, ...], rest: list[Any], scale: float, margin: float
) -> None:
    """Draw one row of SHAPES; coordinates are per cent of the canvas inside the margin."""
    points = [value * scale + margin for value in rest[0]]
    if shape == "rect":
        pen.rectangle(points, fill=fill)
    elif shape == "round":
        pen.rounded_rectangle(points, radius=rest[1] * scale, fill=fill)
    elif shape == "ellipse":
        pen.ellipse(points, fill=fill)
    elif shape == "ring":
        pen.ellipse(points, outline=fill, width=max(1, round(rest[1] * scale)))
    elif shape == "pie":
        start, end = rest[1]
        pen.pieslice(points, start, end, fill=fill)
    elif shape == "poly":
        pen.polygon(points, fill=fill)
    elif shape == "line":
        pen.line(points, fill=fill, width=max(1, round(rest[1] * scale)), joint="curve")
    else:  # tilt: an ellipse (centre x, y, radii, degrees) turned about its centre
        cx, cy, rx, ry, degrees = rest[0]
        turn = math.radians(degrees)
        ring = [math.tau * step / 40 for step in range(40)]
        spots = [(rx * math.cos(t), ry * math.sin(t)) for t in ring]
        pen.polygon(
            [
                value * scale + margin
                for u, v in spots
                for value in (cx + u * math.cos(turn) - v * math.sin(turn), cy + u * math.sin(turn) + v * math.cos(turn))
            ],
            fill=fill,
        )


def _ink(ink: str, color: tuple[int, int, int]) -> tuple[int, ...]:
    factor = {"c": 1.0, "d": 0.72, "l": 1.0}.get(ink)
    if factor is None:
        return (*INKS[ink], 255)
    shaded = _shade(color, factor)
    return (*(_mix(shaded, (255, 255, 255), 0.38) if ink == "l" else shaded), 255)


def _shade(color: tuple[int, int, int], factor: float) -> tuple[int, int, int]:
    return (round(color[0] * factor), round(color[1] * factor), round(color[2] * factor))


def _mix(one: tuple[int, int, int], two: tuple[int, int, int], share: float) -> tuple[int, int, int]:
    mixed = [round(a + (b - a) * share) for a, b in zip(one, two, strict=True)]
    return (mixed[0], mixed[1], mixed[2])


@cache
def _fog(size: int, strength: int) -> Image.Image:
    """Return a soft round mask (L), at most `strength` opaque."""
    mask = Image.new("L", (size, size), 0)
    ImageDraw.Draw(mask).ellipse((3, 3, size - 4, size - 4), fill=strength)
    return mask.filter(ImageFilter.GaussianBlur(2.2))


@cache
def _cover(kind: str, size: int) -> Image.Image:
    """Return a bush or a crate as RGBA, `size` high and about 0.75 as wide."""
    width, high = round(size * 0.78) * OVERSAMPLE, size * OVERSAMPLE
    canvas = Image.new("RGBA", (width, high), (0, 0, 0, 0))
    pen = ImageDraw.Draw(canvas)
    if kind == "crate":
        pen.rectangle((0, 4, width - 1, high - 1), fill=(120, 88, 60, 255))
        for row in range(4):
            top = 8 + row * (high - 8) // 4
            pen.rectangle((4, top, width - 5, top + (high - 8) // 4 - 5), fill=(196, 156, 112, 255))
        pen.line((6, high - 8, width - 7, 10), fill=(140, 104, 72, 255), width=8)
    else:
        dots = random.Random("bush")
        for step in range(46):
            x, y, r = dots.uniform(0.2, 0.8) * width, dots.uniform(0.16, 0.9) * high, width * dots.uniform(0.14, 0.24)
            tone = (70 + step, 112 + step, 66 + step // 2, 255)
            pen.ellipse((x - r, y - r, x + r, y + r), fill=tone)
    return canvas.resize((width // OVERSAMPLE, size), Image.Resampling.BOX)


@cache
def _backdrop(place: str, variant: int, size: int) -> Image.Image:
    """Return one of the place's backdrops, RGB in pale colours so that the objects stand out."""
    return paint(place, random.Random(f"backdrop:{place}:{variant}"), size, OVERSAMPLE)
