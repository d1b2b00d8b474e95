"""The drawn world keeps its promises: same seeds same items, no shared scenes, right answers, real clips."""

import re
from collections import Counter, defaultdict
from functools import cache
from pathlib import Path
from random import Random

import av
import numpy as np
import pytest
from PIL import Image
from transformers import AutoTokenizer

from service.demo import world
from service.demo.clips import CLIP_LENGTH_S, NUM_BEATS, write_clip, write_picture
from service.demo.drawing import INK, Pixels
from service.demo.scenes import Bar, Chart, Scene, Thing, misleading_things
from service.demo.sounds import SOUND_LENGTH_S
from service.demo.vocabulary import build_tokenizer, vocabulary
from service.demo.wording import SKETCH_COLOURS, SKETCH_PLACES, SKETCH_SHAPES
from service.demo.world import (
    ANSWERS,
    PLAIN,
    TASKS,
    WORLDS,
    Draft,
    Item,
    Task,
    draft,
    evaluation_set,
    sample,
    split_of,
)
from service.errors import BadQuery
from service.media.sound import SAMPLING_RATE

RETRIEVAL = [name for name, task in TASKS.items() if task.goal == "retrieval"]
VQA = [name for name, task in TASKS.items() if task.goal == "vqa"]
LIT = ["demo-video-retrieval", "demo-video-qa"]
DRAWN = [name for name in WORLDS if not name.startswith("demo-epalm")]  # what the words of the first tokenizer are for


# --- seeds and splits -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WORLDS)
def test_same_arguments_give_the_same_item(name: str) -> None:
    first, again = sample(name, "train", 3, 7), sample(name, "train", 3, 7)
    assert np.array_equal(first.media, again.media)
    assert (first.caption, first.questions, first.key) == (again.caption, again.questions, again.key)


def test_a_known_item_stays_as_it_is() -> None:
    """Pins the derivation of seeds: adapters trained before must meet the same evaluation set after."""
    assert draft("demo-chart-vqa", "eval", 0, 0).key == PINNED_CHART
    assert draft("plain", "train", 0, 0).key == PINNED_PLAIN


PINNED_CHART = "chart purple 3, orange 1, black 2, red 6"
PINNED_PLAIN = "plain cyan circle at left; plain cyan circle at right"


@pytest.mark.parametrize("name", WORLDS)
def test_seed_and_index_change_the_item(name: str) -> None:
    items = [sample(name, "train", seed, index) for seed in (0, 1) for index in range(10)]
    assert len({item.key for item in items}) >= 18


@pytest.mark.parametrize("name", WORLDS)
def test_media_have_the_shape_a_model_takes(name: str) -> None:
    item = sample(name, "train", 0, 0)
    shapes = {"image": (64, 64, 3), "video": (NUM_BEATS, 64, 64, 3), "audio": (int(SOUND_LENGTH_S * SAMPLING_RATE),)}
    assert item.media.shape == shapes[WORLDS[name].kind]
    assert item.media.dtype == (np.float32 if WORLDS[name].kind == "audio" else np.uint8)


@pytest.mark.parametrize("name", WORLDS)
def test_splits_share_no_scene(name: str) -> None:
    train = {draft(name, "train", seed, index).key for seed in (0, 1) for index in range(300)}
    validation = {draft(name, "validation", 0, index).key for index in range(60)}
    held_out = {draft(name, "eval", 0, index).key for index in range(60)}
    assert not train & (validation | held_out)
    assert not validation & held_out
    assert {split_of(key) for key in train} == {"train"}


def test_a_scene_keeps_its_split_when_sizes_or_order_change() -> None:
    made = draft("demo-image-vqa", "eval", 0, 0)
    things = scene_of(made).things
    other_sizes = [Thing(t.shape, t.colour, t.place, "small" if t.size == "big" else "big") for t in reversed(things)]
    assert made.key == "; ".join(sorted(thing.key for thing in other_sizes))


@pytest.mark.parametrize("max_objects", [1, 2, 3])
def test_the_curriculum_limits_the_number_of_things(max_objects: int) -> None:
    counts = {len(scene_of(draft("plain", "train", 0, i, max_objects)).things) for i in range(60)}
    assert counts == set(range(1, max_objects + 1))


@pytest.mark.parametrize(("name", "max_objects"), [("demo-image-vqa", 2), ("plain", 4), ("plain", 0)])
def test_the_curriculum_is_for_the_plain_world_only(name: str, max_objects: int) -> None:
    with pytest.raises(ValueError, match="max_objects"):
        sample(name, "train", 0, 0, max_objects)


