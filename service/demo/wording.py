"""The words of every world: captions, questions and answers for things, scenes and charts. Knows no pixels."""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random

from service.demo.scenes import BACKGROUNDS, COLOURS, PATTERNS, PLACES, SHAPES, SIZES, Chart, Thing

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@dataclass(frozen=True)
class QA:
    """A question with its one right answer; `kind` names the sort of question, for counting."""

    question: str
    answer: str
    kind: str


# --- captions ---------------------------------------------------------------------------------------------

PLAIN_CAPTIONS = ("{list}", "there is {list}", "a picture of {list}", "we see {list}")
COUNTED_CAPTIONS = ("{number} {objects}, {list}", "we see {number} {objects}, {list}")
LIT_CAPTIONS = (
    "when the light is on {list}",
    "with the light on {list}",
    "in the light {list}",
)
PATTERNED_CAPTIONS = ("{list} on a {background} background", "on a {background} background {list}")
SKETCH_CAPTIONS = ("{list}", "a sketch showing {list}", "chalk lines form {list}")
SKETCH_JOINTS = (" and ", " together with ", " along with ")

SKETCH_SHAPES = {
    "circle": ("disc", "ring"),
    "square": ("box", "block"),
    "triangle": ("pyramid", "wedge"),
    "star": ("spark", "asterisk"),
    "cross": ("plus", "crucifix"),
    "diamond": ("gem", "lozenge"),
}
SKETCH_COLOURS = {
    "red": ("crimson", "scarlet"),
    "orange": ("amber", "tangerine"),
    "yellow": ("golden", "lemon"),
    "green": ("emerald", "jade"),
    "cyan": ("turquoise", "teal"),
    "blue": ("azure", "sapphire"),
    "purple": ("violet", "lilac"),
    "black": ("ivory", "pale"),
}
SKETCH_PLACES = {
    "top left": ("up in the left corner", "in the upper left"),
    "top": ("along the upper edge", "up high"),
    "top right": ("up in the right corner", "in the upper right"),
    "left": ("by the left edge", "over on the left"),
    "centre": ("in the middle", "amid the paper"),
    "right": ("by the right edge", "over on the right"),
    "bottom left": ("down in the left corner", "in the lower left"),
    "bottom": ("along the lower edge", "down low"),
    "bottom right": ("down in the right corner", "in the lower right"),
}


def plain_caption(things: Sequence[Thing], rng: Random) -> str:
    """Every thing with its place, e.g. "a red circle at the top left and a blue star in the centre".

    Half the captions tell sizes, and some the number: the words and what they mean are known to whoever was trained on
    plain pictures, though no plain question asks for either.
    """
    tells_sizes = rng.random() < 0.5
    phrases = [
        f"{_named(thing, *([thing.size] if tells_sizes else []))} {at_place(thing.place)}"
        for thing in _shuffled(things, rng)
    ]
    objects = "object" if len(things) == 1 else "objects"
    template = rng.choice((*PLAIN_CAPTIONS, *COUNTED_CAPTIONS))
    return template.format(list=_joined(phrases, " and "), number=NUMBERS[len(things)], objects=objects)


def lit_caption(things: Sequence[Thing], rng: Random) -> str:
    """What the lit frames hold, e.g. "when the light is on a red circle is at the top and ..."."""
    phrases = [f"{_named(thing)} is {at_place(thing.place)}" for thing in _shuffled(things, rng)]
    return rng.choice(LIT_CAPTIONS).format(list=_joined(phrases, " and "))


def patterned_caption(things: Sequence[Thing], background: str, rng: Random) -> str:
    phrases = [f"{_named(thing, thing.pattern)} {at_place(thing.place)}" for thing in _shuffled(things, rng)]
    return rng.choice(PATTERNED_CAPTIONS).format(list=_joined(phrases, " and "), background=background)


def sketch_caption(things: Sequence[Thing], rng: Random) -> str:
    """The sketches' own words and order, e.g. "up in the left corner a crimson disc"."""
    place_first = rng.random() < 0.5
    phrases = [_sketched(thing, place_first, rng) for thing in _shuffled(things, rng)]
    return rng.choice(SKETCH_CAPTIONS).format(list=_joined(phrases, rng.choice(SKETCH_JOINTS)))


