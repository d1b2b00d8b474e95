"""Which adapter the next request is for, and when it comes: popularity decides what a cache of adapters is worth.

identical   everybody asks for one
uniform     all alike
zipf        the i-th most popular is asked for 1 / i^s as often as the first
distinct    one after the other: no two in a row alike, the worst case for a cache
"""

import itertools
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, TypeVar, get_args

Popularity = Literal["identical", "uniform", "zipf", "distinct"]
POPULARITIES: tuple[Popularity, ...] = get_args(Popularity)

T = TypeVar("T")


def shares(popularity: Popularity, num_choices: int, *, exponent: float = 1.0) -> list[float]:
    """The share of requests each choice gets, most popular first; they sum to 1."""
    if num_choices < 1:
        raise ValueError("there is nothing to choose from")
    match popularity:
        case "identical":
            weights = [1.0] + [0.0] * (num_choices - 1)
        case "uniform" | "distinct":
            weights = [1.0] * num_choices
        case "zipf":
            weights = [rank**-exponent for rank in range(1, num_choices + 1)]
    total = sum(weights)
    return [weight / total for weight in weights]


def picks(popularity: Popularity, choices: Sequence[T], *, seed: int, exponent: float = 1.0) -> Iterator[T]:
    """Choices without end, the same ones for the same seed. `distinct` starts at a place the seed decides."""
    weights = shares(popularity, len(choices), exponent=exponent)
    chance = random.Random(seed)
    if popularity == "distinct":
        start = chance.randrange(len(choices))
        return itertools.islice(itertools.cycle(choices), start, None)
    return (chance.choices(choices, weights)[0] for _ in itertools.repeat(None))


def arrivals(rates: Mapping[T, float], *, seconds: float, seed: int) -> list[tuple[float, T]]:
    """Poisson arrivals of each choice at its rate a second, in order of their time, seconds from the start.

    When a choice's requests come does not depend on which other choices there are.
    """
    found = []
    for choice, rate in rates.items():
        chance = random.Random(f"{seed} {choice}")
        due_s = chance.expovariate(rate)
        while due_s < seconds:
            found.append((due_s, choice))
            due_s += chance.expovariate(rate)
    return sorted(found, key=lambda arrival: arrival[0])
