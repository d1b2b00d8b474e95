"""Batches: who is in them, and when they are made."""

import threading
from collections import Counter

import pytest

from service.train.batches import Ahead, Plan, padded


def test_every_epoch_sees_every_example_once_in_an_order_of_its_own() -> None:
    plan = Plan(10, 4, seed=3)
    assert plan.steps_per_epoch == 3
    seen = [row for step in range(5) for row in plan.rows(step)]
    first, second = seen[:10], seen[10:]
    assert sorted(first) == sorted(second) == list(range(10)) and first != second
    again = [row for step in (4, 2, 0) for row in Plan(10, 4, seed=3).rows(step)]
    assert again == seen[16:] + seen[8:12] + seen[:4]
    assert Plan(10, 4, seed=4).rows(0) != plan.rows(0)
    assert Counter(Plan(3, 7, seed=0).rows(0)).most_common(1)[0][1] == 3  # a batch may be larger than an epoch


def test_one_batch_is_made_ahead_and_no_more() -> None:
    made: list[int] = []
    done = threading.Semaphore(0)

    def make(step: int) -> int:
        made.append(step)
        done.release()
        return 10 * step

    with Ahead(make, 3) as ahead:
        assert ahead(0) == 0
        assert done.acquire(timeout=5) and done.acquire(timeout=5)
        assert not done.acquire(timeout=0.05) and made == [0, 1]
        assert (ahead(1), ahead(2)) == (10, 20)
    assert made == [0, 1, 2]
    with Ahead(make, 9) as resumed:
        assert resumed(5) == 50


def test_an_error_surfaces_at_the_step_it_belongs_to() -> None:
    def make(step: int) -> int:
        if step == 1:
            raise ValueError("no such picture")
        return step

    with Ahead(make, 5) as ahead:
        assert ahead(0) == 0
        with pytest.raises(ValueError, match="no such picture"):
            ahead(1)


def test_texts_are_padded_to_the_longest() -> None:
    ids, mask = padded([(2, 5, 3), (2, 3)], pad=9)
    assert ids.tolist() == [[2, 5, 3], [2, 3, 9]]
    assert mask.tolist() == [[True, True, True], [True, True, False]]
