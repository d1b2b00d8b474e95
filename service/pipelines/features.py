"""What encoders make of media: kept within a budget of bytes, and made once for all who wait for it together.

A key stands for everything that decides the states: where the bytes come from and their digest, how they are prepared,
and whose weights look at them. Whoever can name a key could have the states made, so nobody gets what is not theirs.
"""

import asyncio
import hashlib
import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Coroutine
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, Generic, Literal, Protocol, TypeVar

from service.metrics import Metrics
from service.types import RequestContext


class Sized(Protocol):
    """What takes memory, and always as much."""

    @property
    def num_bytes(self) -> int:
        """How much."""


S = TypeVar("S", bound=Sized)
Place = tuple[str, str, bool]  # key; client and lane, whose turn is waited for
Outcome = Literal["hit", "joined", "miss"]
Make = Callable[[RequestContext], Coroutine[Any, Any, S]]


def cache_key(*parts: str) -> str:
    """A key made of parts, none of which holds a NUL; another one for other parts."""
    return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogateescape")).hexdigest()


class FeatureCache(Generic[S]):
    """The most recently used of what was put, within a budget of bytes. Thread-safe."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._entries: OrderedDict[str, S] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    @property
    def num_bytes(self) -> int:
        """Bytes of all that is kept."""
        return self._bytes

    def get(self, key: str) -> S | None:
        """What is kept under a key; that is a use."""
        with self._lock:
            seen = self._entries.get(key)
            if seen is not None:
                self._entries.move_to_end(key)
            return seen

    def put(self, key: str, seen: S) -> None:
        """Keep something in place of what the key had. What alone is over the budget is not kept."""
        with self._lock:
            before = self._entries.pop(key, None)
            if before is not None:
                self._bytes -= before.num_bytes
            if seen.num_bytes > self.max_bytes:
                return
            self._entries[key] = seen
            self._bytes += seen.num_bytes
            while self._bytes > self.max_bytes:
                _, dropped = self._entries.popitem(last=False)
                self._bytes -= dropped.num_bytes


class _Flight(Generic[S]):
    """States in the making, and how many wait for them."""

    def __init__(self, work: Coroutine[Any, Any, S]) -> None:
        self.num_waiting = 0
        self.task = asyncio.create_task(work)
        self.task.add_done_callback(lambda done: done.cancelled() or done.exception())  # who left does not look


class Features(Generic[S]):
    """The states of one backbone's media: what is kept of them, and what is in the making. For the event loop.

    A budget of 0 turns both off: nothing is kept and nothing shared.
    """

    def __init__(self, max_bytes: int, metrics: Metrics, backbone: str) -> None:
        self._cache: FeatureCache[S] = FeatureCache(max_bytes)
        self._flights: dict[Place, _Flight[S]] = {}
        self._metrics = metrics
        self._backbone = backbone
        metrics.feature_cache_bytes.labels(backbone).set_function(lambda: self._cache.num_bytes)

    @property
    def is_on(self) -> bool:
        """Whether anything is kept and shared."""
        return self._cache.max_bytes > 0

    def kept(self, key: str) -> S | None:
        """What is kept under a key; who holds on to it has it whatever makes room meanwhile."""
        return self._cache.get(key)

    def count(self, outcome: Outcome) -> None:
        """Note how a request came by its states: they were kept, others waited for them already, or it began to make them."""
        self._metrics.feature_lookups.labels(self._backbone, outcome).inc()

    async def get(self, key: str, make: Make[S], context: RequestContext) -> S:
        """What is kept under a key; else what `make` makes, once for all requests of a client that wait for it together.

        It is made as if for the request that came first, and goes on while anybody waits, whoever leaves and whenever the
        first one's deadline is: `make` gets no deadline, and the caller sees to its own. An error goes to all who wait, and
        is not kept. Requests of other clients do not wait for it: its turn may be far, behind all that its client queued.
        """
        found = self._cache.get(key)
        if found is not None:
            self.count("hit")
            return found
        place = (key, context.client, context.background)
        flight = self._flights.get(place)
        if flight is None or flight.task.done():
            flight = self._flights[place] = _Flight(self._made(key, make, replace(context, deadline=math.inf)))
        is_first = flight.num_waiting == 0
        self.count("miss" if is_first else "joined")
        flight.num_waiting += 1
        try:
            with nullcontext() if is_first else self._metrics.stage("join", context):
                return await asyncio.shield(flight.task)
        finally:
            flight.num_waiting -= 1
            if flight.num_waiting == 0:
                await self._end(place, flight)

    async def _made(self, key: str, make: Make[S], context: RequestContext) -> S:
        made = await make(context)
        self._cache.put(key, made)
        return made

    async def _end(self, place: Place, flight: _Flight[S]) -> None:
        """Nobody waits any more: take the flight away, and its work back if there is any left."""
        if self._flights.get(place) is flight:
            del self._flights[place]
        if not flight.task.done():
            flight.task.cancel()
            await asyncio.wait({flight.task})
