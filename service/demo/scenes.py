"""What a picture can hold: things at places, or the bars of a chart. Knows no pixels, words or tasks."""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

SHAPES = ("circle", "square", "triangle", "star", "cross", "diamond")
COLOURS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "black")
PLACES = ("top left", "top", "top right", "left", "centre", "right", "bottom left", "bottom", "bottom right")
SIZES = ("big", "small")
PATTERNS = ("plain", "striped", "dotted", "checked")
BACKGROUNDS = ("white", "grey", "pink", "beige")
BAR_LEVELS = 8  # a bar's height is one of this many steps


@dataclass(frozen=True)
class Thing:
    """One drawn object; `place` is a cell of the 3x3 grid."""

    shape: str
    colour: str
    place: str
    size: str = "big"
    pattern: str = "plain"

    @property
    def key(self) -> str:
        """Identity without the size, so that scenes alike but for sizes share a split."""
        return f"{self.pattern} {self.colour} {self.shape} at {self.place}"


@dataclass(frozen=True)
class Scene:
    """Things on a background.

    `style` is "filled", "sketch" or "patterned"; `background` is one of BACKGROUNDS, "light", "dark" or "paper".
    `grain` seeds what no caption tells (jitter, stroke wobble, paper); `noise` is the pixel noise's strength
    in grey levels of 255.
    """

    things: tuple[Thing, ...]
    grain: int
    style: str = "filled"
    background: str = "light"
    noise: float = 0.0


@dataclass(frozen=True)
class Bar:
    """One bar of a chart; `level` counts steps of height, 1 to BAR_LEVELS."""

    colour: str
    level: int


@dataclass(frozen=True)
class Chart:
    """A bar chart, bars listed from left to right, heights all different."""

    bars: tuple[Bar, ...]
    grain: int

    @property
    def key(self) -> str:
        return "chart " + ", ".join(f"{bar.colour} {bar.level}" for bar in self.bars)


def scene_key(things: Sequence[Thing]) -> str:
    """Identity of a scene's content, the same for any order of its things."""
    return "; ".join(sorted(thing.key for thing in things))


def new_grain(rng: Random) -> int:
    return rng.getrandbits(32)


def random_things(rng: Random, num_things: int) -> tuple[Thing, ...]:
    """Things at distinct places; shapes and colours may repeat."""
    places = rng.sample(PLACES, num_things)
    return tuple(Thing(rng.choice(SHAPES), rng.choice(COLOURS), place, rng.choice(SIZES)) for place in places)


def distinct_things(rng: Random, num_things: int) -> tuple[Thing, ...]:
    """Things that share no shape, no colour and no place, so that each of these names exactly one."""
    chosen = zip(
        rng.sample(SHAPES, num_things),
        rng.sample(COLOURS, num_things),
        rng.sample(PLACES, num_things),
        strict=True,
    )
    return tuple(Thing(shape, colour, place, rng.choice(SIZES)) for shape, colour, place in chosen)


def patterned_things(rng: Random, num_things: int) -> tuple[Thing, ...]:
    """Big things, each with a pattern of its own choice."""
    places = rng.sample(PLACES, num_things)
    return tuple(Thing(rng.choice(SHAPES), rng.choice(COLOURS), place, "big", rng.choice(PATTERNS)) for place in places)


def misleading_things(rng: Random, told: Sequence[Thing]) -> tuple[Thing, ...]:
    """The told shapes and colours, paired anew and moved: every one contradicts what was told.

    Reading them in place of `told` gives a wrong colour for each shape, a wrong shape for each colour and
    another place for both.
    """
    colours = _moved_on(rng, [thing.colour for thing in told])
    free_places = [place for place in PLACES if place not in {thing.place for thing in told}]
    places = rng.sample(free_places, len(told))
    return tuple(
        Thing(thing.shape, colour, place, rng.choice(SIZES))
        for thing, colour, place in zip(told, colours, places, strict=True)
    )


def _moved_on(rng: Random, names: list[str]) -> list[str]:
    """The names rotated by one or more, so that none stays where it was."""
    step = rng.randrange(1, len(names))
    return names[step:] + names[:step]


def random_chart(rng: Random) -> Chart:
    num_bars = rng.choice((3, 4, 5))
    colours = rng.sample(COLOURS, num_bars)
    levels = rng.sample(range(1, BAR_LEVELS + 1), num_bars)
    return Chart(tuple(Bar(colour, level) for colour, level in zip(colours, levels, strict=True)), new_grain(rng))
