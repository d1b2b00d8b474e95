"""How near captions come to their references, by CIDEr-D.

Source: Vedantam et al., "CIDEr: Consensus-based Image Description Evaluation" (2015), section 5; tf-idf vectors of n-grams
up to 4 words, clipped to the reference, with a Gaussian penalty on the difference in length. Each medium has one reference.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence

MAX_N = 4
SIGMA = 6.0
SCALE = 10.0

Grams = Counter[tuple[str, ...]]


def cider(captions: Sequence[str], references: Sequence[str]) -> float:
    """The mean CIDEr-D of captions, each with its reference; 10 is the most.

    Rare n-grams weigh more, by the number of references that hold them: a score depends on all references. Of fewer than
    two it says nothing.
    """
    told = [_grams(reference) for reference in references]
    num_holding = Counter(gram for grams in told for sizes in grams for gram in sizes)
    log_num = math.log(len(references))
    weights = {gram: log_num - math.log(holding) for gram, holding in num_holding.items()}
    scores = [
        _similarity(_grams(caption), grams, weights, log_num) for caption, grams in zip(captions, told, strict=True)
    ]
    return sum(scores) / len(scores)


def _grams(text: str) -> list[Grams]:
    """The n-grams of a text, for each n."""
    words = text.split()
    return [Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1)) for n in range(1, MAX_N + 1)]


def _similarity(
    caption: Sequence[Grams], reference: Sequence[Grams], weights: Mapping[tuple[str, ...], float], unseen: float
) -> float:
    difference = caption[0].total() - reference[0].total()
    penalty = math.exp(-(difference**2) / (2 * SIGMA**2))
    return SCALE * penalty * sum(map(_cosine, caption, reference, [weights] * MAX_N, [unseen] * MAX_N)) / MAX_N


def _cosine(caption: Grams, reference: Grams, weights: Mapping[tuple[str, ...], float], unseen: float) -> float:
    """Of the tf-idf vectors of the n-grams of one size, the caption's clipped to the reference's."""
    a = {gram: count * weights.get(gram, unseen) for gram, count in caption.items()}
    b = {gram: count * weights[gram] for gram, count in reference.items()}
    lengths = math.sqrt(sum(x * x for x in a.values())) * math.sqrt(sum(x * x for x in b.values()))
    if not lengths:
        return 0.0
    return sum(min(a[gram], b[gram]) * b[gram] for gram in a.keys() & b.keys()) / lengths
