"""CIDEr-D against figures of the scorer that its authors published (COCO caption evaluation, sigma 6)."""

from random import Random

import pytest

from service.demo.cider import cider

WORDS = ["a", "red", "big", "circle", "star", "at", "the", "top", "left", "and", "blue", "moves"]


def random_captions() -> tuple[list[str], list[str]]:
    """50 references of up to 12 words, and captions that resemble them; some hold a word of no reference."""
    rng = Random(0)
    references = [" ".join(rng.choice(WORDS) for _ in range(rng.randint(3, 12))) for _ in range(50)]
    captions = [
        " ".join(
            word if rng.random() < 0.8 else rng.choice([*WORDS, "zebra"]) for word in text.split()[: rng.randint(2, 12)]
        )
        for text in references
    ]
    return captions, references


def test_scores_are_those_of_the_published_scorer() -> None:
    captions, references = random_captions()
    assert cider(captions, references) == pytest.approx(4.200356471039785, rel=1e-12)


def test_a_caption_that_says_it_all_scores_10_and_one_that_says_nothing_0() -> None:
    references = ["a big red circle at the top", "a small blue star at the left", "two green squares down below here"]
    assert cider(references, references) == pytest.approx(10.0)
    assert cider(["zebra"] * 3, references) == 0.0
    assert cider([""] * 3, references) == 0.0