def _sketched(thing: Thing, place_first: bool, rng: Random) -> str:
    colour = rng.choice(SKETCH_COLOURS[thing.colour])
    named = f"{article(colour)} {colour} {rng.choice(SKETCH_SHAPES[thing.shape])}"
    place = rng.choice(SKETCH_PLACES[thing.place])
    return f"{place} {named}" if place_first else f"{named} {place}"


def _named(thing: Thing, *adjectives: str) -> str:
    words = (*adjectives, thing.colour, thing.shape)
    return f"{article(words[0])} {' '.join(words)}"


def article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def at_place(place: str) -> str:
    return "in the centre" if place == "centre" else f"at the {place}"


def _joined(phrases: Sequence[str], last_joint: str) -> str:
    """ "a", "a and b", "a, b and c"."""
    if len(phrases) == 1:
        return phrases[0]
    return ", ".join(phrases[:-1]) + last_joint + phrases[-1]


def _shuffled(things: Sequence[Thing], rng: Random) -> list[Thing]:
    return rng.sample(list(things), len(things))


# --- questions --------------------------------------------------------------------------------------------

COLOUR_OF_SHAPE = "colour of shape"
SHAPE_OF_COLOUR = "shape of colour"
PLACE_OF_THING = "place of thing"
EXISTENCE = "existence"
COLOUR_AT_PLACE = "colour at place"
SHAPE_AT_PLACE = "shape at place"
SIZE_OF_SHAPE = "size of shape"
COLOUR_OF_SIZE = "colour of size"
NUMBER_OF_THINGS = "number of things"
LIT_COLOUR = "lit colour"
LIT_SHAPE = "lit shape"
LIT_PLACE = "lit place"
TALLEST_BAR = "tallest bar"
SHORTEST_BAR = "shortest bar"
LEFT_BAR = "left bar"
RIGHT_BAR = "right bar"
NUMBER_OF_BARS = "number of bars"

DESCRIBE = "what is in the picture?"  # answered with a caption; asked in pre-training only

QUESTIONS = {
    COLOUR_OF_SHAPE: "what colour is the {shape}?",
    SHAPE_OF_COLOUR: "what shape is the {colour} object?",
    PLACE_OF_THING: "where is the {colour} {shape}?",
    EXISTENCE: "is there {article} {colour} {shape}?",
    COLOUR_AT_PLACE: "what colour is the object {at}?",
    SHAPE_AT_PLACE: "what shape is the object {at}?",
    SIZE_OF_SHAPE: "what size is the {shape}?",
    COLOUR_OF_SIZE: "what colour is the only {size} object?",
    NUMBER_OF_THINGS: "how many objects are there?",
    LIT_COLOUR: "what colour is the {shape} when the light is on?",
    LIT_SHAPE: "what shape is {colour} when the light is on?",
    LIT_PLACE: "where is the {shape} when the light is on?",
    TALLEST_BAR: "which bar is the tallest?",
    SHORTEST_BAR: "which bar is the shortest?",
    LEFT_BAR: "which bar is on the far left?",
    RIGHT_BAR: "which bar is on the far right?",
    NUMBER_OF_BARS: "how many bars are there?",
}


def _ask(kind: str, answer: str, **names: str) -> QA:
    return QA(QUESTIONS[kind].format(**names), answer, kind)


def plain_questions(things: Sequence[Thing], rng: Random) -> tuple[QA, ...]:
    """Look-ups by shape and by colour where these name one thing, and two of existence (one yes, one no)."""
    asked = [_existing(rng.choice(list(things))), _missing(things, rng)]
    for thing in things:
        if _is_only(thing, things, "shape"):
            asked.append(_ask(COLOUR_OF_SHAPE, thing.colour, shape=thing.shape))
        if _is_only(thing, things, "colour"):
            asked.append(_ask(SHAPE_OF_COLOUR, thing.shape, colour=thing.colour))
        if _is_only(thing, things, "shape", "colour"):
            asked.append(_ask(PLACE_OF_THING, thing.place, shape=thing.shape, colour=thing.colour))
    return _in_random_order(asked, rng)


def _existing(thing: Thing) -> QA:
    return _ask(EXISTENCE, "yes", article=article(thing.colour), colour=thing.colour, shape=thing.shape)


