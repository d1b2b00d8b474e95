import asyncio
import itertools
import math
import time

import pytest

from loadtest.bench.loops import closed_loop, open_loop, percentile


@pytest.mark.parametrize("share, value", [(0.5, 2.0), (0.75, 3.0), (0.76, 4.0), (1.0, 4.0), (0.0, 1.0)])
def test_a_percentile_is_one_of_the_values(share: float, value: float) -> None:
    assert percentile([4.0, 1.0, 3.0, 2.0], share) == value
    assert math.isnan(percentile([], share))


def test_a_closed_loop_keeps_its_number_in_flight_and_counts_none_of_the_beginning() -> None:
    in_flight, most, sent = 0, 0, 0

    async def ask(choice: int) -> None:
        nonlocal in_flight, most, sent
        sent, in_flight = sent + 1, in_flight + 1
        most = max(most, in_flight)
        try:
            await asyncio.sleep(0.5 if choice < 4 else 0.005)
        finally:
            in_flight -= 1

    done = asyncio.run(closed_loop(ask, itertools.count(), in_flight=4, num_requests=40, num_warm=4))
    assert most == 4 and 45 <= sent <= 49
    assert len(done.latencies_s) == 40 and max(done.latencies_s) < 0.4
    assert done.per_s == pytest.approx(40 / done.seconds)


def test_an_error_ends_a_closed_loop() -> None:
    async def ask(choice: int) -> None:
        if choice == 3:
            raise ValueError("no answer")
        await asyncio.sleep(0.001)

    with pytest.raises(ExceptionGroup, match="unhandled"):
        asyncio.run(closed_loop(ask, itertools.count(), in_flight=2, num_requests=10))


def test_an_open_loop_sends_when_it_is_due_and_counts_from_then() -> None:
    async def ask(choice: str) -> None:
        if choice == "blocking":
            time.sleep(0.05)

    answered = asyncio.run(open_loop(ask, [(0.0, "quick"), (0.02, "blocking"), (0.03, "late")]))
    by_choice = {one.choice: one for one in answered}
    assert by_choice["quick"].latency_s < 1
    assert by_choice["late"].latency_s >= by_choice["late"].lag_s > 0.03


def test_an_open_loop_waits_for_no_others() -> None:
    async def ask(choice: str) -> None:
        await asyncio.sleep(60 if choice == "hot" else 0.01)

    answered = asyncio.run(open_loop(ask, [(0.0, "hot"), (0.0, "cold")], is_awaited=lambda choice: choice == "cold"))
    assert {one.choice: math.isfinite(one.latency_s) for one in answered} == {"hot": False, "cold": True}
