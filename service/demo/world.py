"""The demo's tasks, each a pure function of (task, split, seed, index): what is drawn, told and asked.

A scene belongs to one split by the hash of its content, whatever the seed: no training picture shows the scene
of an evaluation picture. Sizes, jitter and the frames around a clip's event are not part of that content.

    WORLDS = PLAIN (the backbone's pre-training) + TASKS (what adapters are trained for)
    sample(...)         -> Item                one training example
    evaluation_set(...) -> list[Item]          unique captions, or one question each with balanced answers
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import blake2s
from itertools import count, islice
from random import Random
from typing import Literal

import numpy as np

from service.demo import corpus, wording
from service.demo.clips import NUM_BEATS
from service.demo.drawing import Pixels, draw
from service.demo.motion import MovingScene, draw_clip, random_movers
from service.demo.scenes import (
    BACKGROUNDS,
    COLOURS,
    PLACES,
    SHAPES,
    SIZES,
    Chart,
    Scene,
    Thing,
    distinct_things,
    misleading_things,
    new_grain,
    patterned_things,
    random_chart,
    random_things,
    scene_key,
)
from service.demo.sounds import Samples, Sound, random_noises, synthesise
from service.demo.wording import QA
from service.errors import BadQuery

Split = Literal["train", "validation", "eval"]
Content = tuple[Scene | Chart, ...] | MovingScene | Sound

NUM_BUCKETS = 10
HELD_OUT_BUCKETS: dict[int, Split] = {0: "validation", 1: "eval"}
MAX_CLIP_NOISE = 3.0


@dataclass(frozen=True)
class Item:
    """One example as a model sees it.

    `media` is uint8 for a picture `[64, 64, 3]` or a clip's 8 sampled frames `[8, 64, 64, 3]`, and float32 for the
    samples of a sound. `key` is the scene's content, for overlap checks.
    """

    media: Pixels | Samples
    caption: str | None
    questions: tuple[QA, ...]
    key: str


@dataclass(frozen=True)
class Draft:
    """An item before it is drawn.

    `content` holds one picture or a clip's 8, or what moves, or what sounds; `told` is what the caption states: the caption of one draft
    holds for another's media exactly if it tells a subset of what that one tells. `lit` lists a clip's lit
    frames.
    """

    content: Content
    key: str
    told: frozenset[str] = frozenset()
    caption: str | None = None
    questions: tuple[QA, ...] = ()
    lit: tuple[int, ...] = ()

    def item(self) -> Item:
        return Item(render(self.content), self.caption, self.questions, self.key)


def render(content: Content) -> Pixels | Samples:
    """The pixels of a picture or a clip, or the samples of a sound."""
    match content:
        case MovingScene():
            return draw_clip(content)
        case Sound():
            return synthesise(content)
        case (picture,):
            return draw(picture)
        case pictures:
            return np.stack([draw(picture) for picture in pictures])


@dataclass(frozen=True)
class Task:
    """A world to train in. `kinds` is the cycle of question kinds in an evaluation set."""

    name: str
    kind: Literal["image", "video", "audio"]
    goal: Literal["pretraining", "retrieval", "vqa", "caption"]
    description: str
    compose: Callable[[Random], Draft]
    kinds: tuple[str, ...] = ()

    @property
    def answers(self) -> tuple[str, ...]:
        """Every answer the task can call for."""
        return tuple(sorted({answer for kind in self.kinds for answer in ANSWERS[kind]}))

    def make(self, rng: Random) -> Item:
        """An item of any split; `sample` makes one of a given split."""
        return self.compose(rng).item()


ANSWERS: dict[str, tuple[str, ...]] = {
    wording.COLOUR_OF_SHAPE: COLOURS,
    wording.SHAPE_OF_COLOUR: SHAPES,
    wording.PLACE_OF_THING: PLACES,
    wording.EXISTENCE: ("yes", "no"),
    wording.COLOUR_AT_PLACE: COLOURS,
    wording.SHAPE_AT_PLACE: SHAPES,
    wording.SIZE_OF_SHAPE: SIZES,
    wording.COLOUR_OF_SIZE: COLOURS,
    wording.NUMBER_OF_THINGS: ("two", "three", "four"),
    wording.LIT_COLOUR: COLOURS,
    wording.LIT_SHAPE: SHAPES,
    wording.LIT_PLACE: PLACES,
    wording.TALLEST_BAR: COLOURS,
    wording.SHORTEST_BAR: COLOURS,
    wording.LEFT_BAR: COLOURS,
    wording.RIGHT_BAR: COLOURS,
    wording.NUMBER_OF_BARS: ("three", "four", "five"),
    **corpus.ANSWERS,
}


# --- what each world shows --------------------------------------------------------------------------------


def _compose_plain(rng: Random, max_objects: int = 3) -> Draft:
    things = random_things(rng, rng.randint(1, max_objects))
    caption = wording.plain_caption(things, rng)
    questions = wording.plain_questions(things, rng)
    return Draft((Scene(things, new_grain(rng)),), scene_key(things), _told(things), caption, questions)


def _compose_image_vqa(rng: Random) -> Draft:
    things = random_things(rng, rng.randint(2, 4))
    questions = wording.lookup_questions(things, rng)
    return Draft((Scene(things, new_grain(rng)),), scene_key(things), questions=questions)


def _compose_sketch(rng: Random) -> Draft:
    things = random_things(rng, rng.randint(2, 3))
    scene = Scene(things, new_grain(rng), style="sketch", background="paper")
    return Draft((scene,), scene_key(things), _told(things), wording.sketch_caption(things, rng))


def _compose_pattern(rng: Random) -> Draft:
    things, background = patterned_things(rng, 2), rng.choice(BACKGROUNDS)
    scene = Scene(things, new_grain(rng), style="patterned", background=background)
    told = _told(things) | {background}
    key = f"{scene_key(things)} on {background}"
    return Draft((scene,), key, told, wording.patterned_caption(things, background, rng))


def _compose_chart(rng: Random) -> Draft:
    chart = random_chart(rng)
    return Draft((chart,), chart.key, questions=wording.chart_questions(chart, rng))


def _compose_video_retrieval(rng: Random) -> Draft:
    """Two or three things in the light; in the dark, others from the same palette."""
    event = random_things(rng, rng.choice((2, 2, 3)))
    caption = wording.lit_caption(event, rng)
    frames, lit = _clip(event, lambda: random_things(rng, rng.randint(2, 3)), rng)
    return Draft(frames, scene_key(event), _told(event), caption, lit=lit)


def _compose_video_qa(rng: Random) -> Draft:
    """In the dark, the same shapes and colours are paired otherwise: unlit frames give wrong answers."""
    event = distinct_things(rng, rng.randint(2, 3))
    questions = wording.lit_questions(event, rng)
    frames, lit = _clip(event, lambda: misleading_things(rng, event), rng)
    return Draft(frames, scene_key(event), questions=questions, lit=lit)


def _compose_few_things(rng: Random) -> Draft:
    things = corpus.few_things(rng)
    questions = corpus.picture_questions(things, rng)
    return Draft((Scene(things, new_grain(rng)),), scene_key(things), questions=questions)


def _compose_told_things(rng: Random) -> Draft:
    things = corpus.few_things(rng)
    caption = corpus.picture_caption(things)
    return Draft((Scene(things, new_grain(rng)),), scene_key(things), _told(things), caption)


def _compose_motion(rng: Random) -> Draft:
    movers = random_movers(rng)
    key = "; ".join(sorted(mover.key for mover in movers))
    return Draft(MovingScene(movers, new_grain(rng)), key, questions=corpus.clip_questions(movers, rng))


def _compose_sound(rng: Random) -> Draft:
    sound = Sound(random_noises(rng), new_grain(rng))
    return Draft(sound, sound.key, caption=corpus.sound_caption(sound.noises))


def _clip(
    event: tuple[Thing, ...], distractor: Callable[[], tuple[Thing, ...]], rng: Random
) -> tuple[tuple[Scene, ...], tuple[int, ...]]:
    """Eight frames, and which of them (2 or 3) are lit and show the event; the others are dark."""
    lit = tuple(sorted(rng.sample(range(NUM_BEATS), rng.randint(2, 3))))
    noise = rng.uniform(0.0, MAX_CLIP_NOISE)
    frames = tuple(
        Scene(event, new_grain(rng), noise=noise)
        if beat in lit
        else Scene(distractor(), new_grain(rng), background="dark", noise=noise)
        for beat in range(NUM_BEATS)
    )
    return frames, lit


def _told(things: tuple[Thing, ...]) -> frozenset[str]:
    return frozenset(thing.key for thing in things)


# --- the table of tasks -----------------------------------------------------------------------------------

PLAIN = Task(
    name="plain",
    kind="image",
    goal="pretraining",
    description="filled shapes on a light background, with captions and questions",
    compose=_compose_plain,
    kinds=(wording.COLOUR_OF_SHAPE, wording.SHAPE_OF_COLOUR, wording.PLACE_OF_THING, wording.EXISTENCE),
)

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task(
            name="demo-image-retrieval",
            kind="image",
            goal="retrieval",
            description="chalk outlines on dark paper, told in other words than the plain world's",
            compose=_compose_sketch,
        ),
        Task(
            name="demo-video-retrieval",
            kind="video",
            goal="retrieval",
            description="clips whose caption tells only what the 2 or 3 lit frames of 8 show",
            compose=_compose_video_retrieval,
        ),
        Task(
            name="demo-image-vqa",
            kind="image",
            goal="vqa",
            description="look-ups by place, sizes and counts, asked of plain pictures",
            compose=_compose_image_vqa,
            kinds=(
                wording.COLOUR_AT_PLACE,
                wording.SHAPE_AT_PLACE,
                wording.SIZE_OF_SHAPE,
                wording.COLOUR_AT_PLACE,
                wording.SHAPE_AT_PLACE,
                wording.NUMBER_OF_THINGS,
                wording.COLOUR_OF_SIZE,
            ),
        ),
        Task(
            name="demo-video-qa",
            kind="video",
            goal="vqa",
            description="clips asked after the lit frames, which the unlit frames contradict",
            compose=_compose_video_qa,
            kinds=(wording.LIT_COLOUR, wording.LIT_SHAPE, wording.LIT_PLACE),
        ),
        Task(
            name="demo-chart-vqa",
            kind="image",
            goal="vqa",
            description="bar charts: the tallest, the shortest, the outermost bar, the number of bars",
            compose=_compose_chart,
            kinds=(
                wording.TALLEST_BAR,
                wording.SHORTEST_BAR,
                wording.LEFT_BAR,
                wording.RIGHT_BAR,
                wording.NUMBER_OF_BARS,
            ),
        ),
        Task(
            name="demo-pattern-retrieval",
            kind="image",
            goal="retrieval",
            description="striped, dotted, checked and plain things on coloured backgrounds",
            compose=_compose_pattern,
        ),
        Task(
            name="demo-epalm-vqa",
            kind="image",
            goal="vqa",
            description="one or two things: their shapes, colours, places and sizes, told by a language model",
            compose=_compose_few_things,
            kinds=(*(corpus.COLOUR, corpus.SHAPE, corpus.PLACE, corpus.SIZE) * 2, corpus.COUNT),
        ),
        Task(
            name="demo-epalm-video-qa",
            kind="video",
            goal="vqa",
            description="one or two things that move: what, and which way",
            compose=_compose_motion,
            kinds=(corpus.MOTION, corpus.COLOUR, corpus.SHAPE, corpus.MOVING_SHAPE, corpus.MOVING_COLOUR),
        ),
        Task(
            name="demo-epalm-caption",
            kind="image",
            goal="caption",
            description="one or two things, told in reading order",
            compose=_compose_told_things,
        ),
        Task(
            name="demo-epalm-audio-caption",
            kind="audio",
            goal="caption",
            description="one or two tones and noises, told in their order",
            compose=_compose_sound,
        ),
    )
}

MAX_DRAFTS = 20_000  # in which one with the wanted question comes up, unless there is none

WORLDS: dict[str, Task] = {PLAIN.name: PLAIN, **TASKS}


# --- splits and samples -----------------------------------------------------------------------------------


def split_of(key: str) -> Split:
    """The one split a scene's content belongs to."""
    bucket = int.from_bytes(blake2s(key.encode()).digest()[:4]) % NUM_BUCKETS
    return HELD_OUT_BUCKETS.get(bucket, "train")