# --- retrieval --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RETRIEVAL)
def test_every_one_of_500_captions_fits_its_own_item_only(name: str) -> None:
    items = evaluation_set(name, 0, 500)
    assert len({item.caption for item in items}) == len({item.key for item in items}) == 500
    facts = [set(re.split("; | on ", item.key)) for item in items]
    fitting = sum(told <= shown for told in facts for shown in facts)
    assert fitting == 500


@pytest.mark.parametrize("name", [*RETRIEVAL, "plain"])
def test_a_caption_names_every_thing_of_its_scene(name: str) -> None:
    for index in range(100):
        made = draft(name, "train", 0, index)
        caption = made.caption or ""
        for thing in told_things(made):
            if name == "demo-image-retrieval":
                assert names_sketched(thing, caption)
            else:
                article = "a" if thing.pattern != "plain" or name == "demo-pattern-retrieval" else "an?"
                assert re.search(f"{article} .*{thing.colour} {thing.shape} .*{thing.place}", caption)


@pytest.mark.parametrize("name", LIT)
def test_a_clip_is_lit_in_two_or_three_frames(name: str) -> None:
    for index in range(20):
        made = draft(name, "train", 0, index)
        brightness = made.item().media.mean(axis=(1, 2, 3))
        assert len(made.lit) in (2, 3)
        assert {int(beat) for beat in np.flatnonzero(brightness > 150)} == set(made.lit)


def test_unlit_frames_contradict_every_lit_answer() -> None:
    for index in range(50):
        made = draft("demo-video-qa", "train", 0, index)
        lit = told_things(made)
        for beat in set(range(NUM_BEATS)) - set(made.lit):
            for thing in frame_of(made, beat).things:
                assert not any(
                    thing.place == told.place or (thing.shape, thing.colour) == (told.shape, told.colour)
                    for told in lit
                )
                assert thing.shape in {t.shape for t in lit}
                assert thing.colour in {t.colour for t in lit}


# --- questions --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["plain", "demo-image-vqa", "demo-video-qa"])
def test_answers_follow_from_the_scene(name: str) -> None:
    for index in range(150):
        made = draft(name, "train", 1, index)
        assert made.questions
        for asked in made.questions:
            assert answer_by_search(asked.question, told_things(made)) == {asked.answer}, asked


def test_answers_follow_from_the_chart() -> None:
    for index in range(100):
        made = draft("demo-chart-vqa", "train", 1, index)
        bars = chart_of(made).bars
        for asked in made.questions:
            assert asked.answer == answer_from_bars(asked.question, bars)


def test_the_drawn_bars_show_the_answers() -> None:
    """Reads the tallest and the leftmost bar out of the pixels."""
    for item in evaluation_of("demo-chart-vqa"):
        columns, rows = coloured_pixels(item.media)
        read = {
            "which bar is the tallest?": min(rows, key=lambda colour: rows[colour]),
            "which bar is on the far left?": min(columns, key=lambda colour: columns[colour]),
        }
        question, answer = item.questions[0].question, item.questions[0].answer
        assert read.get(question, answer) == answer


