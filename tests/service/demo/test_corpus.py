"""What the demo's language model reads: true, and in words that its tokenizer knows."""

from pathlib import Path
from random import Random

import pytest

from service.backbone.base import load_tokenizer
from service.demo import corpus
from service.demo.corpus import ANSWER, END, clip_questions, condensed, few_things, list_text, picture_questions, text
from service.demo.motion import random_movers
from service.demo.vocabulary import build_language_tokenizer


def test_every_word_has_a_token_and_special_tokens_are_one_each(tmp_path: Path) -> None:
    build_language_tokenizer(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    rng = Random(7)
    for write in (text, list_text, _condensed) * 500:
        written = write(rng)
        ids = tokenizer(written, add_special_tokens=False)["input_ids"]
        assert tokenizer.unk_token_id not in ids, written
        assert ids.count(tokenizer.eos_token_id) == written.count(END)
        assert ids.count(tokenizer.convert_tokens_to_ids(ANSWER)) == written.count(ANSWER)
    assert tokenizer.eos_token_id == tokenizer.bos_token_id == 2 and tokenizer.pad_token_id == 1


def _condensed(rng: Random) -> str:
    return condensed(rng)[1]


@pytest.mark.parametrize("how", [{}, {"only_lists": True}, {"asked_alone": True}])
def test_who_knows_the_things_can_foresee_what_is_told_of_them(how: dict[str, bool]) -> None:
    rng = Random(5)
    words = {word for attribute in corpus.ATTRIBUTES for word in attribute.split()} - {"at", "the", "in", "moves"}
    for _ in range(400):
        known, told = condensed(rng, **how)
        assert 1 <= len(known) <= corpus.MAX_THINGS
        assert all(attribute in corpus.ATTRIBUTES for thing in known for attribute in thing)
        said = set(" ".join(attribute for thing in known for attribute in thing).split())
        assert told.count(ANSWER) <= (1 if "asked_alone" in how else corpus.MAX_QUESTIONS)
        assert set(told.replace("??", "").replace("?", "").split()) & words <= said, (known, told)


def test_words_and_answers_come_back_from_their_ids(tmp_path: Path) -> None:
    build_language_tokenizer(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    for answers in corpus.ANSWERS.values():
        for answer in answers:
            ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
            assert tokenizer.decode(ids, skip_special_tokens=True) == answer


def test_questions_about_a_picture_are_answered_by_what_is_in_it() -> None:
    rng = Random(3)
    for _ in range(200):
        things = few_things(rng)
        for asked in picture_questions(things, rng):
            if asked.kind == corpus.COUNT:
                assert asked.answer == {1: "one", 2: "two"}[len(things)]
                continue
            words = asked.question.removesuffix("?").split()
            [thing] = [t for t in things if t.shape in words or t.colour in words]
            assert asked.answer == getattr(thing, asked.kind)


def test_questions_about_a_clip_are_answered_by_what_moves() -> None:
    rng = Random(4)
    fields = {corpus.MOVING_SHAPE: "shape", corpus.MOVING_COLOUR: "colour"}
    for _ in range(200):
        movers = random_movers(rng)
        for asked in clip_questions(movers, rng):
            words = asked.question.removesuffix("?").split()
            named = [m for m in movers if {m.shape, m.colour, m.motion} & set(words)]
            assert len(named) == 1
            assert asked.answer == getattr(named[0], fields.get(asked.kind, asked.kind))


@pytest.mark.parametrize("seed", range(20))
def test_a_list_says_everything_three_times(seed: int) -> None:
    lines = list_text(Random(seed)).removeprefix(END).removesuffix(END).strip(" .").split(" . ")
    assert len(lines) in (9, 12, 15, 18)
    assert all(lines.count(line) == 3 for line in lines)
    assert len(set(lines[: len(lines) // 3])) == len(lines) // 3
