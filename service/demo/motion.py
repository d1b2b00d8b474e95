"""Clips of one or two things that move or stand still. Knows no words and no tasks."""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import numpy as np

from service.demo.clips import NUM_BEATS
from service.demo.drawing import CELL_CENTRES, JITTER, Pixels, Spot, draw_spots
from service.demo.scenes import COLOURS, SHAPES

MOTIONS: dict[str, tuple[int, int]] = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1), "still": (0, 0)}
RADIUS = 9.5
Cell = tuple[int, int]  # column and row of the 3x3 grid


@dataclass(frozen=True)
class Mover:
    """One thing; `motion` is one of MOTIONS."""

    shape: str
    colour: str
    motion: str

    @property
    def key(self) -> str:
        """Identity of what is told."""
        return f"{self.colour} {self.shape} {self.motion}"


@dataclass(frozen=True)
class MovingScene:
    """Things that share no shape, no colour and no motion. `grain` seeds what no caption tells: places and speeds."""

    movers: tuple[Mover, ...]
    grain: int


def random_movers(rng: Random) -> tuple[Mover, ...]:
    """One or two, in a random order."""
    count = rng.choice((1, 2, 2))
    chosen = zip(rng.sample(SHAPES, count), rng.sample(COLOURS, count), rng.sample(list(MOTIONS), count), strict=True)
    return tuple(Mover(*names) for names in chosen)


def by_shape(movers: Sequence[Mover]) -> tuple[Mover, ...]:
    """In the one order that a clip shows and does not depend on where its things are: that of their shapes."""
    return tuple(sorted(movers, key=lambda mover: SHAPES.index(mover.shape)))


def draw_clip(scene: MovingScene) -> Pixels:
    """The clip's 8 sampled frames, uint8 `[8, 64, 64, 3]`; equal scenes give equal pixels."""
    rng = Random(scene.grain)
    paths = _paths(scene.movers, rng)
    light = rng.getrandbits(32)  # the same background in every frame
    frames = [
        draw_spots(
            [_spot(mover, path[beat]) for mover, path in zip(scene.movers, paths, strict=True)],
            Random(light),
        )
        for beat in range(NUM_BEATS)
    ]
    return np.stack(frames)


def _spot(mover: Mover, at: np.ndarray) -> Spot:
    x, y = at.tolist()
    return Spot(mover.shape, mover.colour, x, y, RADIUS)


def _paths(movers: Sequence[Mover], rng: Random) -> list[np.ndarray]:
    """Where each thing is in each frame, [8, 2]. What moves covers two cells or three; no two enter the same cell."""
    while True:
        courses = [_course(MOTIONS[mover.motion], rng) for mover in movers]
        entered = [cell for course in courses for cell in course]
        if len(set(entered)) == len(entered):
            return [_path(course[0], course[-1], rng) for course in courses]


def _course(step: tuple[int, int], rng: Random) -> list[Cell]:
    """The cells that a thing enters."""
    while True:
        column, row = rng.randrange(3), rng.randrange(3)
        length = rng.choice((1, 2)) if any(step) else 0
        course = [(column + step[0] * i, row + step[1] * i) for i in range(length + 1)]
        if all(0 <= place < 3 for place in course[-1]):
            return course


def _path(start: Cell, end: Cell, rng: Random) -> np.ndarray:
    jitter = np.array([rng.uniform(-JITTER, JITTER), rng.uniform(-JITTER, JITTER)])
    first, last = (np.array([CELL_CENTRES[place] for place in cell]) + jitter for cell in (start, end))
    path: np.ndarray = first + (last - first) * np.linspace(0.0, 1.0, NUM_BEATS)[:, None]
    return path