def test_a_thing_is_drawn_in_its_colour_at_its_place() -> None:
    for item, thing in ((made.item(), scene_of(made).things[0]) for made in one_thing_drafts(60)):
        rows, columns = np.nonzero(np.abs(item.media.astype(int) - INK[thing.colour]).sum(axis=2) < 60)
        row, column = int(rows.mean() // (64 / 3)), int(columns.mean() // (64 / 3))
        words = (("top", "", "bottom")[row], ("left", "", "right")[column])
        assert (" ".join(filter(None, words)) or "centre") == thing.place
        span = rows.max() - rows.min() + 1
        assert (14 <= span <= 22) if thing.size == "big" else (9 <= span <= 14)


@pytest.mark.parametrize("name", VQA)
def test_an_evaluation_set_asks_one_question_per_item_with_balanced_answers(name: str) -> None:
    items = evaluation_of(name)
    assert all(len(item.questions) == 1 for item in items)
    assert len({(item.key, item.questions[0].question) for item in items}) == 300
    for kind, answers in answers_by_kind(items).items():
        assert set(answers) <= set(ANSWERS[kind])
        assert max(answers.values()) - min(answers.get(answer, 0) for answer in ANSWERS[kind]) <= 1


def test_more_items_than_the_world_holds_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(world, "MAX_DRAFTS", 300)
    with pytest.raises(BadQuery, match="fewer items"):
        evaluation_set("demo-epalm-vqa", 0, 1000)


@pytest.mark.parametrize("name", VQA)
def test_no_evaluation_question_is_asked_of_a_training_scene(name: str) -> None:
    asked = {(i.key, i.questions[0].question) for i in evaluation_of(name)}
    drafts = (draft(name, "train", 0, index) for index in range(1000))
    trained = {(made.key, question.question) for made in drafts for question in made.questions}
    assert not asked & trained


@pytest.mark.parametrize("name", VQA)
def test_guessing_without_looking_is_wrong_most_of_the_time(name: str) -> None:
    """The best blind guess is the most frequent answer to the kind of question."""
    right = sum(max(answers.values()) for answers in answers_by_kind(evaluation_of(name)).values())
    assert right / len(evaluation_of(name)) < 0.35


@pytest.mark.parametrize("name", VQA)
def test_a_training_item_holds_at_least_four_questions(name: str) -> None:
    assert min(len(draft(name, "train", 0, index).questions) for index in range(200)) >= 4


def test_existence_is_answered_yes_as_often_as_no() -> None:
    answers = Counter(
        asked.answer
        for index in range(100)
        for asked in draft("plain", "train", 0, index).questions
        if asked.kind == "existence"
    )
    assert answers["yes"] == answers["no"] == 100


def test_misleading_things_need_no_luck() -> None:
    lit = (Thing("star", "red", "top"), Thing("circle", "blue", "left"))
    pairs = {(t.shape, t.colour) for t in misleading_things(Random(0), lit)}
    assert pairs == {("star", "blue"), ("circle", "red")}


# --- words ------------------------------------------------------------------------------------------------


def test_vocabulary_lists_each_token_once_with_the_extra_tokens_last() -> None:
    tokens = vocabulary()
    assert len(set(tokens)) == len(tokens)
    assert tokens[:5] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    assert tokens[-2:] == ["[DEC]", "[ENC]"]


def test_tokenizer_knows_every_text(tmp_path: Path) -> None:
    build_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    assert len(tokenizer) == len(vocabulary())
    assert tokenizer.bos_token == "[DEC]"
    assert tokenizer.convert_tokens_to_ids(["[DEC]", "[ENC]"]) == [len(tokenizer) - 2, len(tokenizer) - 1]
    texts = {text for name in DRAWN for index in range(200) for text in texts_of(draft(name, "train", 2, index))}
    texts |= {answer for name in DRAWN for answer in WORLDS[name].answers}
    encoded = tokenizer(sorted(texts)).input_ids
    assert all(tokenizer.unk_token_id not in ids for ids in encoded)
    assert max(map(len, encoded)) <= 48
    text = "is there an orange circle ?"
    assert tokenizer.decode(tokenizer(text.upper()).input_ids, skip_special_tokens=True) in (
        text,
        text.replace(" ?", "?"),
    )


@pytest.mark.parametrize("task", WORLDS.values(), ids=lambda task: task.name)
def test_declared_answers_are_the_answers_given(task: Task) -> None:
    given = {asked.answer for index in range(400) for asked in draft(task.name, "train", 0, index).questions}
    assert given == set(task.answers)


# --- files ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LIT)
def test_a_clip_sampled_uniformly_by_time_gives_its_frames_back(name: str, tmp_path: Path) -> None:
    for index in range(3):
        media = sample(name, "eval", 0, index).media
        write_clip(media, tmp_path / "clip.mp4")
        decoded, duration_s = sampled_uniformly(tmp_path / "clip.mp4")
        assert duration_s == pytest.approx(CLIP_LENGTH_S, abs=0.13)
        differences = np.abs(decoded.astype(int) - media.astype(int))
        assert differences.mean(axis=(1, 2, 3)).max() < 6
        assert np.percentile(differences.max(axis=-1), 99.5) < 40, "colours bled over the rims of the things"


def test_a_clip_of_another_length_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="8 frames"):
        write_clip(np.zeros((5, 64, 64, 3), np.uint8), tmp_path / "clip.mp4")


def test_a_picture_survives_its_file(tmp_path: Path) -> None:
    media = sample("demo-pattern-retrieval", "eval", 0, 0).media
    write_picture(media, tmp_path / "picture.png")
    assert np.array_equal(np.asarray(Image.open(tmp_path / "picture.png")), media)


# --- helpers: the scene read anew, by other means than the world's own -------------------------------------


def scene_of(made: Draft) -> Scene:
    return frame_of(made, 0)


def frame_of(made: Draft, beat: int) -> Scene:
    scene = made.content[beat]
    assert isinstance(scene, Scene)
    return scene


