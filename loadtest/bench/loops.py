"""Requests that follow one another, and requests that come at their time whatever became of the last.

closed   so many are in flight, and each is followed by the next as soon as it is answered: how much gets through
open     each is sent when it is due: how long answers take, counted from then, so that a slow server is not spared
"""

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")

Ask = Callable[[T], Awaitable[object]]
"""Sends a request for a choice, and returns when it is answered."""


@dataclass(frozen=True)
class Answered(Generic[T]):
    """One request: for which choice, when it was due, sent and answered (seconds; infinity: nobody waited any longer)."""

    choice: T
    due_at: float
    sent_at: float
    ended_at: float

    @property
    def latency_s(self) -> float:
        """From when it was due to its answer."""
        return self.ended_at - self.due_at

    @property
    def lag_s(self) -> float:
        """How late it was sent: what the generator, not the server, is to blame for."""
        return self.sent_at - self.due_at


@dataclass(frozen=True)
class Throughput:
    """A stretch of a closed loop: how long it took, and how long each answer did, seconds."""

    seconds: float
    latencies_s: tuple[float, ...]

    @property
    def per_s(self) -> float:
        """Answers a second."""
        return len(self.latencies_s) / self.seconds


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least a share of the values do not exceed; NaN for none."""
    if not values:
        return math.nan
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


async def closed_loop(
    ask: Ask[T], choices: Iterator[T], *, in_flight: int, num_requests: int, num_warm: int = 1
) -> Throughput:
    """Keep so many requests in flight; measured are `num_requests` answers after the first `num_warm`.

    Requests go on being sent until the last of them is in, so neither the beginning nor the end is counted.
    """
    ended: list[tuple[float, float]] = []  # when, and after how long
    enough = asyncio.Event()

    async def user() -> None:
        while True:
            sent_at = time.perf_counter()
            await ask(next(choices))
            ended_at = time.perf_counter()
            ended.append((ended_at, ended_at - sent_at))
            if len(ended) == num_warm + num_requests:
                enough.set()

    async with asyncio.TaskGroup() as group:
        users = [group.create_task(user()) for _ in range(in_flight)]
        await enough.wait()
        for task in users:
            task.cancel()
    await ask(next(choices))  # behind what is still under way, so that nothing of it is left for who measures next
    measured = ended[num_warm : num_warm + num_requests]
    return Throughput(measured[-1][0] - ended[num_warm - 1][0], tuple(latency for _, latency in measured))


async def open_loop(
    ask: Ask[T], arrivals: Iterable[tuple[float, T]], *, is_awaited: Callable[[T], bool] = lambda choice: True
) -> list[Answered[T]]:
    """Send each request at its time (seconds from now, ascending); when those that are awaited are answered, it is over.

    The others are cancelled then, and their end is infinity.
    """
    start = time.perf_counter()
    answered: list[Answered[T]] = []

    async def one(choice: T, due_at: float) -> None:
        sent_at, ended_at = time.perf_counter(), math.inf
        try:
            await ask(choice)
            ended_at = time.perf_counter()
        finally:
            answered.append(Answered(choice, due_at, sent_at, ended_at))

    async with asyncio.TaskGroup() as group:
        awaited: list[asyncio.Task[None]] = []
        others: list[asyncio.Task[None]] = []
        for due_s, choice in arrivals:
            await asyncio.sleep(max(0.0, start + due_s - time.perf_counter()))
            task = group.create_task(one(choice, start + due_s))
            (awaited if is_awaited(choice) else others).append(task)
        if awaited:
            await asyncio.wait(awaited)
        for task in others:
            task.cancel()
    return answered
