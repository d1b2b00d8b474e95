"""What the demo's language model reads: texts about pictures, clips and sounds that nobody shows it. Knows no pixels.

A text describes something and asks about it, or only asks, or only tells a caption. Pictures and clips hold one or two
things, sounds one or two noises: as much as one vector of an encoder can carry.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from random import Random

from service.demo.motion import MOTIONS, Mover, random_movers
from service.demo.scenes import COLOURS, PLACES, SHAPES, SIZES, Thing, distinct_things
from service.demo.sounds import KINDS, LENGTHS_S, PITCHES, Noise, random_noises
from service.demo.wording import NUMBERS, QA, article, at_place

END, ANSWER = "</s>", "</a>"  # what every text starts and ends with; what stands between a question and its answer

MAX_QUESTIONS = 6  # of one text
LIST_FORMS = ("{t.shape} {t.colour}", "{t.colour} {t.shape}", "the {t.shape} is {t.colour}", "the {t.shape} is {at}")

COUNT = "count"
COLOUR, SHAPE, PLACE, SIZE = "colour", "shape", "place", "size"
MOTION, MOVING_SHAPE, MOVING_COLOUR = "motion", "shape of motion", "colour of motion"

ANSWERS: dict[str, tuple[str, ...]] = {
    COUNT: ("one", "two"),
    COLOUR: COLOURS,
    SHAPE: SHAPES,
    PLACE: PLACES,
    SIZE: SIZES,
    MOTION: tuple(MOTIONS),
    MOVING_SHAPE: SHAPES,
    MOVING_COLOUR: COLOURS,
}


def _moving(motion: str) -> str:
    return "stands still" if motion == "still" else f"moves {motion}"


MAX_THINGS = 2  # noises too: as much as the vectors of one token carry
ATTRIBUTES = (  # what a thing can be, in the words of captions
    *SHAPES,
    *COLOURS,
    *map(at_place, PLACES),
    *SIZES,
    *map(_moving, MOTIONS),
    *LENGTHS_S,
    *PITCHES,
    *KINDS,
)

Known = Sequence[tuple[str, ...]]  # of each thing its ATTRIBUTES


def known_of_things(things: Sequence[Thing]) -> Known:
    """What a picture tells."""
    return [(t.shape, t.colour, at_place(t.place), t.size) for t in things]


def known_of_movers(movers: Sequence[Mover]) -> Known:
    """What a clip tells."""
    return [(m.shape, m.colour, _moving(m.motion)) for m in movers]


def known_of_noises(noises: Sequence[Noise]) -> Known:
    """What a sound tells."""
    return [(n.length, n.pitch, n.kind) for n in noises]


def few_things(rng: Random) -> tuple[Thing, ...]:
    """One or two things of different shape, colour and place, in reading order."""
    return tuple(sorted(distinct_things(rng, rng.choice((1, 2, 2))), key=lambda thing: PLACES.index(thing.place)))


# --- captions: one right text for each content ----------------------------------------------------------------------------


def picture_caption(things: Sequence[Thing]) -> str:
    """In reading order, e.g. "a big red circle at the top left and a small blue star in the centre"."""
    return " and ".join(f"a {t.size} {t.colour} {t.shape} {at_place(t.place)}" for t in things)


def clip_caption(movers: Sequence[Mover]) -> str:
    """E.g. "a red circle moves left and an orange star stands still"."""
    return " and ".join(f"{article(m.colour)} {m.colour} {m.shape} {_moving(m.motion)}" for m in movers)


def sound_caption(noises: Sequence[Noise]) -> str:
    """E.g. "a short low tone then a long high hiss"."""
    return " then ".join(f"a {n.length} {n.pitch} {n.kind}" for n in noises)


# --- descriptions: many texts for each content, for reading only -----------------------------------------------------------


def _described_picture(things: Sequence[Thing], rng: Random) -> str:
    shuffled = rng.sample(list(things), len(things))
    match rng.randrange(3):
        case 0:
            return f"there is {picture_caption(shuffled)} ."
        case 1:
            return " ".join(f"{at_place(t.place)} is a {t.size} {t.shape} . it is {t.colour} ." for t in shuffled)
        case _:
            return " ".join(f"the {t.shape} is {t.colour} and {t.size} . it is {at_place(t.place)} ." for t in shuffled)


def _described_clip(movers: Sequence[Mover], rng: Random) -> str:
    shuffled = rng.sample(list(movers), len(movers))
    if rng.random() < 0.5:
        return f"in the clip {clip_caption(shuffled)} ."
    return " ".join(f"the {m.shape} is {m.colour} . it {_moving(m.motion)} ." for m in shuffled)


# --- questions ------------------------------------------------------------------------------------------------------------


def picture_questions(things: Sequence[Thing], rng: Random) -> tuple[QA, ...]:
    """Of what is there, by shape or by colour, in random order. What is asked of comes last: so small a model looks back a word."""
    asked = [QA("how many objects are there?", NUMBERS[len(things)], COUNT)]
    for t in things:
        asked += [
            QA(f"what colour is the {t.shape}?", t.colour, COLOUR),
            QA(f"what shape is the object in {t.colour}?", t.shape, SHAPE),
            QA(f"where is the {t.shape}?", t.place, PLACE),
            QA(f"where is the object in {t.colour}?", t.place, PLACE),
            QA(f"what size is the {t.shape}?", t.size, SIZE),
            QA(f"what size is the object in {t.colour}?", t.size, SIZE),
        ]
    rng.shuffle(asked)
    return tuple(asked)


def clip_questions(movers: Sequence[Mover], rng: Random) -> tuple[QA, ...]:
    """Of what is there, by shape, colour or motion, in random order."""
    asked = []
    for m in movers:
        asked += [
            QA(f"which way moves the {m.shape}?", m.motion, MOTION),
            QA(f"which way moves the object in {m.colour}?", m.motion, MOTION),
            QA(f"what colour is the {m.shape}?", m.colour, COLOUR),
            QA(f"what shape is the object in {m.colour}?", m.shape, SHAPE),
            QA(f"what shape is the object that {_moving(m.motion)}?", m.shape, MOVING_SHAPE),
            QA(f"what colour is the object that {_moving(m.motion)}?", m.colour, MOVING_COLOUR),
        ]
    rng.shuffle(asked)
    return tuple(asked)


# --- texts ----------------------------------------------------------------------------------------------------------------


def list_text(rng: Random) -> str:
    """A list of things, then the same things again in other orders.

    What comes again can be foreseen by looking up what was said before of the same thing. Nothing else can: a language
    model that reads such lists first learns to look things up within minutes, and from descriptions alone hardly ever.
    """
    form = rng.choice(LIST_FORMS)
    things = distinct_things(rng, rng.randint(3, 6))
    again = rng.sample(things, len(things)) + rng.sample(things, len(things))
    lines = [form.format(t=thing, at=at_place(thing.place)) for thing in (*things, *again)]
    return f"{END} {' . '.join(lines)} . {END}"


def text(rng: Random) -> str:
    """One text of the corpus, with its special tokens: words and punctuation are separate in the tokenizer anyway."""
    world = rng.choice(("picture", "picture", "clip", "clip", "sound"))
    if world == "sound":
        return f"{END} {sound_caption(random_noises(rng))} {END}"
    if world == "picture":
        things = few_things(rng)
        caption, questions = picture_caption(things), picture_questions(things, rng)
        describe = partial(_described_picture, things, rng)
    else:
        movers = random_movers(rng)
        caption, questions = clip_caption(movers), clip_questions(movers, rng)
        describe = partial(_described_clip, movers, rng)
    match rng.random():
        case draw if draw < 0.15:
            return f"{END} {caption} {END}"
        case draw if draw < 0.3:
            return list_text(rng)
        case draw if draw < 0.4:
            return f"{END} {_told_twice(describe, rng)} {END}"
        case draw if draw < 0.5:
            return f"{END} {_asked(questions[:1], rng)}"
        case _:
            return f"{END} {describe()} {_asked(questions[:MAX_QUESTIONS], rng)}"


def condensed(rng: Random, *, only_lists: bool = False, asked_alone: bool = False) -> tuple[Known, str]:
    """What is to be known, and a text that only who knows it can foresee: pairs of words, questions, or a caption.

    Known are the attributes of one or two things, in the caption's order. Where several questions follow each other, an
    earlier answer helps with a later question; a question `asked_alone` is answered from what is known or not at all.
    """
    questions: tuple[QA, ...] = ()
    match rng.choice(("picture", "picture", "clip", "clip", "sound")):
        case "picture":
            things = few_things(rng)
            caption, questions = picture_caption(things), picture_questions(things, rng)
            known, num_names = known_of_things(things), 2
        case "clip":
            movers = random_movers(rng)
            caption, questions = clip_caption(movers), clip_questions(movers, rng)
            known, num_names = known_of_movers(movers), 3
        case _:
            noises = random_noises(rng)
            caption = sound_caption(noises)
            known, num_names = known_of_noises(noises), 0
    draw = rng.uniform(0.25, 1.0) if asked_alone else rng.random()
    if only_lists or draw < 0.3:
        pairs = _pairs(known, num_names)
        text = " . ".join(rng.sample(pairs, len(pairs))) + f" . {END}"
    elif questions and draw < 0.8:
        text = _asked((_mostly_indirect(questions, rng),) if asked_alone else questions[:MAX_QUESTIONS], rng)
    else:
        text = f"{caption} {END}"
    return known, f"{END} {text}"


def _mostly_indirect(questions: Sequence[QA], rng: Random) -> QA:
    """One of the questions; three times of four one that names its thing by another attribute than its shape."""
    indirect = [asked for asked in questions if "object in" in asked.question or "object that" in asked.question]
    return rng.choice(indirect if rng.random() < 0.75 else questions)


def _pairs(known: Known, num_names: int) -> list[str]:
    """Each thing's number and names, the first of its attributes, before each of its other attributes: "circle red"."""
    return [
        f"{name} {other}"
        for number, attributes in zip(NUMBERS[1:], known, strict=False)
        for place, name in ((-1, number), *enumerate(attributes[:num_names]))
        for other_place, other in enumerate(attributes)
        if other_place != place
    ]


def _told_twice(describe: Callable[[], str], rng: Random) -> str:
    """The same words again, or others for the same: to foresee them is to learn to look things up in what was told."""
    first = describe()
    return f"{first} {first if rng.random() < 0.5 else describe()}"


def _asked(questions: Sequence[QA], rng: Random) -> str:
    """Questions with their answers. Most have the second question mark that eP-ALM's trainers put behind every question."""
    marks = ["?" if rng.random() < 0.7 else "" for _ in questions]
    return " ".join(f"{q.question}{mark} {ANSWER} {q.answer} {END}" for q, mark in zip(questions, marks, strict=True))


def phrases() -> Iterator[str]:
    """Texts that hold every word of the corpus between them."""
    everything = (
        SHAPES,
        COLOURS,
        PLACES,
        SIZES,
        tuple(MOTIONS),
        tuple(KINDS),
        tuple(PITCHES),
        tuple(LENGTHS_S),
        NUMBERS,
    )
    for names in everything:
        yield from names
    rng = Random(0)
    for _ in range(1000):
        yield text(rng)
