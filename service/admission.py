"""Who may come in: a request takes one permit for its estimated device cost and its bytes before anything is decoded.

The budget is in seconds of device time: estimated operations divided by the speed measured while serving. Stages of a
request inherit its permit, so permits never nest and cannot deadlock.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from service.errors import NotReady, Overloaded, TooLarge
from service.metrics import Metrics

INITIAL_FLOPS = 2e10  # operations per second assumed until a batch has been measured
SMOOTHING = 0.2


class Admission:
    """The budget at the door. Called from the event loop and, for measurements, from the device thread."""

    def __init__(self, *, max_queue_seconds: float, max_bytes: int, metrics: Metrics) -> None:
        self.max_queue_seconds = max_queue_seconds
        self.max_bytes = max_bytes
        self._metrics = metrics
        self._lock = threading.Lock()
        self._flops = INITIAL_FLOPS
        self._cost = 0.0
        self._bytes = 0
        self._num_permits = 0
        self._is_open = True

    @property
    def flops(self) -> float:
        """Measured operations per second."""
        return self._flops

    def measured(self, cost: float, seconds: float) -> None:
        """A batch of that cost took so long."""
        if cost > 0 and seconds > 0:
            with self._lock:
                self._flops += SMOOTHING * (cost / seconds - self._flops)

    @contextmanager
    def permit(self, cost: float, num_bytes: int = 0) -> Iterator[None]:
        """Hold a share of the budget for the length of a request.

        A request that costs more than the whole budget is still admitted when nothing else is in, unless its bytes
        alone are too many: its cost is an estimate, and refusing it for ever would depend on a guess.
        Raises: Overloaded with the time until enough of the budget is free; TooLarge; NotReady while draining.
        """
        self._enter(cost, num_bytes)
        try:
            yield
        finally:
            with self._lock:
                self._bytes -= num_bytes
                self._num_permits -= 1
                self._cost = (
                    self._cost - cost if self._num_permits else 0.0
                )  # no rounding error outlives a quiet moment
                self._report()

    def _enter(self, cost: float, num_bytes: int) -> None:
        with self._lock:
            if not self._is_open:
                self._metrics.refused.labels("draining").inc()
                raise NotReady("the server is shutting down")
            if num_bytes > self.max_bytes:
                self._metrics.refused.labels("too_large").inc()
                raise TooLarge(f"{num_bytes} bytes of media are above the limit of {self.max_bytes}")
            budget = self.max_queue_seconds * self._flops
            if self._num_permits and (self._cost + cost > budget or self._bytes + num_bytes > self.max_bytes):
                self._metrics.refused.labels("overloaded").inc()
                excess = max(self._cost + cost - budget, 0.1 * self._cost)
                raise Overloaded("no capacity for this request now", retry_after_s=max(0.1, excess / self._flops))
            self._cost += cost
            self._bytes += num_bytes
            self._num_permits += 1
            self._report()

    def _report(self) -> None:
        self._metrics.admitted_cost.set(self._cost / (self.max_queue_seconds * self._flops))

    @property
    def num_permits(self) -> int:
        """Requests that are in."""
        return self._num_permits

    def close(self) -> None:
        """Admit nobody any more; who is in may finish."""
        self._is_open = False