def draft(task: str, split: Split, seed: int, index: int, max_objects: int | None = None) -> Draft:
    """What `sample` draws, undrawn. `max_objects` (1, 2 or 3) is the plain world's curriculum."""
    compose = WORLDS[task].compose
    if max_objects is not None:
        compose = _plain_up_to(task, max_objects)
    rng = Random(f"{task}/{split}/{seed}/{index}")
    while True:
        made = compose(rng)
        if split_of(made.key) == split:
            return made


def sample(task: str, split: Split, seed: int, index: int, max_objects: int | None = None) -> Item:
    """The index-th example of a split; the same arguments give the same item in any process."""
    return draft(task, split, seed, index, max_objects).item()


def _plain_up_to(task: str, max_objects: int) -> Callable[[Random], Draft]:
    if task != PLAIN.name or max_objects not in (1, 2, 3):
        raise ValueError(f"max_objects is 1, 2 or 3, of {PLAIN.name!r} only; got {max_objects} for {task!r}")
    return lambda rng: _compose_plain(rng, max_objects)


def evaluation_set(task: str, seed: int, n: int, split: Split = "eval") -> list[Item]:
    """n items to measure a task with.

    Retrieval: no caption holds for the media of another item. Questions (also the plain world's): one per
    item, kinds in the task's cycle, answers of a kind equally often. Captions to be written: any items.
    Raises: BadQuery for more items than the world can ask different questions of.
    """
    drafts = (draft(task, split, seed, index) for index in count())
    match WORLDS[task].goal:
        case "retrieval":
            chosen = _telling_apart(drafts, n)
        case "caption":
            chosen = list(islice(drafts, n))
        case _:
            chosen = _balanced(WORLDS[task], drafts, n)
    return [made.item() for made in chosen]