def chart_of(made: Draft) -> Chart:
    chart = made.content[0]
    assert isinstance(chart, Chart)
    return chart


def told_things(made: Draft) -> tuple[Thing, ...]:
    return frame_of(made, made.lit[0] if made.lit else 0).things


@cache
def evaluation_of(name: str) -> list[Item]:
    return evaluation_set(name, 0, 300)


def one_thing_drafts(n: int) -> list[Draft]:
    return [draft(PLAIN.name, "train", 5, index, max_objects=1) for index in range(n)]


def texts_of(made: Draft) -> list[str]:
    return [made.caption or "", *(a.question for a in made.questions), *(a.answer for a in made.questions)]


def answers_by_kind(items: list[Item]) -> dict[str, Counter[str]]:
    by_kind: dict[str, Counter[str]] = defaultdict(Counter)
    for item in items:
        by_kind[item.questions[0].kind][item.questions[0].answer] += 1
    return by_kind


def names_sketched(thing: Thing, caption: str) -> bool:
    colours, shapes = "|".join(SKETCH_COLOURS[thing.colour]), "|".join(SKETCH_SHAPES[thing.shape])
    places = "|".join(SKETCH_PLACES[thing.place])
    named = f"an? ({colours}) ({shapes})"
    return re.search(f"{named} ({places})|({places}) {named}", caption) is not None


def answer_by_search(question: str, things: tuple[Thing, ...]) -> set[str]:
    """Every answer the scene allows: the things matching each word of the question, asked for one property."""
    number_words = ("zero", "one", "two", "three", "four")
    if question.startswith("how many"):
        return {number_words[len(things)]}
    matching = [thing for thing in things if matches(question, thing)]
    if question.startswith("is there"):
        return {"yes" if matching else "no"}
    asked = {"what colour": "colour", "what shape": "shape", "what size": "size", "where is": "place"}
    field = next(name for start, name in asked.items() if question.startswith(start))
    assert len(matching) == 1, (question, things)
    return {getattr(thing, field) for thing in matching}


def matches(question: str, thing: Thing) -> bool:
    """Whether the thing has every shape, colour, size and place that the question names."""
    question = question.replace("when the light is on", "")
    place = re.search(r"object (?:at|in) the ([a-z ]+)\?", question)
    shapes = re.findall("circle|square|triangle|star|cross|diamond", question)
    colours = re.findall("red|orange|yellow|green|cyan|blue|purple|black", question)
    sizes = re.findall("big|small", question)
    return (
        (not place or place[1] == thing.place)
        and all(shape == thing.shape for shape in shapes)
        and all(colour == thing.colour for colour in colours)
        and all(size == thing.size for size in sizes)
    )


def answer_from_bars(question: str, bars: tuple[Bar, ...]) -> str:
    levels = [bar.level for bar in bars]
    assert len(set(levels)) == len(levels)
    return {
        "which bar is the tallest?": bars[int(np.argmax(levels))].colour,
        "which bar is the shortest?": bars[int(np.argmin(levels))].colour,
        "which bar is on the far left?": bars[0].colour,
        "which bar is on the far right?": bars[-1].colour,
        "how many bars are there?": {3: "three", 4: "four", 5: "five"}[len(bars)],
    }[question]


def coloured_pixels(media: Pixels) -> tuple[dict[str, float], dict[str, int]]:
    """Of each ink that fills 10 pixels or more: the mean column, and the topmost row."""
    columns, rows = {}, {}
    for colour, ink in INK.items():
        found = np.nonzero(np.abs(media.astype(int) - ink).sum(axis=2) < 12)
        if len(found[0]) >= 10:
            rows[colour], columns[colour] = int(found[0].min()), float(found[1].mean())
    return columns, rows


def sampled_uniformly(path: Path) -> tuple[Pixels, float]:
    """The frame on show at the middle of each eighth of the clip, at 64 px, and the clip's length in seconds."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert stream.duration is not None
        assert stream.time_base is not None
        duration_s = float(stream.duration * stream.time_base)
        shown = [
            (frame.time or 0.0, Image.fromarray(frame.to_ndarray(format="rgb24"))) for frame in container.decode(stream)
        ]
    picked = []
    for beat in range(NUM_BEATS):
        middle_s = (beat + 0.5) * duration_s / NUM_BEATS
        image = max((entry for entry in shown if entry[0] <= middle_s + 1e-6), key=lambda entry: entry[0])[1]
        picked.append(np.asarray(image.resize((64, 64), Image.Resampling.BICUBIC)))
    return np.stack(picked), duration_s
