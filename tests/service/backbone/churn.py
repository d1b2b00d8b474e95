"""Texts that come in between words, some at a time, are put in another order, and leave when they are done."""

import random
from collections.abc import Callable, Hashable, Sequence
from itertools import groupby, islice
from typing import TypeVar

import pytest

from service.backbone.decoding import Writing
from service.types import GenerateOutput

T = TypeVar("T")
NEAR_TIE = 1e-4


def write_with_comings_and_goings(
    texts: Sequence[T], begin: Callable[[Sequence[T]], Writing], alike: Callable[[T], Hashable], seed: int
) -> list[GenerateOutput]:
    """What comes of each text. Those that are begun in one go are `alike`. Some have written a word before they join others."""
    choice, found = random.Random(seed), dict[int, GenerateOutput]()
    waiting, numbers = list(enumerate(texts)), list[int]()  # who is to come, and who is here
    writing: Writing | None = None
    while waiting or numbers:
        if waiting and (not numbers or choice.random() < 0.5):
            _, same = next(groupby(waiting, key=lambda pair: alike(pair[1])))
            coming = list(islice(same, choice.randint(1, 4)))
            waiting = waiting[len(coming) :]
            begun = begin([text for _, text in coming])
            if choice.random() < 0.5:
                ended = dict(begun.choose())
                found |= {coming[place][0]: output for place, output in ended.items()}
                coming = [pair for place, pair in enumerate(coming) if place not in ended]
                if not coming:
                    continue
                begun.step()
            if writing is None or not numbers:
                writing, numbers = begun, [number for number, _ in coming]
            else:
                assert writing.can_join(begun)
                writing.join(begun)
                numbers += [number for number, _ in coming]
                if choice.random() < 0.5:
                    order = choice.sample(range(len(numbers)), len(numbers))
                    writing.reorder(order)
                    numbers = [numbers[place] for place in order]
        assert writing is not None
        ended = dict(writing.choose())
        found |= {numbers[place]: output for place, output in ended.items()}
        numbers = [number for place, number in enumerate(numbers) if place not in ended]
        if numbers:
            writing.step()
    return [found[number] for number in range(len(texts))]


def assert_same(found: GenerateOutput, wanted: GenerateOutput) -> None:
    """The same texts and scores, up to rounding; where two were as good, either."""
    if [one.ids for one in found.hypotheses] != [one.ids for one in wanted.hypotheses]:
        assert wanted.gap < NEAR_TIE
        return
    scores = [one.score for one in wanted.hypotheses]
    assert [one.score for one in found.hypotheses] == pytest.approx(scores, abs=1e-4)
