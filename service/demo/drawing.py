"""Draws scenes and charts with Pillow at 4x the size, then averages down. Knows no words and no tasks.

Lengths below are in units of a 64 px picture unless a name says `_px`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from random import Random

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageChops, ImageDraw

from service.demo.scenes import BAR_LEVELS, PLACES, Chart, Scene, Thing

Pixels = NDArray[np.uint8]
Rgb = tuple[int, int, int]
Point = tuple[float, float]

OVERSAMPLING = 4
UNITS = 64
RADIUS = {"big": 9.5, "small": 6.2}
CELL_CENTRES = (11.5, 32.0, 52.5)
JITTER = 0.75

INK: dict[str, Rgb] = {
    "red": (222, 32, 32),
    "orange": (255, 136, 0),
    "yellow": (244, 220, 28),
    "green": (28, 146, 48),
    "cyan": (0, 196, 216),
    "blue": (36, 64, 220),
    "purple": (160, 40, 184),
    "black": (16, 16, 18),
}
CHALK: dict[str, Rgb] = INK | {
    "red": (240, 60, 70),
    "green": (60, 200, 90),
    "blue": (90, 130, 255),
    "purple": (205, 110, 235),
    "black": (248, 248, 240),  # black chalk would not show: the sketches' words call this one ivory
}
PAPER: dict[str, Rgb] = {
    "white": (250, 250, 250),
    "grey": (164, 166, 168),
    "pink": (252, 190, 206),
    "beige": (222, 202, 160),
    "dark": (78, 80, 90),
    "paper": (38, 42, 52),
}
LIGHT_TONES = (228, 250)
PATTERN_INK_ON_PALE: Rgb = (20, 20, 20)
PATTERN_INK_ON_DEEP: Rgb = (252, 252, 252)
PALE_COLOURS = frozenset(("orange", "yellow", "cyan"))


@dataclass(frozen=True)
class Spot:
    """A shape of a colour somewhere: its middle and its radius."""

    shape: str
    colour: str
    x: float
    y: float
    radius: float


def draw(picture: Scene | Chart, size: int = 64) -> Pixels:
    """The picture as uint8 `[size, size, 3]`; equal pictures give equal pixels."""
    rng = Random(picture.grain)
    if isinstance(picture, Chart):
        return np.asarray(_draw_chart(picture, size, rng).reduce(OVERSAMPLING))
    canvas = Image.new("RGB", (size * OVERSAMPLING,) * 2, _background(picture.background, rng))
    for thing in picture.things:
        _draw_thing(canvas, thing, picture.style, rng)
    pixels = np.asarray(canvas.reduce(OVERSAMPLING))
    strength = picture.noise + (9.0 if picture.background == "paper" else 0.0)
    return _with_noise(pixels, strength, rng) if strength else pixels


def draw_spots(spots: Sequence[Spot], rng: Random, size: int = 64) -> Pixels:
    """Filled shapes anywhere on a light background, later ones before earlier ones, as uint8 `[size, size, 3]`."""
    side_px = size * OVERSAMPLING
    scale = side_px / UNITS
    canvas = Image.new("RGB", (side_px, side_px), _background("light", rng))
    pen = ImageDraw.Draw(canvas)
    for spot in spots:
        pen.polygon(_outline(spot.shape, spot.x, spot.y, spot.radius, scale), fill=INK[spot.colour])
    return np.asarray(canvas.reduce(OVERSAMPLING))


def _background(name: str, rng: Random) -> Rgb:
    if name == "light":
        return (rng.randint(*LIGHT_TONES), rng.randint(*LIGHT_TONES), rng.randint(*LIGHT_TONES))
    red, green, blue = PAPER[name]
    shift = rng.randint(-5, 5)
    return (red + shift, green + shift, blue + shift)


def _draw_thing(canvas: Image.Image, thing: Thing, style: str, rng: Random) -> None:
    scale = canvas.width / UNITS
    outline = _placed(thing, rng, scale)
    pen = ImageDraw.Draw(canvas)
    if style == "sketch":
        _sketch(pen, outline, CHALK[thing.colour], scale, rng)
        return
    pen.polygon(outline, fill=INK[thing.colour])
    if thing.pattern != "plain":
        _overlay_pattern(canvas, outline, thing, scale)


def _placed(thing: Thing, rng: Random, scale: float) -> list[Point]:
    """The thing's outline in canvas pixels, moved by the jitter."""
    row, column = divmod(PLACES.index(thing.place), 3)
    x = CELL_CENTRES[column] + rng.uniform(-JITTER, JITTER)
    y = CELL_CENTRES[row] + rng.uniform(-JITTER, JITTER)
    return _outline(thing.shape, x, y, RADIUS[thing.size], scale)


def _outline(shape: str, x: float, y: float, radius: float, scale: float) -> list[Point]:
    return [((x + dx * radius) * scale, (y + dy * radius) * scale) for dx, dy in _unit_outline(shape)]