def _telling_apart(drafts: Iterator[Draft], n: int) -> list[Draft]:
    """The first n drafts of which none tells a subset of what another tells."""
    chosen: list[Draft] = []
    for made in drafts:
        if len(chosen) == n:
            break
        if not any(made.told <= other.told or other.told <= made.told for other in chosen):
            chosen.append(made)
    return chosen


def _balanced(task: Task, drafts: Iterator[Draft], n: int) -> list[Draft]:
    """n drafts of one question each; every (scene, question) once."""
    num_asked = dict.fromkeys(task.kinds, 0)
    taken: set[tuple[str, str]] = set()
    chosen: list[Draft] = []
    for turn in range(n):
        kind = task.kinds[turn % len(task.kinds)]
        answer = ANSWERS[kind][num_asked[kind] % len(ANSWERS[kind])]
        made = _next_asking(drafts, kind, answer, taken)
        num_asked[kind] += 1
        taken.add((made.key, made.questions[0].question))
        chosen.append(made)
    return chosen


def _next_asking(drafts: Iterator[Draft], kind: str, answer: str, taken: set[tuple[str, str]]) -> Draft:
    """The next draft with such a question, cut down to that question.

    Raises: BadQuery when none of many drafts asks it anew: so many items are more than the world holds.
    """
    for made in islice(drafts, MAX_DRAFTS):
        for asked in made.questions:
            if (asked.kind, asked.answer) == (kind, answer) and (made.key, asked.question) not in taken:
                return Draft(made.content, made.key, made.told, made.caption, (asked,), made.lit)
    raise BadQuery(f"the world holds too few scenes to ask for {answer!r} so often; ask for fewer items", param="n")