def _missing(things: Sequence[Thing], rng: Random) -> QA:
    """Asks for a thing that is near one in the picture: its shape or its colour is there, the pair is not."""
    present = {(thing.colour, thing.shape) for thing in things}
    one = rng.choice(list(things))
    pairs = [(colour, one.shape) for colour in COLOURS] if rng.random() < 0.5 else [(one.colour, s) for s in SHAPES]
    colour, shape = rng.choice([pair for pair in pairs if pair not in present])
    return _ask(EXISTENCE, "no", article=article(colour), colour=colour, shape=shape)


def lookup_questions(things: Sequence[Thing], rng: Random) -> tuple[QA, ...]:
    """The kinds that the plain world never asks: look-ups by place, sizes and the count."""
    asked = [_ask(NUMBER_OF_THINGS, NUMBERS[len(things)])]
    for thing in things:
        asked.append(_ask(COLOUR_AT_PLACE, thing.colour, at=at_place(thing.place)))
        asked.append(_ask(SHAPE_AT_PLACE, thing.shape, at=at_place(thing.place)))
        if _is_only(thing, things, "shape"):
            asked.append(_ask(SIZE_OF_SHAPE, thing.size, shape=thing.shape))
        if _is_only(thing, things, "size"):
            asked.append(_ask(COLOUR_OF_SIZE, thing.colour, size=thing.size))
    return _in_random_order(asked, rng)


def lit_questions(things: Sequence[Thing], rng: Random) -> tuple[QA, ...]:
    """Asks after the lit frames of a clip; shapes and colours there must be distinct."""
    asked = []
    for thing in things:
        asked.append(_ask(LIT_COLOUR, thing.colour, shape=thing.shape))
        asked.append(_ask(LIT_SHAPE, thing.shape, colour=thing.colour))
        asked.append(_ask(LIT_PLACE, thing.place, shape=thing.shape))
    return _in_random_order(asked, rng)


def chart_questions(chart: Chart, rng: Random) -> tuple[QA, ...]:
    by_height = sorted(chart.bars, key=lambda bar: bar.level)
    asked = [
        _ask(TALLEST_BAR, by_height[-1].colour),
        _ask(SHORTEST_BAR, by_height[0].colour),
        _ask(LEFT_BAR, chart.bars[0].colour),
        _ask(RIGHT_BAR, chart.bars[-1].colour),
        _ask(NUMBER_OF_BARS, NUMBERS[len(chart.bars)]),
    ]
    return _in_random_order(asked, rng)


def _is_only(thing: Thing, things: Sequence[Thing], *fields: str) -> bool:
    """Whether no other thing agrees with this one in all the fields."""
    return not any(
        other is not thing and all(getattr(other, field) == getattr(thing, field) for field in fields)
        for other in things
    )


def _in_random_order(asked: list[QA], rng: Random) -> tuple[QA, ...]:
    rng.shuffle(asked)
    return tuple(asked)


# --- every word -------------------------------------------------------------------------------------------


def words() -> list[str]:
    """Every word any caption, question or answer can hold, without repeats, in a fixed order."""
    found = Counter(word for phrase in _phrases() for word in re.findall("[a-z]+", re.sub("{[a-z]+}", "", phrase)))
    return sorted(found)


def _phrases() -> Iterator[str]:
    """Every table of words; names of fields in braces stand for entries of the other tables."""
    for names in (SHAPES, COLOURS, PLACES, SIZES, PATTERNS, BACKGROUNDS, NUMBERS, ("yes", "no")):
        yield from names
    for templates in (
        PLAIN_CAPTIONS,
        COUNTED_CAPTIONS,
        LIT_CAPTIONS,
        PATTERNED_CAPTIONS,
        SKETCH_CAPTIONS,
        SKETCH_JOINTS,
    ):
        yield from templates
    yield from ("object", "objects", DESCRIBE)
    for synonyms in (SKETCH_SHAPES, SKETCH_COLOURS, SKETCH_PLACES):
        for choices in synonyms.values():
            yield from choices
    yield from QUESTIONS.values()
    yield from (at_place(place) for place in PLACES)
    yield from ("a", "an", "and", "is")
