"""Paint the four places of the example world: park, street, kitchen and beach."""

from __future__ import annotations

import random

from PIL import Image, ImageDraw, ImageFilter

Color = tuple[int, int, int]


def paint(place: str, rng: random.Random, size: int, oversample: int) -> Image.Image:
    """Return a `size` x `size` RGB backdrop, drawn larger by `oversample` and downsampled."""
    side = size * oversample
    image = Image.new("RGB", (side, side), (226, 238, 248))
    pen = ImageDraw.Draw(image)
    {"park": _park, "street": _street, "kitchen": _kitchen, "beach": _beach}[place](pen, rng, side)
    image = image.filter(ImageFilter.GaussianBlur(oversample * 0.4))
    return image.resize((size, size), Image.Resampling.BOX)


def _gradient(pen: ImageDraw.ImageDraw, side: int, top: int, bottom: int, start: Color, end: Color) -> None:
    for y in range(top, bottom):
        share = (y - top) / max(1, bottom - top)
        tone = tuple(round(a + (b - a) * share) for a, b in zip(start, end, strict=True))
        pen.line((0, y, side, y), fill=tone)


def _cloud(pen: ImageDraw.ImageDraw, rng: random.Random, side: int) -> None:
    x, y = rng.uniform(0, side), rng.uniform(0.02, 0.16) * side
    for step in range(4):
        r = side * rng.uniform(0.03, 0.06)
        pen.ellipse((x + step * r - r, y - r, x + step * r + r, y + r), fill=(246, 250, 253))


def _park(pen: ImageDraw.ImageDraw, rng: random.Random, side: int) -> None:
    horizon = round(side * rng.uniform(0.34, 0.44))
    _gradient(pen, side, 0, horizon, (176, 214, 242), (222, 238, 246))
    _cloud(pen, rng, side)
    for _ in range(rng.randint(3, 5)):
        x, r = rng.uniform(0, side), side * rng.uniform(0.07, 0.12)
        pen.rectangle((x - r * 0.15, horizon - r, x + r * 0.15, horizon + r * 0.3), fill=(168, 140, 116))
        pen.ellipse((x - r, horizon - 2.4 * r, x + r, horizon - 0.4 * r), fill=(150, 196, 148))
    _gradient(pen, side, horizon, side, (190, 222, 164), (164, 206, 138))
    for _ in range(70):
        x, y = rng.uniform(0, side), rng.uniform(horizon, side)
        pen.line((x, y, x + 3, y - 8), fill=(146, 190, 122), width=2)


def _street(pen: ImageDraw.ImageDraw, rng: random.Random, side: int) -> None:
    curb = round(side * rng.uniform(0.5, 0.58))
    _gradient(pen, side, 0, curb, (206, 220, 232), (228, 232, 236))
    x = 0.0
    while x < side:
        width, top = side * rng.uniform(0.14, 0.24), side * rng.uniform(0.04, 0.2)
        tone = rng.choice(((214, 198, 190), (200, 202, 212), (220, 212, 196), (206, 194, 202)))
        pen.rectangle((x, top, x + width - 3, curb), fill=tone)
        for row in range(4):
            for column in range(2):
                wx, wy = x + width * (0.18 + 0.4 * column), top + side * (0.04 + 0.1 * row)
                pen.rectangle((wx, wy, wx + width * 0.22, wy + side * 0.05), fill=(236, 240, 234))
        x += width
    pen.rectangle((0, curb, side, curb + side * 0.05), fill=(208, 206, 204))
    _gradient(pen, side, round(curb + side * 0.05), side, (156, 158, 164), (140, 142, 150))
    shift = rng.uniform(0, 0.2) * side
    for step in range(-1, 5):
        x = shift + step * side * 0.24
        pen.rectangle((x, side * 0.78, x + side * 0.12, side * 0.8), fill=(238, 238, 232))


def _kitchen(pen: ImageDraw.ImageDraw, rng: random.Random, side: int) -> None:
    floor = round(side * rng.uniform(0.6, 0.7))
    wall = rng.choice(((248, 238, 220), (240, 236, 228), (244, 232, 226)))
    pen.rectangle((0, 0, side, floor), fill=wall)
    step = side // 8
    for line in range(0, side, step):
        pen.line((line, 0, line, floor), fill=(226, 216, 202), width=3)
        if line < floor:
            pen.line((0, line, side, line), fill=(226, 216, 202), width=3)
    shelf = side * rng.uniform(0.46, 0.52)
    pen.rectangle((0, shelf, side, shelf + side * 0.035), fill=(206, 176, 144))
    _gradient(pen, side, floor, side, (222, 196, 164), (206, 176, 142))
    for _ in range(5):
        y = rng.uniform(floor, side)
        pen.line((0, y, side, y), fill=(194, 164, 130), width=3)


def _beach(pen: ImageDraw.ImageDraw, rng: random.Random, side: int) -> None:
    sea, sand = round(side * rng.uniform(0.22, 0.3)), round(side * rng.uniform(0.46, 0.56))
    _gradient(pen, side, 0, sea, (190, 226, 246), (236, 244, 244))
    x = rng.uniform(0.1, 0.9) * side
    pen.ellipse((x - side * 0.06, side * 0.03, x + side * 0.06, side * 0.15), fill=(254, 240, 186))
    _gradient(pen, side, sea, sand, (122, 190, 214), (168, 218, 224))
    for _ in range(9):
        x, y = rng.uniform(0, side), rng.uniform(sea + 4, sand - 4)
        pen.line((x, y, x + side * 0.08, y), fill=(216, 238, 240), width=3)
    _gradient(pen, side, sand, side, (246, 232, 196), (236, 216, 172))
    for _ in range(90):
        x, y = rng.uniform(0, side), rng.uniform(sand + 4, side)
        pen.ellipse((x - 1.5, y - 1.5, x + 1.5, y + 1.5), fill=(222, 198, 152))