@cache
def _unit_outline(shape: str) -> tuple[Point, ...]:
    """A shape as a polygon in the circle of radius 1 around the origin, y pointing down."""
    if shape == "circle":
        return _ring([1.0] * 40)
    if shape == "star":
        return _ring([1.06, 0.44] * 5)
    if shape == "square":
        return ((-0.86, -0.86), (0.86, -0.86), (0.86, 0.86), (-0.86, 0.86))
    if shape == "triangle":
        return ((0.0, -0.98), (0.98, 0.82), (-0.98, 0.82))
    if shape == "diamond":
        return ((0.0, -1.05), (0.68, 0.0), (0.0, 1.05), (-0.68, 0.0))
    return _cross(arm=0.32)


def _ring(radii: Sequence[float]) -> tuple[Point, ...]:
    """Points around the origin at the given distances, clockwise from the top."""
    turn = 2 * math.pi / len(radii)
    return tuple((radius * math.sin(i * turn), -radius * math.cos(i * turn)) for i, radius in enumerate(radii))


def _cross(arm: float) -> tuple[Point, ...]:
    quarter = ((-arm, -1.0), (arm, -1.0), (arm, -arm))
    points = list(quarter)
    for _ in range(3):
        quarter = tuple((-y, x) for x, y in quarter)  # type: ignore[assignment]
        points.extend(quarter)
    return tuple(points)


def _sketch(pen: ImageDraw.ImageDraw, outline: list[Point], colour: Rgb, scale: float, rng: Random) -> None:
    """Two passes of an unsteady hand around the outline."""
    for _ in range(2):
        wobble = 0.45 * scale
        stroke = [(x + rng.uniform(-wobble, wobble), y + rng.uniform(-wobble, wobble)) for x, y in outline]
        pen.line([*stroke, stroke[0], stroke[1]], fill=colour, width=round(1.3 * scale), joint="curve")


def _overlay_pattern(canvas: Image.Image, outline: list[Point], thing: Thing, scale: float) -> None:
    """Lays the pattern's ink over the thing, within its bounding box only."""
    left, top = (math.floor(min(axis)) for axis in zip(*outline, strict=True))
    side_px = math.ceil(2.2 * RADIUS[thing.size] * scale)
    inside = Image.new("L", (side_px, side_px), 0)
    ImageDraw.Draw(inside).polygon([(x - left, y - top) for x, y in outline], fill=255)
    ink = PATTERN_INK_ON_PALE if thing.colour in PALE_COLOURS else PATTERN_INK_ON_DEEP
    canvas.paste(ink, (left, top), ImageChops.multiply(inside, _pattern(thing.pattern, side_px, scale)))


@lru_cache(maxsize=64)
def _pattern(name: str, side_px: int, scale: float) -> Image.Image:
    """Where the pattern has ink: a mask of side_px squared."""
    y, x = np.mgrid[0:side_px, 0:side_px] / scale
    if name == "striped":
        inked = (x + y) % 5.2 < 1.9
    elif name == "dotted":
        inked = (x % 5.2 - 2.6) ** 2 + (y % 5.2 - 2.6) ** 2 < 1.55**2
    else:
        inked = (x % 8.4 < 4.2) ^ (y % 8.4 < 4.2)
    return Image.fromarray((inked * 255).astype(np.uint8), "L")


def _draw_chart(chart: Chart, size: int, rng: Random) -> Image.Image:
    """Bars on a base line; their widths share the picture's width."""
    scale = size * OVERSAMPLING / UNITS
    canvas = Image.new("RGB", (size * OVERSAMPLING,) * 2, _background("light", rng))
    pen = ImageDraw.Draw(canvas)
    ground, pitch, step = 60.0, 58.0 / len(chart.bars), 54.0 / BAR_LEVELS
    width = pitch * rng.uniform(0.62, 0.74)
    for index, bar in enumerate(chart.bars):
        middle = 4.0 + pitch * (index + 0.5)
        top = ground - step * bar.level + rng.uniform(-0.8, 0.8)
        box = (middle - width / 2, top, middle + width / 2, ground)
        pen.rectangle(tuple(edge * scale for edge in box), fill=INK[bar.colour])
    pen.line([(3 * scale, 3 * scale), (3 * scale, ground * scale), (62 * scale, ground * scale)], (90, 90, 90), 4)
    return canvas


def _with_noise(pixels: Pixels, strength: float, rng: Random) -> Pixels:
    """The pixels with grey noise of that standard deviation, cut from a fixed field so that it costs little."""
    height, width, _ = pixels.shape
    field = _noise_field()
    top, left = rng.randrange(field.shape[0] - height), rng.randrange(field.shape[1] - width)
    noise = field[top : top + height, left : left + width, None] * np.float32(strength)
    return np.clip(pixels + noise, 0, 255).astype(np.uint8)


@cache
def _noise_field() -> NDArray[np.float32]:
    return np.random.default_rng(0).standard_normal((512, 512), dtype=np.float32)
