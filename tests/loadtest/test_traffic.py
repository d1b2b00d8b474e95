from collections import Counter
from itertools import islice, pairwise

import pytest

from loadtest.traffic import POPULARITIES, Popularity, arrivals, picks, shares

CHOICES = [f"adapter-{i}" for i in range(8)]


def sample(popularity: Popularity, count: int = 8000, *, seed: int = 0, exponent: float = 1.0) -> list[str]:
    return list(islice(picks(popularity, CHOICES, seed=seed, exponent=exponent), count))


@pytest.mark.parametrize("popularity", POPULARITIES)
@pytest.mark.parametrize("num_choices", [1, 2, 50])
def test_shares_sum_to_one_and_never_rise(popularity: Popularity, num_choices: int) -> None:
    parts = shares(popularity, num_choices)
    assert len(parts) == num_choices and sum(parts) == pytest.approx(1)
    assert parts == sorted(parts, reverse=True)


def test_zipf_falls_with_the_rank() -> None:
    parts = shares("zipf", 4, exponent=2.0)
    assert [parts[0] / part for part in parts] == pytest.approx([1, 4, 9, 16])


@pytest.mark.parametrize("popularity", ["uniform", "zipf"])
def test_picks_come_in_their_shares(popularity: Popularity) -> None:
    counts = Counter(sample(popularity))
    for choice, share in zip(CHOICES, shares(popularity, len(CHOICES)), strict=True):
        assert counts[choice] / 8000 == pytest.approx(share, abs=0.02)


def test_identical_is_always_the_first() -> None:
    assert set(sample("identical")) == {CHOICES[0]}


def test_distinct_goes_round_and_never_repeats() -> None:
    picked = sample("distinct", 24)
    assert all(first != second for first, second in pairwise(picked))
    assert set(Counter(picked).values()) == {3}


@pytest.mark.parametrize("popularity", POPULARITIES)
def test_a_seed_gives_the_same_picks(popularity: Popularity) -> None:
    assert sample(popularity, 50, seed=3) == sample(popularity, 50, seed=3)


def test_seeds_differ() -> None:
    assert sample("zipf", 50, seed=1) != sample("zipf", 50, seed=2)


@pytest.mark.parametrize("popularity", POPULARITIES)
def test_nothing_to_choose_from_is_an_error(popularity: Popularity) -> None:
    with pytest.raises(ValueError, match="nothing"):
        picks(popularity, [], seed=0)


def test_arrivals_come_at_their_rates_in_order() -> None:
    found = arrivals({"a": 30.0, "b": 3.0}, seconds=100.0, seed=0)
    times = [due_s for due_s, _ in found]
    assert times == sorted(times) and times[0] >= 0 and times[-1] < 100
    counts = Counter(choice for _, choice in found)
    assert counts["a"] == pytest.approx(3000, rel=0.1) and counts["b"] == pytest.approx(300, rel=0.2)


def test_who_else_comes_moves_nobody_s_arrivals() -> None:
    both = arrivals({"a": 5.0, "b": 50.0}, seconds=10.0, seed=1)
    assert [one for one in both if one[1] == "a"] == arrivals({"a": 5.0}, seconds=10.0, seed=1)
    assert arrivals({"a": 5.0}, seconds=10.0, seed=1) != arrivals({"a": 5.0}, seconds=10.0, seed=2)
