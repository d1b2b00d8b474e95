"""When newcomers wait for company: only where it is likely, and never for longer than letting them in costs."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.engine.newcomers import MAX_HELD_S, MAX_KINDS, MEMORY_S, Newcomers, Price

KIND = "greedy"


def newcomers(fixed_s: float, per_s: float, now: float = 0.0) -> Newcomers:
    """To which so many came a second, and for whom coming in has that price."""
    known = Newcomers()
    for work in (1.0, 2.0):
        known.price.learn(work, fixed_s + 0.01 * work)
    known._arrivals[KIND] = (1.0 + MEMORY_S * per_s, now)
    assert known.price.fixed_s == pytest.approx(fixed_s) and known.per_s(KIND, now) == pytest.approx(per_s)
    return known


def test_the_price_is_what_does_not_grow_with_the_work() -> None:
    price = Price()
    assert price.fixed_s == 0.0, "nothing was seen"
    for _ in range(5):
        price.learn(3.0, 0.7)
        assert price.fixed_s == 0.0, "all of it may grow with the work"
    for work in (1.0, 2.0, 6.0):
        price.learn(work, 0.1 + 0.2 * work)
    assert price.fixed_s == pytest.approx(0.1)


def test_the_price_follows_what_came_last() -> None:
    price = Price()
    for number in range(400):
        fixed = 0.5 if number < 200 else 0.1
        price.learn(1.0 + number % 7, fixed + 0.02 * (1 + number % 7))
    assert price.fixed_s == pytest.approx(0.1, rel=0.01)


@given(st.lists(st.tuples(st.floats(1.0, 1e12), st.floats(0.0, 10.0)), min_size=1, max_size=30))
def test_the_price_is_a_part_of_the_time_whatever_was_seen(seen: list[tuple[float, float]]) -> None:
    price = Price()
    for work, seconds in seen:
        price.learn(work, seconds)
    assert 0.0 <= price.fixed_s <= max(seconds for _, seconds in seen) * (1 + 1e-9)


def test_arrivals_are_counted_and_forgotten() -> None:
    known = Newcomers()
    for number in range(1000):
        known.arrived(KIND, number * 0.1)
    assert known.per_s(KIND, 100.0) == pytest.approx(10.0, rel=0.1)
    assert known.per_s(KIND, 100.0 + 10 * MEMORY_S) == 0.0
    assert known.per_s("another kind", 100.0) == 0.0
    for number in range(1000):
        known.arrived(number, 200.0 + number)
    assert len(known._arrivals) <= MAX_KINDS


def test_where_few_come_nobody_waits() -> None:
    """One a second; the next is not here before those who are being written have lost less than a newcomer would."""
    known = newcomers(fixed_s=0.1, per_s=1.0)
    assert not known.should_wait(KIND, 0.0, num_writing=3, num_waiting=1, waited_s=0.0)


def test_where_many_come_they_wait_until_they_have_lost_what_the_others_would() -> None:
    known = newcomers(fixed_s=0.1, per_s=20.0)
    assert known.should_wait(KIND, 0.0, num_writing=10, num_waiting=4, waited_s=0.99)
    assert not known.should_wait(KIND, 0.0, num_writing=10, num_waiting=4, waited_s=1.01)
    assert not known.should_wait(KIND, 0.0, num_writing=10, num_waiting=21, waited_s=0.0), (
        "as many as will come in the meantime"
    )
    assert known.should_wait(KIND, 0.0, num_writing=100, num_waiting=3, waited_s=2.9 * MAX_HELD_S)
    assert not known.should_wait(KIND, 0.0, num_writing=100, num_waiting=3, waited_s=3 * MAX_HELD_S)


def test_nobody_waits_for_nothing() -> None:
    assert not newcomers(0.0, 1000.0).should_wait(KIND, 0.0, num_writing=50, num_waiting=1, waited_s=0.0)
    assert not newcomers(5.0, 1000.0).should_wait(KIND, 0.0, num_writing=0, num_waiting=1, waited_s=0.0)
    assert not Newcomers().should_wait(KIND, 0.0, num_writing=50, num_waiting=1, waited_s=0.0), "nothing was learnt yet"


def test_whoever_is_the_only_one_of_its_kind_does_not_wait() -> None:
    known = newcomers(fixed_s=0.1, per_s=50.0)
    known.arrived("alone", 0.0)
    assert not known.should_wait("alone", 0.0, num_writing=30, num_waiting=1, waited_s=0.0)


def test_what_they_waited_for_room_does_not_count() -> None:
    """In a backlog all have waited for long; what counts is how long there has been room for those who could come."""
    known = newcomers(fixed_s=0.1, per_s=20.0)
    assert not known.should_wait(KIND, 10.0, num_writing=10, num_waiting=2, waited_s=20.0)
    known._arrivals[KIND] = (40.0, 10.0)
    known.let_in(9.9, 1.5, 0.115)
    assert known.should_wait(KIND, 10.0, num_writing=10, num_waiting=2, waited_s=20.0)
    assert not known.should_wait(KIND, 10.41, num_writing=10, num_waiting=2, waited_s=20.0)


def simulate(
    arrivals: list[float], *, holds: bool, word_s: float = 0.05, fixed_s: float = 0.1, each_s: float = 0.01
) -> float:
    """Seconds that all requests take together, of five words each, where those who come hold up the others."""
    known = newcomers(fixed_s, per_s=0.0)
    now, total, waiting, writing = 0.0, 0.0, list[float](), list[tuple[float, int]]()
    coming = sorted(arrivals)
    while coming or waiting or writing:
        if not waiting and not writing:
            now = max(now, coming[0])
        while coming and coming[0] <= now:
            known.arrived(KIND, coming[0])
            waiting.append(coming.pop(0))
        waited_s = sum(now - came for came in waiting)
        sizes = {"num_writing": len(writing), "num_waiting": len(waiting)}
        if waiting and not (holds and known.should_wait(KIND, now, waited_s=waited_s, **sizes)):
            now += fixed_s + each_s * len(waiting)
            writing += [(came, 5) for came in waiting]
            waiting = []
        now += word_s
        total += sum(now - came for came, left in writing if left == 1)
        writing = [(came, left - 1) for came, left in writing if left > 1]
    return total


def test_waiting_for_company_saves_time_under_load_and_costs_none_without() -> None:
    under_load = [0.03 * number for number in range(300)]
    assert simulate(under_load, holds=True) < 0.9 * simulate(under_load, holds=False)
    few = [2.0 * number for number in range(50)]
    assert simulate(few, holds=True) == pytest.approx(simulate(few, holds=False))
